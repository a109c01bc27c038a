"""The gateway's proxy: what HTTP allows passes whole, what breaks is told, and nothing is kept that need not be."""

from __future__ import annotations

import contextlib
import gzip
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from aiohttp import web

from isthmus.loop_thread import LoopThread
from isthmus_tools.engine import proxy
from isthmus_tools.engine.gateway import create_runner
from isthmus_tools.engine.proxy import ReverseProxy, open_session
from isthmus_tools.engine.replica import Deployment, Replica, ReplicaState, WatchdogLimits
from isthmus_tools.engine.stack import FunctionSpec
from isthmus_tools.engine.supervisor import Supervisor
from isthmus_tools.engine.telemetry import InvocationMetrics, ignore_event
from support.patience import LONG_S, eventually

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
MOST = 3_000_000


class Function:
    """A server of one function, to the byte: `answer(connection, request so far)` is called for each request's head."""

    def __init__(self, answer: Callable[[socket.socket, bytes], None]) -> None:
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.connections = 0
        self.heads: list[bytes] = []
        self.ended = threading.Event()
        self._accepting = threading.Thread(target=self._serve, daemon=True)
        self._accepting.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # closing alone does not wake who waits for a connection
        self._listener.close()
        self._accepting.join()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            while said := head_of(connection):
                self.heads.append(said.partition(b"\r\n\r\n")[0])
                self._answer(connection, said)
        self.ended.set()


def head_of(connection: socket.socket) -> bytes:
    """A head and what came with it; nothing at the end."""
    said = b""
    while b"\r\n\r\n" not in said:
        piece = connection.recv(65_536)
        if not piece:
            return b""
        said += piece
    return said


def everything(connection: socket.socket) -> bytes:
    said = b""
    while piece := connection.recv(1 << 20):
        said += piece
    return said


def exactly(connection: socket.socket, count: int) -> bytes:
    said = b""
    while len(said) < count:
        piece = connection.recv(count - len(said))
        assert piece, f"it ended after {len(said)} of {count} bytes"
        said += piece
    return said


class Gateway(LoopThread[ReverseProxy]):
    """A proxy in front of one function, f."""

    def __init__(
        self,
        function: Function,
        *,
        timeout_s: float = LONG_S,
        watchdog: WatchdogLimits = WatchdogLimits(0),  # noqa: B008
    ) -> None:
        self.function = function
        self.url_port = 0

        @asynccontextmanager
        async def live() -> AsyncIterator[ReverseProxy]:
            async with open_session() as session:
                supervisor = Supervisor("f", session, ignore_event, drain_s=0.0)
                spec = FunctionSpec("f", "python3-isthmus", ".", "f:latest")
                deployment = Deployment(spec, Path(), MappingProxyType({}), watchdog=watchdog)
                replica = Replica(deployment, supervisor.log_buffer, session)
                replica.url, replica.state = f"http://127.0.0.1:{function.port}", ReplicaState.READY
                supervisor._replicas.append(replica)
                self.supervisor, self.replica = supervisor, replica
                proxy = ReverseProxy(
                    {"f": supervisor}.get, InvocationMetrics(), session, max_body_bytes=MOST, timeout_s=timeout_s
                )
                app = web.Application()
                app.router.add_route("*", "/function/{rest:.+}", proxy.handle)
                runner = create_runner(app, LONG_S)
                await runner.setup()
                with socket.create_server(("127.0.0.1", 0)) as listener:
                    self.url_port = listener.getsockname()[1]
                    await web.SockSite(runner, listener).start()
                    yield proxy
                    await runner.cleanup()
                supervisor._replicas.clear()
                await supervisor.close()

        super().__init__("gateway", live)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.url_port), timeout=LONG_S)


@contextlib.contextmanager
def proxied(answer: Callable[[socket.socket, bytes], None], **options: Any) -> Iterator[Gateway]:
    with contextlib.closing(Function(answer)) as function, Gateway(function, **options) as gateway:
        yield gateway


def request(body: bytes = b"", *headers: bytes, method: bytes = b"POST", path: bytes = b"/function/f") -> bytes:
    lines = [method + b" " + path + b" HTTP/1.1", b"Host: gw", b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def say(answer: bytes) -> Callable[[socket.socket, bytes], None]:
    return lambda connection, _: connection.sendall(answer)


def ask(gateway: Gateway, said: bytes) -> bytes:
    """All that comes until the gateway closes, which is asked of it."""
    with gateway.connect() as connection:
        connection.sendall(said)
        return everything(connection)


def response_of(connection: socket.socket) -> tuple[list[bytes], bytes]:
    """The lines and the body of a response with Content-Length."""
    head, body = parted(head_of(connection))
    length = next(int(line.split(b": ")[1]) for line in head if line.startswith(b"Content-Length"))
    return head, body + exactly(connection, length - len(body))


CLOSE = b"Connection: close"


def parted(answer: bytes) -> tuple[list[bytes], bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.split(b"\r\n"), body


def test_a_chunked_answer_is_chunked_again() -> None:
    chunked = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n4\r\ndefg\r\n0\r\nTrailer: t\r\n\r\n"
    )
    with proxied(say(chunked)) as gateway:
        head, body = parted(ask(gateway, request(b"", CLOSE)))
    assert b"Transfer-Encoding: chunked" in head
    assert not any(line.startswith(b"Trailer") for line in head)
    assert body in (b"7\r\nabcdefg\r\n0\r\n\r\n", b"3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n")


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 262_144, 400_000, 2_500_000])
def test_bodies_of_any_size_pass_both_ways_on_one_connection(size: int) -> None:
    def echo(connection: socket.socket, said: bytes) -> None:
        body = said.partition(b"\r\n\r\n")[2]
        body += exactly(connection, size - len(body))
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + body)

    body = bytes(range(256)) * (size // 256) + bytes(size % 256)
    with proxied(echo) as gateway, gateway.connect() as connection:
        for _ in range(3):
            connection.sendall(request(body))
            got = head_of(connection).partition(b"\r\n\r\n")[2]
            assert got + exactly(connection, size - len(got)) == body
        assert gateway.function.connections == 1


def test_a_chunked_request_is_chunked_again() -> None:
    def length(connection: socket.socket, said: bytes) -> None:
        while not said.endswith(b"0\r\n\r\n"):
            said += connection.recv(65_536)
        text = said.partition(b"\r\n\r\n")[2]
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(text) + text)

    chunked = b"POST /function/f HTTP/1.1\r\nHost: gw\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    with proxied(length) as gateway, gateway.connect() as connection:
        for piece in (chunked, b"3\r\nab", b"c\r\n", b"0\r\n", b"\r\n"):
            connection.sendall(piece)
            time.sleep(0.01)
        body = parted(everything(connection))[1]
    assert body.endswith(b"0\r\n\r\n")
    assert b"".join(body.split(b"\r\n")[1::2]) == b"abc"


def test_an_answer_that_ends_with_its_connection_is_whole() -> None:
    def end(connection: socket.socket, _: bytes) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\nall of it")
        connection.shutdown(socket.SHUT_RDWR)

    with proxied(end) as gateway:
        _, body = parted(ask(gateway, request(b"", CLOSE)))
        assert body == b"9\r\nall of it\r\n0\r\n\r\n"
        _, plain = parted(ask(gateway, b"GET /function/f HTTP/1.0\r\n\r\n"))
    assert plain == b"all of it"


@pytest.mark.parametrize(
    "part",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nha",
    ],
)
def test_an_answer_that_breaks_off_breaks_off_for_the_caller(part: bytes) -> None:
    def end(connection: socket.socket, _: bytes) -> None:
        connection.sendall(part)
        connection.shutdown(socket.SHUT_RDWR)

    with proxied(end) as gateway, gateway.connect() as connection:
        connection.sendall(request())
        with pytest.raises(ConnectionResetError):
            everything(connection)


def test_a_function_that_says_no_http_is_500_as_one_that_does_not_listen() -> None:
    for answer in (say(b"hello\r\n\r\n"), lambda connection, _: connection.shutdown(socket.SHUT_RDWR)):
        with proxied(answer) as gateway:
            head, body = parted(ask(gateway, request(b"", CLOSE)))
        assert head[0].startswith(b"HTTP/1.1 500")
        assert b"X-OpenFaaS-Internal: proxy" in head
        assert body == b"Can't reach service for: f."
    with proxied(say(OK)) as gateway:
        gateway.replica.url = "http://127.0.0.1:1"
        assert ask(gateway, request(b"x" * 500_000, CLOSE)).startswith(b"HTTP/1.1 500")


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
def test_an_answer_without_a_body_is_not_waited_for(status: bytes) -> None:
    with proxied(say(b"HTTP/1.1 " + status + b"\r\n\r\n")) as gateway, gateway.connect() as connection:
        for _ in range(2):
            connection.sendall(request())
            head, body = parted(head_of(connection))
            assert (head[0], body) == (b"HTTP/1.1 " + status, b"")
            assert not any(line.lower().startswith((b"transfer-encoding", b"content-length")) for line in head)


def test_head_has_a_length_and_no_body() -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"
    with proxied(say(answer)) as gateway, gateway.connect() as connection:
        for _ in range(2):
            connection.sendall(request(method=b"HEAD"))
            head, body = parted(head_of(connection))
            assert (b"Content-Length: 1000" in head, body) == (True, b"")


def test_requests_that_come_at_once_are_answered_in_order() -> None:
    def path(connection: socket.socket, said: bytes) -> None:
        target = said.split(b" ")[1]
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(target) + target)

    several = [request(b"body", path=b"/function/f/%d" % i) for i in range(5)]
    with proxied(path) as gateway:
        answer = ask(gateway, b"".join(several) + request(b"", CLOSE, path=b"/function/f/last"))
    assert [part[:2] for part in answer.split(b"\r\n\r\n/")[1:]] == [b"%dH" % i for i in range(5)] + [b"la"]


def test_what_follows_a_chunked_request_at_once_is_the_next_request() -> None:
    def whole(connection: socket.socket, said: bytes) -> None:
        while not said.endswith(b"0\r\n\r\n"):
            said += connection.recv(65_536)
        connection.sendall(OK)

    chunked = b"POST /function/f HTTP/1.1\r\nHost: gw\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n"
    last = chunked.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)
    with proxied(whole) as gateway:
        answer = ask(gateway, chunked + last)
        assert len(gateway.function.heads) == 2
    assert answer.count(b"HTTP/1.1 200 OK") == 2
    assert answer.endswith(b"\r\n\r\nok")


def test_an_interim_answer_is_not_the_answer() -> None:
    with proxied(say(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK)) as gateway:
        head, body = parted(ask(gateway, request(b"", CLOSE)))
    assert (head[0], body) == (b"HTTP/1.1 200 OK", b"ok")


def test_who_expects_to_be_asked_for_the_body_is_asked() -> None:
    def echo(connection: socket.socket, said: bytes) -> None:
        exactly(connection, 4 - len(said.partition(b"\r\n\r\n")[2]))
        connection.sendall(OK)

    with proxied(echo) as gateway, gateway.connect() as connection:
        connection.sendall(request(b"body", b"Expect: 100-continue", CLOSE)[:-4])
        assert head_of(connection) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"body")
        assert everything(connection).endswith(b"ok")
        assert b"expect" not in gateway.function.heads[0].lower()


def test_what_is_between_two_neighbours_does_not_pass() -> None:
    answer = OK.replace(b"\r\n\r\n", b"\r\nConnection: X-Mine\r\nX-Mine: 1\r\nKeep-Alive: 5\r\nX-Theirs: 2\r\n\r\n")
    asked = request(
        b"", b"Connection: close, X-Own", b"X-Own: 1", b"TE: trailers", b"X-Other: 2", b"X-Forwarded-For: 9"
    )
    with proxied(say(answer)) as gateway:
        head, _ = parted(ask(gateway, asked))
        sent = gateway.function.heads[0].split(b"\r\n")
    assert b"X-Theirs: 2" in head
    assert not any(line.startswith((b"X-Mine", b"Keep-Alive")) for line in head)
    assert {b"X-Other: 2", b"X-Forwarded-Host: gw", b"X-Forwarded-For: 127.0.0.1"} <= set(sent)
    assert not any(line.startswith((b"X-Own", b"TE", b"Connection")) for line in sent)


def test_a_body_over_the_bound_is_413() -> None:
    with proxied(say(OK)) as gateway, gateway.connect() as connection:
        connection.sendall(b"POST /function/f HTTP/1.1\r\nHost: gw\r\nContent-Length: %d\r\n\r\n" % (MOST + 1))
        head, _ = parted(head_of(connection))
        assert head[0].startswith(b"HTTP/1.1 413")
        assert CLOSE in head
    with proxied(lambda connection, _: time.sleep(1)) as gateway, gateway.connect() as connection:
        connection.sendall(b"POST /function/f HTTP/1.1\r\nHost: gw\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(40):
            connection.sendall(b"186a0\r\n" + bytes(100_000) + b"\r\n")
        assert head_of(connection).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    "headers",
    [
        b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"Transfer-Encoding: gzip\r\n\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"Space : x\r\n\r\n",
        b"X: " + b"x" * 70_000 + b"\r\n\r\n",
        b"X: latin \xe9\r\n\r\n",
    ],
)
def test_what_is_not_http_is_refused(headers: bytes) -> None:
    with proxied(say(OK)) as gateway:
        said = b"POST /function/f HTTP/1.1\r\nHost: gw\r\nConnection: close\r\n" + headers
        assert ask(gateway, said).split(b" ")[1] == b"400"
        assert gateway.function.heads == []


def test_a_body_with_a_chunk_that_is_none_never_ends_for_the_function() -> None:
    bodies = list[bytes]()

    def until_end(connection: socket.socket, said: bytes) -> None:
        bodies.append(said + everything(connection))

    chunked = b"POST /function/f HTTP/1.1\r\nHost: gw\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"
    smuggled = b"POST /function/f/smuggled HTTP/1.1\r\nHost: gw\r\nContent-Length: 0\r\n\r\n"
    with proxied(until_end, timeout_s=0.5) as gateway, gateway.connect() as connection:
        connection.sendall(chunked)
        eventually(lambda: bool(gateway.function.heads))
        connection.sendall(b"xyz\r\n0\r\n\r\n" + smuggled)
        assert head_of(connection).startswith(b"HTTP/1.1 502")
        assert gateway.function.ended.wait(LONG_S)
        assert len(gateway.function.heads) == 1
    assert bodies[0].endswith(b"\r\nabc\r\n")


def test_a_header_in_any_number_of_connection_lines_does_not_pass() -> None:
    headers = (b"Connection: X-One", b"Connection: close, X-Two", b"X-One: 1", b"X-Two: 2", b"X-Three: 3")
    with proxied(say(OK)) as gateway:
        ask(gateway, request(b"", *headers))
        sent = gateway.function.heads[0].split(b"\r\n")
    assert [line for line in sent if line.startswith((b"X-One", b"X-Two", b"X-Three"))] == [b"X-Three: 3"]


def test_a_request_to_upgrade_is_an_ordinary_one_and_another_may_follow() -> None:
    for protocol in (b"websocket", b"h2c"):
        with proxied(say(OK)) as gateway, gateway.connect() as connection:
            for _ in range(2):
                connection.sendall(request(b"", b"Connection: Upgrade", b"Upgrade: " + protocol))
                assert response_of(connection)[1] == b"ok"
            assert not any(b"upgrade" in head.lower() for head in gateway.function.heads)


def test_a_response_whose_coding_the_gateway_does_not_know_is_500() -> None:
    coded = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n1\r\na\r\n0\r\n\r\n"
    with proxied(say(coded)) as gateway:
        assert ask(gateway, request(b"", CLOSE)).startswith(b"HTTP/1.1 500")


def test_a_compressed_body_stays_compressed_both_ways() -> None:
    def echo(connection: socket.socket, said: bytes) -> None:
        body = said.partition(b"\r\n\r\n")[2]
        body += exactly(connection, len(packed) - len(body))
        connection.sendall(
            b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )

    packed = gzip.compress(b"isthmus" * 1000)
    with proxied(echo) as gateway:
        head, body = parted(ask(gateway, request(packed, b"Content-Encoding: gzip", CLOSE)))
    assert b"Content-Encoding: gzip" in head
    assert body == packed


def test_two_hundred_connections_are_served_at_once() -> None:
    with proxied(say(OK)) as gateway, contextlib.ExitStack() as stack:
        connections = [stack.enter_context(gateway.connect()) for _ in range(200)]
        for connection in connections:
            connection.sendall(request())
        assert all(response_of(connection)[1] == b"ok" for connection in connections)


def test_an_answer_before_the_whole_request_reaches_the_caller() -> None:
    refusal = b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno"

    def refuse(connection: socket.socket, _: bytes) -> None:
        connection.sendall(refusal)
        connection.shutdown(socket.SHUT_WR)
        everything(connection)

    with proxied(refuse) as gateway, gateway.connect() as connection:
        connection.sendall(request(bytes(2_000_000))[:1_000_000])
        head, body = response_of(connection)
    assert (head[0], body) == (b"HTTP/1.1 413 Too Large", b"no")
    assert CLOSE in head


def test_a_call_over_its_time_is_502() -> None:
    with proxied(lambda connection, _: None, timeout_s=0.2) as gateway:
        head, body = parted(ask(gateway, request(b"", CLOSE)))
        assert (head[0], body) == (b"HTTP/1.1 502 Bad Gateway", b"")
        eventually(lambda: gateway.replica.in_flight == 0)


def test_a_function_with_a_longer_exec_timeout_than_the_gateways_default_has_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(proxy, "UPSTREAM_TIMEOUT_S", 0.05)

    def slow(connection: socket.socket, _: bytes) -> None:
        time.sleep(0.3)
        connection.sendall(OK)

    with proxied(slow, timeout_s=0.05, watchdog=WatchdogLimits(LONG_S)) as gateway:
        assert parted(ask(gateway, request(b"", CLOSE)))[1] == b"ok"


@pytest.mark.parametrize(
    ("watchdog", "headers"),
    [(WatchdogLimits(), [b"X-Timeout: 100ms"]), (WatchdogLimits(0.1), []), (WatchdogLimits(0.1), [b"X-Timeout: 1h"])],
)
def test_a_call_over_its_x_timeout_or_exec_timeout_is_the_watchdogs_empty_504(
    watchdog: WatchdogLimits, headers: list[bytes]
) -> None:
    with proxied(lambda connection, _: None, watchdog=watchdog) as gateway:
        head, body = parted(ask(gateway, request(b"", CLOSE, *headers)))
        assert (head[0], body) == (b"HTTP/1.1 504 Gateway Timeout", b"")
        assert b"X-OpenFaaS-Internal: of-watchdog" in head
        assert any(line.startswith(b"X-Duration-Seconds: 0.") for line in head)
        eventually(lambda: gateway.replica.in_flight == 0)


def test_a_call_beside_max_inflight_others_is_the_watchdogs_429() -> None:
    release = threading.Event()

    def wait(connection: socket.socket, _: bytes) -> None:
        release.wait(LONG_S)
        connection.sendall(OK)

    with proxied(wait, watchdog=WatchdogLimits(0, max_inflight=1)) as gateway, gateway.connect() as first:
        first.sendall(request())
        eventually(lambda: gateway.replica.in_flight == 1)
        for path in (b"/function/f", b"/function/f/_/ready"):
            head, body = parted(ask(gateway, request(b"", CLOSE, path=path)))
            assert head[0] == b"HTTP/1.1 429 Too Many Requests"
            assert b"X-OpenFaaS-Internal: faas-middleware" in head
            assert any(line.startswith(b"Content-Type: text/plain") for line in head)
            assert body == b"Concurrent request limit exceeded. Max concurrent requests: 1\n"
        release.set()
        assert head_of(first).startswith(b"HTTP/1.1 200")
        eventually(lambda: gateway.replica.in_flight == 0)


def test_the_watchdogs_limits_are_read_as_it_reads_them() -> None:
    for env, limits in (
        ({}, (30.0, 0)),
        ({"exec_timeout": "1m30s", "max_inflight": "4"}, (90.0, 4)),
        ({"exec_timeout": "5", "max_inflight": "-1"}, (5.0, 0)),
        ({"exec_timeout": "soon", "max_inflight": "many"}, (30.0, 0)),
        ({"exec_timeout": "0"}, (0.0, 0)),
    ):
        found = WatchdogLimits.from_env(env)
        assert (found.exec_timeout_s, found.max_inflight) == limits
    given = [WatchdogLimits(10.0).timeout_s(text) for text in ("", "1500ms", "1m", "soon", "5")]
    assert given == [10.0, 1.5, 10.0, 10.0, 10.0]


def test_a_call_over_its_time_in_mid_answer_breaks_off() -> None:
    half = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"
    for _ in range(20):
        with proxied(say(half), timeout_s=0.2) as gateway, gateway.connect() as connection:
            connection.sendall(request())
            head = head_of(connection)
            if head.startswith(b"HTTP/1.1 502"):  # a pause took the time before there was a head
                continue
            assert head.startswith(b"HTTP/1.1 200")
            with pytest.raises(ConnectionResetError):
                everything(connection)
            break
    else:
        pytest.fail("its time was always over before it began to answer")


def test_a_caller_who_hangs_up_ends_the_call() -> None:
    def wait(connection: socket.socket, _: bytes) -> None:
        assert connection.recv(1) == b""

    with proxied(wait) as gateway:
        with gateway.connect() as connection:
            connection.sendall(request())
            eventually(lambda: gateway.replica.in_flight == 1)
        assert gateway.function.ended.wait(LONG_S)
        eventually(lambda: gateway.replica.in_flight == 0)
        assert gateway.supervisor.invocations == 0


def test_an_event_passes_before_the_next_and_who_hangs_up_between_them_ends_the_stream() -> None:
    def stream(connection: socket.socket, _: bytes) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n8\r\ndata: 1\n\r\n")
        assert connection.recv(1) == b""

    with proxied(stream) as gateway:
        with gateway.connect() as connection:
            connection.sendall(request())
            got = head_of(connection)  # and perhaps the event behind it
            # The function waits: only a proxy that passes pieces on gets so far.
            while b"data: 1\n" not in got:
                piece = connection.recv(1000)
                assert piece, got
                got += piece
            assert got.startswith(b"HTTP/1.1 200")
        assert gateway.function.ended.wait(LONG_S)


def test_a_slow_reader_holds_the_function_up_and_nothing_is_piled_up() -> None:
    sent = 0
    done = threading.Event()
    size = 200_000_000

    def pour(connection: socket.socket, _: bytes) -> None:
        nonlocal sent
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        piece = bytes(1_000_000)
        for _ in range(size // len(piece)):
            connection.sendall(piece)
            sent += len(piece)
        done.set()

    with proxied(pour) as gateway, gateway.connect() as connection:
        connection.sendall(request())
        before = -1
        while before < sent:
            before = sent
            time.sleep(0.5)
        assert sent < 60_000_000
        got = head_of(connection).partition(b"\r\n\r\n")[2]
        left = size - len(got)
        while left:
            left -= len(connection.recv(1 << 20))
        assert done.wait(LONG_S)


def test_a_connection_that_the_function_closed_is_not_used() -> None:
    closed = threading.Semaphore(0)

    def once(connection: socket.socket, _: bytes) -> None:
        connection.sendall(OK)
        connection.shutdown(socket.SHUT_RDWR)
        closed.release()

    with proxied(once) as gateway, gateway.connect() as connection:
        for calls in range(1, 5):
            connection.sendall(request())
            assert response_of(connection)[1] == b"ok"
            assert closed.acquire(timeout=LONG_S)
            assert gateway.function.connections == calls


def test_closing_waits_for_the_calls_under_way() -> None:
    go_on = threading.Event()

    def slow(connection: socket.socket, _: bytes) -> None:
        go_on.wait(LONG_S)
        connection.sendall(OK)

    with proxied(slow) as gateway, gateway.connect() as connection, gateway.connect() as idle:
        connection.sendall(request())
        eventually(lambda: gateway.replica.in_flight == 1)
        stopping = threading.Thread(target=gateway.stop)
        stopping.start()
        assert idle.recv(1) == b""
        go_on.set()
        assert response_of(connection)[1] == b"ok"
        # Whoever keeps the connection for later is not waited for.
        stopping.join(LONG_S / 2)
        assert not stopping.is_alive()


def test_a_head_may_come_in_pieces() -> None:
    with proxied(say(OK)) as gateway, gateway.connect() as connection:
        for each in request(b"", CLOSE):
            connection.sendall(bytes([each]))
        assert everything(connection).endswith(b"ok")
