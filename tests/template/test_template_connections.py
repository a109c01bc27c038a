"""The template's threads: more connections than threads, slow clients, malformed requests."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest

from support.local_stack import http
from support.patience import LONG_S, least
from support.template_process import served

HANDLER = """
import gc
import threading


def create_app():
    gc.disable()
    released = threading.Event()

    def app(environ, start_response):
        path = environ["PATH_INFO"]
        if path == "/fails":
            raise ZeroDivisionError("a secret")
        if path == "/garbage":
            answer = str(gc.collect())
        elif path == "/echo":
            answer = environ["wsgi.input"].read().decode()
        elif path == "/wait":
            answer = "waited" if released.wait(60) else "late"
        elif path == "/release":
            released.set()
            answer = "released"
        elif path == "/headers":
            answer = " ".join(sorted(key for key in environ if key.startswith("HTTP_X_")))
        else:
            answer = threading.current_thread().name
        start_response("200 OK", [("Content-Length", str(len(answer)))])
        return [answer.encode()]

    return app
"""
THREADS = 4
"""Those of max_concurrency 1 and max_queued 0, with what the template adds."""


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with served(HANDLER, tmp_path_factory.mktemp("workers") / "app", max_concurrency="1", max_queued="0") as port:
        yield port


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=LONG_S)


def receive(s: socket.socket) -> bytes:
    """One response with a Content-Length, which may arrive in pieces."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += s.recv(1)
    length = next(int(line[15:]) for line in data.split(b"\r\n") if line.lower().startswith(b"content-length:"))
    body = b""
    while len(body) < length:
        body += s.recv(length - len(body))
    return data + body


def ask(connection: HTTPConnection, path: str = "/", body: bytes | None = None) -> str:
    connection.request("GET" if body is None else "POST", path, body)
    return connection.getresponse().read().decode()


def test_more_connections_than_threads_are_all_answered(port: int) -> None:
    connections = [HTTPConnection("127.0.0.1", port, timeout=LONG_S) for _ in range(4 * THREADS)]
    for _ in range(3):
        assert all(ask(connection).startswith("waitress") for connection in connections)
    for connection in connections:
        connection.close()


def test_requests_in_the_queue_hold_no_thread_of_a_refusal(tmp_path: Path) -> None:
    """max_concurrency requests in work, and max_queued in the queue, leave two threads to others."""
    with served(HANDLER, tmp_path / "app", max_concurrency="2", max_queued="8") as port:
        held = [HTTPConnection("127.0.0.1", port, timeout=LONG_S) for _ in range(2 + 8)]
        for connection in held:
            connection.request("GET", "/wait")
        assert http("GET", f"http://127.0.0.1:{port}/").data.startswith(b"waitress")
        assert http("GET", f"http://127.0.0.1:{port}/release").data == b"released"
        for connection in held:
            assert connection.getresponse().read() == b"waited"
            connection.close()


def test_a_partial_request_holds_no_thread(port: int) -> None:
    said = b"POST /echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 50000\r\n\r\n" + b"x" * 50_000
    slow = [connect(port) for _ in range(2 * THREADS)]
    for s in slow:
        s.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert receive(s).startswith(b"HTTP/1.1 200")
    for s, part in zip(slow, (1, 20, 60, 100, 40_000, 50_000, 50_050, len(said) - 1), strict=True):
        s.sendall(said[:part])
    assert http("GET", f"http://127.0.0.1:{port}/").data.startswith(b"waitress")
    for s, part in zip(slow, (1, 20, 60, 100, 40_000, 50_000, 50_050, len(said) - 1), strict=True):
        s.sendall(said[part:])
        assert s.makefile("rb").read().endswith(b"\r\n\r\n" + b"x" * 50_000)
        s.close()


@pytest.mark.parametrize("before", [0, 1], ids=["first", "second"])
def test_expect_100_continue_is_answered_before_the_body(port: int, before: int) -> None:
    with connect(port) as s:
        for _ in range(before):
            s.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert receive(s).startswith(b"HTTP/1.1 200")
        s.sendall(b"POST /echo HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
        assert s.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        s.sendall(b"hello")
        assert receive(s).endswith(b"\r\n\r\nhello")


def test_chunks_and_requests_that_come_at_once_are_answered_in_order(port: int) -> None:
    chunked = b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: Chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    with connect(port) as s:
        s.sendall(3 * chunked + b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answers = s.makefile("rb").read()
    assert answers.count(b"HTTP/1.1 200 OK") == 4
    assert answers.count(b"\r\n\r\nabcde") == 3


@pytest.mark.parametrize(("said", "stays"), [(b"", False), (b"Connection: Keep-Alive\r\n", True)])
def test_a_connection_of_http_1_0_stays_where_that_is_asked_for(port: int, said: bytes, stays: bool) -> None:
    with connect(port) as s:
        s.sendall(b"GET / HTTP/1.0\r\n" + said + b"\r\n")
        answer = receive(s)
        assert answer.startswith(b"HTTP/1.0 200 OK")
        assert (b"Connection: Keep-Alive" in answer) == stays
        if stays:
            s.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert receive(s).startswith(b"HTTP/1.0 200 OK")
        assert s.recv(1000) == b""


@pytest.mark.parametrize(
    "lines",
    [
        b"Content-Length: 5\r\nContent-Length: 6\r\n",
        b"Content-Length: five\r\n",
        b"Content-Length: -5\r\n",
        b"Transfer-Encoding: gzip\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"Content-Length : 5\r\n",
        b"X: a\rb\r\n",
        b"no header\r\n",
    ],
)
def test_a_malformed_head_is_refused(port: int, lines: bytes) -> None:
    with connect(port) as s:
        s.sendall(b"POST /echo HTTP/1.1\r\nHost: x\r\n" + lines + b"\r\nhello")
        assert s.recv(10_000).split()[1] in (b"400", b"501")


def test_bytes_that_are_not_http_are_refused_and_other_clients_are_served(port: int) -> None:
    with connect(port) as s:
        s.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert s.recv(1000).startswith(b"HTTP/1.0 400")
    assert http("GET", f"http://127.0.0.1:{port}/").status == 200


def test_a_header_with_an_underscore_does_not_pass_for_one_with_a_hyphen(port: int) -> None:
    found = http("GET", f"http://127.0.0.1:{port}/headers", headers={"X_Call_Id": "a", "X-Timeout": "1s"})
    assert found.data == b"HTTP_X_TIMEOUT"


def test_an_exception_of_the_app_is_500_without_its_text(port: int) -> None:
    found = http("GET", f"http://127.0.0.1:{port}/fails")
    assert (found.status, found.headers["Connection"]) == (500, "close")
    assert b"secret" not in found.data


def test_a_response_leaves_no_cycles_for_the_garbage_collector(port: int) -> None:
    connection = HTTPConnection("127.0.0.1", port, timeout=LONG_S)

    def left() -> int:
        ask(connection, "/garbage")
        for _ in range(5):
            ask(connection, "/echo", b"x" * 100_000)
        return int(ask(connection, "/garbage"))

    assert least(left, 1) == 0  # a connection of the test before may have ended meanwhile
    connection.close()
