"""The trigger's calls over HTTP: a body into the queue, the state of a call, its result.

Source: docs/reference/calls.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from flask import Response, g, jsonify, request

from isthmus.admission import RETRY_AFTER_S, Bound
from isthmus.context import Context, Deadline
from isthmus.errors import BrokerRefused, IsthmusError, Overloaded, RequestMalformed
from isthmus.events.call import Call
from isthmus.events.calls import Calls
from isthmus.events.intake import CallIntake
from isthmus.events.message import storable
from isthmus.serving.app import FunctionApp
from isthmus.serving.call_stream import CallStream
from isthmus.serving.error_responses import error_document
from isthmus.serving.request import FunctionRequest
from isthmus.settings import TriggerSettings
from isthmus.units import parse_duration

# The response to a long poll has to be written before the deadline.
_MARGIN_S = 0.2


@dataclass(frozen=True)
class OpenCalls:
    """The records of calls, and the way into the queue; the reason where the source takes none."""

    records: Calls
    intake: CallIntake | BrokerRefused


class CallRoutes:
    """Serves calls on `app`; `calls` gives the open ones, or raises NotReady."""

    def __init__(self, app: FunctionApp, settings: TriggerSettings, calls: Callable[[], OpenCalls]) -> None:
        self._settings, self._calls = settings, calls
        self._waiters = Bound(settings.max_waiters)
        app.metrics.gauge(
            "isthmus_trigger_waiters", "Requests that wait for the end of a call.", lambda: float(self._waiters.count)
        )
        app.post("/", self.queue, "queue")
        app.post("/calls", self.queue, "queue_call")
        app.flask.add_url_rule("/calls/<call_id>", "call", self.call, methods=["GET"])
        app.flask.add_url_rule("/calls/<call_id>/result", "result", self.result, methods=["GET"])

    def queue(self, request: FunctionRequest) -> Response:
        """Put the body into the source's queue: 202 with the call of its id."""
        intake = self._calls().intake
        if isinstance(intake, BrokerRefused):
            raise intake
        # The body was decoded.
        headers = {name.lower(): value for name, value in request.headers if name.lower() != "content-encoding"}
        # The message goes on in the trace of this request, whose traceparent the response has.
        headers["traceparent"] = request.context.traceparent
        call = intake.queue(bytes(request.body), headers, request.context.call_id)
        # The id may come from another header, such as an event's.
        g.context = replace(request.context, call_id=call.id)
        response = jsonify(call.document())
        response.status_code = 202
        response.headers["Location"] = f"{self._settings.public_url.rstrip('/')}/calls/{call.id}"
        return response

    def call(self, call_id: str) -> Response:
        """The state of a call: at once, at its end, or as a stream of events."""
        records, deadline = self._calls().records, self._deadline()
        call = records.get(storable(call_id))
        # OpenFaaS's gateway and watchdog flush where Accept begins so.
        if request.headers.get("Accept", "").startswith("text/event-stream"):
            return self._stream(records, call, deadline)
        return jsonify(self._awaited(records, call, deadline).document())

    def result(self, call_id: str) -> Response:
        """The body of a call's result, with its content type and status; 202 with the call before."""
        records, deadline = self._calls().records, self._deadline()
        call = self._awaited(records, records.get(storable(call_id)), deadline)
        if call.result is None:
            response = jsonify(call.document())
            response.status_code = 202
            response.headers["Retry-After"] = str(RETRY_AFTER_S)
        else:
            body, content_type = records.body(call.result), call.result.content_type
            response = Response(body, call.result.status, content_type=content_type or "application/octet-stream")
        # A 503 that is the result, and one of this function, differ by this header.
        response.headers["X-Isthmus-State"] = call.state
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    def _deadline(self) -> Deadline:
        return Context.from_headers(request.headers, longest_s=self._settings.longest_s).deadline

    def _awaited(self, records: Calls, call: Call, deadline: Deadline) -> Call:
        """The call at its end, where the request waits for that."""
        wait_s = min(_wait_s(request.args.get("wait", "")), deadline.remaining() - _MARGIN_S)
        if call.is_over or wait_s <= 0:
            return call
        with self._waiting():
            return records.wait(call.id, wait_s)

    def _stream(self, records: Calls, call: Call, deadline: Deadline) -> Response:
        stream = CallStream(records, call, deadline, self._error)
        if stream.is_read(request.headers.get("Last-Event-ID", "")):
            # The one status that ends the reconnections of a browser.
            return Response(status=204)
        waiting = self._waiting()
        waiting.__enter__()
        response = Response(stream.events(), content_type="text/event-stream")
        response.call_on_close(lambda: waiting.__exit__(None, None, None))
        response.headers["Cache-Control"] = "no-store"
        # nginx in front of a gateway would hold events back.
        response.headers["X-Accel-Buffering"] = "no"
        return response

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """A place among the requests that wait.

        Raises:
            Overloaded: all of them are taken.
        """
        if not self._waiters.enter():
            raise Overloaded(
                f"{self._waiters.limit} requests wait for calls; that is the limit", retry_after_s=RETRY_AFTER_S
            )
        try:
            yield
        finally:
            self._waiters.leave()

    def _error(self, error: IsthmusError) -> dict[str, Any]:
        return error_document(error, expose_details=self._settings.expose_details)


def _wait_s(text: str) -> float:
    """Seconds of the parameter `wait`: `20s`, or a number of seconds; 0.0 without it.

    Raises:
        RequestMalformed: neither.
    """
    try:
        return float(text) if text.isascii() and text.isdecimal() and len(text) < 9 else parse_duration(text or "0s")
    except ValueError as e:
        raise RequestMalformed(f"wait is {text[:40]!r}; it is a duration such as 20s", parameter="wait") from e
