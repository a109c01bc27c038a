"""Usage of a version's candidates: requests, failures, shares of the traffic, and when each was last taken."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

# Time constant of rates and shares: some seconds of traffic, so that `isthmus top` shows a change at once.
WINDOW_S = 10.0
# A load that begins is felt within half a second, by what chance cannot explain: short windows count less so many
# standard deviations of a Poisson process.
_SHORT_WINDOWS_S, _DEVIATIONS = (0.5, 2.0), 1.5


class RouteUsage:
    """Counts by candidate; thread-safe. Rates are exponentially weighted over WINDOW_S."""

    def __init__(self, candidates: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self.requests = [0] * candidates
        self.failures = [0] * candidates
        self._rates = [0.0] * candidates
        self._rated_at = [-math.inf] * candidates
        self._recent = [0.0 for _ in _SHORT_WINDOWS_S]
        self._latest = -math.inf

    def took(self, index: int) -> None:
        """A request was routed to the candidate."""
        now = self._clock()
        with self._lock:
            self.requests[index] += 1
            self._rates[index] = self._rate(index, now) + 1 / WINDOW_S
            self._rated_at[index] = now
            self._arrived(now)

    def refused(self) -> None:
        """A request was refused for load: routes should be ready for it all the same."""
        with self._lock:
            self._arrived(self._clock())

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
            recent = self._recent_rates(now)
        certain = [r - _DEVIATIONS * math.sqrt(r / (2 * w)) for r, w in zip(recent, _SHORT_WINDOWS_S, strict=True)]
        return max(sum(self.rates()), *certain)

    def age_s(self, index: int, now: float) -> float:
        """Seconds since the candidate was taken; infinite if never."""
        return now - self._rated_at[index]

    def _arrived(self, now: float) -> None:
        recent = self._recent_rates(now)
        self._recent = [rate + 1 / window for rate, window in zip(recent, _SHORT_WINDOWS_S, strict=True)]
        self._latest = now

    def _rate(self, index: int, now: float) -> float:
        return self._rates[index] * _decay(now - self._rated_at[index], WINDOW_S) if self._rates[index] else 0.0

    def _recent_rates(self, now: float) -> list[float]:
        elapsed_s = now - self._latest
        return [r * _decay(elapsed_s, w) if r else 0.0 for r, w in zip(self._recent, _SHORT_WINDOWS_S, strict=True)]


def _decay(elapsed_s: float, window_s: float) -> float:
    return math.exp(-max(0.0, elapsed_s) / window_s)
