"""A receiver of traces by OTLP over HTTP: what OpenTelemetry's collector would be sent."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class ReceivedSpan:
    """A span as sent; `parent` is empty at the root of a trace."""

    service: str
    name: str
    kind: str
    trace: str
    id: str
    parent: str
    attributes: dict[str, Any]
    is_error: bool


@dataclass
class OtlpReceiver:
    """Takes spans at `url`, or refuses them with `status`; `bodies` are the requests' as they came."""

    url: str = ""
    status: int = 200
    spans: list[ReceivedSpan] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)

    def take(self, body: bytes) -> None:
        self.bodies.append(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"]
            for scope in resource.scope_spans:
                self.spans += [_read(service, span) for span in scope.spans]

    def of_requests(self) -> list[ReceivedSpan]:
        """All but the spans of segments that are loaded ahead, whenever that is."""
        return [span for span in self.spans if span.name != "POST /load"]

    def named(self, service: str, name: str = "") -> list[ReceivedSpan]:
        return [s for s in self.of_requests() if s.service == service and s.name.startswith(name)]


def _read(service: str, span: Any) -> ReceivedSpan:
    values = {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}
    kind = type(span).SpanKind.Name(span.kind).removeprefix("SPAN_KIND_")
    ids = span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex()
    return ReceivedSpan(service, span.name, kind, *ids, values, span.status.code == 2)


@contextmanager
def otlp_receiver() -> Iterator[OtlpReceiver]:
    receiver = OtlpReceiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if receiver.status == 200:
                receiver.take(body)
            self.send_response(receiver.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    receiver.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
