"""The queue of runs that wait for a CPU: first come, first served, and dynamic batching of those that wait.

A run that ends hands its slot to the request that waits longest, and with it, as one batch, those behind it with the
same segment and shapes, where `BatchTrials` measured that a batch pays. Without a window nobody waits for company.
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
class _Turn:
    """A request in the queue; `trial` is None where it runs alone."""

    deadline: Deadline
    runner: Runner | None = None
    arrays: Mapping[str, Array] = field(default_factory=dict)
    trial: ShapeTrial | None = None
    began: float = field(default_factory=time.perf_counter)
    # Set under the queue's lock: the turn has left the queue, with a slot of its own or in another's batch.
    taken: bool = False
    others: list[_Turn] = field(default_factory=list)
    # Set when the turn has a slot, or a result.
    ready: threading.Event = field(default_factory=threading.Event)
    result: QueuedOutputs | Exception | None = None

    @property
    def input_bytes(self) -> int:
        """Bytes of the inputs."""
        return sum(array.nbytes for array in self.arrays.values())


class RunQueue:
    """At most `slots` runs at a time.

    Units: `window_s` is how long a run with a free slot waits for others of its kind, 0 for not at all. The inputs that
    a batch copies together count in `memory`.
    """

    def __init__(self, slots: int, trials: BatchTrials, memory: MemoryBudget, *, window_s: float = 0.0) -> None:
        self.memory = memory
        self._trials, self._window_s = trials, window_s
        self._slots = slots
        self._lock = threading.Lock()
        self._free = slots
        self._waiting: deque[_Turn] = deque()
        # Turns with a slot whose window is open.
        self._gathering: dict[ShapeTrial, _Turn] = {}

    @contextmanager
    def slot(self, deadline: Deadline) -> Iterator[None]:
        """Hold a slot for the block, after those who wait already.

        Raises:
            DeadlineExceeded: no slot was free in time.
        """
        turn = _Turn(deadline)
        self._take_slot(turn)
        if isinstance(turn.result, Exception):
            raise turn.result
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
            return [str(turn.runner.segment.id) if turn.runner else "" for turn in self._waiting]

    def run(self, runner: Runner, arrays: Mapping[str, Array], deadline: Deadline) -> QueuedOutputs:
        """Run a segment, alone or in a batch.

        Shapes: rows of a batch are cut apart again, so outputs are as those of a run alone, within
        `batching.tolerance`.

        Raises:
            DeadlineExceeded: no slot was free in time.
            SegmentError: as `Runner.run`, for these arrays alone.
        """
        turn = _Turn(deadline, runner, arrays, self._trials.find(runner, arrays))
        self._take_slot(turn)
        if turn.result is None:
            # From here on this thread owns a slot, and the results of the turns in its batch.
            try:
                self._run_batch(turn, [turn, *turn.others])
            finally:
                self._hand_on()
                for other in turn.others:
                    other.ready.set()
        if not isinstance(turn.result, QueuedOutputs):
            raise turn.result or RunFailed("a run ended without a result", segment=runner.segment.id)
        return turn.result

    def _take_slot(self, turn: _Turn) -> None:
        """Return once `turn` has a slot or a result."""
        with self._lock:
            if self._joins(turn):
                gathers = False
            elif self._free and not self._waiting:
                self._free -= 1
                turn.taken = True
                if not (gathers := self._gathers(turn)):
                    return
            else:
                gathers = False
                self._waiting.append(turn)
        if gathers:
            self._gather(turn)
            return
        if not turn.ready.wait(turn.deadline.remaining()):
            with self._lock:
                if not turn.taken:
                    self._waiting.remove(turn)
                    raise DeadlineExceeded("the deadline passed before a CPU was free to run the segment")
            # In a batch already: its thread sets the result.
            turn.ready.wait()

    def _hand_on(self) -> None:
        """Give the slot of this thread to the request that waits longest, with the batch that goes with it."""
        with self._lock:
            while self._waiting:
                turn = self._waiting.popleft()
                turn.taken = True
                # A request past its deadline raises by itself; nothing is run for it.
                if turn.deadline.remaining() <= 0:
                    turn.result = DeadlineExceeded("the deadline passed before a CPU was free to run the segment")
                    turn.ready.set()
                    continue
                turn.others = self._companions(turn)
                turn.ready.set()
                return
            self._free += 1

    def _companions(self, turn: _Turn) -> list[_Turn]:
        """The waiting turns that run with `turn`, taken from the queue."""
        if (trial := turn.trial) is None:
            return []
        same = [other for other in self._waiting if other.trial is trial and other.runner is turn.runner]
        if not same:
            return []
        self._trials.contended(trial, turn.runner, turn.arrays, self.slot)
        others = same[: trial.largest([each.deadline.remaining() for each in (turn, *same)]) - 1]
        for other in others:
            other.taken = True
            self._waiting.remove(other)
        return others

    def _joins(self, turn: _Turn) -> bool:
        """Whether `turn` joined the batch of a turn that waits for company."""
        if turn.trial is None or (leader := self._gathering.get(turn.trial)) is None:
            return False
        size = 2 + len(leader.others)
        if leader.runner is not turn.runner or turn.deadline.remaining() <= self._window_s + turn.trial.seconds(size):
            return False
        leader.others.append(turn)
        turn.taken = True
        if size >= turn.trial.max_size:
            del self._gathering[turn.trial]
            leader.ready.set()
        return True

    def _gathers(self, turn: _Turn) -> bool:
        """Whether `turn`, with a slot, waits for company first; alone with its segment it has nobody to wait for."""
        if not self._window_s or (trial := turn.trial) is None or trial.max_size < 2 or trial in self._gathering:
            return False
        if turn.deadline.remaining() <= self._window_s + trial.seconds(trial.max_size):
            return False
        self._gathering[trial] = turn
        return True

    def _gather(self, turn: _Turn) -> None:
        """Wait for company until the batch is full or the window is over."""
        turn.ready.wait(self._window_s)
        with self._lock:
            if turn.trial is not None and self._gathering.get(turn.trial) is turn:
                del self._gathering[turn.trial]

    def _run_batch(self, leader: _Turn, turns: Sequence[_Turn]) -> None:
        """Run the turns together in batches of measured sizes, the rest and what fails one by one."""
        runner, trial = leader.runner, leader.trial
        left = list(turns)
        while left and runner is not None:
            size = trial.fitting(len(left)) if trial is not None else 1
            together, left = left[:size], left[size:]
            if size > 1 and trial is not None and self._run_together(runner, together):
                self._trials.ran(size)
                continue
            for turn in together:
                _run_alone(runner, turn)
            if size > 1 and trial is not None:
                self._trials.fell_back(trial, size, all(isinstance(t.result, QueuedOutputs) for t in together))

    def _run_together(self, runner: Runner, turns: Sequence[_Turn]) -> bool:
        needed = len(turns) * turns[0].input_bytes
        if not self.memory.reserve(needed):
            return False
        try:
            return _share_run(runner, turns)
        finally:
            self.memory.release(needed)


def _share_run(runner: Runner, turns: Sequence[_Turn]) -> bool:
    """Whether the turns have their results from one run; their inputs have a single row each."""
    started = time.perf_counter()
    try:
        outputs = runner.run(stacked([turn.arrays for turn in turns]))
    # Whatever it is: alone, each request gets its own error, or fits where a batch does not.
    except Exception:
        return False
    if any(leading_size(array) != len(turns) for array in outputs.values()):
        return False
    run_s = time.perf_counter() - started
    for row, turn in enumerate(turns):
        # Copies: a view would keep the rows of all others in memory until its own response is written.
        own = {name: array[row : row + 1].copy() for name, array in outputs.items()}
        turn.result = QueuedOutputs(own, started - turn.began, run_s, len(turns))
    return True


def _run_alone(runner: Runner, turn: _Turn) -> None:
    started = time.perf_counter()
    try:
        turn.deadline.check(f"segment {runner.segment.id} ran")
        outputs = runner.run(turn.arrays)
    # A defect as well: it is raised in the thread of its own request, not in that of the batch.
    except Exception as e:
        turn.result = e
    else:
        turn.result = QueuedOutputs(outputs, started - turn.began, time.perf_counter() - started, 1)
