"""The template's threads: each stays with its connection, none is kept from another, none is held by who is slow."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from types import ModuleType

import pytest

from support.local_stack import http
from support.patience import LONG_S, eventually, least
from support.template_process import module, served

HANDLER = """
import gc
import threading


def create_app():
    gc.disable()

    def app(environ, start_response):
        path = environ["PATH_INFO"]
        if path == "/fails":
            raise ZeroDivisionError("a secret")
        if path == "/garbage":
            answer = str(gc.collect())
        elif path == "/echo":
            environ["isthmus.after"].append(lambda: environ)
            answer = environ["wsgi.input"].read().decode()
        elif path == "/headers":
            answer = " ".join(sorted(key for key in environ if key.startswith("HTTP_X_")))
        else:
            answer = threading.current_thread().name
        start_response("200 OK", [("Content-Length", str(len(answer)))])
        return [answer.encode()]

    return app
"""
THREADS = 4
"""Those of max_concurrency 1, with what the template adds."""


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with served(HANDLER, tmp_path_factory.mktemp("workers") / "app", max_concurrency="1") as port:
        yield port


@pytest.fixture(scope="module")
def workers() -> ModuleType:
    return module("http_workers")


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=LONG_S)


def ask(connection: HTTPConnection, path: str = "/", body: bytes | None = None) -> str:
    connection.request("GET" if body is None else "POST", path, body)
    return connection.getresponse().read().decode()


def test_a_connections_requests_are_answered_by_one_thread(port: int) -> None:
    first, second = (HTTPConnection("127.0.0.1", port, timeout=LONG_S) for _ in range(2))
    answers = [(ask(first), ask(second)) for _ in range(5)]
    assert len(set(answers)) == 1
    assert len(set(answers[0])) == 2
    first.close()
    second.close()


def test_more_connections_than_threads_are_all_answered(port: int) -> None:
    connections = [HTTPConnection("127.0.0.1", port, timeout=LONG_S) for _ in range(4 * THREADS)]
    for _ in range(3):
        assert all(ask(connection).startswith("worker") for connection in connections)
    for connection in connections:
        connection.close()


def test_who_says_half_a_request_holds_no_thread(port: int) -> None:
    said = b"POST /echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 50000\r\n\r\n" + b"x" * 50_000
    slow = [connect(port) for _ in range(2 * THREADS)]
    for s in slow:
        s.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert s.recv(1000).startswith(b"HTTP/1.1 200")
    for s, part in zip(slow, (1, 20, 60, 100, 40_000, 50_000, 50_050, len(said) - 1), strict=True):
        s.sendall(said[:part])
    assert http("GET", f"http://127.0.0.1:{port}/").data.startswith(b"worker")
    for s, part in zip(slow, (1, 20, 60, 100, 40_000, 50_000, 50_050, len(said) - 1), strict=True):
        s.sendall(said[part:])
        assert s.makefile("rb").read().endswith(b"\r\n\r\n" + b"x" * 50_000)
        s.close()


@pytest.mark.parametrize("before", [0, 1], ids=["first", "second"])
def test_who_expects_to_be_asked_for_the_body_is_asked(port: int, before: int) -> None:
    with connect(port) as s:
        for _ in range(before):
            s.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert s.recv(1000).startswith(b"HTTP/1.1 200")
        s.sendall(b"POST /echo HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
        assert s.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        s.sendall(b"hello")
        assert s.recv(1000).endswith(b"\r\n\r\nhello")


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
        answer = s.recv(1000)
        assert answer.startswith(b"HTTP/1.0 200 OK")
        assert (b"Connection: Keep-Alive" in answer) == stays
        if stays:
            s.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert s.recv(1000).startswith(b"HTTP/1.0 200 OK")
        assert s.recv(1000) == b""


@pytest.mark.parametrize(
    "lines",
    [
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
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
def test_a_head_that_can_be_read_in_two_ways_is_refused_as_json(port: int, lines: bytes) -> None:
    with connect(port) as s:
        s.sendall(b"POST /echo HTTP/1.1\r\nHost: x\r\n" + lines + b"\r\nhello")
        answer = b""
        while b"}" not in answer and (piece := s.recv(10_000)):
            answer += piece
    assert answer.split()[1] in (b"400", b"501")
    assert b'"type": "RequestMalformed"' in answer


def test_what_is_no_http_is_refused_and_the_next_is_answered(port: int) -> None:
    with connect(port) as s:
        s.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert s.recv(1000).startswith(b"HTTP/1.0 400")
    assert http("GET", f"http://127.0.0.1:{port}/").status == 200


def test_a_header_with_an_underscore_does_not_pass_for_one_with_a_hyphen(port: int) -> None:
    found = http("GET", f"http://127.0.0.1:{port}/headers", headers={"X_Call_Id": "a", "X-Timeout": "1s"})
    assert found.data == b"HTTP_X_TIMEOUT"


def test_an_app_that_fails_is_500_without_its_reason(port: int) -> None:
    found = http("GET", f"http://127.0.0.1:{port}/fails")
    assert (found.status, found.headers["Connection"]) == (500, "close")
    assert b"InternalError" in found.data
    assert b"secret" not in found.data


def test_an_answer_leaves_nothing_to_the_garbage_collector(port: int) -> None:
    connection = HTTPConnection("127.0.0.1", port, timeout=LONG_S)

    def left() -> int:
        ask(connection, "/garbage")
        for _ in range(5):
            ask(connection, "/echo", b"x" * 100_000)
        return int(ask(connection, "/garbage"))

    assert least(left, 1) == 0  # a connection of the test before may have ended meanwhile
    connection.close()


class Task:
    """One request of a connection on which nothing more comes, unless `more` says so."""

    def __init__(self, seen: list[str], more: int = 0) -> None:
        self.taken = False
        self.released = threading.Event()
        self._seen, self._more = seen, more
        self._ours, self._theirs = socket.socketpair()

    def fileno(self) -> int:
        return self._ours.fileno()

    def service(self) -> bool:
        self._seen.append(threading.current_thread().name)
        if len(self._seen) == 2:
            raise ZeroDivisionError("one that fails is not the last")
        self._more -= 1
        return self._more > 0

    def release(self) -> None:
        self.taken = False
        self._ours.close()
        self._theirs.close()
        self.released.set()


def test_every_task_is_done_by_the_worker_that_was_busy_last(workers: ModuleType) -> None:
    seen: list[str] = []
    pool = workers.Workers(4)
    for _ in range(40):
        eventually(lambda: len(pool._idle) == 4)
        task = Task(seen)
        pool.add_task(task)
        assert task.released.wait(LONG_S)
    assert len(set(seen)) == 1
    many = [Task(seen) for _ in range(20)]
    for task in many:
        pool.add_task(task)
    assert all(task.released.wait(LONG_S) for task in many)
    pool.shutdown()


def test_a_worker_that_stays_leaves_for_a_task_that_finds_nobody_idle(
    workers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "STAY_S", LONG_S)
    seen: list[str] = ["", ""]
    pool = workers.Workers(1)
    stays, other = Task(seen, more=100), Task(seen)
    pool.add_task(stays)
    eventually(lambda: len(pool._staying) == 1)
    pool.add_task(stays)  # it has a worker
    pool.add_task(other)
    assert stays.released.wait(LONG_S)
    assert other.released.wait(LONG_S)
    assert len(seen) == 4
    pool.shutdown()


def test_a_worker_that_stays_leaves_when_nothing_comes(workers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "STAY_S", 0.01)
    task = Task(["", ""], more=100)
    pool = workers.Workers(1)
    pool.add_task(task)
    assert task.released.wait(LONG_S)
    pool.shutdown()
