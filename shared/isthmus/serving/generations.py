"""Generations of a router: the route by the dispatcher, deadlines by the settings, metrics and spans."""

from __future__ import annotations

import time
from collections import abc
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from isthmus.admission import describe_varying_work
from isthmus.context import Context, Deadline, Headers, parse_timeout, working_time
from isthmus.errors import HopError
from isthmus.generation.generator import Generator
from isthmus.generation.policy import GenerationPolicy
from isthmus.generation.request import Generated, GenerationRequest, Proposer
from isthmus.generation.speculation import edge_proposer
from isthmus.pipeline import Route
from isthmus.processing.sampling import SampledToken
from isthmus.routing import ROUTE_HEADER, Dispatcher, GenerationRoute, RouteCandidate, ServedModel
from isthmus.serving.generation_metrics import GenerationMetrics
from isthmus.settings import RouterSettings

if TYPE_CHECKING:
    from isthmus.serving.app import FunctionApp
    from isthmus.serving.drafts import Drafts
    from isthmus.serving.tracing import Tracing


@dataclass(frozen=True)
class _Services:
    """What the generations of a router share."""

    policy: GenerationPolicy
    metrics: GenerationMetrics
    tracing: Tracing | None


class Generations:
    """Begins generations; one for all models of a router."""

    def __init__(
        self,
        app: FunctionApp,
        settings: RouterSettings,
        dispatcher: Dispatcher,
        metrics: GenerationMetrics,
        drafts: Drafts | None = None,
    ) -> None:
        self._longest_s, self._dispatcher, self._drafts = settings.longest_generation_s, dispatcher, drafts
        policy = GenerationPolicy(
            silence_s=settings.generation_silence_s,
            replay_bytes=settings.replay_bytes,
            memory=metrics.memory,
        )
        self._services = _Services(policy, metrics, app.tracing)
        app.closing.callback(policy.ender.close)

    def begin(
        self,
        model: ServedModel,
        request: GenerationRequest,
        context: Context,
        headers: Headers,
    ) -> RunningGeneration:
        """A generation along the route that the router, or the header Isthmus-Route, chooses.

        Its deadline is its own: the context's is for requests of a single pass.

        Raises:
            RequestMalformed: no route has the name in the header, or X-Timeout is no duration.
        """
        timeout, seconds = headers.get("X-Timeout", ""), self._longest_s
        if timeout:
            seconds = min(seconds, working_time(parse_timeout(timeout)))
        context = replace(context, deadline=Deadline.after(seconds))
        describe_varying_work()
        routed = self._dispatcher.generation(model, context, headers.get(ROUTE_HEADER, ""))
        draft = None if self._drafts is None else self._drafts.of(model, request, context)
        proposer = edge_proposer() if draft is None else edge_proposer(draft)
        running = RunningGeneration(model, request, context, routed, proposer, self._services)
        if draft is not None:
            running.closing.callback(draft.end, self._services.policy.ender)
        return running


class RunningGeneration:
    """A generation: its tokens, and the facts of its route and progress."""

    def __init__(
        self,
        model: ServedModel,
        request: GenerationRequest,
        context: Context,
        routed: GenerationRoute,
        proposer: Proposer,
        services: _Services,
    ) -> None:
        self.done = Generated()
        self.closing = ExitStack()
        self._model, self._request, self._context, self._routed = model, request, context, routed
        self._proposer, self._services = proposer, services

    @property
    def candidate(self) -> RouteCandidate:
        """The route in force."""
        return self._routed.candidate

    def tokens(self) -> abc.Generator[SampledToken, None, None]:
        """The tokens as they come; closing the iterator ends the session at every function.

        Raises:
            As `Generator.run`.
        """
        tracing, metrics, context = self._services.tracing, self._services.metrics, self._context
        span, context = (None, context) if tracing is None else tracing.generation(self._model, context)
        rerouting = _TracedRerouting(self._routed, tracing)
        route = rerouting.traced(self.candidate.route, context)
        generator = Generator(route, rerouting, self._proposer, self._services.policy)
        metrics.began(len(self._request.prompt))
        outcome, error, seconds = "left", "", 0.0
        steps = generator.run(self._request, context, self.done)
        try:
            while True:
                began = time.perf_counter()
                token = next(steps, None)
                seconds += time.perf_counter() - began
                if token is None:
                    break
                yield token
            outcome = self.done.finish
        except Exception as e:
            # The call under way fails as its reader leaves: nobody's fault.
            if context.abandonment is None or not context.abandonment.is_abandoned:
                outcome, error = "failed", type(e).__name__
            raise
        finally:
            steps.close()
            self.closing.close()
            metrics.ended(self.done, seconds, outcome=outcome)
            if span is not None and tracing is not None:
                tracing.end_generation(span, self._facts(), error)

    def _facts(self) -> dict[str, int | float | str]:
        done = self.done
        return {
            "isthmus.route": self.candidate.name,
            "isthmus.prompt_tokens": len(self._request.prompt),
            "isthmus.tokens": len(done.tokens),
            "isthmus.steps": done.steps,
            "isthmus.first_token_ms": round(done.first_token_s * 1000, 3),
            "isthmus.recoveries": done.recoveries,
            "isthmus.replayed_positions": done.replayed,
            "isthmus.finish": done.finish,
        }


class _TracedRerouting:
    """The routes of a generation, with spans for some of their calls where the function has traces."""

    def __init__(self, routed: GenerationRoute, tracing: Tracing | None) -> None:
        self._routed, self._tracing = routed, tracing

    def traced(self, route: Route, context: Context) -> Route:
        """The route with spans for some of its calls."""
        return route if self._tracing is None else self._tracing.steps(route, context)

    def limited(self, context: Context, expected_s: float | None) -> Context:
        """See `Rerouting.limited`."""
        return self._routed.limited(context, expected_s)

    def instead(self, error: HopError, context: Context) -> Route | None:
        """See `Rerouting.instead`."""
        other = self._routed.instead(error, context)
        return None if other is None else self.traced(other, context)
