"""Dispatch of requests to routes: a choice for each request, and another route where the first gives no response."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cachetools import LRUCache
from msgspec import structs

from isthmus.admission import describe_work
from isthmus.context import Context
from isthmus.errors import HopError, RequestMalformed
from isthmus.pipeline import Result
from isthmus.routing.candidates import RouteCandidate
from isthmus.routing.capacity import Capacities
from isthmus.routing.catalog import MAX_CACHED, ServedModel
from isthmus.routing.choice import RouteChooser
from isthmus.routing.estimates import Estimates
from isthmus.routing.fallback import FallbackChain, first_in_time, is_hops_fault, limited
from isthmus.routing.forecast import forecast, plan_drift
from isthmus.routing.outstanding import IDLE, Outstanding
from isthmus.routing.readiness import ReadinessProber
from isthmus.routing.replicas import RoutedHop
from isthmus.routing.state import ModelState, RouterState
from isthmus.routing.warming import Warming

ROUTE_HEADER = "Isthmus-Route"
DEGRADED_HEADER = "Isthmus-Degraded"

Attempt = Callable[[RouteCandidate, Context], Result]


# Forecasts are made anew this often while requests come, and a preference changes no more often.
REFRESH_S = 0.1
# A version of a model that no request has named for so long leaves the state, where another one is served.
FORGOTTEN_S = 300.0


@dataclass
class _Served:
    """A version that requests named, and when the latest did."""

    model: ServedModel
    chooser: RouteChooser
    used_at: float


class Dispatcher:
    """Runs requests along candidate routes; one for all models of a router."""

    def __init__(
        self,
        hops: Sequence[RoutedHop],
        estimates: Estimates,
        warming: Warming,
        log: logging.Logger,
        fallback: Sequence[str] = (),
    ) -> None:
        self._hops, self._log = {hop.name: hop for hop in hops}, log
        self._tiers = {replica.name: hop.name for hop in hops for replica in (hop, *hop.watched)}
        self._estimates, self._warming = estimates, warming
        self._outstanding, self._capacities = Outstanding(), Capacities()
        self._fallbacks = FallbackChain(fallback)
        self._prober = ReadinessProber([replica for hop in hops for replica in hop.watched], log)
        self._lock = threading.Lock()
        self._served: LRUCache[tuple[str, str, str], _Served] = LRUCache(MAX_CACHED)
        self._requested, self._closed = threading.Event(), threading.Event()
        self._refresher: threading.Thread | None = None

    def run(
        self, model: ServedModel, context: Context, pin: str, attempt: Attempt, *, exact_only: bool = False
    ) -> Result:
        """The result of `attempt` along the chosen candidate, or along a fallback where its hop is at fault.

        `pin` names the only candidate that may be taken; empty leaves the choice to the router. With `exact_only` no
        degraded candidate is taken where there are others.

        Raises:
            RequestMalformed: no candidate has the name `pin`.
            As `attempt` for the last candidate tried.
        """
        candidates = _pinned(model, pin)
        if not model.route.name:  # a route beside the served ones, which their state must not know
            return attempt(candidates[0], context)
        if exact_only:
            candidates = tuple(c for c in candidates if not c.degradation) or candidates
        chooser = self._chooser(model)
        loaded = self._warming.loaded(model)
        # Where no hop answers, the best route waits for its own.
        chosen = chooser.choose(self._answering(candidates, loaded) or candidates, context.deadline.remaining())
        while True:
            candidates = tuple(c for c in candidates if c is not chosen)
            chain = self._fallbacks.order(self._answering(candidates, loaded), chooser.expected_s)
            # Routes differ in their seconds: the adaptive concurrency limit compares requests of one route.
            describe_work(f"{model.digest} {chosen.name}")
            try:
                with chooser.begin(chosen):
                    result = attempt(chosen, limited(context, chosen, chain, chooser.expected_s))
            except HopError as e:
                if not is_hops_fault(e):
                    raise
                chooser.failed(chosen)
                failed = self._tiers.get(e.facts.get("hop", ""))
                chain = [c for c in chain if failed not in c.hops and self._answers(c)]
                left_s = context.deadline.remaining()
                if not chain or left_s <= 0:
                    raise
                fallback = first_in_time(chain, left_s, chooser.expected_s)
                chooser.fell_back(chosen, type(e).__name__)
                self._log_fallback(chosen, fallback, e, context)
                candidates = tuple(c for c in candidates if failed not in c.hops)
                chosen = fallback
                continue
            encode_s = sum(run.encode_s for run in result.runs[: result.segments])
            self._estimates.prepared(chosen.route.digest, chosen.name, result.preprocess_s, encode_s)
            return replace(result, route=chosen.name, degraded=chosen.degradation)

    def close(self) -> None:
        """End the threads of the dispatcher."""
        self._warming.close()
        self._closed.set()
        self._requested.set()
        if self._refresher is not None:
            self._refresher.join()
        self._prober.close()

    def state(self) -> RouterState:
        """The present state of hops and models."""
        with self._lock:
            served = [each for each in self._served.values() if not self._is_forgotten(each)]
        hops = tuple(replica.state() for hop in self._hops.values() for replica in hop.watched)
        return RouterState(hops, tuple(map(self._state_of, served)))

    def _state_of(self, served: _Served) -> ModelState:
        state = served.chooser.state(served.model.name, served.model.version)
        loaded = self._warming.state(served.model)
        drifts = {c.name: plan_drift(c, self._estimates) for c in served.model.candidates}
        return structs.replace(
            state,
            candidates=tuple(
                structs.replace(c, loaded=c.name in loaded, drift=drifts[c.name]) for c in state.candidates
            ),
        )

    def _is_forgotten(self, served: _Served) -> bool:
        latest = max(each.used_at for each in self._served.values() if each.model.name == served.model.name)
        return served.used_at < latest - FORGOTTEN_S

    def _refresh_often(self) -> None:
        """New forecasts for the versions that requests named since the last ones, until the dispatcher is closed."""
        refreshed_at = -math.inf
        while not self._closed.wait(REFRESH_S):
            self._requested.wait()
            self._requested.clear()
            began = time.monotonic()
            with self._lock:
                served = [each for each in self._served.values() if each.used_at >= refreshed_at]
            self._refresh(served, began)
            refreshed_at = began

    def _refresh(self, served: Sequence[_Served], now: float) -> None:
        used = [each.chooser.used for each in served]
        total = [sum(seconds) for seconds in zip(*used, strict=True)]
        rate = sum(each.chooser.usage.rate() for each in served)
        edge, *_, cloud = (self._estimates.wait_s(hop) for hop in (*self._hops, *self._hops))
        self._capacities.update(now, total or IDLE, rate, edge, cloud)
        for each, own in zip(served, used, strict=True):
            others = [all_s - own_s for all_s, own_s in zip(total, own, strict=True)]
            expected = forecast(each.model.candidates, self._estimates)
            each.chooser.refresh(expected, self._capacities.left(others))

    def _answering(self, candidates: Sequence[RouteCandidate], loaded: frozenset[str]) -> Sequence[RouteCandidate]:
        """The candidates whose breakers allow a call; of these the loaded ones, if any."""
        answering = [c for c in candidates if self._answers(c)]
        return [c for c in answering if c.name in loaded] or answering

    def _answers(self, candidate: RouteCandidate) -> bool:
        """Whether the breakers of all hops on the way allow a call."""
        return all(self._hops[name].allows() for name in candidate.hops if name in self._hops)

    def _log_fallback(
        self, chosen: RouteCandidate, fallback: RouteCandidate, error: HopError, context: Context
    ) -> None:
        reason = type(error).__name__
        facts = {"from": chosen.name, "to": fallback.name, "type": reason, "error": error.message}
        facts |= {"call_id": context.call_id, "hop": error.facts.get("hop", "")}
        self._log.info("%s takes over from %s: %s", fallback.name, chosen.name, reason, extra={"facts": facts})

    def _chooser(self, model: ServedModel) -> RouteChooser:
        key = (model.name, model.version, model.digest)
        now = time.monotonic()
        with self._lock:
            if (served := self._served.get(key)) is None:
                chooser = RouteChooser(model.candidates, self._outstanding)
                chooser.refresh(forecast(model.candidates, self._estimates))
                served = self._served[key] = _Served(model, chooser, now)
                if self._refresher is None and len(model.candidates) > 1:
                    self._refresher = threading.Thread(target=self._refresh_often, name="routes", daemon=True)
                    self._refresher.start()
            served.used_at = now
        self._requested.set()
        return served.chooser


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
