"""Exploration: a few requests take another route than the preferred one, so that the others stay known."""

from __future__ import annotations

import math
from collections.abc import Sequence

from isthmus.routing.forecast import Expectation
from isthmus.routing.usage import RouteUsage

# One request of so many explores, none within so many seconds of the last.
EXPLORED_OF, EXPLORED_EVERY_S = 64, 1.0
# More often where the preferred route leaves a link out of use: probes are too small to show a rate, and a link that
# has recovered is found within twenty requests.
OFTEN_EXPLORED_OF = 16
# An exploration that takes less than this share of its expected seconds is repeated at once, since one transfer may be
# luck; at most so often, since the forecast may be wrong for other reasons.
SURPRISE, MAX_REPEATED = 0.8, 8
# A candidate that carried a request so recently is known, and so is a link.
KNOWN_S, LINK_KNOWN_S, REFUGE_KNOWN_S = 10.0, 1.0, 20.0
# Before so many requests a candidate's segments ran cold, or never: explored as often as a link out of use.
KNOWN_REQUESTS = 3
# An explored route is at most so many times slower than the preferred one, over a link out of use and else, and leaves
# half of the time left.
MAX_SLOWER_LINK, MAX_SLOWER, MAX_SHARE_OF_LEFT = 10.0, 3.0, 0.5
# A route that was left because its function became slow: tried again after an eighth of the time since, at least a
# second, for so long. No probe shows the speed of a function, and a process that was slow may be quick at any moment.
_RETRIED_AFTER, _RETRIED_S = 1 / 8, 60.0
# Minimal gain by a faster link, as a share of the preferred route's seconds.
_MIN_GAIN = 0.1


class Exploration:
    """Selects the exploring requests and their routes; not thread-safe."""

    def __init__(self, usage: RouteUsage) -> None:
        self._usage = usage
        self._since, self._latest_at = 0, -math.inf
        self._latest = -1
        self._is_surprising, self._repeated = False, 0
        self._left, self._left_at = -1, -math.inf

    def left(self, index: int, now: float) -> None:
        """The candidate is preferred no more, since its function became slow."""
        self._left, self._left_at = index, now

    def pick(
        self, indices: Sequence[int], expected: Sequence[Expectation], preferred: int, left_s: float, now: float
    ) -> int | None:
        """The route that this request explores, among the candidates at `indices`; None for most requests."""
        self._since += 1
        limit_s, preferred_s = MAX_SHARE_OF_LEFT * left_s, expected[preferred].seconds
        if self._is_surprising and self._latest in indices and expected[self._latest].seconds <= limit_s:
            self._is_surprising = False
            self._repeated += 1
            return self._latest
        is_open = self._left in indices and self._left != preferred and expected[self._left].seconds <= limit_s
        if is_open and self._is_retry_due(expected[self._left].seconds, now):
            self._latest_at, self._latest, self._repeated = now, self._left, 0
            return self._left
        if self._since < OFTEN_EXPLORED_OF or now - self._latest_at < EXPLORED_EVERY_S:
            return None
        others = [i for i in indices if i != preferred and expected[i].seconds <= limit_s]
        if (picked := self._without_link(others, expected, now)) is None:
            picked = self._over_unused_link(others, expected, expected[preferred], now)
            if picked is None:
                quick = [i for i in others if expected[i].seconds <= MAX_SLOWER * preferred_s]
                picked = self._unknown(quick, expected, now)
            if picked is None:
                return None
            self._since = 0  # the turns of other routes come as often as without the refuge's
        self._latest_at, self._latest, self._repeated = now, picked, 0
        return picked

    def _is_retry_due(self, expected_s: float, now: float) -> bool:
        since_left_s = now - self._left_at
        # A slow route takes a fifth of the time at most.
        pause_s = max(EXPLORED_EVERY_S, _RETRIED_AFTER * since_left_s, 5 * expected_s)
        return since_left_s < _RETRIED_S and now - max(self._latest_at, self._left_at) >= pause_s

    def ended(self, index: int, seconds: float, expected_s: float) -> None:
        """A request along a candidate took so many seconds."""
        if index == self._latest and seconds < SURPRISE * expected_s:
            self._is_surprising = self._repeated < MAX_REPEATED

    def _over_unused_link(
        self, others: Sequence[int], expected: Sequence[Expectation], preferred: Expectation, now: float
    ) -> int | None:
        """The quickest route that a faster link would make the best, if no route has used the link of late."""
        over_link = [i for i, e in enumerate(expected) if e.busy.uplink > 0]
        if preferred.busy.uplink or any(self._usage.age_s(i, now) <= LINK_KNOWN_S for i in over_link):
            return None
        promising = [
            i
            for i in others
            if 0 < expected[i].busy.uplink <= expected[i].seconds <= MAX_SLOWER_LINK * preferred.seconds
            and expected[i].seconds - expected[i].busy.uplink < (1 - _MIN_GAIN) * preferred.seconds
        ]
        return min(promising, key=lambda i: expected[i].seconds, default=None)

    def _without_link(self, others: Sequence[int], expected: Sequence[Expectation], now: float) -> int | None:
        """The route without the link, the refuge if the link fails: tried every REFUGE_KNOWN_S, whatever its forecast.

        Work of others at the edge may have made its last runs slow.
        """
        at_edge = [i for i in others if not expected[i].busy.uplink and self._usage.age_s(i, now) > REFUGE_KNOWN_S]
        return min(at_edge, key=lambda i: expected[i].seconds, default=None)

    def _unknown(self, others: Sequence[int], expected: Sequence[Expectation], now: float) -> int | None:
        """The quickest route with few requests so far, else the route with the oldest request."""
        new = [i for i in others if self._usage.requests[i] < KNOWN_REQUESTS]
        if new:
            return min(new, key=lambda i: expected[i].seconds)
        if self._since < EXPLORED_OF:
            return None
        oldest = max(others, key=lambda i: self._usage.age_s(i, now), default=None)
        return oldest if oldest is not None and self._usage.age_s(oldest, now) > KNOWN_S else None
