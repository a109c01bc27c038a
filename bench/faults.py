"""Faults of a tail and of its link: an HTTP relay that spoils responses, and what happens to the process behind it."""

from __future__ import annotations

import contextlib
import http.client
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

from adaptive import REGISTRY, SHARED, Site
from functions import Process, running, stage_functions
from harness import STATE

from isthmus_tools.engine.cpu_share import share_of_a_cpu

Spoiled = Literal["", "garbage", "429", "503"]
_GARBAGE = bytes(range(256)) * 16


class FaultyFront(ThreadingHTTPServer):
    """A relay before `target`, an http URL, that spoils the responses to frames as `spoils` says.

    It stands for a tail that is out of order: /ready still answers, unless the tail refuses everything with 503.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _FrontHandler)
        self.target = ""
        self.spoils: Spoiled = ""

    @property
    def url(self) -> str:
        """URL of the relay."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients hang up: that is what these faults are about."""


class _FrontHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: FaultyFront
    upstream: http.client.HTTPConnection | None = None

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        spoils = self.server.spoils
        if spoils == "503" or (spoils and self.command == "POST"):
            self._answer(200 if spoils == "garbage" else int(spoils), _GARBAGE if spoils == "garbage" else b"", {})
            return
        try:
            status, headers, reply = self._relay(body)
        except (OSError, http.client.HTTPException):
            self.upstream, self.close_connection = None, True
            return
        self._answer(status, reply, headers)

    do_GET = do_POST  # noqa: N815

    def _relay(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        if self.upstream is None:
            target = urlsplit(self.server.target)
            self.upstream = http.client.HTTPConnection(target.hostname or "", target.port, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        self.upstream.request(self.command, self.path, body or None, headers)
        response = self.upstream.getresponse()
        reply = response.read()
        return response.status, {n: v for n, v in response.getheaders() if n.lower() not in _OWN}, reply

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response_only(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


_OWN = ("connection", "transfer-encoding", "content-length")


@contextlib.contextmanager
def faulty_front() -> Iterator[FaultyFront]:
    """A relay for the block, in a thread."""
    front = FaultyFront()
    thread = threading.Thread(target=front.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield front
    finally:
        front.shutdown()
        front.server_close()
        thread.join()


class Faults:
    """What can go wrong at a site, by name: context managers, each the fault for its block."""

    def __init__(self, site: Site, front: FaultyFront, model: str) -> None:
        self._site, self._front, self._model = site, front, model
        self._tail: Process = site.cloud
        self._stack = contextlib.ExitStack()
        self.all: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
            "killed": self.killed,
            "stopped": self.stopped,
            "slowed ten times": self.slowed,
            "garbage": lambda: self._spoiling("garbage"),
            "429": lambda: self._spoiling("429"),
            "503": lambda: self._spoiling("503"),
            "link cut": self.cut,
            "link delayed": lambda: self._shaped(rtt_s=0.6),
            "link throttled": lambda: self._shaped(uplink_bps=2e5, downlink_bps=2e5),
        }

    def close(self) -> None:
        """End the tail that was started in place of a killed one."""
        self._stack.close()

    @contextlib.contextmanager
    def killed(self) -> Iterator[None]:
        """The process is killed; at the end another one serves the same URL, and is ready."""
        url = self._tail.url
        self._tail.process.kill()
        self._tail.process.wait()
        yield
        staged = stage_functions("cloud-tail", registry=REGISTRY, model=self._model)["cloud-tail"]
        environment = staged.environment_at(url, **SHARED, cache_dir=str(STATE / "adaptive-cloud"))
        self._tail = self._stack.enter_context(running(staged.command, "cloud-tail", url, environment, staged.folder))
        self._tail.wait_ready()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """The process is stopped: connections are made, and nothing answers."""
        self._tail.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._tail.process.send_signal(signal.SIGCONT)

    @contextlib.contextmanager
    def slowed(self) -> Iterator[None]:
        """The process has a tenth of a CPU."""
        with share_of_a_cpu(0.1, [self._tail.process.pid]):
            yield

    @contextlib.contextmanager
    def cut(self) -> Iterator[None]:
        """Connections are reset and refused."""
        self._site.link.down()
        try:
            yield
        finally:
            self._site.link.up()

    @contextlib.contextmanager
    def _spoiling(self, spoils: Spoiled) -> Iterator[None]:
        self._front.spoils = spoils
        try:
            yield
        finally:
            self._front.spoils = ""

    @contextlib.contextmanager
    def _shaped(self, **changes: float) -> Iterator[None]:
        shape = self._site.link.shape
        self._site.link.set(replace(shape, **changes))
        try:
            yield
        finally:
            self._site.link.set(shape)


def wait_until(moment: float) -> None:
    """Sleep until `moment` of `time.monotonic`."""
    time.sleep(max(0.0, moment - time.monotonic()))
