"""The adaptive concurrency limit: as many requests in work as the function handles without slowing down.

The gradient of Envoy's adaptive concurrency: a latency baseline from moments of low concurrency, and a limit that
falls where requests take longer than the baseline and otherwise grows by the square root of itself. The baseline is
measured anew all the time, by requests that began at low concurrency; without any for a while, a probe lowers the
limit. A baseline from samples under load would rise with the load (Netflix concurrency-limits, issue 165).
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable

from cachetools import LRUCache

# Requests that began beside at most this many measure the baseline; no limit is lower. Envoy: min_concurrency.
MIN_LIMIT = 3
# Enough for most functions, and little for a burst before the first window to overload.
_START = 16
# A service time within this factor of the baseline is no sign of load: neighbours on the machine slow requests down as
# well, and requests that need another resource than the busy one should not wait. Netflix's Gradient2 has 1.5.
TOLERANCE = 2.0
# Where more than this share of a window missed deadlines, the limit does not grow; where these left as many times the
# baseline, the limit falls by the factor. The gradient alone may settle where all requests are late.
_MAX_MISSED, _FAIR_DEADLINE, _MISSED_DECREASE = 0.1, 1.5, 0.8
# A window ends with both; the median of a few samples is robust to one outlier.
_WINDOW_S, _WINDOW_SAMPLES = 0.1, 8
# No window halves the limit more than once: a pause of the whole machine is in all samples of a window.
_MAX_DECREASE = 0.5
# A baseline is the median of the latest samples: compared with medians, it is no lower than times without load that
# vary, as under a CPU quota. Envoy compares the same percentile of both.
_BASELINE_SAMPLES = 8
# Without samples at low concurrency for as long, a probe; a probe ends after as long at the latest. A low limit may be
# the fault of an old baseline, and a probe costs little there.
_PROBE_EVERY_S, _PROBE_LOW_EVERY_S, _MAX_PROBE_S = 30.0, 5.0, 2.0
_LOW_LIMIT = 8
# Kinds of work: models, routes and body sizes; the least recently used is forgotten.
_MAX_KINDS = 256


class _Baseline:
    """The usual seconds of a kind of work at low concurrency, of late."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._samples: deque[float] = deque(maxlen=_BASELINE_SAMPLES)

    def add(self, seconds: float) -> None:
        self._samples.append(seconds)
        self.seconds = statistics.median(self._samples)


class AdaptiveLimit:
    """A limit between MIN_LIMIT and `max_limit`, from the seconds of requests; not thread-safe.

    Kinds of work are compared with themselves alone, as one model takes longer than another. `floor` gives the least
    limit at present, as for batches: their requests take longer together and yet are more in a second.
    """

    def __init__(self, max_limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max, self._clock = max_limit, clock
        self.floor: Callable[[], int] = lambda: MIN_LIMIT
        self._probe_limit = min(MIN_LIMIT, max_limit)
        self._limit = float(min(max_limit, _START))
        self._baselines: LRUCache[str, _Baseline] = LRUCache(_MAX_KINDS)
        now = clock()
        self._window_began, self._ratios, self._max_in_work = now, list[float](), 0
        self._missed = self._missed_fair = 0
        self._measured_at, self._probing_since, self._probe_samples = now, math.inf, 0

    @property
    def value(self) -> int:
        """The limit in force."""
        return self._probe_limit if self.is_probing else int(self._limit)

    @property
    def is_probing(self) -> bool:
        """Whether the limit is low for the sake of the baseline."""
        return self._probing_since < math.inf

    def baseline(self, kind: str) -> float | None:
        """Seconds of a kind of work without load; None before the first sample."""
        entry = self._baselines.get(kind)
        return None if entry is None else entry.seconds

    def observe(self, kind: str, seconds: float, in_work: int, *, succeeded: bool = True) -> None:
        """Learn from a request that ended; `in_work` counts the requests in work when it began, itself included.

        A request that ended at its deadline took at least `seconds`: evidence of load only where that is long, so that
        callers with short deadlines cannot lower the limit.
        """
        now = self._clock()
        entry = self._baselines.get(kind)
        if not succeeded:
            if entry is None or seconds <= entry.seconds:
                return
            self._missed += 1
            self._missed_fair += seconds >= _FAIR_DEADLINE * entry.seconds
        elif in_work <= self._probe_limit or entry is None:
            # At high concurrency, better than nothing until samples at low concurrency displace this sample.
            if entry is None:
                entry = self._baselines[kind] = _Baseline()
            entry.add(seconds)
            if in_work <= self._probe_limit:
                self._measured_at = now
                self._probe_samples += 1
        self._max_in_work = max(self._max_in_work, in_work)
        self._ratios.append(seconds / max(entry.seconds, 1e-6))
        self._probe(now)
        if len(self._ratios) >= _WINDOW_SAMPLES and now - self._window_began >= _WINDOW_S:
            self._adapt(now)

    def _adapt(self, now: float) -> None:
        ratio = statistics.median(self._ratios)
        if ratio * TOLERANCE < 1:
            # Faster than without load: the baseline is of a slower time.
            self._measured_at = -math.inf
        gradient = min(1.0, max(_MAX_DECREASE, TOLERANCE / ratio))
        limit = self._limit * gradient + math.sqrt(self._limit)
        max_missed = _MAX_MISSED * len(self._ratios)
        if self._missed_fair > max_missed:
            limit = self._limit * _MISSED_DECREASE
        elif self._missed > max_missed:
            limit = min(limit, self._limit)
        # A limit that is not reached says nothing of the effect of more requests.
        if limit <= self._limit or self._max_in_work * 2 >= self._limit:
            self._limit = min(float(self._max), max(MIN_LIMIT, self.floor(), limit))
        self._begin_window(now)

    def _begin_window(self, now: float) -> None:
        self._window_began, self._max_in_work = now, 0
        self._missed = self._missed_fair = 0
        self._ratios.clear()

    def _probe(self, now: float) -> None:
        if self.is_probing:
            if self._probe_samples >= _BASELINE_SAMPLES or now - self._probing_since >= _MAX_PROBE_S:
                self._probing_since = math.inf
                self._measured_at = now
                # Samples of the probe say nothing of the limit after it.
                self._begin_window(now)
        elif now - self._measured_at >= (_PROBE_LOW_EVERY_S if self._limit <= _LOW_LIMIT else _PROBE_EVERY_S):
            self._probing_since, self._probe_samples = now, 0
