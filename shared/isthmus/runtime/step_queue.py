"""Steps of sessions in the queue of runs: iteration-level batching, as Yu et al., Orca, OSDI 2022.

Decode steps of a segment that wait at the same time take one run: the weights are read once for all. A chunk of a
prompt runs alone, as does a step of several tokens, which GroupQueryAttention takes for one row only; behind a chunk a
step goes first. A batch forms again at every step, so that sessions come and go between two tokens.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from isthmus.arrays import Array
from isthmus.runtime.ort_runner import OrtRunner
from isthmus.runtime.run_queue import QueuedOutputs, QueuedWork
from isthmus.runtime.sessions import MAX_VERIFIED, RowSpan, SegmentSessions, Session
from isthmus.runtime.step_trial import MAX_ROWS, rows_agree

# A run waits for sessions that come back within this share of its seconds: else these would wait for all of it.
_WINDOW = 0.5


@dataclass(eq=False)
class QueuedStep(QueuedWork):
    """A step of a session, accepted by `Sessions.begin`. Shapes: arrays (1, `count`, …)."""

    runner: OrtRunner = field(kw_only=True)
    group: SegmentSessions = field(kw_only=True)
    session: Session = field(kw_only=True)
    arrays: Mapping[str, Array] = field(kw_only=True)
    position: int = field(kw_only=True)
    count: int = field(kw_only=True)
    # How many of the last positions get scores.
    scored: int = field(kw_only=True)
    # Followers that are worth a wait.
    _expected: int = 0

    def __post_init__(self) -> None:
        self.is_long = self.count > MAX_VERIFIED
        self.is_step = not self.is_long

    def shares_with(self, other: QueuedWork) -> bool:
        """See `QueuedWork.shares_with`: decode steps of one segment's sessions."""
        return isinstance(other, QueuedStep) and other.group is self.group and self.count == other.count == 1

    def company(self, others: Sequence[QueuedWork]) -> int:
        """See `QueuedWork.company`."""
        return self.group.trial.largest([each.deadline.remaining() for each in (self, *others)]) - 1

    def window_s(self, *, has_waited: bool) -> float:
        """See `QueuedWork.window_s`: as long as sessions are expected back that make a larger batch."""
        trial = self.group.trial
        window_s = _WINDOW * trial.run_s
        if self.count > 1 or not window_s:
            return 0.0
        others = self.group.expected(window_s)
        count = 1 + len(self.followers) + others
        remaining = [each.deadline.remaining() - window_s for each in (self, *self.followers)]
        self._expected = trial.largest(remaining + [min(remaining)] * others) - 1
        return window_s if others and self._expected > len(self.followers) and count > 1 else 0.0

    def accepts(self, follower: QueuedWork) -> bool:
        """See `QueuedWork.accepts`."""
        remaining = [each.deadline.remaining() for each in (self, *self.followers, follower)]
        return self.group.trial.largest(remaining) == len(remaining)

    def is_complete(self) -> bool:
        """See `QueuedWork.is_complete`."""
        return len(self.followers) >= self._expected

    def execute(self, entries: Sequence[QueuedWork]) -> None:
        """Run the steps: those whose rows can lie beside each other together, others one after the other."""
        steps = {step.session: step for step in entries if isinstance(step, QueuedStep) and step.is_in_time()}
        if not steps:
            return
        for step in steps.values():
            # The tokens behind the step's position are taken back now: the run writes in their place.
            step.session.length = min(step.session.length, step.position)
        for span in self.group.take_rows(list(steps), MAX_ROWS):
            try:
                self._run_span(span, [steps[session] for session in span.sessions])
            finally:
                self.group.give_back(span)

    def is_in_time(self) -> bool:
        """Whether the step may begin; else its result is the error."""
        try:
            self.deadline.check(f"segment {self.segment} ran")
        except Exception as e:
            self.result = e
            return False
        return True

    def run_alone(self) -> float:
        """Run the step in its own row, and set its result; seconds of the run."""
        started = time.perf_counter()
        try:
            last = np.array([self.position + self.count - 1], np.int32)
            outputs = self._run(self.arrays, last, self.session.row)
        # Defects as well: an error is raised in the thread of its own request, not in the leader's.
        except Exception as e:
            self.result = e
            return 0.0
        seconds = time.perf_counter() - started
        self.group.count_run(1)
        self._succeeded(outputs, started, seconds, 1)
        return seconds

    def _run_span(self, span: RowSpan, steps: Sequence[QueuedStep]) -> None:
        trial, count, size = self.group.trial, len(steps), len(span.lengths)
        if count == 1 or not trial.pays(size, count):
            for step in steps:
                seconds = step.run_alone()
                if step.count == 1 and seconds:
                    trial.ran(1, seconds)
            return
        started = time.perf_counter()
        try:
            rows = self._run_together(span, steps)
        # Any error: alone, each step gets its own error, or succeeds.
        except Exception:
            rows = []
        together_s = time.perf_counter() - started
        if rows and trial.is_proved(size):
            trial.ran(size, together_s)
            self.group.count_run(count)
            for step, outputs in zip(steps, rows, strict=True):
                step._succeeded(outputs, started, together_s, count)
            return
        alone_s = sum(step.run_alone() for step in steps)
        results = [step.result for step in steps]
        if all(isinstance(result, QueuedOutputs) for result in results):
            if not rows:
                trial.failed(size)
                return
            agrees = all(
                rows_agree(row, result.outputs)
                for row, result in zip(rows, results, strict=True)
                if isinstance(result, QueuedOutputs)
            )
            # Of as many steps as rows: idle rows run along in this batch, and need not in the next.
            trial.compared(size, together_s, alone_s * size / count, agrees=agrees)

    def _run_together(self, span: RowSpan, steps: Sequence[QueuedStep]) -> list[dict[str, Array]]:
        """The outputs of each step from a shared run; idle rows take zeros."""
        count = len(span.lengths)
        places = [step.session.row - span.first for step in steps]
        arrays = {}
        for name, array in self.arrays.items():
            arrays[name] = np.zeros((count, *array.shape[1:]), array.dtype)
            for place, step in zip(places, steps, strict=True):
                arrays[name][place] = step.arrays[name][0]
        outputs = self._run(arrays, np.array(span.lengths, np.int32), span.first)
        return [{name: array[place : place + 1] for name, array in outputs.items()} for place in places]

    def _run(self, arrays: Mapping[str, Array], lengths: Array, row: int) -> dict[str, Array]:
        return self.runner.run_step(arrays, lengths, self.group.memory.buffers(row, len(lengths)), self.scored)

    def _succeeded(self, outputs: dict[str, Array], started: float, run_s: float, batch: int) -> None:
        self.group.ran(self.session, self.position + self.count)
        self.result = QueuedOutputs(outputs, started - self.began, run_s, batch)
