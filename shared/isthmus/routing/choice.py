"""The choice of a request's route among its model's candidates, under the present estimates.

Two steps. In the background the forecasts decide which route is preferred, with hysteresis. For each request the
outstanding work is added: the preferred route is taken unless its resources are so busy that another route ends sooner.
Source: docs/explanation/routing.md, "Route choice".
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

from isthmus.routing.candidates import RouteCandidate
from isthmus.routing.forecast import Expectation
from isthmus.routing.outstanding import IDLE, Outstanding, Ticket
from isthmus.routing.state import CandidateState, ModelState
from isthmus.routing.usage import RouteUsage

# A preference changes for a gain of a tenth that holds, or at once for more than a forecast's noise.
MIN_GAIN, HOLD_S = 0.10, 0.5
LARGE_GAIN = 0.40
# Another route must end this share sooner than the preferred one, for outstanding work is a forecast as well.
MIN_DETOUR_GAIN = 0.05
# Exploration: one request of so many, and none within so many seconds of the last.
EXPLORED_OF, EXPLORED_EVERY_S = 64, 1.0
# A candidate that carried a request so recently is known.
KNOWN_S = 10.0
# An explored route is at most so many times slower than the preferred one, and leaves half of the time left.
MAX_EXPLORED_SLOWER, MAX_EXPLORED_SHARE = 4.0, 0.5

Clock = Callable[[], float]


class Preference:
    """Hysteresis: the preferred one of several routes, by their expected seconds."""

    def __init__(self) -> None:
        self.index = 0
        self.switches = 0
        self._challenged_at = math.inf

    def update(self, now: float, seconds: Sequence[float], allowed: Sequence[int]) -> None:
        """Take the latest forecasts into account; `allowed` are the indices that may be preferred."""
        best = min(allowed, key=seconds.__getitem__)
        present = seconds[self.index]
        gain = 1 - seconds[best] / present if present > 0 else 0.0
        if gain < MIN_GAIN:
            self._challenged_at = math.inf
            return
        self._challenged_at = min(self._challenged_at, now)
        if gain >= LARGE_GAIN or now - self._challenged_at >= HOLD_S:
            self.index = best
            self.switches += 1
            self._challenged_at = math.inf


class RouteChooser:
    """Chooses for one served version; thread-safe. `candidates[0]` is preferred until forecasts say otherwise."""

    def __init__(
        self, candidates: Sequence[RouteCandidate], outstanding: Outstanding, clock: Clock = time.monotonic
    ) -> None:
        self.candidates = tuple(candidates)
        self.usage = RouteUsage(len(self.candidates), clock)
        self._outstanding, self._clock = outstanding, clock
        self._lock = threading.Lock()
        self._index = {c.name: i for i, c in enumerate(self.candidates)}
        self._exact = [i for i, c in enumerate(self.candidates) if not c.degradation] or [0]
        self._preference = Preference()
        self._fallbacks: list[Counter[str]] = [Counter() for _ in self.candidates]
        self._expected: Sequence[Expectation] = ()
        self._since_explored, self._explored_at = 0, -math.inf

    @property
    def preferred(self) -> RouteCandidate:
        """The candidate that a request takes while nothing else is in the way."""
        return self.candidates[self._preference.index]

    @property
    def switches(self) -> int:
        """How often the preference changed."""
        return self._preference.switches

    def refresh(self, expected: Sequence[Expectation]) -> None:
        """Take in new forecasts, one for each candidate; they change slowly, so no request does this."""
        with self._lock:
            self._expected = expected
            self._preference.update(self._clock(), [e.seconds for e in expected], self._exact)

    def expectation(self, candidate: RouteCandidate) -> Expectation | None:
        """The latest forecast of a candidate; None before the first."""
        expected = self._expected
        return expected[self._index[candidate.name]] if expected else None

    def expected_s(self, candidate: RouteCandidate) -> float | None:
        """Seconds of a request that would be routed to the candidate now, behind all outstanding work."""
        if (expectation := self.expectation(candidate)) is None:
            return candidate.planned_s
        return self._behind(expectation)

    def choose(self, candidates: Sequence[RouteCandidate], left_s: float) -> RouteCandidate:
        """The route of a request that has `left_s` seconds, of candidates whose hops answer.

        A degraded candidate is chosen only where all are degraded.
        """
        expected = self._expected
        if len(candidates) == 1 or not expected:
            return candidates[0]
        indices = [self._index[c.name] for c in candidates]
        exact = [i for i in indices if not self.candidates[i].degradation] or indices
        waits = self._outstanding.seconds()
        if not any(waits) and (explored := self._explored(exact, left_s)) is not None:
            return self.candidates[explored]
        seconds = {i: _after(expected[i], waits) for i in exact}
        best = min(seconds, key=seconds.__getitem__)
        preferred = self._preference.index
        if preferred in seconds and seconds[preferred] * (1 - MIN_DETOUR_GAIN) <= seconds[best]:
            best = preferred
        return self.candidates[best]

    def begin(self, candidate: RouteCandidate) -> Ticket:
        """Enter a request of the candidate into the account of outstanding work, until the ticket is closed."""
        self.usage.took(self._index[candidate.name])
        expectation = self.expectation(candidate)
        return self._outstanding.begin(IDLE if expectation is None else expectation.busy, candidate.far_hop)

    def failed(self, candidate: RouteCandidate) -> None:
        """A hop of the candidate gave no response."""
        self.usage.failed(self._index[candidate.name])

    def fell_back(self, candidate: RouteCandidate, error: str) -> None:
        """A request left the candidate for another, for an error of the class `error`."""
        with self._lock:
            self._fallbacks[self._index[candidate.name]][error] += 1

    def state(self, name: str, version: str) -> ModelState:
        """The present state of the version `version` of the model `name`."""
        rates = self.usage.rates()
        rate = sum(rates)
        candidates = tuple(
            CandidateState(
                candidate.name,
                tuple(str(s.id) for s in candidate.route.segments),
                share=rates[i] / rate if rate else 0.0,
                expected_s=self.expected_s(candidate),
                planned_s=candidate.planned_s,
                requests=self.usage.requests[i],
                failures=self.usage.failures[i],
                degraded=candidate.degradation,
                fallbacks=dict(self._fallbacks[i]),
            )
            for i, candidate in enumerate(self.candidates)
        )
        return ModelState(name, version, self.preferred.name, self.switches, candidates, rate)

    def _behind(self, expectation: Expectation) -> float:
        return _after(expectation, self._outstanding.seconds())

    def _explored(self, indices: Sequence[int], left_s: float) -> int | None:
        """The route whose last request is the longest ago, once in a while; None for most requests."""
        now = self._clock()
        with self._lock:
            self._since_explored += 1
            if self._since_explored < EXPLORED_OF or now - self._explored_at < EXPLORED_EVERY_S:
                return None
            limit_s = min(
                MAX_EXPLORED_SHARE * left_s, MAX_EXPLORED_SLOWER * self._expected[self._preference.index].seconds
            )
            unknown = [
                i for i in indices if self._expected[i].seconds <= limit_s and self.usage.age_s(i, now) > KNOWN_S
            ]
            if not unknown:
                return None
            self._since_explored, self._explored_at = 0, now
            return max(unknown, key=lambda i: self.usage.age_s(i, now))


def _after(expectation: Expectation, waits: Sequence[float]) -> float:
    """Seconds of a request that finds `waits` seconds of work before it on the resources that it needs."""
    seconds = expectation.seconds
    for wait, own in zip(waits, expectation.busy, strict=True):
        if own > 0:
            seconds += wait
    return seconds
