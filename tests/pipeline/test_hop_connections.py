"""Hops over HTTP and connections: kept, replaced, broken off, and what is no HTTP."""

from __future__ import annotations

import gc
import http.client
import socket
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from isthmus.client import Client
from isthmus.errors import (
    HopRejected,
    HopUnavailable,
)
from isthmus.http import pool as http_pool
from isthmus.pipeline import HttpHop
from isthmus.wire import frame as frames
from isthmus.wire.frame import Frame
from support.hop_servers import ECHO, FRAME, context, doc, raw_server, server
from support.hop_servers import hop_to as hop_to
from support.patience import LONG_S


def test_informational_responses_before_the_answer_are_passed_over(hop_to: Callable[..., HttpHop]) -> None:
    body = frames.encode(FRAME)
    early = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    answer = early + b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    for size in (50, len(answer)):

        def say(c: socket.socket, size: int = size) -> None:
            c.recv(2**16)
            for i in range(0, len(answer), size):
                c.sendall(answer[i : i + size])
                time.sleep(0.001)

        with raw_server(say) as url:
            assert hop_to(url, attempts=1).call(FRAME, context()).frame.segment == "..1"


def test_a_hop_that_only_ever_answers_1xx_broke_off(hop_to: Callable[..., HttpHop]) -> None:
    def say(c: socket.socket) -> None:
        c.recv(2**16)
        for _ in range(100):
            c.sendall(b"HTTP/1.1 102 Processing\r\n\r\n")

    with raw_server(say) as url, pytest.raises(HopUnavailable, match="102"):
        hop_to(url, attempts=1).call(FRAME, context())


def test_nothing_listening_is_unavailable_and_names_the_hop(hop_to: Callable[..., HttpHop]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as s:
        url = f"http://127.0.0.1:{s.getsockname()[1]}/"
    with pytest.raises(HopUnavailable) as e:
        hop_to(url, attempts=1).call(FRAME, context())
    assert url in e.value.message
    assert "refused" in e.value.message


def test_a_broken_connection_is_unavailable(hop_to: Callable[..., HttpHop]) -> None:
    def cut_off(c: socket.socket) -> None:
        c.recv(65536)
        c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf")

    with raw_server(cut_off) as url, pytest.raises(HopUnavailable):
        hop_to(url).call(FRAME, context())


def test_a_connection_is_kept_and_replaced_once_the_other_end_has_closed_it(hop_to: Callable[..., HttpHop]) -> None:
    body = frames.encode(FRAME)
    connections = []

    def answer_twice(c: socket.socket) -> None:
        connections.append(c)
        for _ in range(2):
            received = b""
            while not received.endswith(body):
                piece = c.recv(2**16)
                if not piece:
                    return
                received += piece
            c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    with raw_server(answer_twice) as url:
        hop = hop_to(url, attempts=1)
        for _ in range(6):
            assert hop.call(FRAME, context()).frame.segment == "..1"
            time.sleep(0.02)
    assert len(connections) == 3


def test_only_so_many_connections_wait_for_the_next_call(
    hop_to: Callable[..., HttpHop], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_pool, "MAX_IDLE", 2)
    ports, together = set(), threading.Barrier(4)

    class Echo(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1

        def do_POST(self) -> None:
            ports.add(self.client_address)
            body = self.rfile.read(int(self.headers["Content-Length"]))
            together.wait(LONG_S)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as made:
        made.daemon_threads = False  # closing waits for them
        serving = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
        serving.start()
        try:
            hop = hop_to(f"http://127.0.0.1:{made.server_port}/", attempts=1)
            with ThreadPoolExecutor(4) as threads:
                for connections in (4, 6):
                    replies = list(threads.map(lambda _: hop.call(FRAME, context()), range(4)))
                    assert [reply.frame.segment for reply in replies] == ["..1"] * 4
                    assert len(ports) == connections
            hop.close()
        finally:
            made.shutdown()
            serving.join()


def test_calls_take_no_proxy_from_the_environment(
    hop_to: Callable[..., HttpHop], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1/")
    with server([ECHO]) as (url, _):
        assert hop_to(url, attempts=1).call(FRAME, context()).frame.segment == "..1"


def test_a_line_break_in_a_name_or_a_header_adds_no_header_to_a_request() -> None:
    heads: list[bytes] = []

    def note(c: socket.socket) -> None:
        heads.append(c.recv(2**16))
        c.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")

    with raw_server(note) as url:
        client = Client(url, timeout_s=LONG_S)
        with pytest.raises(HopRejected):
            client.infer({}, model="a b\r\nX-Evil: 1\r\n\u00e9")
        for value in ("1\r\nX-Evil: 1", "1\n X-Evil: 1", "1\rX-Evil: 1"):
            with pytest.raises(ValueError, match="line break"):
                client.post("/", [b"x"], {"X-Call-Id": value}, {})
    (head,) = heads
    assert head.startswith(b"POST /v2/models/a%20b%0D%0AX-Evil%3A%201%0D%0A%C3%A9/infer HTTP/1.1\r\n")


def test_the_error_of_a_hop_is_read_no_further_than_its_bound(hop_to: Callable[..., HttpHop]) -> None:
    with server([(400, {}, doc("X", padding="x" * 2**20))]) as (url, _), pytest.raises(HopRejected) as e:
        hop_to(url).call(FRAME, context())
    assert e.value.facts["error"] == {}
    assert len(e.value.message) < 1500


def test_an_answer_may_come_in_chunks_or_end_with_its_connection(hop_to: Callable[..., HttpHop]) -> None:
    body = frames.encode(FRAME)
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    pieces = [body[:100], body[100:101], body[101:]]
    chunked += b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n"
    closing = b"HTTP/1.0 200 OK\r\n\r\n" + body
    for answer in (chunked, closing):

        def say(c: socket.socket, answer: bytes = answer) -> None:
            c.recv(2**16)
            for i in range(0, len(answer), 50):
                c.sendall(answer[i : i + 50])
                time.sleep(0.001)

        with raw_server(say) as url:
            assert hop_to(url, attempts=1).call(FRAME, context()).frame.tensors["x"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "answer",
    [
        b"\x16\x03\x01 not HTTP at all\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 2**17,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\nab",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\nno header\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 200 OK\r\n" + (b"X: " + b"x" * 2**15 + b"\r\n") * 50 + b"\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 2**14,
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"",
    ],
    ids=lambda answer: repr(answer[:60]),
)
def test_what_is_no_http_is_a_hop_that_broke_off(hop_to: Callable[..., HttpHop], answer: bytes) -> None:
    def say(c: socket.socket) -> None:
        c.recv(2**16)
        c.sendall(answer)

    with raw_server(say) as url, pytest.raises(HopUnavailable) as e:
        hop_to(url, attempts=1).call(FRAME, context())
    assert "broke off" in e.value.message


def test_a_frame_of_many_tensors_arrives_whole(hop_to: Callable[..., HttpHop]) -> None:
    many = Frame({f"t{i}": np.full(i * 10, i, "int16") for i in range(200)}, FRAME.bundle, FRAME.segment, "r1")
    with server([ECHO]) as (url, _):
        back = hop_to(url).call(many, context()).frame.tensors
    assert all(np.array_equal(back[name], array) for name, array in many.tensors.items())


def test_an_answer_does_not_wait_for_the_garbage_collector(hop_to: Callable[..., HttpHop]) -> None:
    large = Frame({"x": np.zeros(50_000, np.float32)})
    with server([ECHO]) as (url, _):
        hop = hop_to(url)
        hop.call(large, context())
        gc.collect()
        gc.disable()
        try:
            reply = hop.call(large, context())
            kept = weakref.ref(reply.frame.tensors["x"])
            del reply
            assert kept() is None
            for kind in (http_pool._DeadlineSocket, http.client.HTTPResponse, http.client.HTTPConnection):
                assert not [o for o in gc.get_objects() if issubclass(type(o), kind)]
        finally:
            gc.enable()
