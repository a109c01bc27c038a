"""OpenTelemetry traces by OTLP over HTTP: a span for each request, each route tried and each call of a hop.

The module is imported only where OpenTelemetry's variables name a receiver: without it a request pays for a comparison.
Spans hold names, sizes, times and classes of errors, never payloads.

Source: W3C Trace Context; OpenTelemetry's semantic conventions for HTTP and messaging.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import requests
from opentelemetry.context import Context as SpanContext
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

import isthmus
from isthmus.context import Context, Deadline, Headers
from isthmus.errors import IsthmusError
from isthmus.http.pool import is_url
from isthmus.serving.request import Timings

if TYPE_CHECKING:  # segment functions load neither routing nor events
    from isthmus.events.message import Message
    from isthmus.events.processing import MessageHandler
    from isthmus.events.route import RouterReply
    from isthmus.pipeline import Result, Route
    from isthmus.pipeline.hop import Hop, HopReply
    from isthmus.routing import Attempt, RouteCandidate, ServedModel
    from isthmus.wire.frame import Frame

Attributes = Mapping[str, AttributeValue | None]

# The process ends soon after SIGTERM; spans of the last requests must not wait for the processor's five seconds.
DRAIN_PERIOD_S = 0.5
# The end of a process does not wait for a receiver that is away.
MAX_CLOSE_S = 2.0
# A receiver that is away fails every batch: a line a minute says so.
MAX_SILENCE_S = 60.0
# Texts in spans come from registries and brokers.
MAX_TEXT = 200
# Of the calls of a generation at each hop: so many first ones have spans, and then one of so many.
MAX_FIRST_STEPS, TRACED_STEPS = 8, 64
# Stages of a request in its span; closer looks add four each.
MAX_STAGES = 32
_REQUEST_NAMES = {"in_bytes": "http.request.body.size", "out_bytes": "http.response.body.size"}
_PROPAGATOR = TraceContextTextMapPropagator()


class Tracing:
    """The spans of a function. Variables of the environment, OTEL_*, configure the SDK; `service` is a default name."""

    def __init__(self, service: str, log: logging.Logger) -> None:
        sdk_log = logging.getLogger("opentelemetry")
        sdk_log.setLevel(logging.NOTSET)
        self._provider = TracerProvider(resource=_resource(service), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(_ReportingExporter(log)))
        # The SDK has told what it thinks of its settings. From now on it would log a line for every failed batch.
        sdk_log.setLevel(logging.CRITICAL)
        self._tracer = self._provider.get_tracer("isthmus", isthmus.__version__)
        self._closed = threading.Event()

    def begin(self, method: str, route: str, context: Context, headers: Headers) -> tuple[Span, Context]:
        """The span of a request to a path's `route`, and the context in which its calls are made.

        The caller's span is the parent; a request without a valid trace begins one.
        """
        # The ids alone: the context has normalised the version and the flags.
        is_sent = headers.get("traceparent", "")[3:52] == context.traceparent[3:52]
        parent = _parent(context) if is_sent else SpanContext()
        names = {"http.request.method": method, "http.route": route, "isthmus.call_id": context.call_id}
        span = self._tracer.start_span(f"{method} {route}", parent, SpanKind.SERVER, names)
        return span, _within(span, context)

    def end(self, span: Span, status: int, facts: Mapping[str, str | float | None], timings: Timings) -> None:
        """End the span of a request with the facts of its log line, and the times of its first stages."""
        if span.is_recording():
            own = {_REQUEST_NAMES.get(name, f"isthmus.{name}"): value for name, value in facts.items()}
            stages = {f"isthmus.{stage}_ms": round(s * 1000, 3) for stage, s, _ in timings.stages[:MAX_STAGES]}
            describe(span, {**own, **stages, "http.response.status_code": status})
            if status >= 500:
                fail(span, str(facts.get("error") or status))
        span.end()

    def attempt(self, model: ServedModel, context: Context, attempt: Attempt) -> Attempt:
        """`attempt` with a span for each route that is tried, and for each call of a hop along the route.

        Where the request is not sampled, neither is any part of it.
        """
        if not is_sampled(context):
            return attempt

        def traced(candidate: RouteCandidate, context: Context) -> Result:
            names = {"isthmus.model": model.name, "isthmus.version": model.version, "isthmus.route": candidate.name}
            with self._span(f"route {candidate.name}"[:MAX_TEXT], context, SpanKind.INTERNAL, names) as (_, within):
                hops = tuple(_TracedHop(hop, self) for hop in candidate.route.hops)
                return attempt(replace(candidate, route=replace(candidate.route, hops=hops)), within)

        return traced

    def generation(self, model: ServedModel, context: Context) -> tuple[Span, Context]:
        """The span of a generation, and the context in which its steps are made; `end_generation` ends it."""
        span = self._tracer.start_span(f"generate {model.name}"[:MAX_TEXT], _parent(context), SpanKind.INTERNAL)
        describe(span, {"isthmus.model": model.name, "isthmus.version": model.version})
        return span, _within(span, context)

    def end_generation(self, span: Span, facts: Attributes, error: str) -> None:
        """End the span of a generation."""
        if span.is_recording():
            describe(span, facts)
            if error:
                fail(span, error)
        span.end()

    def steps(self, route: Route, context: Context) -> Route:
        """The route with spans for some calls of a generation's steps: its first ones, and then a few."""
        if not is_sampled(context):
            return route
        return replace(route, hops=tuple(_SparselyTracedHop(hop, self) for hop in route.hops))

    def call(self, hop: Hop, frame: Frame, context: Context) -> HopReply:
        """Call a hop in a span of its own."""
        kind = SpanKind.CLIENT if hop.encodes else SpanKind.INTERNAL
        names: dict[str, AttributeValue | None] = {
            "isthmus.hop": hop.name,
            "isthmus.bundle": frame.bundle,
            "isthmus.segment": frame.segment,
        }
        if hop.encodes:
            # A tier of several replicas has no single URL.
            names |= {"http.request.method": "POST", "url.full": hop.name if is_url(hop.name) else None}
        with self._span(f"segment {frame.segment}"[:MAX_TEXT], context, kind, names) as (span, within):
            reply = hop.call(frame, within)
            if span.is_recording():
                describe(span, _call_facts(reply))
            return reply

    def handler(self, inner: MessageHandler) -> MessageHandler:
        """`inner` with a span for each message that the router is given, in the trace of the message."""
        return _TracedHandler(inner, self)

    def message(self, message: Message, call: Callable[[Message], RouterReply]) -> RouterReply:
        """Have the router serve a message, in a span of its own."""
        traced = {name: message.headers.get(name, "") for name in ("traceparent", "tracestate")}
        context = Context.from_headers(traced, longest_s=0.0)
        names: dict[str, AttributeValue | None] = {
            "messaging.operation.type": "process",
            "messaging.message.id": message.id,
            "messaging.destination.name": message.source,
            "messaging.message.body.size": len(message.body),
        }
        with self._span("process", context, SpanKind.CONSUMER, names) as (span, within):
            headers = {**message.headers, "traceparent": within.traceparent, "tracestate": within.tracestate}
            reply = call(replace(message, headers={name: text for name, text in headers.items() if text}))
            describe(span, {"isthmus.outcome": reply.outcome.value, "http.response.status_code": reply.status or None})
            return reply

    def drain(self) -> None:
        """Send spans at once from now on, until the process ends or `close` is called; blocks."""
        while not self._closed.wait(DRAIN_PERIOD_S):
            self._provider.force_flush()

    def close(self) -> None:
        """Send what there is, for at most MAX_CLOSE_S seconds."""
        self._closed.set()
        # The SDK waits for the receiver as long as the batch may take.
        end = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        end.start()
        end.join(MAX_CLOSE_S)

    @contextmanager
    def _span(self, name: str, context: Context, kind: SpanKind, names: Attributes) -> Iterator[tuple[Span, Context]]:
        span = self._tracer.start_span(name, _parent(context), kind)
        describe(span, names)
        try:
            yield span, _within(span, context)
        except Exception as e:
            fail(span, type(e).__name__)
            if isinstance(e, IsthmusError):
                describe(span, {"http.response.status_code": e.facts.get("status")})
            raise
        finally:
            span.end()


class _TracedHop:
    """A hop whose calls have spans."""

    def __init__(self, inner: Hop, tracing: Tracing) -> None:
        self.name, self.encodes = inner.name, inner.encodes
        self._inner, self._tracing = inner, tracing

    def call(self, frame: Frame, context: Context) -> HopReply:
        """See `Hop.call`."""
        return self._tracing.call(self._inner, frame, context)

    def end_session(self, session: str, deadline: Deadline) -> None:
        """See `SessionHop.end_session`."""
        # Late, as other functions have traces and no hops.
        from isthmus.pipeline.hop import SessionHop

        if isinstance(self._inner, SessionHop):
            self._inner.end_session(session, deadline)

    def close(self) -> None:
        """No-op: the hop belongs to the router."""


class _SparselyTracedHop(_TracedHop):
    """A hop of a generation: a text of 2,000 tokens must not become 4,000 spans, here and in the functions."""

    def __init__(self, inner: Hop, tracing: Tracing) -> None:
        super().__init__(inner, tracing)
        self._calls = 0

    def call(self, frame: Frame, context: Context) -> HopReply:
        """See `Hop.call`; without a span of its own the function is told not to record either."""
        self._calls += 1
        if self._calls <= MAX_FIRST_STEPS or self._calls % TRACED_STEPS == 0:
            return super().call(frame, context)
        return self._inner.call(frame, replace(context, traceparent=f"{context.traceparent[:53]}00"))


class _TracedHandler:
    """A handler of messages whose calls have spans."""

    def __init__(self, inner: MessageHandler, tracing: Tracing) -> None:
        self._inner, self._tracing = inner, tracing

    def call(self, message: Message, wait_s: int | None = None) -> RouterReply:
        """See `MessageHandler.call`."""
        return self._tracing.message(message, lambda within: self._inner.call(within, wait_s))


def is_sampled(context: Context) -> bool:
    """Whether somebody records the trace. Source: W3C Trace Context, "trace-flags"."""
    return int(context.traceparent[53:55], 16) % 2 == 1


def describe(span: Span, attributes: Attributes) -> None:
    """Set attributes; None is left out, and texts are bounded."""
    span.set_attributes(
        {n: v[:MAX_TEXT] if isinstance(v, str) else v for n, v in attributes.items() if v is not None and v != ""}
    )


def fail(span: Span, error: str) -> None:
    """Mark a span as failed, by the class of the error alone: messages may quote what a caller sent."""
    span.set_status(StatusCode.ERROR)
    span.set_attribute("error.type", error)


def _call_facts(reply: HopReply) -> Attributes:
    sizes = {
        "isthmus.sent_bytes": reply.sent_bytes or None,
        "isthmus.received_bytes": reply.received_bytes or None,
    }
    seconds = {"run": reply.run_s, "decode": reply.decode_s, "wait": reply.served.wait_s, "load": reply.served.load_s}
    return {**sizes, **{f"isthmus.{stage}_ms": round(s * 1000, 3) for stage, s in seconds.items() if s}}


def _parent(context: Context) -> SpanContext:
    headers = {"traceparent": context.traceparent, "tracestate": context.tracestate}
    return _PROPAGATOR.extract({name: text for name, text in headers.items() if text})


def _within(span: Span, context: Context) -> Context:
    """The context in which `span` is the parent."""
    headers: dict[str, str] = {}
    _PROPAGATOR.inject(headers, set_span_in_context(span, SpanContext()))
    return replace(
        context,
        traceparent=headers.get("traceparent", context.traceparent),
        tracestate=headers.get("tracestate", ""),
    )


def _resource(service: str) -> Resource:
    """What the SDK knows of the process; a name in the environment is kept."""
    given = OTELResourceDetector().detect().attributes
    name = {} if SERVICE_NAME in given else {SERVICE_NAME: service}
    return Resource.create({**name, SERVICE_VERSION: isthmus.__version__})


class _Session(requests.Session):
    """Connections to the receiver, as the other connections of a function: no proxy and no .netrc are read."""

    reason = ""

    def __init__(self) -> None:
        super().__init__()
        self.trust_env = False
        self.hooks["response"].append(self._note)

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        """See `requests.Session.send`; notes why the receiver was not reached."""
        try:
            return super().send(request, **options)
        except requests.RequestException as e:
            self.reason = type(e).__name__
            raise

    def _note(self, response: requests.Response, **_: object) -> None:
        self.reason = f"status {response.status_code}"


class _ReportingExporter(SpanExporter):
    """The exporter by OTLP, with a line a minute at most while spans are lost."""

    def __init__(self, log: logging.Logger) -> None:
        self._log, self._session = log, _Session()
        self._inner = OTLPSpanExporter(session=self._session)
        self._lost, self._told_at = 0, -MAX_SILENCE_S

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """See `SpanExporter.export`; one thread at a time calls."""
        result = self._inner.export(spans)
        if result is not SpanExportResult.SUCCESS:
            self._lost += len(spans)
            if time.monotonic() - self._told_at >= MAX_SILENCE_S:
                self._told_at = time.monotonic()
                facts = {"spans": self._lost, "reason": self._session.reason}
                self._log.warning("the receiver of traces does not take them", extra={"facts": facts})
                self._lost = 0
        return result

    def shutdown(self) -> None:
        """See `SpanExporter.shutdown`."""
        self._inner.shutdown()  # type: ignore[no-untyped-call]

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """See `SpanExporter.force_flush`; True, as nothing waits here."""
        return True
