"""waitress by its settings, with bounds on requests that are still arriving.

waitress calls the app once a request has been received whole. Until then the sockets given to waitress
hold the bounds: bytes of a request, bytes of all requests together, time for a request to arrive. Refusals have the
JSON of the functions' own errors. docs/how-to/deployment.md, "What bounds a request", lists all bounds.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import resource
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from waitress.channel import HTTPChannel  # type: ignore[import-untyped]
from waitress.parser import HTTPRequestParser, ParsingError  # type: ignore[import-untyped]
from waitress.server import create_server  # type: ignore[import-untyped]

RETRY_AFTER_S = 1
MAX_CONNECTIONS = 4096
BACKLOG = 1024
FRAMING_BYTES = 2**20  # request line, headers and chunk lines, beside the body
# Longer than any client here keeps an idle connection: 0.5 s the watchdog, 10 s the local engine. A
# request on a connection that the server is about to close would fail.
IDLE_S = 15
LINGER_S = 2.0
MAX_LINGERING = 32  # threads; above, a refused connection is closed at once
LENGTH, CODING = b"content-length", b"transfer-encoding"
RECV_BYTES = 256 * 1024  # measured at bodies of 1.2 MB: 64 KiB and 1 MiB are slower


def error_body(path: str, status: int, message: str, kind: str, **facts: Any) -> bytes:
    """An error as the functions' own are rendered: below /v1 in OpenAI's form."""
    document: dict[str, Any] = {"error": message, "type": kind, "facts": facts}
    if path.startswith("/v1/"):
        code = "rate_limit_exceeded" if status == 429 else re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind).lower()
        group = {429: "rate_limit_error", 503: "server_error"}.get(status, "invalid_request_error")
        document = {"error": {"message": message, "type": group, "param": None, "code": code, "facts": facts}}
    return json.dumps(document).encode()


@dataclass(frozen=True)
class Limits:
    """Bounds on requests that are not answered yet.

    Units: bytes of a request's body and of all bodies in memory, seconds from a request's first byte to its last.
    """

    body_bytes: int
    total_bytes: int
    receive_s: float

    @classmethod
    def of(cls, body_bytes: int, working_bytes: int, receive_s: float) -> Limits:
        """Half of `working_bytes` for bodies that are received, as the app counts bodies in work by itself."""
        # Room for a body of the largest size, which counts twice in `BoundedConnection`.
        return cls(body_bytes, max(working_bytes // 2, 2 * (body_bytes + FRAMING_BYTES)), receive_s)


class Admission:
    """The bytes of all unanswered requests, bounded together."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.lingering = threading.Semaphore(MAX_LINGERING)
        self._charged = 0
        self._lock = threading.Lock()  # a worker sends while the main thread receives

    def charge(self, connection: BoundedConnection, count: int) -> bool:
        """Count bytes of a connection; False if the bound leaves no room."""
        with self._lock:
            if self._charged + count > self.limits.total_bytes:
                return False
            self._charged += count
            connection.charged += count
            return True

    def release(self, connection: BoundedConnection) -> None:
        """Count the bytes of a connection no longer."""
        with self._lock:
            self._charged -= connection.charged
            connection.charged = connection.received = 0


class BoundedConnection(socket.socket):
    """A connection that counts bytes received since the last response, and refuses requests over the limits."""

    def __init__(self, accepted: socket.socket, admission: Admission) -> None:
        super().__init__(accepted.family, accepted.type, accepted.proto, accepted.detach())
        self.charged = self.received = 0
        self._admission = admission
        self._began = 0.0
        self._refused = False
        self._path = ""

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        """Receive bytes; empty after a refusal, so that waitress closes the connection."""
        data = super().recv(size, flags)
        if not self.received:
            self._began = time.monotonic()
            # Of a request line in several pieces the form of an error is the general one.
            self._path = data[:64].partition(b" ")[2].decode("latin-1")
        self.received += len(data)
        if refusal := self._refusal(len(data)):
            self._refused = True
            with contextlib.suppress(OSError):
                super().send(refusal)
            return b""
        return data

    def send(self, data: Any, flags: int = 0, /) -> int:
        """Send bytes of a response: its request has arrived whole, and counts no longer."""
        if self.received:
            self._admission.release(self)
        return super().send(data, flags)

    def close(self) -> None:
        """Close; bytes received count no longer."""
        self._admission.release(self)
        # waitress closes twice where the client reset the connection meanwhile.
        refused, self._refused = self._refused, False
        if refused and self._admission.lingering.acquire(blocking=False):
            threading.Thread(target=self._linger, args=(self.detach(),), daemon=True).start()
        super().close()

    def _linger(self, descriptor: int) -> None:
        """Discard the rest of a refused request: closing before would reset the connection and lose the refusal."""
        until = time.monotonic() + LINGER_S
        try:
            with socket.socket(fileno=descriptor) as connection, contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
                connection.settimeout(LINGER_S)
                while time.monotonic() < until and connection.recv(RECV_BYTES):
                    pass
        finally:
            self._admission.lingering.release()

    def _refusal(self, count: int) -> bytes:
        limits = self._admission.limits
        if self.received > limits.body_bytes + FRAMING_BYTES:
            text = f"the body has more than {limits.body_bytes} bytes"
            return _response(self._path, "413 Content Too Large", text, "RequestTooLarge", limit=limits.body_bytes)
        if time.monotonic() - self._began > limits.receive_s:
            text = f"the request did not arrive within {limits.receive_s:g} s"
            return _response(self._path, "408 Request Timeout", text, "DeadlineExceeded")
        # Twice: as it grows, waitress' BytesIO is copied, and malloc keeps the room of its last copy.
        if not self._admission.charge(self, 2 * count):
            text = f"all requests that are being received may take {limits.total_bytes} bytes together; try again"
            return _response(self._path, "429 Too Many Requests", text, "Overloaded", retry_after_s=RETRY_AFTER_S)
        return b""


class StrictParser(HTTPRequestParser):  # type: ignore[misc]
    """Refuses heads that a proxy before this server may read as another request, which would smuggle a second one in.

    waitress takes a length and chunks together, chunks twice, and folded lines. Source: RFC 9112, 5.2 and 6.3.
    """

    def parse_header(self, header_plus: bytes) -> None:
        """Parse a request line with its headers.

        Raises:
            ParsingError: the response is 400, and the connection is closed.
        """
        _, *lines = header_plus.split(b"\r\n")
        if any(line[:1] in (b" ", b"\t") for line in lines):
            raise ParsingError("A header is folded")
        fields = [line.partition(b":") for line in lines]
        names = Counter(name.lower() for name, _, _ in fields)
        coding = next((value.strip(b" \t").lower() for name, _, value in fields if name.lower() == CODING), None)
        if names[LENGTH] + names[CODING] > 1 or names[b"host"] > 1:
            raise ParsingError("The length or the host of the request is stated twice")
        try:
            super().parse_header(header_plus)
        except ValueError as e:
            raise ParsingError("The request's target is no URL") from e
        if coding is not None and (coding != b"chunked" or self.version != "1.1"):
            # An unknown coding of HTTP/1.1 was refused with 501 above.
            raise ParsingError("The request's coding is not chunked")


class StrictChannel(HTTPChannel):  # type: ignore[misc]
    """A connection whose heads are parsed strictly."""

    parser_class = StrictParser


class BoundedListener(socket.socket):
    """A listening socket whose connections are bounded together."""

    def __init__(self, listening: socket.socket, limits: Limits) -> None:
        super().__init__(listening.family, listening.type, listening.proto, listening.detach())
        self._admission = Admission(limits)

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept a connection; its peer has `receive_s` to acknowledge bytes of a response."""
        accepted, address = super().accept()
        # waitress has no timeout for a worker that waits for its peer to read, so the kernel closes that connection.
        if sys.platform == "linux":
            patience_ms = max(1, int(self._admission.limits.receive_s * 1000))
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, patience_ms)
        return BoundedConnection(accepted, self._admission), address


def listen(host: str, port: int, limits: Limits) -> BoundedListener:
    """Bind and listen.

    Raises:
        OSError: the address is in use, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return BoundedListener(socket.create_server((host, port), family=family, backlog=BACKLOG), limits)


def serve(app: Callable[..., Any], listener: BoundedListener, limits: Limits, threads: int) -> None:
    """Serve `app` until the process ends."""
    never = 2**62  # bytes: waitress would write longer bodies to temporary files
    open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    descriptors = open_files if open_files != resource.RLIM_INFINITY else 2 * MAX_CONNECTIONS
    server = create_server(
        app,
        sockets=[listener],
        threads=threads,
        backlog=BACKLOG,
        # Half of the open files are the app's: segments, connections to hops.
        connection_limit=max(256, 4 * threads, min(MAX_CONNECTIONS, descriptors // 2)),
        channel_timeout=math.ceil(limits.receive_s) + IDLE_S,
        cleanup_interval=5,
        recv_bytes=RECV_BYTES,
        max_request_body_size=never,  # bounded by the sockets, whose refusal is JSON
        inbuf_overflow=never,
        outbuf_overflow=never,
        # Responses above this wait for their peer in a worker: only a client that pipelines requests comes to that.
        outbuf_high_watermark=limits.body_bytes,
        asyncore_use_poll=True,  # select() ends at file descriptor 1023
        log_socket_errors=False,  # with a traceback for each client that has gone
        ident=None,
        # The app sees them: they can be forged, and so only refuse (docs/how-to/callers.md).
        clear_untrusted_proxy_headers=False,
    )
    server.channel_class = StrictChannel
    server.run()


def _response(path: str, status: str, message: str, kind: str, **facts: Any) -> bytes:
    body = error_body(path, int(status[:3]), message, kind, **facts)
    retry = f"Retry-After: {facts['retry_after_s']}\r\n" if "retry_after_s" in facts else ""
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{retry}"
    return head.encode() + b"Connection: close\r\n\r\n" + body
