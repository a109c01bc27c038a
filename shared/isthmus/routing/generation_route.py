"""The route of a generation: chosen as the route of a request, kept for all steps, replaced where a hop of it fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from isthmus.context import Context
from isthmus.errors import HopError
from isthmus.pipeline import Route
from isthmus.routing.attempts import Attempts
from isthmus.routing.candidates import RouteCandidate
from isthmus.routing.fallback import is_hops_fault

Tier = Callable[[HopError], str]
"""The tier of the hop that failed."""


class Fallback(NamedTuple):
    """A route that takes over from another."""

    failed: RouteCandidate
    candidate: RouteCandidate
    error: HopError
    context: Context


class GenerationRoute:
    """One generation's route; a `Rerouting` of generation. Not thread-safe."""

    def __init__(self, attempts: Attempts, tier: Tier, on_fallback: Callable[[Fallback], None]) -> None:
        self._attempts, self._tier, self._on_fallback = attempts, tier, on_fallback

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
        if not is_hops_fault(error):
            return None
        failed = self._attempts.candidate
        other = self._attempts.fall_back(error, self._tier(error), context.deadline.remaining())
        if other is None:
            return None
        self._on_fallback(Fallback(failed, other, error, context))
        return other.route
