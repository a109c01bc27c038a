"""The base of every function's app: JSON errors, admission, deadlines, timings, metrics and readiness."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from flask import Flask, Response, g, jsonify, request

from isthmus.admission import MemoryBudget, Reservation, Slots
from isthmus.context import CURRENT, Context, Deadline, working_on
from isthmus.errors import IsthmusError, NotReady, SettingsError
from isthmus.retries import log_retries
from isthmus.serving.access import ADMITTED, Access, AdmittedCaller, challenges
from isthmus.serving.content_coding import compress, decompress
from isthmus.serving.error_responses import ErrorRenderer
from isthmus.serving.metrics import FunctionMetrics
from isthmus.serving.request import FunctionRequest, Timings, caller_of, read_body
from isthmus.serving.request_log import identify_requests, log_request
from isthmus.serving.route_roles import TABLES, Need
from isthmus.settings import FunctionSettings, wants_traces

if TYPE_CHECKING:  # a function without traces never loads the SDK
    from isthmus.serving.tracing import Tracing

Handle = Callable[[FunctionRequest], Response]
# Short enough that a function is ready soon after the registry is; a registry that stays away is asked rarely.
_FIRST_WAIT_S, _MAX_WAIT_S = 0.5, 15.0


class Readiness:
    """Runs `prepare` in a thread until the first success; before that, `check` refuses.

    The process does not end where the registry is down or a model is not published yet, since the platform would
    restart into the same state. Failures are logged, stated in the 503 responses, and tried again.
    """

    def __init__(self, prepare: Callable[[], None], log: logging.Logger) -> None:
        self._prepare = prepare
        self._log = log
        self._ready, self._closed = threading.Event(), threading.Event()
        self._reason, self._hint = "loading", ""
        self._refusal: NotReady | None = None

    def start(self) -> None:
        """Start the thread; called once, after everything that `prepare` uses was created."""
        # A daemon: a registry that never answers must not hold up the end of the process.
        threading.Thread(target=self._run, name="prepare", daemon=True).start()

    def refuse(self, error: NotReady) -> None:
        """Refuse with `error` for good, in place of `start`."""
        self._refusal = error
        self._log.warning("not ready", extra={"facts": {"error": error.message, "hint": error.hint}})

    def close(self) -> None:
        """Stop trying; an attempt under way goes on to its end."""
        self._closed.set()

    @property
    def ready(self) -> bool:
        """Whether everything that the settings preload is loaded."""
        return self._ready.is_set()

    def check(self) -> None:
        """Refuse requests until the function is ready.

        Raises:
            NotReady: with the reason and the time to ask again.
        """
        if self._refusal is not None:
            raise self._refusal
        if not self._ready.is_set():
            raise NotReady(f"not ready: {self._reason}", retry_after_s=1, hint=self._hint)

    def _run(self) -> None:
        wait_s = _FIRST_WAIT_S
        while not self._closed.is_set():
            try:
                self._prepare()
            except IsthmusError as e:
                self._reason, self._hint = e.message, e.hint
                facts = {"error": e.message, "again_in_s": wait_s} | ({"hint": e.hint} if e.hint else {})
                self._log.warning("not ready", extra={"facts": facts})
            # Defects as well: without its thread the function would stay unready, with no reason in its responses.
            except Exception as e:
                self._reason, self._hint = "an unexpected error; the log has it", ""
                self._log.error("not ready: %s", type(e).__name__, exc_info=True)
            else:
                self._ready.set()
                self._log.info("ready")
                return
            # Not a sleep, so that `close` ends the wait.
            self._closed.wait(wait_s)
            wait_s = min(_MAX_WAIT_S, wait_s * 2)


class FunctionApp:
    """A Flask app, and the parts that its endpoints share."""

    def __init__(
        self,
        name: str,
        settings: FunctionSettings,
        prepare: Callable[[], None],
        needs: Mapping[str, Need] | None = None,
    ) -> None:
        self.flask = Flask(f"isthmus.{name}", static_folder=None)
        # Flask's place for such objects: whoever has the app can close it.
        self.flask.extensions["isthmus"] = self
        # No redirects: their target would lack the gateway's part, /function/NAME.
        self.flask.url_map.merge_slashes = self.flask.url_map.strict_slashes = False
        # The template owns the process and sets the format of log records.
        self.log = logging.getLogger("isthmus")
        self.log.setLevel(settings.log_level.upper())
        log_retries(self.log)
        identify_requests()
        self.metrics = FunctionMetrics()
        # longest_s is a property with arithmetic, and every request needs the number.
        self._settings, self._longest_s = settings, settings.longest_s
        self.slots = Slots(
            settings.max_concurrency, max_queued=settings.max_queued, adaptive=settings.adaptive_concurrency
        )
        self._expose_admission()
        self._memory = MemoryBudget(settings.working_bytes)
        self._access = Access(settings, TABLES[name] if needs is None else needs, self.log)
        self._access.warn()
        self._errors = ErrorRenderer(self.log, expose_details=settings.expose_details)
        self.readiness = Readiness(prepare, self.log)
        self.closing = ExitStack()
        self.observers: list[Callable[[EndedRequest, int], None]] = []
        """Called with each request whose response is complete, and its status."""
        self.tracing = _open_tracing(name, self.log)
        if self.tracing is not None:
            self.closing.callback(self.tracing.close)
        self.closing.callback(self.readiness.close)
        self.metrics.gauge(
            "isthmus_ready", "Whether the function is ready (1) or loading (0).", lambda: float(self.readiness.ready)
        )
        self.metrics.gauge(
            "isthmus_deadline_seconds", "Seconds that a request may take at most.", lambda: self._longest_s
        )
        self.flask.register_error_handler(Exception, self._failed)
        self.flask.before_request(self._begin)
        self.flask.after_request(self._end)
        self.flask.teardown_request(_forget_context)
        self.flask.add_url_rule("/ready", "ready", self.ready, methods=["GET"])
        self.flask.add_url_rule("/metrics", "metrics", self.exposition, methods=["GET"])

    def close(self) -> None:
        """End the threads of this app and close its connections; no further requests are served.

        For apps that share a process: the process of a function simply ends.
        """
        self.closing.close()

    def drain(self) -> None:
        """Prepare for the end of the process, which comes once the last requests are answered."""
        if self.tracing is not None:
            self.tracing.drain()

    def post(
        self,
        rule: str,
        handle: Callable[..., Response],
        endpoint: str,
        user_of: Callable[[bytes | memoryview], str] = lambda body: "",
    ) -> None:
        """Serve POST on `rule`: `handle(request, **path)` runs admitted, timed, within its deadline, once ready.

        `user_of` reads a name of the caller from a body, for requests without the header of `caller_header`.
        """

        def view(**path: str) -> Response:
            return self._handle(partial(handle, **path), user_of)

        self.flask.add_url_rule(rule, endpoint=endpoint, view_func=view, methods=["POST"])

    def _expose_admission(self) -> None:
        slots, metrics = self.slots, self.metrics
        metrics.in_flight.set_function(lambda: float(slots.working))
        metrics.gauge("isthmus_concurrency_limit", "Requests that may be worked on now.", lambda: float(slots.limit))
        metrics.gauge("isthmus_requests_queued", "Requests that wait to be worked on.", lambda: float(slots.queued))
        metrics.counts("isthmus_refused", "Requests that the queue refused, by reason.", "reason", slots.refused)

    def _handle(self, handle: Handle, user_of: Callable[[bytes | memoryview], str]) -> Response:
        context = Context.from_headers(request.headers, longest_s=self._longest_s)
        if caller := g.grant.caller.name:
            context = replace(context, caller=caller)
        if self.tracing is not None:
            route = request.url_rule.rule if request.url_rule is not None else ""
            g.span, context = self.tracing.begin(request.method, route, context, request.headers)
        g.context = context
        # Until the teardown: the lines of errors and of the response are this request's too.
        CURRENT.set(context)
        with ExitStack() as held:
            memory = held.enter_context(closing(Reservation(self._memory)))
            # Before admission: the server has the body in memory already, also where the request is refused.
            body = read_body(request.environ, self._settings.max_request_bytes)
            self.metrics.received.inc(len(body))
            memory.hold(len(body))
            caller = context.caller or caller_of(request.headers, self._settings.caller_header, partial(user_of, body))
            admitted = self.slots.admitted(context.deadline, caller=caller, work=_work(len(body)))
            g.timings.add("queue", held.enter_context(admitted))
            self.readiness.check()
            if coding := request.headers.get("Content-Encoding", ""):
                body = decompress(body, coding, memory, self._settings.max_request_bytes)
            response = handle(
                FunctionRequest(
                    body, request.headers, request.args, context, g.timings, memory, g.reply_headers, g.facts
                )
            )
            if response.is_streamed:
                # The work goes on while the body is sent: slot and memory are the request's until its end.
                response.call_on_close(held.pop_all().close)
            return response

    def ready(self) -> Response:
        """200 once everything that the settings preload is loaded, else 503 with the reason."""
        self.readiness.check()
        return jsonify(ready=True)

    def exposition(self) -> Response:
        """The metrics, in the format that Accept prefers."""
        body, content_type = self.metrics.expose(request.headers.get("Accept", ""))
        return Response(body, content_type=content_type)

    @contextmanager
    def unadmitted(self) -> Iterator[Deadline]:
        """The deadline of a request that needs no slot; its look-ups in the registry count as others' do."""
        context = Context.from_headers(request.headers, longest_s=self._longest_s)
        with working_on(context), self.slots.unadmitted(context.deadline):
            yield context.deadline

    def _begin(self) -> None:
        g.timings, g.context, g.error, g.span, g.grant = Timings(), None, "", None, None
        g.facts, g.reply_headers = {}, {}
        # Before the body is looked at; the server has it in memory already.
        g.grant = self._access.admit(request)
        ADMITTED.set(g.grant)

    def _failed(self, error: Exception) -> Response:
        g.error = type(error).__name__
        context: Context | None = g.context
        return self._errors.render(error, context.call_id if context is not None else "")

    def _end(self, response: Response) -> Response:
        """Add the headers common to all responses; count and log, a stream at its end."""
        context: Context | None = g.context
        grant: AdmittedCaller | None = g.grant
        for headers in (g.reply_headers, {} if grant is None else grant.headers):
            if headers:
                response.headers.update(headers)
        compress(response, request.headers.get("Accept-Encoding", ""))
        if response.status_code == 401:
            for challenge in challenges(request.headers, request.method):
                response.headers.add("WWW-Authenticate", challenge)
        self.metrics.count_caller("none" if grant is None else grant.caller.label, response.status_code)
        if context is not None:
            response.headers["Server-Timing"] = g.timings.header()
            response.headers["X-Call-Id"] = context.call_id
            response.headers["traceparent"] = context.traceparent
        # Unknown paths share a label: their texts are the callers', and would add metrics without bound.
        endpoint = request.endpoint or "none"
        ended = EndedRequest(endpoint, context, g.timings, g.facts, g.error, g.span, request.content_length)
        if response.is_streamed and context is not None:
            response.call_on_close(partial(self._count, ended, response))
        else:
            self._count(ended, response)
        return response

    def _count(self, ended: EndedRequest, response: Response) -> None:
        """Count a response, log it and end its span."""
        # Of a stream its handler states the bytes and an error, which come after the headers.
        size = int(ended.facts.get("out_bytes", response.content_length or 0))
        self.metrics.count_response(ended.endpoint, response.status_code, size, ended.timings)
        for observe in self.observers:
            observe(ended, response.status_code)
        if ended.context is None:
            return
        facts = {
            "error": ended.error,
            **ended.facts,
            "endpoint": ended.endpoint,
            "ms": round(ended.timings.elapsed() * 1000, 3),
            "in_bytes": ended.in_bytes,
            "out_bytes": size,
        }
        log_request(self.log, ended.context, response.status_code, facts)
        if self.tracing is not None and ended.span is not None:
            self.tracing.end(ended.span, response.status_code, facts, ended.timings)


class EndedRequest(NamedTuple):
    """A request whose response is complete, for its count, log line and span."""

    endpoint: str
    context: Context | None
    timings: Timings
    facts: dict[str, str]
    error: str
    span: Any
    in_bytes: int | None


def _open_tracing(function: str, log: logging.Logger) -> Tracing | None:
    """Traces as OpenTelemetry's variables say; None without a receiver, and where the packages are missing.

    Raises:
        SettingsError: a variable that the SDK does not take.
    """
    if not wants_traces(os.environ):
        return None
    try:
        from isthmus.serving.tracing import Tracing  # 100 ms, and 15 MB
    except ModuleNotFoundError as e:
        hint = "install isthmus[traces], or unset OTEL_EXPORTER_OTLP_ENDPOINT"
        log.warning("no traces: the package %s is missing", e.name, extra={"facts": {"hint": hint}})
        return None
    try:
        return Tracing(f"isthmus-{function}", log)
    except ValueError as e:  # a bound of queues or spans
        raise SettingsError(f"OpenTelemetry does not take a variable OTEL_*: {e}", variable="OTEL_*") from e


def _forget_context(_: BaseException | None) -> None:
    """Keep the ids of a request out of the lines that its thread logs afterwards, and its caller out of others'."""
    CURRENT.set(None)
    ADMITTED.set(None)


def _work(body_bytes: int) -> str:
    """A name of requests that take about the same time: endpoint, model, and size of the body to a factor of two."""
    path = request.view_args or {}
    parts = (request.endpoint or "", *path.values(), request.args.get("model", ""), body_bytes.bit_length())
    # Bounded: a caller chooses most of these.
    return " ".join(map(str, parts))[:200]
