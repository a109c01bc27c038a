"""The choice of a request's route among its model's candidates, under the present estimates.

In the background forecasts decide which route is preferred, with hysteresis, and under load the shares by which
requests are spread over several. A request takes the preferred route, or the route whose turn it is; a few explore.
Source: docs/explanation/routing.md, "Route choice".
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from isthmus.errors import Overloaded
from isthmus.routing.candidates import RouteCandidate
from isthmus.routing.exploration import Exploration
from isthmus.routing.forecast import Expectation
from isthmus.routing.mix import Resources
from isthmus.routing.outstanding import IDLE, Busy, Outstanding
from isthmus.routing.spreading import Spreading
from isthmus.routing.state import CandidateState, ModelState
from isthmus.routing.usage import RouteUsage

# A preference changes for a gain of a tenth that holds, or at once for more than a forecast's noise.
MIN_GAIN, HOLD_S = 0.10, 0.5
LARGE_GAIN = 0.40

Clock = Callable[[], float]
ONE_EACH = Resources(1.0, 1.0, 1.0, 1.0)


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
        self._allowed: Sequence[int] = self._exact
        self._preference = Preference()
        self._spreading = Spreading(len(self.candidates))
        self._fallbacks: list[Counter[str]] = [Counter() for _ in self.candidates]
        self._expected: Sequence[Expectation] = ()
        self._exploration = Exploration(self.usage)

    @property
    def preferred(self) -> RouteCandidate:
        """The candidate that a request takes while nothing else is in the way."""
        return self.candidates[self._preference.index]

    @property
    def switches(self) -> int:
        """How often the preference changed."""
        return self._preference.switches

    @property
    def used(self) -> Busy:
        """Busy seconds of each resource in a second of the present requests."""
        pairs = list(zip(self.usage.rates(), self._expected, strict=False))
        return Busy(*(sum(rate * e.busy[i] for rate, e in pairs) for i in range(len(IDLE))))

    @property
    def calls(self) -> float:
        """Calls over the link in a second of the present requests."""
        pairs = zip(self.usage.rates(), self._expected, strict=False)
        return sum(rate * e.demand.calls for rate, e in pairs)

    def refresh(self, expected: Sequence[Expectation], capacities: Resources = ONE_EACH) -> None:
        """Take in new forecasts, one for each candidate; they change slowly, so no request does this.

        `capacities` are the busy seconds a second of each resource that other models leave.
        """
        with self._lock:
            self._expected = expected
            now, before = self._clock(), self._preference.index
            self._preference.update(now, [e.seconds for e in expected], self._exact)
            # Beyond twice the planned seconds the function is slow, not the link.
            planned_s = expected[before].behind * self.candidates[before].demand.cloud_s
            is_slow = 0 < 2 * planned_s < expected[before].busy.cloud
            if before != self._preference.index and is_slow:
                self._exploration.left(before, now)
            best = self._best(self._allowed)
            self._spreading.update(expected, best, self._allowed, self.usage.rate(), capacities)

    def expectation(self, candidate: RouteCandidate) -> Expectation | None:
        """The latest forecast of a candidate; None before the first."""
        expected = self._expected
        return expected[self._index[candidate.name]] if expected else None

    def expected_s(self, candidate: RouteCandidate) -> float | None:
        """Seconds of a request that would be routed to the candidate now, behind all outstanding work."""
        if (expectation := self.expectation(candidate)) is None:
            return candidate.planned_s
        return self._behind(expectation)

    def longest_s(self, candidate: RouteCandidate) -> float | None:
        """As `expected_s`, of a request that passes the candidate's exit; what a deadline has to allow for."""
        if (expectation := self.expectation(candidate)) is None:
            return None if candidate.planned_s is None else candidate.planned_s / candidate.planned_behind
        return self._behind(expectation) + expectation.further_s

    def choose(
        self, candidates: Sequence[RouteCandidate], left_s: float, *, may_explore: bool = True
    ) -> RouteCandidate:
        """The route of a request that has `left_s` seconds, of candidates whose hops answer.

        A degraded candidate is chosen only where all are degraded. Without `may_explore` the request is no exploration.

        Raises:
            Overloaded: alone a request would end in time, and behind the outstanding work none of the routes does.
        """
        expected = self._expected
        if len(candidates) == 1 or not expected:
            return candidates[0]
        by_index = {self._index[c.name]: c for c in candidates}
        exact = [i for i, c in by_index.items() if not c.degradation] or list(by_index)
        seconds = {i: self._behind(expected[i]) for i in exact}
        with self._lock:
            self._allowed = exact
            chosen = self._spreading.take(exact, list(seconds.values())) if self._spreading.shares else None
            if chosen is None and may_explore and not any(self._outstanding.seconds()):
                chosen = self._exploration.pick(exact, expected, self._preference.index, left_s, self._clock())
        if chosen is None:
            chosen, soonest = self._best(exact), min(seconds, key=seconds.__getitem__)
            # A load begins faster than forecasts follow: until shares are in force its requests evade a queue.
            if seconds[soonest] < (1 - LARGE_GAIN) * seconds[chosen]:
                chosen = soonest
        if seconds[chosen] + expected[chosen].further_s <= left_s:
            return by_index[chosen]
        return by_index[self._in_time(seconds, left_s)]

    def _in_time(self, seconds: Mapping[int, float], left_s: float) -> int:
        """The quickest candidate by its expected `seconds`, where the one whose turn it is would be late.

        Quickest past its exit, for nobody knows before whether a request ends there; as refused counts only a request
        that even an exit would not save.
        """
        quickest = min(seconds, key=lambda i: seconds[i] + self._expected[i].further_s)
        # Late even without any other request: the forecasts may be wrong, and only a request can tell.
        if seconds[quickest] > left_s >= min(self._expected[i].seconds for i in seconds):
            self.usage.refused()
            late_s = seconds[quickest] - left_s
            raise Overloaded(
                f"the requests before this one take {late_s:.3g} s more than its deadline allows",
                retry_after_s=max(1, math.ceil(late_s)),
            )
        return quickest

    def _best(self, indices: Sequence[int]) -> int:
        """The preferred candidate, or else the quickest of these: a hop that is down changes no preference."""
        preferred = self._preference.index
        return preferred if preferred in indices else min(indices, key=lambda i: self._expected[i].seconds)

    @contextmanager
    def running(self, candidate: RouteCandidate) -> Iterator[None]:
        """Enter a request of the candidate into the account of outstanding work for the block."""
        index, expectation = self._index[candidate.name], self.expectation(candidate)
        self.usage.took(index)
        if expectation is None:
            yield
            return
        began = self._clock()
        with self._outstanding.begin(expectation.busy, candidate.far_hop):
            yield
        if not expectation.further_s:  # the seconds of one request say little of a mean of early and late ones
            with self._lock:
                self._exploration.ended(index, self._clock() - began, expectation.seconds)

    def took(self, candidate: RouteCandidate) -> None:
        """Count a request of the candidate that is in no account of outstanding work."""
        self.usage.took(self._index[candidate.name])

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
        return expectation.seconds + self._outstanding.wait_s(expectation.busy)
