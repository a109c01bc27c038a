"""Dispatch of requests to routes: a choice for each request, and another route where the first gives no response."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from cachetools import LRUCache

from isthmus.context import Context
from isthmus.errors import HopError, RequestMalformed
from isthmus.pipeline import Result
from isthmus.routing.candidates import RouteCandidate
from isthmus.routing.catalog import MAX_CACHED, ServedModel
from isthmus.routing.choice import RouteChooser
from isthmus.routing.state import CandidateState, ModelState, RouterState
from isthmus.routing.watched_hop import WatchedHop, is_hops_fault

ROUTE_HEADER = "Isthmus-Route"
DEGRADED_HEADER = "Isthmus-Degraded"

Attempt = Callable[[RouteCandidate, Context], Result]


class Dispatcher:
    """Runs requests along candidate routes; one for all models of a router."""

    def __init__(self, hops: Sequence[WatchedHop], log: logging.Logger) -> None:
        self._hops, self._log = {hop.name: hop for hop in hops}, log
        self._lock = threading.Lock()
        self._served: LRUCache[str, tuple[ServedModel, RouteChooser]] = LRUCache(MAX_CACHED)

    def run(self, model: ServedModel, context: Context, pin: str, attempt: Attempt) -> Result:
        """The result of `attempt` along the chosen candidate, or along the next where its hop is at fault.

        `pin` names the only candidate that may be taken; empty leaves the choice to the router.

        Raises:
            RequestMalformed: no candidate has the name `pin`.
            As `attempt` for the last candidate tried.
        """
        candidates = _pinned(model, pin)
        chooser = self._chooser(model)
        while True:
            chosen = chooser.choose(self._answering(candidates), context.deadline.remaining())
            try:
                result = attempt(chosen, context)
            except HopError as e:
                failed = e.facts.get("hop")
                others = tuple(c for c in candidates if c is not chosen and failed not in c.hops)
                if not others or not is_hops_fault(e) or context.deadline.remaining() <= 0:
                    raise
                candidates = others
                continue
            return replace(result, route=chosen.name, degraded=chosen.degradation)

    def close(self) -> None:
        """End the threads of the dispatcher."""

    def state(self) -> RouterState:
        """The present state of hops and models."""
        with self._lock:
            served = list(self._served.values())
        models = tuple(
            ModelState(
                model.name,
                model.version,
                model.route.name,
                0,
                tuple(
                    CandidateState(
                        c.name,
                        tuple(str(s.id) for s in c.route.segments),
                        planned_s=c.planned_s,
                        degraded=c.degradation,
                    )
                    for c in model.candidates
                ),
            )
            for model, _ in served
        )
        return RouterState(tuple(hop.state() for hop in self._hops.values()), models)

    def _answering(self, candidates: Sequence[RouteCandidate]) -> Sequence[RouteCandidate]:
        """The candidates whose breakers allow a call; all where none does."""
        closed = {name for name, hop in self._hops.items() if hop.breaker.allows()}
        return [c for c in candidates if closed.issuperset(c.hops)] or candidates

    def _chooser(self, model: ServedModel) -> RouteChooser:
        key = model.digest
        with self._lock:
            if (served := self._served.get(key)) is None:
                served = self._served[key] = (model, RouteChooser())
        return served[1]


def _pinned(model: ServedModel, pin: str) -> tuple[RouteCandidate, ...]:
    if not pin:
        return model.candidates
    named = tuple(c for c in model.candidates if c.name == pin)
    if not named:
        raise RequestMalformed(
            f"{ROUTE_HEADER} is {pin[:80]!r}, which is no route of {model.name} {model.version}",
            header=ROUTE_HEADER,
            exists=[c.name for c in model.candidates],
        )
    return named
