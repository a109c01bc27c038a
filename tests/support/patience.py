"""How tests wait on a machine that is busy or pauses, and how they show there that something is quick."""

from __future__ import annotations

import sys
import time
import tracemalloc
from collections.abc import Callable

LONG_S = 60.0
"""For what happens sooner or later: only a failure waits so long, and a machine may pause for seconds."""


def until(condition: Callable[[], bool], seconds: float = LONG_S) -> bool:
    """Whether `condition` holds in time; it is looked at once more after a pause that outlasts the time."""
    end = time.monotonic() + seconds
    while True:
        is_last = time.monotonic() > end
        if condition():
            return True
        if is_last:
            return False
        time.sleep(0.02)


def eventually(condition: Callable[[], bool], seconds: float = LONG_S) -> None:
    """Wait until `condition` holds; fail if it does not in time."""
    assert until(condition, seconds), "it did not happen in time"


def least(measure: Callable[[], float], below: float, tries: int = 20) -> float:
    """The least of what `measure` gives, such as seconds, asked anew until it is below `below`.

    A pause of the machine spoils a try; what is too slow is so in all of them.
    """
    found = measure()
    for _ in range(tries - 1):
        if found < below:
            break
        found = min(found, measure())
    return found


def peak_of(action: Callable[[], object], below: float) -> float:
    """The peak of bytes that Python allocates during `action`, run anew until the peak is below `below`.

    tracemalloc counts the whole process: threads of other fixtures add to a run's peak, and never take from it. No
    other thread runs while `action` keeps Python's lock; for actions that release it there are further runs.
    """

    def peak() -> int:
        time.sleep(0.01)  # threads that ask for the lock by the earlier interval have it now
        tracemalloc.start()
        try:
            action()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1.0)
    try:
        return least(peak, below)
    finally:
        sys.setswitchinterval(interval)
