"""Steadiness of a device during a measurement, and robust timing of an unsteady device."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from isthmus.artifacts.profile import Timing

# Series of runs of each segment, each at another moment.
ROUNDS = 5
# Series that must agree.
MIN_AGREEING = 3
# Between the medians of series that agree, as a share of the smallest; a third of this where the runs allow.
MAX_DRIFT = 0.15
# Between the quartiles of their runs, as a share of the median.
MAX_SPREAD = 0.25
# Smaller differences come from the clock and the scheduler.
MIN_DIFFERENCE_S = 100e-6


def timing(series: Sequence[Sequence[float]]) -> Timing:
    """Median and quartiles of the fastest series of runs that agree; `series` are in the order of measurement.

    Other load only slows a device down, so its own speed is the fastest that repeats. The device was not steady where
    too few series agree, or where the last two both depart from the rest: its speed may have changed for good.
    """
    ordered = sorted(series, key=statistics.median)
    count = min(MIN_AGREEING, len(ordered))
    windows = [ordered[i : i + count] for i in range(len(ordered) - count + 1)]
    drifts = (MAX_DRIFT / 3, MAX_DRIFT)
    close = [w for drift in drifts for w in windows if _near(_median(w[0]), _median(w[-1]), drift)]
    window = close[0] if close else min(windows, key=lambda w: _median(w[-1]) / (_median(w[0]) or 1.0))
    pooled = sorted(s for each in window for s in each)
    low, median, high = statistics.quantiles(pooled, n=4, method="inclusive") if len(pooled) > 1 else pooled * 3
    narrow = high - low <= max(MAX_SPREAD * median, MIN_DIFFERENCE_S)
    lately = any(_near(median, _median(s), MAX_DRIFT) for s in series[-2:])
    return Timing(median, low, high, len(pooled), bool(close) and narrow and lately)


def _median(series: Sequence[float]) -> float:
    return statistics.median(series)


def _near(a: float, b: float, drift: float) -> bool:
    return abs(a - b) <= max(drift * min(a, b), MIN_DIFFERENCE_S)
