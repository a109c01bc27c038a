"""The queue of runs for a CPU: first come, first served, with dynamic batching.

A run that ends hands its slot to the work that waits longest. Work that may share its run leads a batch: work behind it
follows in the same run. Two kinds of work do: requests of a segment and shape where `BatchTrials` measured that batches
pay, and steps of sessions (`step_queue`). Without a window a request with a free slot never waits for followers.
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
class QueuedWork:
    """Work in the queue; by itself a request for a slot alone.

    `is_long` work, such as a chunk of a prompt, lets work that is `is_step` go before other long work.
    """

    deadline: Deadline
    segment: str = ""
    is_long: bool = False
    is_step: bool = False
    began: float = field(default_factory=time.perf_counter)
    # Set under the queue's lock: the entry leads with a slot, or follows in a batch.
    dequeued: bool = False
    followers: list[QueuedWork] = field(default_factory=list)
    # Set with a slot or a result.
    ready: threading.Event = field(default_factory=threading.Event)
    # Of a leader with a window: its seconds, and set once it has brought all the company that the leader takes.
    gathers_s: float = 0.0
    gathered: threading.Event = field(default_factory=threading.Event)
    result: QueuedOutputs | Exception | None = None

    def shares_with(self, other: QueuedWork) -> bool:
        """Whether the two may run together."""
        return False

    def company(self, others: Sequence[QueuedWork]) -> int:
        """How many of `others`, in the order of the queue, follow this work in its run."""
        return 0

    def window_s(self, *, has_waited: bool) -> float:
        """Seconds that this work, as a leader with a slot, waits for followers; under the queue's lock."""
        return 0.0

    def accepts(self, follower: QueuedWork) -> bool:
        """Whether a leader in its window takes a follower that arrives."""
        return False

    def is_complete(self) -> bool:
        """Whether no more followers are worth a wait."""
        return True

    def execute(self, entries: Sequence[QueuedWork]) -> None:
        """Run this work and its followers, and set the result of each."""


class RunQueue:
    """At most `slots` runs at a time.

    Units: `window_s` is how long a run with a free slot waits for followers, 0 for not at all. Copies of inputs for a
    batch count in `memory`.
    """

    def __init__(self, slots: int, trials: BatchTrials, memory: MemoryBudget, *, window_s: float = 0.0) -> None:
        self.memory = memory
        self.window_s = window_s
        self._trials = trials
        self._slots = slots
        self._lock = threading.Lock()
        self._free = slots
        self._waiting: deque[QueuedWork] = deque()
        # Leaders with a slot and an open window.
        self._gathering: list[QueuedWork] = []

    @contextmanager
    def slot(self, deadline: Deadline) -> Iterator[None]:
        """Hold a slot for the block, after the requests in the queue.

        Raises:
            DeadlineExceeded: no slot was free in time.
        """
        entry = QueuedWork(deadline)
        self._take_slot(entry)
        if isinstance(entry.result, Exception):
            raise entry.result
        try:
            yield
        finally:
            self._hand_on(entry)

    def room_for_batches(self, size: int = 1) -> int:
        """Requests at a time that fill every slot with a batch while another batch waits; 0 where no batch pays.

        `size` is that of the largest batch of other work than requests.
        """
        size = max(size, self._trials.max_size)
        return (self._slots + 1) * size if size > 1 else 0

    def waiting(self) -> list[str]:
        """The segments that requests wait to run, longest wait first; empty for slots of no segment."""
        with self._lock:
            return [entry.segment for entry in self._waiting]

    def run(self, runner: Runner, arrays: Mapping[str, Array], deadline: Deadline) -> QueuedOutputs:
        """Run a segment, alone or in a batch.

        Shapes: rows of a batch are cut apart again, so outputs are as those of a run alone, within
        `batching.tolerance`.

        Raises:
            DeadlineExceeded: no slot was free in time.
            SegmentError: as `Runner.run`, for these arrays alone.
        """
        trial = self._trials.find(runner, arrays)
        entry = _QueuedRun(
            deadline, str(runner.segment.id), runner=runner, arrays=arrays, trial=trial, trials=self._trials, queue=self
        )
        return self.perform(entry)

    def perform(self, entry: QueuedWork) -> QueuedOutputs:
        """Run work in its turn, alone or in a batch.

        Raises:
            DeadlineExceeded: no slot was free in time.
            As the work's own errors.
        """
        self._take_slot(entry)
        if entry.result is None:
            # This thread owns a slot now, and the results of its followers.
            try:
                self._gather(entry)
                entry.execute([entry, *entry.followers])
            finally:
                self._hand_on(entry)
                for follower in entry.followers:
                    follower.ready.set()
        if not isinstance(entry.result, QueuedOutputs):
            raise entry.result or RunFailed("a run ended without a result", segment=entry.segment)
        return entry.result

    def _take_slot(self, entry: QueuedWork) -> None:
        """Return once `entry` has a slot or a result."""
        with self._lock:
            if not self._joins(entry):
                if self._free and not self._waiting:
                    self._free -= 1
                    entry.dequeued = True
                    self._open_window(entry, has_waited=False)
                    return
                self._waiting.append(entry)
        if not entry.ready.wait(entry.deadline.remaining()):
            with self._lock:
                if not entry.dequeued:
                    self._waiting.remove(entry)
                    raise DeadlineExceeded("the deadline passed before a CPU was free to run the segment")
            # In a batch already: the leader sets the result.
            entry.ready.wait()

    def _hand_on(self, ended: QueuedWork) -> None:
        """Give the slot of this thread to the work that waits longest, with its followers."""
        with self._lock:
            while self._waiting:
                entry = self._next(ended)
                entry.dequeued = True
                # Past its deadline: the request's own thread raises, and no run begins.
                if entry.deadline.remaining() <= 0:
                    entry.result = DeadlineExceeded("the deadline passed before a CPU was free to run the segment")
                    entry.ready.set()
                    continue
                self._take_company(entry)
                self._open_window(entry, has_waited=True)
                entry.ready.set()
                return
            self._free += 1

    def _next(self, ended: QueuedWork) -> QueuedWork:
        """The work that is next: the longest wait; behind long work, a step that waits goes before more of it."""
        entry = self._waiting[0]
        if ended.is_long and entry.is_long:
            entry = next((each for each in self._waiting if each.is_step), entry)
        self._waiting.remove(entry)
        return entry

    def _take_company(self, entry: QueuedWork) -> None:
        """Move the followers of `entry` from the queue to it."""
        same = [other for other in self._waiting if entry.shares_with(other)]
        for follower in same[: entry.company(same) if same else 0]:
            follower.dequeued = True
            self._waiting.remove(follower)
            entry.followers.append(follower)

    def _joins(self, entry: QueuedWork) -> bool:
        """Whether `entry` joined the batch of a leader with an open window."""
        leader = next((each for each in self._gathering if each.shares_with(entry)), None)
        if leader is None or not leader.accepts(entry):
            return False
        leader.followers.append(entry)
        entry.dequeued = True
        if leader.is_complete():
            self._gathering.remove(leader)
            leader.gathered.set()
        return True

    def _open_window(self, entry: QueuedWork, *, has_waited: bool) -> None:
        # No wait for the sake of a batch while other work could run.
        if not self._waiting and not any(each.shares_with(entry) for each in self._gathering):
            entry.gathers_s = entry.window_s(has_waited=has_waited)
            if entry.gathers_s > 0:
                self._gathering.append(entry)

    def _gather(self, entry: QueuedWork) -> None:
        """Have a leader with a window wait for followers until the batch is complete or the window is over."""
        if entry.gathers_s > 0:
            entry.gathered.wait(entry.gathers_s)
            with self._lock:
                if entry in self._gathering:
                    self._gathering.remove(entry)


@dataclass(eq=False)
class _QueuedRun(QueuedWork):
    """A request for a run; `trial` is None for a request that always runs alone."""

    runner: Runner = field(kw_only=True)
    arrays: Mapping[str, Array] = field(kw_only=True)
    trial: ShapeTrial | None = field(kw_only=True)
    trials: BatchTrials = field(kw_only=True)
    queue: RunQueue = field(kw_only=True)

    def shares_with(self, other: QueuedWork) -> bool:
        """See `QueuedWork.shares_with`: the same segment and shapes."""
        if self.trial is None or not isinstance(other, _QueuedRun):
            return False
        return other.trial is self.trial and other.runner is self.runner

    def company(self, others: Sequence[QueuedWork]) -> int:
        """See `QueuedWork.company`."""
        if (trial := self.trial) is None:
            return 0
        self.trials.contended(trial, self.runner, self.arrays, self.queue.slot)
        return trial.largest([each.deadline.remaining() for each in (self, *others)]) - 1

    def window_s(self, *, has_waited: bool) -> float:
        """See `QueuedWork.window_s`: that of the settings, where a batch pays and ends before the deadline."""
        window_s = self.queue.window_s
        if has_waited or not window_s or (trial := self.trial) is None or trial.max_size < 2:
            return 0.0
        return window_s if self.deadline.remaining() > window_s + trial.seconds(trial.max_size) else 0.0

    def accepts(self, follower: QueuedWork) -> bool:
        """See `QueuedWork.accepts`."""
        seconds = self.trial.seconds(2 + len(self.followers)) if self.trial is not None else 0.0
        return follower.deadline.remaining() > self.queue.window_s + seconds

    def is_complete(self) -> bool:
        """See `QueuedWork.is_complete`."""
        return self.trial is None or 1 + len(self.followers) >= self.trial.max_size

    def execute(self, entries: Sequence[QueuedWork]) -> None:
        """Run the entries in batches of measured sizes; the rest, and the entries of a failed batch, alone."""
        trial = self.trial
        remaining = [entry for entry in entries if isinstance(entry, _QueuedRun)]
        while remaining:
            size = trial.fitting(len(remaining)) if trial is not None else 1
            together, remaining = remaining[:size], remaining[size:]
            if size > 1 and self._run_together(together):
                self.trials.ran(size)
                continue
            for entry in together:
                entry.run_alone()
            if size > 1 and trial is not None:
                self.trials.fell_back(trial, size, all(isinstance(t.result, QueuedOutputs) for t in together))

    def run_alone(self) -> None:
        """Run this request alone, and set its result."""
        started = time.perf_counter()
        try:
            self.deadline.check(f"segment {self.segment} ran")
            outputs = self.runner.run(self.arrays)
        # Defects as well: an error is raised in the thread of its own request, not in the leader's.
        except Exception as e:
            self.result = e
        else:
            self.result = QueuedOutputs(outputs, started - self.began, time.perf_counter() - started, 1)

    def _run_together(self, entries: Sequence[_QueuedRun]) -> bool:
        needed = len(entries) * sum(array.nbytes for array in self.arrays.values())
        if not self.queue.memory.reserve(needed):
            return False
        try:
            return self._share_run(entries)
        finally:
            self.queue.memory.release(needed)

    def _share_run(self, entries: Sequence[_QueuedRun]) -> bool:
        """Whether the entries, of a single row each, have their results from a shared run."""
        started = time.perf_counter()
        try:
            outputs = self.runner.run(stacked([entry.arrays for entry in entries]))
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
