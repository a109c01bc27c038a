"""The trial of shared runs for the steps of sessions: whether rows keep their own results, and whether sharing pays.

Source of the idea: Yu et al., Orca, OSDI 2022, "iteration-level scheduling". The first batches of each size run both
ways, together and row by row, which is safe since a step may be repeated; the rows' own results are answered. So the
trial compares real rows at real lengths, and needs no state of its own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from isthmus.arrays import Array
from isthmus.runtime.batching import AGAIN_S, MAX_SHARE, is_close, tolerance

# Memory-bound decoding gains up to where a matrix product of so many rows is bound by arithmetic.
MAX_ROWS = 16
# Largest difference of a row in a batch from the row alone, relative to the row's largest magnitude.
_FLOAT32_TOLERANCE = 1e-5
# Other work on the machine may spoil one measurement.
_ATTEMPTS = 3
# Of the seconds measured: under load a run takes longer.
_MARGIN = 1.5
_NEWEST = 0.2

_log = logging.getLogger("isthmus")


class StepTrial:
    """What shared runs of a segment's decode steps gave. Sizes count up to the next power of two."""

    def __init__(self, segment: str, *, enabled: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._segment, self._clock = segment, clock
        self._lock = threading.Lock()
        # Replaced and never changed: other threads read it without the lock.
        self._seconds: Mapping[int, float] = {}
        self._tries = 0
        self._limit = MAX_ROWS if enabled else 1
        self._not_before = 0.0

    @property
    def max_size(self) -> int:
        """The largest batch that pays; 1 where none does."""
        return max((size for size in self._seconds if size <= self._limit), default=1)

    @property
    def step_s(self) -> float:
        """Seconds of a step alone; 0 before the first."""
        return self._seconds.get(1, 0.0)

    @property
    def run_s(self) -> float:
        """Seconds of the largest run so far; 0 before the first."""
        return max(self._seconds.values(), default=0.0)

    def largest(self, remaining: Sequence[float]) -> int:
        """The largest batch of the first steps that ends before the deadline of each.

        Units: `remaining` are each step's remaining seconds, in the order of the queue.
        """
        if not self.step_s:
            return 1
        for count in range(min(self._most(), len(remaining)), 1, -1):
            if min(remaining[:count]) > _MARGIN * self._expected_s(count):
                return count
        return 1

    def is_proved(self, count: int) -> bool:
        """Whether a batch of so many needs no comparison any more."""
        return _bucket(count) in self._seconds

    def pays(self, rows: int, steps: int) -> bool:
        """Whether a run of so many rows is worth it for so many steps: idle rows run along."""
        size = _bucket(rows)
        return size <= self._limit and self._seconds.get(size, 0.0) <= MAX_SHARE * steps * self.step_s

    def ran(self, count: int, seconds: float) -> None:
        """Learn the seconds of a run of `count` rows."""
        with self._lock:
            before = self._seconds.get(size := _bucket(count), seconds)
            self._seconds = {**self._seconds, size: before + _NEWEST * (seconds - before)}

    def compared(self, count: int, together_s: float, alone_s: float, *, agrees: bool) -> None:
        """Learn from a batch that ran both ways. Units: `alone_s` is the sum over its rows."""
        size = _bucket(count)
        with self._lock:
            self._tries += 1
            if not agrees:
                self._limit = size // 2
                outcome = "differs"
            elif together_s <= MAX_SHARE * alone_s:
                self._seconds, self._tries = {**self._seconds, size: together_s}, 0
                outcome = "pays"
            elif self._tries < _ATTEMPTS:
                return
            else:
                self._tries, self._not_before = 0, self._clock() + AGAIN_S
                outcome = "no_gain"
        facts = {"segment": self._segment, "outcome": outcome, "steps": count}
        _log.info("trial of shared steps", extra={"facts": facts})

    def failed(self, count: int) -> None:
        """A batch failed whose rows succeed alone: no more batches of that size."""
        with self._lock:
            self._limit = min(self._limit, _bucket(count) // 2)
        _log.warning("%d steps of segment %s fail together and succeed alone", count, self._segment)

    def _most(self) -> int:
        """The largest batch that may be formed: a size beyond the proved ones while these are worth a try."""
        tried = self.max_size if self._clock() < self._not_before else 2 * self.max_size
        return min(self._limit, tried)

    def _expected_s(self, count: int) -> float:
        size = _bucket(count)
        # Of a comparison: together, and each alone.
        return self._seconds.get(size, 0.0) or self._seconds.get(size // 2, self.step_s) + count * self.step_s


def rows_agree(together: Mapping[str, Array], alone: Mapping[str, Array]) -> bool:
    """Whether a row of a batch has the result of the row alone."""
    return all(name in together and is_close(array, together[name], _tolerance(array)) for name, array in alone.items())


def _tolerance(array: Array) -> float:
    return _FLOAT32_TOLERANCE if array.dtype == np.float32 else tolerance(array.dtype)


def _bucket(count: int) -> int:
    return 1 << (count - 1).bit_length()
