"""Usage of a version's candidates: requests, failures, shares of the traffic, and when each was last taken."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

# Time constant of rates and shares: some seconds of traffic, so that `isthmus top` shows a change at once.
WINDOW_S = 10.0


class RouteUsage:
    """Counts by candidate; thread-safe. Rates are exponentially weighted over WINDOW_S."""

    def __init__(self, candidates: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self.requests = [0] * candidates
        self.failures = [0] * candidates
        self._rates = [0.0] * candidates
        self._rated_at = [-math.inf] * candidates

    def took(self, index: int) -> None:
        """A request was routed to the candidate."""
        now = self._clock()
        with self._lock:
            self.requests[index] += 1
            self._rates[index] = self._rate(index, now) + 1 / WINDOW_S
            self._rated_at[index] = now

    def failed(self, index: int) -> None:
        """A hop of the candidate gave no response."""
        with self._lock:
            self.failures[index] += 1

    def rates(self) -> list[float]:
        """Requests a second of each candidate."""
        now = self._clock()
        with self._lock:
            return [self._rate(i, now) for i in range(len(self._rates))]

    def age_s(self, index: int, now: float) -> float:
        """Seconds since the candidate was taken; infinite if never."""
        return now - self._rated_at[index]

    def _rate(self, index: int, now: float) -> float:
        return self._rates[index] * math.exp((self._rated_at[index] - now) / WINDOW_S) if self._rates[index] else 0.0
