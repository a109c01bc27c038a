"""Servers that a hop calls in tests: each answer in turn, or any behaviour of a socket."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import numpy as np
import pytest
from flask import Flask, Response, request
from werkzeug.serving import make_server

from isthmus.context import Context, Deadline
from isthmus.pipeline import HttpHop
from isthmus.wire.frame import Frame
from support.patience import LONG_S

FRAME = Frame({"x": np.arange(4, dtype="float32")}, "sha256:" + "0" * 64, "..1", "r1")


ECHO = (200, {"Server-Timing": "decode;dur=0.01, run;dur=0.125, total;dur=0.13"}, None)


Answer = tuple[int, dict[str, str], bytes | None]


@contextmanager
def server(answers: list[Answer]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A function that gives each answer in turn and the last one ever after; None echoes the frame."""
    seen: list[dict[str, str]] = []
    app = Flask("hop")

    @app.post("/")
    def answer() -> Response:
        status, headers, body = answers[min(len(seen), len(answers) - 1)]
        seen.append(dict(request.headers))
        return Response(request.get_data() if body is None else body, status, headers)

    made = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{made.server_port}/", seen
    finally:
        made.shutdown()
        thread.join()
        made.server_close()


@contextmanager
def raw_server(behave: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that does to each connection whatever `behave` does, until one of the two ends it."""
    open_now: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                open_now[:] = [connection]
                with suppress(OSError), connection:
                    behave(connection)

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            with suppress(OSError):
                for connection in open_now:
                    connection.shutdown(socket.SHUT_RDWR)
            thread.join()


def context(seconds: float = LONG_S) -> Context:
    return Context(Deadline.after(seconds), "call-1", "00-" + "a" * 32 + "-" + "b" * 16 + "-01", "vendor=1")


@pytest.fixture
def hop_to() -> Iterator[Callable[..., HttpHop]]:
    made: list[HttpHop] = []

    def to(url: str, attempts: int = 3, connect_timeout_s: float = LONG_S) -> HttpHop:
        made.append(HttpHop(url, attempts=attempts, connect_timeout_s=connect_timeout_s, max_reply_bytes=2**20))
        return made[-1]

    yield to
    for hop in made:
        hop.close()


def doc(type: str, **facts: object) -> bytes:
    return json.dumps({"error": "it said so", "type": type, "facts": facts}).encode()


WATCHDOG, PROXY, MIDDLEWARE = ({"X-OpenFaaS-Internal": v} for v in ("of-watchdog", "proxy", "faas-middleware"))
