"""A server in the router's place: a JSON document for each message, or a scripted status; what it was sent."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Received:
    """A request that the server got."""

    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass
class ScriptedRouter:
    """`replies` are statuses, headers and bodies for the next requests; without any, each gets its body's digest.

    A status of 0 breaks the connection off.
    """

    url: str = ""
    received: list[Received] = field(default_factory=list)
    replies: list[tuple[int, Mapping[str, str], bytes]] = field(default_factory=list)
    pause_s: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def reply(self, request: Received) -> tuple[int, Mapping[str, str], bytes]:
        with self.lock:
            self.received.append(request)
            scripted = self.replies.pop(0) if self.replies else None
        time.sleep(self.pause_s)
        if scripted is not None:
            return scripted
        if request.body.startswith(b"poison"):
            return 400, {"Content-Type": "application/json"}, json.dumps({"error": "poison", "type": "X"}).encode()
        return 200, {"Content-Type": "application/json"}, result_of(request.body)

    def calls(self) -> Counter[str]:
        """Requests by their message's id."""
        return Counter(request.headers["idempotency-key"] for request in self.received)


def result_of(body: bytes) -> bytes:
    return json.dumps({"digest": hashlib.sha256(body).hexdigest(), "bytes": len(body)}).encode()


@contextmanager
def scripted_router(port: int = 0) -> Iterator[ScriptedRouter]:
    script = ScriptedRouter()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Small replies must not wait for the acknowledgement of the head.
        disable_nagle_algorithm = True
        wbufsize = -1

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, added, content = script.reply(Received(self.path, headers, body))
            if not status:  # as a server that dies
                self.close_connection = True
                return
            self.send_response(status)
            for name, value in added.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request: object, client_address: object) -> None:
            """Nothing: a client that dies is what tests do."""

    server = Server(("127.0.0.1", port), Handler)
    script.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield script
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
