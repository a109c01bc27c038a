"""What every function of Isthmus has: errors as JSON, a concurrency limit, deadlines, timings, metrics, readiness."""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from io import BytesIO
from typing import TYPE_CHECKING, Any

from flask import Flask, Response, g, jsonify, request
from werkzeug.exceptions import HTTPException
from werkzeug.http import HTTP_STATUS_CODES
from werkzeug.sansio.utils import get_content_length
from werkzeug.wrappers import Request

from isthmus.admission import RETRY_AFTER_S, Slots
from isthmus.context import Context, Deadline
from isthmus.errors import EncodingUnsupported, IsthmusError, RequestMalformed, RequestTooLarge, http_status
from isthmus.retries import log_retries
from isthmus.serving.encodings import decoded, encoded
from isthmus.serving.exposure import problem
from isthmus.serving.memory import CountedMemory, Reservation
from isthmus.serving.metrics import Metrics
from isthmus.serving.readiness import Readiness
from isthmus.serving.work import Reply, RequestHeaders, Timings, Work
from isthmus.settings import SegmentSettings

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse

WsgiApp = Callable[..., Iterable[bytes]]
# What the template's server offers beyond WSGI: it sends memoryviews from where they lie, and calls what is in a list
# once the answer has been sent. It counts the bodies that it reads in a `Memory`, and says when the first byte came.
_TAKES_BUFFERS, _AFTER, _MEMORY = "isthmus.takes_buffers", "isthmus.after", "isthmus.memory"
_BEGAN = "isthmus.began"
_NO_QUERY: Mapping[str, str] = {}


Handle = Callable[[Work], Reply]


class FunctionApp:
    """A Flask app, and the parts that its endpoints share.

    A POST that does a function's work is looked up before Flask is asked and takes one way, through `_exchange`:
    measured, that saves 0.6 of the 1.9 ms of CPU that a frame of 150 kB costs a function. Flask has all the rest.
    """

    def __init__(self, name: str, settings: SegmentSettings, prepare: Callable[[], None]) -> None:
        self.flask = Flask(f"isthmus.{name}", static_folder=None)
        # No redirects: they would lead to a URL that lacks the gateway's part, /function/NAME.
        self.flask.url_map.merge_slashes = self.flask.url_map.strict_slashes = False
        # The template, which owns the process, says how a record is written.
        self.log = logging.getLogger("isthmus")
        self.log.setLevel(settings.log_level.upper())
        log_retries(self.log)
        self.metrics = Metrics()
        self._settings = settings
        self._slots = Slots(settings.max_concurrency)
        self.metrics.in_flight.set_function(lambda: float(self._slots.taken))
        self._memory = CountedMemory(settings.working_bytes)
        self._works: list[tuple[re.Pattern[str], str, Callable[..., Reply]]] = []
        self.readiness = Readiness(prepare, self.log)
        self.closing = ExitStack()
        self.closing.callback(self.readiness.close)
        self.metrics.gauge("isthmus_ready", "Whether the function is ready (1) or loading (0).", self._ready)
        self.flask.register_error_handler(IsthmusError, self._known)
        self.flask.register_error_handler(HTTPException, self._http)
        self.flask.register_error_handler(Exception, self._unexpected)
        self.flask.before_request(self._begin)
        self.flask.after_request(self._end)
        self.flask.add_url_rule("/ready", "ready", self.ready, methods=["GET"])
        self.flask.add_url_rule("/metrics", "metrics", self.exposition, methods=["GET"])
        self._routed: WsgiApp = self.flask.wsgi_app
        self.flask.wsgi_app = self._enter  # type: ignore[method-assign]  # Flask's own way to add a middleware

    def close(self) -> None:
        """End the threads of this app and close its connections; it takes no more requests.

        A function's process simply ends. This is for apps that live in a process with others.
        """
        self.closing.close()

    def work(self, rule: str, handle: Callable[..., Reply], endpoint: str) -> None:
        """Serve POST on `rule`: `handle(work, **path)` runs admitted, timed, within its deadline, once ready."""

        def view(**path: str) -> Response:
            reply = self._exchange(endpoint, partial(handle, **path), request.environ)
            g.counted = True
            return Response(b"".join(reply.parts), reply.status, dict(reply.headers))

        self._works.append((re.compile(re.sub(r"<(\w+)>", r"(?P<\1>[^/]+)", rule)), endpoint, handle))
        self.flask.add_url_rule(rule, endpoint=endpoint, view_func=view, methods=["POST"])

    def _enter(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] == "POST":
            for rule, endpoint, handle in self._works:
                if found := rule.fullmatch(environ["PATH_INFO"] or "/"):
                    reply = self._exchange(endpoint, partial(handle, **found.groupdict()), environ)
                    status = f"{reply.status} {HTTP_STATUS_CODES.get(reply.status, '')}"
                    size = str(sum(map(len, reply.parts)))
                    start_response(status, [*reply.headers.items(), ("Content-Length", size)])
                    if environ.get(_TAKES_BUFFERS):
                        return reply.parts  # type: ignore[return-value]
                    return [b"".join(reply.parts)]
        return self._routed(environ, start_response)

    def _exchange(self, endpoint: str, handle: Handle, environ: dict[str, Any]) -> Reply:
        """One request's life: its context and body, its slot, the work, and whatever came of it, counted and told."""
        timings = Timings()
        headers = RequestHeaders(environ)
        later: list[Callable[[], None]] = []
        context: Context | None = None
        error = ""
        memory = Reservation(environ.get(_MEMORY) or self._memory)
        try:
            began = environ.get(_BEGAN)
            context = Context.from_headers(headers, longest_s=self._settings.longest_s, began=began)
            query = Request(environ).args if environ.get("QUERY_STRING") else _NO_QUERY
            body = self._body(environ)
            later.append(partial(self.metrics.received.inc, len(body)))
            if _MEMORY not in environ:
                memory.hold(len(body))
            if began is not None:
                context.deadline.check("the whole request had come")
            with self._slots.admitted(context.deadline):
                self.readiness.check()
                if coding := headers.get("Content-Encoding", ""):
                    body = decoded(body, coding, memory, self._settings.max_request_bytes)
                reply = handle(Work(body, headers, query, context, timings, later, memory))
        except IsthmusError as e:
            error, reply = type(e).__name__, self._refusal(e, context)
        except Exception as e:
            error, reply = type(e).__name__, self._failure(e, context)
        finally:
            memory.close()
        reply = _compressed(reply, headers.get("Accept-Encoding", ""))
        later.append(partial(self._tell, endpoint, reply, environ, timings, timings.since(), context, error))
        if (after := environ.get(_AFTER)) is not None:
            after.extend(later)
        else:
            for call in later:
                call()
        if context is None:
            return reply
        about = {
            "Server-Timing": timings.header(),
            "X-Call-Id": context.call_id,
            "traceparent": context.traceparent,
        }
        return Reply(reply.body, {**reply.headers, **about}, reply.status)

    def _tell(
        self,
        endpoint: str,
        reply: Reply,
        environ: Mapping[str, Any],
        timings: Timings,
        took: float,
        context: Context | None,
        error: str,
    ) -> None:
        """Count an answer, and log it."""
        size = sum(map(len, reply.parts))
        self.metrics.answered(endpoint, reply.status, took, size)
        for name, seconds, _ in timings.stages:
            self.metrics.stage(name).observe(seconds)
        # The watchdog writes a line for every request already.
        level = logging.DEBUG if reply.status < 400 else logging.INFO
        if context is not None and self.log.isEnabledFor(level):
            facts = {
                "endpoint": endpoint,
                "status": reply.status,
                "ms": round(took * 1000, 3),
                "in_bytes": environ.get("CONTENT_LENGTH"),
                "out_bytes": size,
                **({"error": error} if error else {}),
                "call_id": context.call_id,
                "trace_id": context.traceparent[3:35],
            }
            self.log.log(level, "request", extra={"facts": facts})

    def ready(self) -> Response:
        """200 once everything that was asked for at start is loaded, else 503 with the reason."""
        self.readiness.check()
        return jsonify(ready=True)

    def exposition(self) -> Response:
        """The metrics, in the format that Accept prefers."""
        body, content_type = self.metrics.expose(request.headers.get("Accept", ""))
        return Response(body, content_type=content_type)

    def _body(self, environ: dict[str, Any]) -> bytes | memoryview:
        limit = self._settings.max_request_bytes
        length = get_content_length(environ.get("CONTENT_LENGTH"), environ.get("HTTP_TRANSFER_ENCODING"))
        if length is not None and length > limit:
            raise RequestTooLarge(f"the body has {length} bytes; at most {limit} are taken", limit=limit)
        if length is None and not environ.get("wsgi.input_terminated"):
            length = 0  # neither a length nor chunks: such a request has no body, and reading would wait for one
        # The server has buffered the whole body; werkzeug's own stream would read it in small pieces. A BytesIO gives
        # its value without a copy, which `read` makes, and so does the template's server.
        stream = environ["wsgi.input"]
        body: bytes | memoryview
        if isinstance(stream, BytesIO) and stream.tell() == 0:
            body = stream.getvalue()
        elif hasattr(stream, "getbuffer") and stream.tell() == 0:
            body = stream.getbuffer()
        else:
            body = stream.read(limit + 1 if length is None else length)
        if length is not None and len(body) != length:
            raise RequestMalformed(f"the body has {len(body)} of {length} bytes")
        if len(body) > limit:
            raise RequestTooLarge(f"the body has more than {limit} bytes", limit=limit)
        return body

    @contextmanager
    def asking(self) -> Iterator[Deadline]:
        """The deadline of a request that does no work and may ask the registry, which counts as others' asking does."""
        deadline = Context.from_headers(request.headers, longest_s=self._settings.longest_s).deadline
        with self._slots.unadmitted(deadline):
            yield deadline

    def _ready(self) -> float:
        return float(self.readiness.ready)

    def _begin(self) -> None:
        g.began = time.perf_counter()

    def _end(self, response: Response) -> Response:
        """Count what did not go through `_exchange`: readiness, metrics, metadata, and paths that are not there."""
        if "counted" not in g:
            took = time.perf_counter() - g.began
            size = response.content_length or 0
            self.metrics.answered(request.endpoint or "none", response.status_code, took, size)
            headers, parts = encoded(
                dict(response.headers), [response.get_data()], request.headers.get("Accept-Encoding", "")
            )
            response.set_data(b"".join(parts))  # which sets Content-Length as well
            for name in ("Content-Encoding", "Vary"):
                if name in headers:
                    response.headers[name] = headers[name]
        return response

    def _refusal(self, error: IsthmusError, context: Context | None) -> Reply:
        status, exposed = http_status(error), self._settings.expose_details
        ours = status >= 500 and status != 503
        if ours or (error.told and not exposed):
            facts = {"type": type(error).__name__, **error.facts}
            facts |= {"hint": error.hint} if error.hint else {}
            facts |= {"call_id": context.call_id} if context is not None else {}
            level = logging.ERROR if ours else logging.INFO
            self.log.log(level, error.message, extra={"facts": facts}, exc_info=error if status == 500 else None)
        headers = {"Content-Type": "application/json"}
        if isinstance(error, EncodingUnsupported):
            headers["Accept-Encoding"] = ", ".join(error.facts["accepted"])
        if status in (429, 503):
            headers["Retry-After"] = str(math.ceil(error.facts.get("retry_after_s") or RETRY_AFTER_S))
        # Facts may hold what JSON has no form for; an error must not fail on them.
        doc = problem(error, expose_details=exposed)
        return Reply(json.dumps(doc, default=str).encode(), headers, status)

    def _failure(self, error: Exception, context: Context | None) -> Reply:
        """Our own fault: the caller gets an id to report, the log gets the rest."""
        self.log.error("unexpected: %s", type(error).__name__, exc_info=error)
        facts = {"call_id": context.call_id} if context is not None else {}
        doc = {"error": "an unexpected error; the function's log has it", "type": "InternalError", "facts": facts}
        return Reply(json.dumps(doc).encode(), {"Content-Type": "application/json"}, 500)

    def _known(self, error: IsthmusError) -> Response:
        reply = self._refusal(error, None)
        return Response(b"".join(reply.parts), reply.status, dict(reply.headers))

    def _unexpected(self, error: Exception) -> Response:
        reply = self._failure(error, None)
        return Response(b"".join(reply.parts), reply.status, dict(reply.headers))

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


def _compressed(reply: Reply, accepts: str) -> Reply:
    headers, parts = encoded(reply.headers, reply.parts, accepts)
    return Reply(parts, headers, reply.status)


def _paths(app: Flask) -> Iterable[str]:
    return sorted(rule.rule for rule in app.url_map.iter_rules())
