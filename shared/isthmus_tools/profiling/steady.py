"""Whether a device kept one speed while it was measured, and what to make of it where it did not."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from isthmus.artifacts.profile import Timing

ROUNDS = 5
"""Series of runs of each segment, each at another moment."""
AGREEING = 3
"""Series that must agree."""
MAX_DRIFT = 0.15
"""Between the medians of series that agree, as a share of the smallest; a third of it where the runs allow."""
MAX_SPREAD = 0.25
"""Between the quartiles of all their runs, as a share of the median."""
UNHEEDED_S = 100e-6
"""Differences below this are the clock's and the scheduler's."""


def timing(series: Sequence[Sequence[float]]) -> Timing:
    """What series of runs say, in the order in which they were made: median and quartiles of the fastest that agree.

    Others who use a device only make it slower, so what is fastest, again and again, is the device's own. It was not
    steady where too few agree, or where the last two both depart from the rest: then it may have changed for good.
    """
    ordered = sorted(series, key=statistics.median)
    count = min(AGREEING, len(ordered))
    windows = [ordered[i : i + count] for i in range(len(ordered) - count + 1)]
    close = [w for most in (MAX_DRIFT / 3, MAX_DRIFT) for w in windows if _near(_median(w[0]), _median(w[-1]), most)]
    chosen = close[0] if close else min(windows, key=lambda w: _median(w[-1]) / (_median(w[0]) or 1.0))
    pooled = sorted(s for each in chosen for s in each)
    low, median, high = statistics.quantiles(pooled, n=4, method="inclusive") if len(pooled) > 1 else pooled * 3
    narrow = high - low <= max(MAX_SPREAD * median, UNHEEDED_S)
    lately = any(_near(median, _median(s), MAX_DRIFT) for s in series[-2:])
    return Timing(median, low, high, len(pooled), bool(close) and narrow and lately)


def _median(series: Sequence[float]) -> float:
    return statistics.median(series)


def _near(a: float, b: float, most: float) -> bool:
    return abs(a - b) <= max(most * min(a, b), UNHEEDED_S)
