"""The guard of exits: a sample of requests shows whether exits keep their limit on live inputs; one that does not is
closed.

An exit's threshold holds for inputs as those that it was fitted on. Requests that ended at the exit run again in full,
in idle time; the others agree, since the model gave their predictions: the limit is of all requests. A closed exit
stays closed until a new version of the bundle or a restart. Source: docs/explanation/routing.md, "Early exits".
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeAlias

from cachetools import LRUCache

from isthmus.arrays import Array
from isthmus.artifacts.bounds import wilson
from isthmus.artifacts.fidelity import TOP1, Measure
from isthmus.artifacts.gate import Gate
from isthmus.codecs import EncodedTensor
from isthmus.pipeline import Result, Route, execute
from isthmus.pipeline.agreement import agrees
from isthmus.routing.idle_work import Job, job_context
from isthmus.routing.latest_outcomes import LatestOutcomes
from isthmus.routing.state import ExitState

# Whose samples are kept: callers name versions, each with exits of its own.
MAX_EXITS = 256

ExitKey: TypeAlias = tuple[str, str, float]
"""A bundle's digest, the head (a variant of it counts apart), and the threshold."""


class ExitMetrics(Protocol):
    """The function's metrics, as far as exits set these."""

    def exit_checked(self, agreed: bool) -> None:
        """Count a request of the sample."""
        ...

    def exit_state(self, disagreement: float, closed: int) -> None:
        """The largest share of disagreements of all exits, and the number of closed exits."""
        ...


@dataclass
class _Checks:
    """An exit's sample; a prediction other than the full model's is a bad outcome."""

    limit: float
    outcomes: LatestOutcomes = field(default_factory=LatestOutcomes)


def limit_of(gate: Gate) -> float:
    """The share of requests that may exit with another prediction than the model's.

    Live requests have no labels. Where a gate bounds lost accuracy, other predictions may be as right, or both wrong:
    then as many may differ as did on held-out inputs, by the upper bound of their share.
    """
    if gate.risk == "disagreement":
        return gate.limit
    differing = gate.failing if gate.differing is None else gate.differing
    return max(gate.limit, wilson(differing / gate.inputs, gate.inputs, gate.confidence)[1] if gate.inputs else 1.0)


class ExitGuard:
    """The exits of a router's routes: the checks of each, and which are closed; thread-safe."""

    def __init__(self, metrics: ExitMetrics, log: logging.Logger, *, deadline_s: float) -> None:
        self._metrics, self._log, self._deadline_s = metrics, log, deadline_s
        self._lock = threading.Lock()
        self._checks: LRUCache[ExitKey, _Checks] = LRUCache(MAX_EXITS)
        # Read by every request with an exit, without the lock; kept where many others are checked since.
        self._closed: frozenset[ExitKey] = frozenset()

    def apply(self, route: Route) -> tuple[Route, Mapping[str, str | int]]:
        """The route, without its exit where that is closed, and the facts of this for the response."""
        if route.exit is None or not self._closed or _key(route) not in self._closed:
            return route, {}
        return route.full(), {"exit_closed": route.exit.cut}

    def state(self, route: Route, share: float) -> ExitState | None:
        """The present state of a route's exit; None without one."""
        if (branch := route.exit) is None:
            return None
        key = _key(route)
        with self._lock:
            checks, is_closed = self._checks.get(key) or _Checks(limit_of(branch.gate)), key in self._closed
            return ExitState(
                branch.cut,
                branch.gate.threshold,
                0.0 if is_closed else share,
                len(checks.outcomes),
                checks.outcomes.share,
                checks.limit,
                is_closed,
            )

    def job(
        self, route: Route, inputs: Mapping[str, Array], encoded: Mapping[str, EncodedTensor], result: Result
    ) -> Job | None:
        """The check of a served request for idle time; None of a request that met no exit."""
        if route.exit is None or result.exit is None:
            return None
        if not result.is_early:
            return partial(self.checked, route, True)
        return partial(self.check, route, inputs, encoded, result.outputs)

    def check(
        self,
        route: Route,
        inputs: Mapping[str, Array],
        encoded: Mapping[str, EncodedTensor],
        outputs: Mapping[str, Array],
    ) -> None:
        """Run a request that ended at its exit in full and raw, and compare the predictions.

        Raises:
            IsthmusError: the full request failed.
        """
        if route.exit is None:
            return
        expected = execute(route.raw().full(), inputs, job_context(self._deadline_s), encoded)
        self.checked(route, agrees(Measure(TOP1, route.exit.gate.output), expected.outputs, outputs))

    def checked(self, route: Route, agreed: bool) -> None:
        """Take in a request of the sample, and close the exit where the limit is exceeded beyond chance."""
        if (branch := route.exit) is None:
            return
        self._metrics.exit_checked(agreed)
        key = _key(route)
        with self._lock:
            if key in self._closed:
                return
            if (checks := self._checks.get(key)) is None:
                checks = self._checks[key] = _Checks(limit_of(branch.gate))
            checks.outcomes.add(is_bad=not agreed)
            if is_closing := checks.outcomes.exceed(checks.limit):
                self._closed |= {key}
            self._metrics.exit_state(max(c.outcomes.share for c in self._checks.values()), len(self._closed))
        if is_closing:
            facts = {
                "bundle": route.digest,
                "cut": branch.cut,
                **checks.outcomes.facts(),
                "limit": round(checks.limit, 4),
                "hint": f"inputs differ from those that the exit was fitted on: isthmus exits {route.bundle.name} with"
                " inputs of late",
            }
            self._log.warning("the guard closed an exit: the full model answers", extra={"facts": facts})


def _key(route: Route) -> ExitKey:
    return route.digest, str(route.segments[0].id), 0.0 if route.exit is None else route.exit.gate.threshold
