"""Dispatch of requests to routes: a choice for each request, and another route where the first gives no response."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from functools import partial

from msgspec import structs

from isthmus.admission import describe_work
from isthmus.context import EXIT_HEADER as EXIT_HEADER
from isthmus.context import ROUTE_HEADER as ROUTE_HEADER
from isthmus.context import Context
from isthmus.errors import HopError, RequestMalformed
from isthmus.pipeline import Result
from isthmus.routing.attempts import Attempts, GenerationRoute, RouteChange
from isthmus.routing.candidates import RouteCandidate, ServedModel
from isthmus.routing.estimates import Estimates
from isthmus.routing.exit_guard import ExitGuard
from isthmus.routing.fallback import FallbackChain, may_fall_back
from isthmus.routing.forecast import plan_drift
from isthmus.routing.readiness import ReadinessProber
from isthmus.routing.replicas import RoutedHop
from isthmus.routing.served_versions import ServedVersions
from isthmus.routing.state import ExitState, ModelState, RouterState
from isthmus.routing.warming import Warming

DEGRADED_HEADER = "Isthmus-Degraded"
# Below it, in an outage behind an exit, more requests would run the head in vain than would end there.
MIN_EARLY_SHARE = 0.5

Attempt = Callable[[RouteCandidate, Context], Result]


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
        self.own_work = estimates.own_work
        self._versions = ServedVersions([hop.name for hop in hops], estimates, log)
        self._fallbacks = FallbackChain(fallback)
        self.exits: ExitGuard | None = None
        self._prober = ReadinessProber([replica for hop in hops for replica in hop.watched], log)

    def run(
        self,
        model: ServedModel,
        context: Context,
        pin: str,
        attempt: Attempt,
        *,
        exact_only: bool = False,
        may_exit: bool = True,
    ) -> Result:
        """The result of `attempt` along the chosen candidate, or along a fallback where its hop is at fault.

        `pin` names the only candidate that may be taken; empty leaves the choice to the router. With `exact_only` no
        degraded candidate is taken where there are others. Without `may_exit` candidates come without their exits.

        Raises:
            RequestMalformed: no candidate has the name `pin`.
            DeadlineExceeded: the deadline passed before any attempt.
            As `attempt` for the last candidate tried.
        """
        candidates = _pinned(model, pin)
        if not may_exit:
            candidates = tuple(candidate.full() for candidate in candidates)
        # Later photos of a batch may come after it; an attempt begins with decoding a photo.
        context.deadline.check("a route was taken")
        if not model.route.name:  # a route beside the served ones, which their state must not know
            return attempt(candidates[0], context)
        attempts = self._attempts(model, candidates, context, exact_only=exact_only)
        chooser = attempts.chooser
        while True:
            chosen = attempts.candidate
            # Routes differ in their seconds: the adaptive concurrency limit compares requests of one route.
            describe_work(f"{model.digest} {chosen.name}")
            began = time.monotonic()
            try:
                with chooser.running(chosen):
                    result = attempt(chosen, attempts.limited(context))
            except HopError as e:
                if not may_fall_back(e):
                    raise
                fallback = attempts.fall_back(e, self._tier(e), context.deadline.remaining())
                if fallback is None:
                    raise
                self._log_fallback(RouteChange(chosen, fallback, e, context))
                continue
            self._learn(chosen, result, time.monotonic() - began)
            return replace(result, route=chosen.name, degraded=chosen.degradation)

    def generation(self, model: ServedModel, context: Context, pin: str) -> GenerationRoute:
        """The route of a generation along the chosen candidate, as `run`; exact candidates alone where there are any.

        Its steps are in no account of outstanding work, and no route is explored: a plan's seconds are not those of a
        generation, whose length nobody knows, and a generation keeps its route for all of it.

        Raises:
            RequestMalformed, DeadlineExceeded: as `run`.
        """
        candidates = _pinned(model, pin)
        context.deadline.check("a route was taken")
        attempts = self._attempts(model, candidates, context, exact_only=True, may_explore=False)
        chooser = attempts.chooser
        chooser.took(attempts.candidate)

        def fell_back(change: RouteChange) -> None:
            chooser.took(change.candidate)
            self._log_fallback(change)

        return GenerationRoute(attempts, self._tier, fell_back)

    def _attempts(
        self,
        model: ServedModel,
        candidates: Sequence[RouteCandidate],
        context: Context,
        *,
        exact_only: bool,
        may_explore: bool = True,
    ) -> Attempts:
        if exact_only:
            candidates = tuple(c for c in candidates if not c.degradation) or candidates
        return Attempts(
            candidates,
            self._versions.chooser(model),
            self._fallbacks,
            partial(self._answering, loaded=self._warming.loaded(model)),
            left_s=context.deadline.remaining(),
            may_explore=may_explore,
        )

    def _tier(self, error: HopError) -> str:
        return self._tiers.get(error.facts.get("hop", ""), "")

    def _learn(self, chosen: RouteCandidate, result: Result, seconds: float) -> None:
        # Not of closer looks, which the forecast of a request has not either.
        encode_s = sum(run.encode_s for run in result.runs[: result.segments])
        self.own_work.named((result.preprocess_s or 0.0) + encode_s)
        learnt = None if result.is_early else encode_s
        self._estimates.answered(chosen.route.digest, chosen.name, seconds, result.preprocess_s, learnt)

    def met_exit(self, chosen: RouteCandidate, *, is_early: bool) -> None:
        """Learn whether a request along a candidate ended at its exit; no-op without one.

        Also of a request that found no response behind it: else an outage would seem to make every request early.
        """
        if chosen.route.exit is not None and chosen.name:
            self._estimates.met_exit(chosen.route.digest, chosen.name, chosen.exit_share, is_early=is_early)

    def close(self) -> None:
        """End the threads of the dispatcher."""
        self._warming.close()
        self._versions.close()
        self._prober.close()

    def state(self) -> RouterState:
        """The present state of hops and models."""
        hops = tuple(replica.state() for hop in self._hops.values() for replica in hop.watched)
        return RouterState(hops, tuple(self._completed(*each) for each in self._versions.states()))

    def _completed(self, model: ServedModel, state: ModelState) -> ModelState:
        """The chooser's state of a version, and what the other parts of the router know of its candidates."""
        loaded = self._warming.state(model)
        candidates = tuple(
            structs.replace(
                shown,
                loaded=shown.name in loaded,
                measured_s=self._estimates.whole_s(candidate.route.digest, candidate.name),
                drift=plan_drift(candidate, self._estimates),
                exit=self._exit_state(candidate),
            )
            for shown, candidate in zip(state.candidates, model.candidates, strict=True)
        )
        return structs.replace(state, candidates=candidates)

    def _exit_state(self, candidate: RouteCandidate) -> ExitState | None:
        if self.exits is None or candidate.route.exit is None:
            return None
        share = self._estimates.exit_share(candidate.route.digest, candidate.name, candidate.exit_share)
        return self.exits.state(candidate.route, share)

    def _answering(self, candidates: Sequence[RouteCandidate], *, loaded: frozenset[str]) -> Sequence[RouteCandidate]:
        """The candidates whose breakers allow a call; of these the loaded ones, if any."""
        allowed = {name for name, hop in self._hops.items() if hop.allows()}
        reached = {c.name for c in candidates if allowed.issuperset(c.hops)}
        # Of a hop that is away nobody knows whether it has the segments behind the exit still in memory.
        early = {c.name for c in candidates if c.name not in reached and self._ends_early(c, allowed)}
        answering = [c for c in candidates if c.name in reached or c.name in early]
        return [c for c in answering if c.name in loaded or c.name in early] or answering

    def _ends_early(self, candidate: RouteCandidate, allowed: AbstractSet[str]) -> bool:
        """Whether most requests of a candidate do without the hops behind its exit; the others take another route."""
        if candidate.route.exit is None or candidate.hops[0] not in allowed:
            return False
        met = self._exit_state(candidate)
        return met is not None and not met.closed and met.share >= MIN_EARLY_SHARE

    def _log_fallback(self, change: RouteChange) -> None:
        chosen, other, error = change.failed.name, change.candidate.name, change.error
        reason = type(error).__name__
        facts = {"from": chosen, "to": other, "type": reason, "error": error.message}
        facts |= {"call_id": change.context.call_id, "hop": error.facts.get("hop", "")}
        self._log.info("%s takes over from %s: %s", other, chosen, reason, extra={"facts": facts})


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
