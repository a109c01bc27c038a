"""The queue of runs for a CPU: first come, first served, with dynamic batching.

A run that ends hands its slot to the request that waits longest. Where `BatchTrials` measured that batches pay, that
request leads a batch: requests behind with the same segment and shapes follow in the same run. Without a window a
request with a free slot never waits for followers.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from isthmus.admission import MemoryBudget
from isthmus.arrays import Array
from isthmus.context import Deadline
from isthmus.errors import DeadlineExceeded, RunFailed
from isthmus.runtime.batching import BatchTrials, ShapeTrial, leading_size, stacked
from isthmus.runtime.ort_runner import Runner


class QueuedOutputs(NamedTuple):
    """A run's outputs, the seconds of waiting and of running, and how many requests ran together."""

    outputs: dict[str, Array]
    wait_s: float
    run_s: float
    batch: int


@dataclass(eq=False)
class _QueuedRun:
    """A request in the queue; `trial` is None for a request that always runs alone."""

    deadline: Deadline
    runner: Runner | None = None
    arrays: Mapping[str, Array] = field(default_factory=dict)
    trial: ShapeTrial | None = None
    began: float = field(default_factory=time.perf_counter)
    # Set under the queue's lock: the entry leads with a slot, or follows in a batch.
    dequeued: bool = False
    followers: list[_QueuedRun] = field(default_factory=list)
    # Set with a slot or a result.
    ready: threading.Event = field(default_factory=threading.Event)
    result: QueuedOutputs | Exception | None = None

    @property
    def input_bytes(self) -> int:
        """Bytes of the inputs."""
        return sum(array.nbytes for array in self.arrays.values())


class RunQueue:
    """At most `slots` runs at a time.

    Units: `window_s` is how long a run with a free slot waits for followers, 0 for not at all. Copies of inputs for a
    batch count in `memory`.
    """

    def __init__(self, slots: int, trials: BatchTrials, memory: MemoryBudget, *, window_s: float = 0.0) -> None:
        self.memory = memory
        self._trials, self._window_s = trials, window_s
        self._slots = slots
        self._lock = threading.Lock()
        self._free = slots
        self._waiting: deque[_QueuedRun] = deque()
        # Leaders with a slot and an open window.
        self._gathering: dict[ShapeTrial, _QueuedRun] = {}

    @contextmanager
    def slot(self, deadline: Deadline) -> Iterator[None]:
        """Hold a slot for the block, after the requests in the queue.

        Raises:
            DeadlineExceeded: no slot was free in time.
        """
        entry = _QueuedRun(deadline)
        self._take_slot(entry)
        if isinstance(entry.result, Exception):
            raise entry.result
        try:
            yield
        finally:
            self._hand_on()

    def room_for_batches(self) -> int:
        """Requests at a time that fill every slot with a batch while another batch waits; 0 where no batch pays."""
        size = self._trials.max_size
        return (self._slots + 1) * size if size > 1 else 0

    def waiting(self) -> list[str]:
        """The segments that requests wait to run, longest wait first; empty for slots of no segment."""
        with self._lock:
            return [str(entry.runner.segment.id) if entry.runner else "" for entry in self._waiting]

    def run(self, runner: Runner, arrays: Mapping[str, Array], deadline: Deadline) -> QueuedOutputs:
        """Run a segment, alone or in a batch.

        Shapes: rows of a batch are cut apart again, so outputs are as those of a run alone, within
        `batching.tolerance`.

        Raises:
            DeadlineExceeded: no slot was free in time.
            SegmentError: as `Runner.run`, for these arrays alone.
        """
        entry = _QueuedRun(deadline, runner, arrays, self._trials.find(runner, arrays))
        self._take_slot(entry)
        if entry.result is None:
            # This thread owns a slot now, and the results of its followers.
            try:
                self._run_batch(entry, [entry, *entry.followers])
            finally:
                self._hand_on()
                for follower in entry.followers:
                    follower.ready.set()
        if not isinstance(entry.result, QueuedOutputs):
            raise entry.result or RunFailed("a run ended without a result", segment=runner.segment.id)
        return entry.result

    def _take_slot(self, entry: _QueuedRun) -> None:
        """Return once `entry` has a slot or a result."""
        with self._lock:
            if self._joins(entry):
                gathers = False
            elif self._free and not self._waiting:
                self._free -= 1
                entry.dequeued = True
                if not (gathers := self._gathers(entry)):
                    return
            else:
                gathers = False
                self._waiting.append(entry)
        if gathers:
            self._gather(entry)
            return
        if not entry.ready.wait(entry.deadline.remaining()):
            with self._lock:
                if not entry.dequeued:
                    self._waiting.remove(entry)
                    raise DeadlineExceeded("the deadline passed before a CPU was free to run the segment")
            # In a batch already: the leader sets the result.
            entry.ready.wait()

    def _hand_on(self) -> None:
        """Give the slot of this thread to the request that waits longest, with its followers."""
        with self._lock:
            while self._waiting:
                entry = self._waiting.popleft()
                entry.dequeued = True
                # Past its deadline: the request's own thread raises, and no run begins.
                if entry.deadline.remaining() <= 0:
                    entry.result = DeadlineExceeded("the deadline passed before a CPU was free to run the segment")
                    entry.ready.set()
                    continue
                entry.followers = self._companions(entry)
                entry.ready.set()
                return
            self._free += 1

    def _companions(self, entry: _QueuedRun) -> list[_QueuedRun]:
        """The followers of `entry`, removed from the queue."""
        if (trial := entry.trial) is None:
            return []
        same = [follower for follower in self._waiting if follower.trial is trial and follower.runner is entry.runner]
        if not same:
            return []
        self._trials.contended(trial, entry.runner, entry.arrays, self.slot)
        followers = same[: trial.largest([each.deadline.remaining() for each in (entry, *same)]) - 1]
        for follower in followers:
            follower.dequeued = True
            self._waiting.remove(follower)
        return followers

    def _joins(self, entry: _QueuedRun) -> bool:
        """Whether `entry` joined the batch of a leader with an open window."""
        if entry.trial is None or (leader := self._gathering.get(entry.trial)) is None:
            return False
        size = 2 + len(leader.followers)
        if leader.runner is not entry.runner or entry.deadline.remaining() <= self._window_s + entry.trial.seconds(
            size
        ):
            return False
        leader.followers.append(entry)
        entry.dequeued = True
        if size >= entry.trial.max_size:
            del self._gathering[entry.trial]
            leader.ready.set()
        return True

    def _gathers(self, entry: _QueuedRun) -> bool:
        """Whether `entry`, with a slot, opens a window for followers."""
        if not self._window_s or (trial := entry.trial) is None or trial.max_size < 2 or trial in self._gathering:
            return False
        if entry.deadline.remaining() <= self._window_s + trial.seconds(trial.max_size):
            return False
        self._gathering[trial] = entry
        return True

    def _gather(self, entry: _QueuedRun) -> None:
        """Wait for followers until the batch is full or the window is over."""
        entry.ready.wait(self._window_s)
        with self._lock:
            if entry.trial is not None and self._gathering.get(entry.trial) is entry:
                del self._gathering[entry.trial]

    def _run_batch(self, leader: _QueuedRun, entries: Sequence[_QueuedRun]) -> None:
        """Run the entries in batches of measured sizes; the rest, and the entries of a failed batch, alone."""
        runner, trial = leader.runner, leader.trial
        remaining = list(entries)
        while remaining and runner is not None:
            size = trial.fitting(len(remaining)) if trial is not None else 1
            together, remaining = remaining[:size], remaining[size:]
            if size > 1 and trial is not None and self._run_together(runner, together):
                self._trials.ran(size)
                continue
            for entry in together:
                _run_alone(runner, entry)
            if size > 1 and trial is not None:
                self._trials.fell_back(trial, size, all(isinstance(t.result, QueuedOutputs) for t in together))

    def _run_together(self, runner: Runner, entries: Sequence[_QueuedRun]) -> bool:
        needed = len(entries) * entries[0].input_bytes
        if not self.memory.reserve(needed):
            return False
        try:
            return _share_run(runner, entries)
        finally:
            self.memory.release(needed)


def _share_run(runner: Runner, entries: Sequence[_QueuedRun]) -> bool:
    """Whether the entries, of a single row each, have their results from a shared run."""
    started = time.perf_counter()
    try:
        outputs = runner.run(stacked([entry.arrays for entry in entries]))
    # Any error: alone, each request gets its own error, or succeeds.
    except Exception:
        return False
    if any(leading_size(array) != len(entries) for array in outputs.values()):
        return False
    run_s = time.perf_counter() - started
    for row, entry in enumerate(entries):
        # Copies: a view would keep all rows in memory until its own response is written.
        own = {name: array[row : row + 1].copy() for name, array in outputs.items()}
        entry.result = QueuedOutputs(own, started - entry.began, run_s, len(entries))
    return True


def _run_alone(runner: Runner, entry: _QueuedRun) -> None:
    started = time.perf_counter()
    try:
        entry.deadline.check(f"segment {runner.segment.id} ran")
        outputs = runner.run(entry.arrays)
    # Defects as well: an error is raised in the thread of its own request, not in the leader's.
    except Exception as e:
        entry.result = e
    else:
        entry.result = QueuedOutputs(outputs, started - entry.began, time.perf_counter() - started, 1)
