"""What every function of Isthmus has: errors as JSON, a concurrency limit, deadlines, timings, metrics, readiness."""

from __future__ import annotations

import json
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from flask import Flask, Response, g, jsonify, request
from werkzeug.exceptions import HTTPException

from isthmus.context import Context
from isthmus.errors import IsthmusError, Overloaded, RequestMalformed, RequestTooLarge, http_status
from isthmus.serving.metrics import Metrics
from isthmus.serving.readiness import Readiness
from isthmus.settings import SegmentSettings

RETRY_AFTER_S = 1
_NOT_IN_A_TIMING = re.compile(r"[^\w.-]", re.ASCII)


@dataclass
class Timings:
    """The stages of one request, in order, for Server-Timing and the histogram."""

    began: float = field(default_factory=time.perf_counter)
    stages: list[tuple[str, float, str]] = field(default_factory=list)

    def add(self, stage: str, seconds: float, description: str = "") -> None:
        """Note that `stage` took that long."""
        self.stages.append((stage, seconds, description))

    def header(self) -> str:
        """Source: W3C Server Timing; durations in milliseconds."""
        stages = (*self.stages, ("total", time.perf_counter() - self.began, ""))
        return ", ".join(f"{name}{_described(desc)};dur={seconds * 1000:.3f}" for name, seconds, desc in stages)


@dataclass(frozen=True)
class Work:
    """One admitted request: its body, its context, and where it notes its timings."""

    body: bytes
    context: Context
    timings: Timings


class FunctionApp:
    """A Flask app, and the parts that its endpoints share."""

    def __init__(self, name: str, settings: SegmentSettings, prepare: Callable[[], None]) -> None:
        self.flask = Flask(f"isthmus.{name}", static_folder=None)
        # No redirects: they would lead to a URL that lacks the gateway's part, /function/NAME.
        self.flask.url_map.merge_slashes = self.flask.url_map.strict_slashes = False
        # The template, which owns the process, says how a record is written.
        self.log = logging.getLogger("isthmus")
        self.log.setLevel(settings.log_level.upper())
        self.metrics = Metrics()
        self._settings = settings
        self._slots = threading.BoundedSemaphore(settings.max_concurrency)
        self.readiness = Readiness(prepare, self.log)
        self.metrics.gauge("isthmus_ready", "Whether the function is ready (1) or loading (0).", self._ready)
        self.flask.register_error_handler(IsthmusError, self._known)
        self.flask.register_error_handler(HTTPException, self._http)
        self.flask.register_error_handler(Exception, self._unexpected)
        self.flask.before_request(self._begin)
        self.flask.after_request(self._end)
        self.flask.add_url_rule("/ready", "ready", self.ready, methods=["GET"])
        self.flask.add_url_rule("/metrics", "metrics", self.exposition, methods=["GET"])

    def work(self, rule: str, handle: Callable[..., Response], endpoint: str) -> None:
        """Serve POST on `rule`: `handle(work, **path)` runs admitted, timed, within its deadline, once ready."""

        def view(**path: str) -> Response:
            context = Context.from_headers(request.headers, longest_s=self._settings.deadline_s)
            g.context = context
            body = self._body()
            if not self._slots.acquire(blocking=False):
                raise Overloaded(
                    f"{self._settings.max_concurrency} requests are under way; that is the limit",
                    retry_after_s=RETRY_AFTER_S,
                )
            try:
                self.metrics.in_flight.inc()
                self.readiness.check()
                return handle(Work(body, context, g.timings), **path)
            finally:
                self.metrics.in_flight.dec()
                self._slots.release()

        self.flask.add_url_rule(rule, endpoint=endpoint, view_func=view, methods=["POST"])

    def ready(self) -> Response:
        """200 once everything that was asked for at start is loaded, else 503 with the reason."""
        self.readiness.check()
        return jsonify(ready=True)

    def exposition(self) -> Response:
        """The metrics, in the format that Accept prefers."""
        body, content_type = self.metrics.expose(request.headers.get("Accept", ""))
        return Response(body, content_type=content_type)

    def _body(self) -> bytes:
        limit = self._settings.max_request_bytes
        length = request.content_length
        if length is not None and length > limit:
            raise RequestTooLarge(f"the body has {length} bytes; at most {limit} are taken", limit=limit)
        if length is None and not request.environ.get("wsgi.input_terminated"):
            length = 0  # neither a length nor chunks: such a request has no body, and reading would wait for one
        # The server has buffered the whole body, so this is one copy; werkzeug's own stream reads in small pieces.
        body: bytes = request.environ["wsgi.input"].read(limit + 1 if length is None else length)
        if length is not None and len(body) < length:
            raise RequestMalformed(f"the body ended after {len(body)} of {length} bytes")
        if len(body) > limit:
            raise RequestTooLarge(f"the body has more than {limit} bytes", limit=limit)
        self.metrics.received.inc(len(body))
        return body

    def _ready(self) -> float:
        return float(self.readiness.ready)

    def _begin(self) -> None:
        g.timings = Timings()

    def _end(self, response: Response) -> Response:
        timings: Timings = g.timings
        took = time.perf_counter() - timings.began
        endpoint = request.endpoint or "none"
        size = response.content_length or 0
        self.metrics.answered(endpoint, response.status_code, took, size)
        for name, seconds, _ in timings.stages:
            self.metrics.stage(name).observe(seconds)
        context: Context | None = g.get("context")
        if context is not None:
            response.headers["Server-Timing"] = timings.header()
            response.headers["X-Call-Id"] = context.call_id
            response.headers["traceparent"] = context.traceparent
            # The watchdog writes a line for every request already.
            level = logging.DEBUG if response.status_code < 400 else logging.INFO
            if self.log.isEnabledFor(level):
                self.log.log(
                    level,
                    "request",
                    extra={
                        "facts": {
                            "endpoint": endpoint,
                            "status": response.status_code,
                            "ms": round(took * 1000, 3),
                            "in_bytes": request.content_length,
                            "out_bytes": size,
                            **({"error": g.error} if "error" in g else {}),
                            "call_id": context.call_id,
                            "trace_id": context.traceparent[3:35],
                        }
                    },
                )
        return response

    def _known(self, error: IsthmusError) -> Response:
        status = http_status(error)
        g.error = type(error).__name__
        if status >= 500 and status != 503:
            self.log.error(
                error.message, extra={"facts": {"type": type(error).__name__, **error.facts}}, exc_info=status == 500
            )
        # Facts may hold what JSON has no form for; an error must not fail on them.
        response = Response(json.dumps(problem(error), default=str), status, content_type="application/json")
        if status in (429, 503):
            response.headers["Retry-After"] = str(math.ceil(error.facts.get("retry_after_s") or RETRY_AFTER_S))
        return response

    def _http(self, error: HTTPException) -> Response:
        """Flask's own refusals: no such path, no such method."""
        doc: dict[str, Any] = {"error": error.description or error.name, "type": type(error).__name__, "facts": {}}
        if error.code == 404:
            doc["facts"] = {"path": request.path, "exists": _paths(self.flask)}
        response = jsonify(doc)
        response.status_code = error.code or 500
        for name, value in error.get_headers():
            if name == "Allow":
                response.headers[name] = value
        return response

    def _unexpected(self, error: Exception) -> Response:
        """Our own fault: the caller gets an id to report, the log gets the rest."""
        self.log.error("unexpected: %s", type(error).__name__, exc_info=True)
        context: Context | None = g.get("context")
        facts = {"call_id": context.call_id} if context is not None else {}
        response = jsonify(error="an unexpected error; the function's log has it", type="InternalError", facts=facts)
        response.status_code = 500
        return response


def problem(error: IsthmusError) -> dict[str, Any]:
    """An error as the JSON body that every endpoint answers with; docs/api.md."""
    doc = {"error": error.message, "type": type(error).__name__, "facts": dict(error.facts)}
    if error.hint:
        doc["hint"] = error.hint
    return doc


def _paths(app: Flask) -> Iterable[str]:
    return sorted(rule.rule for rule in app.url_map.iter_rules())


def _described(text: str) -> str:
    """A timing's description; a segment's id comes from a manifest, and must not end the header's value or line."""
    return f';desc="{_NOT_IN_A_TIMING.sub("_", text)}"' if text else ""
