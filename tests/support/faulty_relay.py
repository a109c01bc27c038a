"""An HTTP relay that stands between a client and a real server and spoils answers, as bad networks do."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

Fault = Literal["flip", "truncate", "drop", "stall", "500", "trickle", "flip-upload"]


class Relay(ThreadingHTTPServer):
    """Relays to 127.0.0.1:`port`; the next `times` answers with a body under `/blobs/` (None: all) get `fault`.

    `delay_s` holds back every such answer; `served` counts their bytes, and `hits` every request.
    """

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = port
        self.fault: Fault | None = None
        self.times: int | None = None
        self.delay_s = 0.0
        self.served = 0
        self.hits = 0
        self.ended = threading.Event()
        self.lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def spoil(self, fault: Fault, times: int | None = None) -> None:
        self.fault, self.times = fault, times

    def take_fault(self) -> Fault | None:
        with self.lock:
            if self.times == 0:
                return None
            if self.times is not None and self.fault is not None:
                self.times -= 1
            return self.fault

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up is what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Relay

    def do_GET(self) -> None:
        relay = self.server
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        is_blob = "/blobs/" in self.path and self.command in ("GET", "PUT")
        fault = relay.take_fault() if is_blob and (self.command == "GET") != (relay.fault == "flip-upload") else None
        with relay.lock:
            relay.hits += 1
        if fault == "stall":
            relay.ended.wait(60)
        if fault in ("drop", "stall"):
            self.close_connection = True
            self.connection.close()
            return
        if fault == "500":
            self.send_response(500)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "flip-upload":
            sent = flipped(sent)
        status, headers, body = self._ask(sent)
        if is_blob:
            time.sleep(relay.delay_s)
            with relay.lock:
                relay.served += len(body)
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if fault == "flip" and body:
            body = flipped(body)
        if fault == "truncate":
            body = body[: len(body) // 2]
            self.close_connection = True
        if fault == "trickle":
            for at in range(len(body)):
                self.wfile.write(body[at : at + 1])
                self.server.ended.wait(0.1)
        else:
            self.wfile.write(body)

    do_PUT = do_HEAD = do_POST = do_DELETE = do_GET  # noqa: N815

    def _ask(self, sent: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=30)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection"):
                    upstream.putheader(name, value)
            upstream.endheaders(sent or None)
            reply = upstream.getresponse()
            body = reply.read()
            headers = [(n, v) for n, v in reply.getheaders() if n.lower() not in ("transfer-encoding", "connection")]
            if not any(n.lower() == "content-length" for n, _ in headers):
                headers.append(("Content-Length", str(len(body))))
            return reply.status, headers, body
        finally:
            upstream.close()

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


def flipped(data: bytes) -> bytes:
    """`data` with one bit of its middle byte turned over."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@contextmanager
def relaying(port: int) -> Iterator[Relay]:
    """A relay to that port of this machine, for the length of a `with` block."""
    relay = Relay(port)
    thread = threading.Thread(target=relay.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield relay
    finally:
        relay.ended.set()
        relay.shutdown()
        relay.server_close()
        thread.join()
