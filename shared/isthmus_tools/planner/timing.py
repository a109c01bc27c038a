"""Seconds of what is done here: the least of a few tries, since the machine may be busy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")
_FEW_S, _MANY_S, _TRIES = 0.005, 0.1, 3


def timed(do: Callable[[], T]) -> tuple[float, T]:
    """What `do` gives, and the least seconds of a few tries, two if none is long."""
    best, found = _once(do)
    spent = best
    while spent < _MANY_S:
        took, found = _once(do)
        best, spent = min(best, took), spent + took
        if spent >= _FEW_S:
            break
    return best, found


def timed_all(run: Callable[[U], T], examples: Sequence[U]) -> tuple[float, list[T]]:
    """The answers to all examples, and the median over them of the least seconds of a few runs, warmed up."""
    run(examples[0])
    seconds, found = [], []
    for example in examples:
        tries = [_once(partial(run, example)) for _ in range(_TRIES)]
        seconds.append(min(took for took, _ in tries))
        found.append(tries[0][1])
    return statistics.median(seconds), found


def _once(do: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    found = do()
    return time.perf_counter() - start, found
