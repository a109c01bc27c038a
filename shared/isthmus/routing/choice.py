"""The choice of a request's route among its model's candidates, under the present estimates."""

from __future__ import annotations

from collections.abc import Sequence

from isthmus.routing.candidates import RouteCandidate


class RouteChooser:
    """Chooses for one served version; thread-safe."""

    def choose(self, candidates: Sequence[RouteCandidate], left_s: float) -> RouteCandidate:
        """The route of a request that has `left_s` seconds, of candidates whose hops answer."""
        return candidates[0]
