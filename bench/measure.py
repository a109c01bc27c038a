"""Times of several things that are compared: taken by turns, so that what disturbs one disturbs all."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

Call = Callable[[], object]
Clock = Callable[[], float]
MIN_S = 0.0005
"""A sample of something shorter is the mean of as many calls in a row."""


class Samples:
    """Times of one thing, in the order in which they were taken. Units: seconds unless the name says otherwise."""

    def __init__(self, seconds: list[float]) -> None:
        self.seconds = seconds

    @property
    def p50(self) -> float:
        """The median."""
        return statistics.median(self.seconds)

    @property
    def p95(self) -> float:
        """Nineteen in twenty are no longer."""
        return statistics.quantiles(self.seconds, n=20, method="inclusive")[-1] if len(self.seconds) > 1 else self.p50

    def over(self, other: Samples) -> float:
        """The median ratio to `other`, turn by turn: noise that lasts longer than a turn cancels out."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


def interleave(
    calls: Mapping[str, Call],
    *,
    turns: int,
    block: int = 1,
    warm: int = 1,
    batch: bool = False,
    clock: Clock = time.perf_counter,
) -> dict[str, Samples]:
    """Time `block` calls of each by turns, `turns` times over, starting with another one each turn.

    Before each block, `warm` calls are not timed. With `batch`, short calls are timed several at once. `clock` may be
    time.thread_time where calls do all their work in this thread: what else the machine does then counts for less.
    """
    names = list(calls)
    numbers = {name: _number(call, clock) if batch else 1 for name, call in calls.items()}
    taken: dict[str, list[float]] = {name: [] for name in names}
    with _no_collector():
        for turn in range(turns):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                call, number = calls[name], numbers[name]
                for _ in range(warm):
                    call()
                for _ in range(block):
                    taken[name].append(_timed(call, number, clock))
            gc.collect()
    return {name: Samples(seconds) for name, seconds in taken.items()}


def _timed(call: Call, number: int, clock: Clock) -> float:
    start = clock()
    for _ in range(number):
        call()
    return (clock() - start) / number


def _number(call: Call, clock: Clock) -> int:
    call()
    return max(1, int(MIN_S / max(1e-9, min(_timed(call, 1, clock) for _ in range(5)))))


@contextmanager
def _no_collector() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
