"""The candidates of one request or generation: the candidate that it takes, and the fallback chain behind that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from isthmus.context import Context
from isthmus.errors import HopError
from isthmus.pipeline import Route
from isthmus.routing.candidates import RouteCandidate
from isthmus.routing.choice import RouteChooser
from isthmus.routing.fallback import ExpectedSeconds, FallbackChain, first_in_time, limited, may_fall_back

Answering = Callable[[Sequence[RouteCandidate]], Sequence[RouteCandidate]]
"""Those of some candidates whose hops answer, loaded ones if any."""
TierOf = Callable[[HopError], str]
"""The tier of the hop that failed."""


class Attempts:
    """A choice among candidates, and others in its place; not thread-safe."""

    def __init__(
        self,
        candidates: Sequence[RouteCandidate],
        chooser: RouteChooser,
        fallbacks: FallbackChain,
        answering: Answering,
        *,
        left_s: float,
        may_explore: bool = True,
    ) -> None:
        """Choose a candidate for a request with `left_s` seconds.

        Raises:
            Overloaded: as `RouteChooser.choose`.
        """
        self.chooser, self._fallbacks, self._answering = chooser, fallbacks, answering
        # Where no hop answers, the best route waits for its own.
        self.candidate = chooser.choose(answering(candidates) or candidates, left_s, may_explore=may_explore)
        self._others = tuple(c for c in candidates if c is not self.candidate)

    def without(self, hop: str) -> Sequence[RouteCandidate]:
        """The fallback chain of the other candidates that do without a hop."""
        others = [c for c in self._others if hop not in c.hops]
        return self._fallbacks.order(self._answering(others), self.chooser.expected_s)

    def limited(self, context: Context, expected_s: ExpectedSeconds | None = None) -> Context:
        """The context of an attempt: each hop that a fallback does without is given up in time for it."""
        return limited(context, self.candidate, self.without, expected_s or self.chooser.longest_s)

    def fall_back(self, error: HopError, hop: str, left_s: float) -> RouteCandidate | None:
        """The candidate that takes over from the present one, whose `hop` failed; None where none can."""
        self.chooser.failed(self.candidate)
        chain = self.without(hop)
        if not chain or left_s <= 0:
            return None
        self.chooser.fell_back(self.candidate, type(error).__name__)
        self.candidate = first_in_time(chain, left_s, self.chooser.longest_s)
        self._others = tuple(c for c in self._others if hop not in c.hops and c is not self.candidate)
        return self.candidate


class RouteChange(NamedTuple):
    """A route that takes over from another."""

    failed: RouteCandidate
    candidate: RouteCandidate
    error: HopError
    context: Context


class GenerationRoute:
    """One generation's route; a `Rerouting` of generation. Not thread-safe."""

    def __init__(self, attempts: Attempts, tier_of: TierOf, on_fallback: Callable[[RouteChange], None]) -> None:
        self._attempts, self._tier_of, self._on_fallback = attempts, tier_of, on_fallback

    @property
    def candidate(self) -> RouteCandidate:
        """The candidate in force."""
        return self._attempts.candidate

    def limited(self, context: Context, expected_s: float | None) -> Context:
        """See `Rerouting.limited`.

        The plan's seconds are of a token or a request, so only the generation's own steps say what a call may take.
        """
        candidate = self._attempts.candidate
        return self._attempts.limited(context, lambda each: expected_s if each is candidate else None)

    def instead(self, error: HopError, context: Context) -> Route | None:
        """See `Rerouting.instead`."""
        if not may_fall_back(error):
            return None
        failed = self._attempts.candidate
        other = self._attempts.fall_back(error, self._tier_of(error), context.deadline.remaining())
        if other is None:
            return None
        self._on_fallback(RouteChange(failed, other, error, context))
        return other.route
