"""Hops over HTTP against real servers: what each failure means, what is tried again, and when it must end."""

from __future__ import annotations

import gc
import json
import math
import select
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import numpy as np
import pytest
from flask import Flask, Response, request
from werkzeug.serving import make_server

from isthmus import frame as frames
from isthmus.context import Context, Deadline, parse_duration
from isthmus.errors import (
    HopBusy,
    HopError,
    HopRejected,
    HopTimeout,
    HopUnavailable,
    RequestMalformed,
    ShapeMismatch,
)
from isthmus.frame import Frame
from isthmus.hop import HttpHop
from patience import LONG_S, least

FRAME = Frame({"x": np.arange(4, dtype="float32")}, "sha256:" + "0" * 64, "..1", "r1")
ECHO = (200, {"Server-Timing": "decode;dur=0.1, run;dur=12.5, total;dur=13"}, None)
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


def test_a_frame_goes_there_and_back_with_the_requests_identity(hop_to: Callable[..., HttpHop]) -> None:
    start = time.monotonic()
    with server([ECHO]) as (url, seen):
        reply = hop_to(url).call(FRAME, context())
    took = time.monotonic() - start
    assert reply.frame.tensors["x"].tolist() == [0, 1, 2, 3]
    assert reply.run_s == pytest.approx(0.0125)
    assert reply.sent == reply.received == len(frames.encode(FRAME))
    headers = seen[0]
    assert headers["X-Call-Id"] == "call-1"
    assert headers["Traceparent"] == "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    assert headers["Tracestate"] == "vendor=1"
    assert headers["Content-Type"] == frames.CONTENT_TYPE
    assert LONG_S - took - 0.001 <= parse_duration(headers["X-Timeout"]) <= LONG_S
    assert "Authorization" not in headers
    assert "X-Callback-Url" not in headers


def doc(type: str, **facts: object) -> bytes:
    return json.dumps({"error": "it said so", "type": type, "facts": facts}).encode()


WATCHDOG, PROXY, MIDDLEWARE = ({"X-OpenFaaS-Internal": v} for v in ("of-watchdog", "proxy", "faas-middleware"))
TABLE: list[tuple[Answer, type[Exception], int]] = [
    ((404, {}, b"error finding function cloud-tail.openfaas-fn"), HopRejected, 1),
    ((502, {}, b""), HopUnavailable, 3),
    ((503, PROXY, b"No endpoints available for: cloud-tail."), HopUnavailable, 3),
    ((500, PROXY, b"Can't reach service for: cloud-tail."), HopUnavailable, 3),
    ((500, WATCHDOG, b""), HopUnavailable, 3),
    ((504, WATCHDOG, b""), HopTimeout, 1),
    ((429, MIDDLEWARE, b"concurrency limit"), HopBusy, 3),
    ((429, {"Retry-After": "3600"}, doc("Overloaded")), HopBusy, 1),
    ((500, {}, doc("RunFailed")), HopRejected, 1),
    ((400, {}, doc("FrameMalformed")), HopRejected, 1),
    ((404, {}, doc("Missing")), HopRejected, 1),
    ((400, {}, doc("ShapeMismatch")), ShapeMismatch, 1),
    ((302, {"Location": "http://127.0.0.1:1/"}, b""), HopRejected, 1),
    ((200, {}, b"<html>a login page</html>"), HopRejected, 1),
    ((200, {}, bytes(2**20 + 1)), HopRejected, 1),
]


@pytest.mark.parametrize(("answer", "error", "tries"), TABLE, ids=lambda v: str(v)[:40])
def test_each_answer_is_read_as_the_docs_say(
    hop_to: Callable[..., HttpHop], answer: Answer, error: type[HopError], tries: int
) -> None:
    with server([answer]) as (url, seen), pytest.raises(error) as e:
        hop_to(url).call(FRAME, context())
    assert len(seen) == tries
    assert e.value.facts["hop"] == url


def test_a_hop_that_comes_back_is_reached_by_a_later_try(hop_to: Callable[..., HttpHop]) -> None:
    with server([(503, PROXY, b"No endpoints"), (500, WATCHDOG, b""), ECHO]) as (url, seen):
        assert hop_to(url).call(FRAME, context()).frame.segment == "..1"
    assert len(seen) == 3


def test_retry_after_is_honoured(hop_to: Callable[..., HttpHop]) -> None:
    with server([(503, {"Retry-After": "1"}, doc("NotReady")), ECHO]) as (url, _):
        start = time.monotonic()
        hop_to(url).call(FRAME, context())
    assert time.monotonic() - start >= 1.0


def test_nothing_listening_is_unavailable_and_names_the_hop(hop_to: Callable[..., HttpHop]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as s:
        url = f"http://127.0.0.1:{s.getsockname()[1]}/"
    with pytest.raises(HopUnavailable) as e:
        hop_to(url).call(FRAME, context())
    assert url in e.value.message
    assert "refused" in e.value.message


def test_a_broken_connection_is_unavailable(hop_to: Callable[..., HttpHop]) -> None:
    def cut_off(c: socket.socket) -> None:
        c.recv(65536)
        c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf")

    with raw_server(cut_off) as url, pytest.raises(HopUnavailable):
        hop_to(url).call(FRAME, context())


MUCH_LATER_S = 30.0
"""When these servers give up by themselves: far from every deadline below, with room for a machine that pauses."""


def wait_for_the_end(c: socket.socket) -> None:
    """Until the other end closes the connection; nothing is read."""
    ends = select.poll()
    ends.register(c, select.POLLRDHUP)
    ends.poll(MUCH_LATER_S * 1000)


def silent(c: socket.socket) -> None:
    c.recv(65536)
    wait_for_the_end(c)


def dripping(c: socket.socket) -> None:
    c.recv(65536)
    c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(int(10 * MUCH_LATER_S)):
        time.sleep(0.1)
        c.sendall(b"x")


@pytest.mark.parametrize("behave", [silent, dripping])
def test_no_answer_outlasts_the_deadline(
    hop_to: Callable[..., HttpHop], behave: Callable[[socket.socket], None]
) -> None:
    with raw_server(behave) as url:
        start = time.monotonic()
        with pytest.raises(HopTimeout) as e:
            hop_to(url).call(FRAME, context(0.4))
        assert time.monotonic() - start < MUCH_LATER_S / 2
    assert e.value.facts["hop"] == url


def stalled(c: socket.socket) -> None:
    c.recv(65536)
    time.sleep(0.25)
    c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf")
    wait_for_the_end(c)


def test_a_stall_in_the_middle_of_an_answer_does_not_begin_the_wait_anew(hop_to: Callable[..., HttpHop]) -> None:
    def given_up() -> float:
        start = time.monotonic()
        with raw_server(stalled) as url, pytest.raises(HopTimeout):
            hop_to(url).call(FRAME, context(0.4))
        return time.monotonic() - start

    assert 0.4 <= least(given_up, 0.6) < 0.6


LARGE = Frame({"x": np.zeros(2**22, "float32")}, "sha256:" + "0" * 64, "..1", "r1")


def test_a_frame_may_take_longer_to_send_than_a_connection_to_make(hop_to: Callable[..., HttpHop]) -> None:
    def sip(c: socket.socket) -> None:
        length, received = len(frames.encode(LARGE)), 0
        while received < length and (piece := c.recv(2**21)):
            received += len(piece)
            time.sleep(0.02)
        c.sendall(b"HTTP/1.1 404 Gone\r\nContent-Length: 0\r\n\r\n")

    with raw_server(sip) as url, pytest.raises(HopRejected):
        hop_to(url, attempts=1, connect_timeout_s=0.05).call(LARGE, context())


def test_a_frame_that_nobody_takes_is_given_up_at_the_deadline(hop_to: Callable[..., HttpHop]) -> None:
    with raw_server(wait_for_the_end) as url:
        start = time.monotonic()
        with pytest.raises(HopTimeout):
            hop_to(url).call(LARGE, context(0.4))
        assert time.monotonic() - start < MUCH_LATER_S / 2


def test_no_pause_outlasts_the_deadline(hop_to: Callable[..., HttpHop]) -> None:
    def given_up() -> float:
        with server([(503, PROXY, b"")]) as (url, seen):
            start = time.monotonic()
            with pytest.raises((HopUnavailable, HopTimeout)) as e:
                hop_to(url, attempts=50).call(FRAME, context(0.5))
            took = time.monotonic() - start
        assert len(seen) <= 5
        # On a busy machine a try may end at the deadline, or be the only one.
        return took if e.type is HopUnavailable and len(seen) >= 2 else math.inf

    assert least(given_up, 0.5) < 0.5


def test_a_function_that_has_forgotten_what_is_refined_is_asked_once(hop_to: Callable[..., HttpHop]) -> None:
    """It says so in its body; whoever refines reads that there, and no other 409 means it."""
    said = {"error": "send it whole", "type": "NotKept", "facts": {"tensor": "x"}}
    with server([(409, {"Content-Type": "application/json"}, json.dumps(said).encode())]) as (url, seen):
        hop = hop_to(url)
        assert hop.whole_until == 0
        with pytest.raises(HopRejected, match="send it whole") as e:
            hop.call(FRAME, context())
        assert (e.value.facts["status"], e.value.facts["error"]) == (409, said)
        assert len(seen) == 1


def test_a_retry_after_of_nothing_is_tried_again(hop_to: Callable[..., HttpHop]) -> None:
    with server([(503, {"Retry-After": "0"}, b""), ECHO]) as (url, _):
        assert hop_to(url).call(FRAME, context()).frame.segment == "..1"


def test_a_connection_that_is_not_made_in_time_is_unavailable(hop_to: Callable[..., HttpHop]) -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        hop = hop_to(f"http://127.0.0.1:{full.getsockname()[1]}/", attempts=1, connect_timeout_s=0.1)
        # One waits in the backlog; the kernel drops the next one's SYN.
        with socket.create_connection(full.getsockname()):
            start = time.monotonic()
            with pytest.raises(HopUnavailable):
                hop.call(FRAME, context())
            assert time.monotonic() - start < LONG_S / 2


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


def test_the_error_of_a_hop_is_read_no_further_than_its_bound(hop_to: Callable[..., HttpHop]) -> None:
    with server([(400, {}, doc("X", padding="x" * 2**20))]) as (url, _), pytest.raises(HopRejected) as e:
        hop_to(url).call(FRAME, context())
    assert e.value.facts["error"] == {}
    assert len(e.value.message) < 1500


def test_a_deadline_that_has_passed_calls_nobody(hop_to: Callable[..., HttpHop]) -> None:
    with server([ECHO]) as (url, seen), pytest.raises(HopTimeout):
        hop_to(url).call(FRAME, context(0))
    assert not seen


@pytest.mark.parametrize(
    ("text", "seconds"), [("1500ms", 1.5), ("2s", 2), ("1m30s", 90), ("1.5h", 5400), ("250us", 0.00025)]
)
def test_durations_are_gos(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5", "s", "-1s", "1 s", "1s2", "9" * 40 + "s"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(RequestMalformed):
        parse_duration(text)


def test_a_context_keeps_what_is_valid_and_makes_the_rest_anew() -> None:
    trace = "00-" + "c" * 32 + "-" + "d" * 16 + "-00"
    kept = Context.from_headers({"X-Call-Id": "me", "traceparent": trace, "X-Timeout": "1m"}, longest_s=99)
    assert (kept.call_id, kept.traceparent) == ("me", trace)
    assert 20 < kept.deadline.remaining() <= 60
    for later in ("01-" + trace[3:] + "-new", "cc" + trace[2:]):
        assert Context.from_headers({"traceparent": later}, longest_s=9).traceparent == later
    for wrong in (trace + "-new", "ff" + trace[2:], trace.upper(), trace + "\n", "01-" + trace[3:] + "-" + "x" * 300):
        assert Context.from_headers({"traceparent": wrong}, longest_s=9).traceparent != wrong
    odd = Context.from_headers({"traceparent": trace, "tracestate": "a=1,\r\n b=2"}, longest_s=9)
    assert odd.tracestate == ""
    made = Context.from_headers({"X-Call-Id": "a\nb", "traceparent": "00-0-0-0", "X-Timeout": "1h"}, longest_s=99)
    assert made.call_id != "a\nb"
    assert made.traceparent.startswith("00-")
    assert 60 < made.deadline.remaining() <= 99


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
        b"",
    ],
    ids=["not-http", "endless-header", "bad-chunk", "half-chunk", "nothing"],
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
            assert not [o for o in gc.get_objects() if type(o).__name__ in ("Reader", "_Message")]
        finally:
            gc.enable()
