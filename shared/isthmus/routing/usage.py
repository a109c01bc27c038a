"""Usage of a version's candidates: requests, failures, shares of the traffic, and when each was last taken."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable

# Time constant of rates and shares: some seconds of traffic, so that `isthmus top` shows a change at once.
WINDOW_S = 10.0
# A load that begins is felt at once: the latest arrivals within so many seconds, less what chance explains, in standard
# deviations of a Poisson process. So few tell nothing, and so many all there is to know.
_SHORT_WINDOW_S, _DEVIATIONS, _MIN_ARRIVALS, _MAX_ARRIVALS = 1.5, 1.0, 8, 128
_COUNTS = (8, 16, 32, 64)


class RouteUsage:
    """Counts by candidate; thread-safe. Rates are exponentially weighted over WINDOW_S."""

    def __init__(self, candidates: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self.requests = [0] * candidates
        self.failures = [0] * candidates
        self._rates = [0.0] * candidates
        self._rated_at = [-math.inf] * candidates
        self._arrivals: deque[float] = deque(maxlen=_MAX_ARRIVALS)

    def took(self, index: int) -> None:
        """A request was routed to the candidate."""
        now = self._clock()
        with self._lock:
            self.requests[index] += 1
            self._rates[index] = self._rate(index, now) + 1 / WINDOW_S
            self._rated_at[index] = now
            self._arrivals.append(now)

    def refused(self) -> None:
        """A request was refused for load: routes should be ready for it all the same."""
        with self._lock:
            self._arrivals.append(self._clock())

    def failed(self, index: int) -> None:
        """A hop of the candidate gave no response."""
        with self._lock:
            self.failures[index] += 1

    def rates(self) -> list[float]:
        """Requests a second of each candidate."""
        now = self._clock()
        with self._lock:
            return [self._rate(i, now) for i in range(len(self._rates))]

    def rate(self) -> float:
        """Requests a second of all candidates, as routes should be ready for."""
        now = self._clock()
        with self._lock:
            recent = [at for at in self._arrivals if at > now - _SHORT_WINDOW_S]
        # Of the latest 8, 16, 32, ...: beside the arrivals of a quiet second a burst would not stand out.
        counts = [n for n in (*_COUNTS, len(recent)) if _MIN_ARRIVALS <= n <= len(recent)]
        certain = [(n - _DEVIATIONS * math.sqrt(n)) / max(now - recent[-n], 1e-3) for n in counts]
        return max([sum(self.rates()), *certain])

    def age_s(self, index: int, now: float) -> float:
        """Seconds since the candidate was taken; infinite if never."""
        return now - self._rated_at[index]

    def _rate(self, index: int, now: float) -> float:
        return self._rates[index] * _decay(now - self._rated_at[index], WINDOW_S) if self._rates[index] else 0.0


def _decay(elapsed_s: float, window_s: float) -> float:
    return math.exp(-max(0.0, elapsed_s) / window_s)
