"""Hops over HTTP against real servers: what each failure means, what is tried again, and when it must end."""

from __future__ import annotations

import gc
import http.client
import itertools
import json
import logging
import math
import random
import select
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import stamina.instrumentation
from flask import Flask, Response, request
from werkzeug.serving import make_server

from isthmus.client import Client
from isthmus.context import Context, Deadline, parse_duration
from isthmus.errors import (
    HopBusy,
    HopError,
    HopRejected,
    HopTimeout,
    HopUnavailable,
    RegistryUnavailable,
    RequestMalformed,
    ShapeMismatch,
    ValueRefused,
)
from isthmus.http import pool as http_pool
from isthmus.http import sockets
from isthmus.http.pool import retry_after_seconds, stage_seconds
from isthmus.pipeline import HttpHop
from isthmus.pipeline import hop as hops
from isthmus.registry.retry_policy import RetryPolicy
from isthmus.retries import RetryBudget, backoff, log_retries
from isthmus.wire import frame as frames
from isthmus.wire.frame import Frame
from support.patience import LONG_S, eventually, least

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
    assert reply.sent_bytes == reply.received_bytes == len(frames.encode(FRAME))
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
REACHED: list[tuple[Answer, type[Exception], int]] = [
    ((504, WATCHDOG, b""), HopTimeout, 1),
    ((408, {}, doc("DeadlineExceeded")), HopTimeout, 1),
    ((429, MIDDLEWARE, b"concurrency limit"), HopBusy, 3),
    ((429, {"Retry-After": "3600"}, doc("Overloaded")), HopBusy, 1),
    ((500, {}, doc("RunFailed")), HopRejected, 1),
    ((400, {}, doc("FrameMalformed")), HopRejected, 1),
    ((404, {}, doc("Missing")), HopRejected, 1),
    ((400, {}, doc("ShapeMismatch")), ShapeMismatch, 1),
    ((400, {}, doc("ValueRefused", tensor="ids", value=9)), ValueRefused, 1),
    ((302, {"Location": "http://127.0.0.1:1/"}, b""), HopRejected, 1),
    ((200, {}, b"<html>a login page</html>"), HopRejected, 1),
    ((200, {}, bytes(2**20 + 1)), HopRejected, 1),
]
STARTING: list[Answer] = [
    (404, {}, b"error finding function cloud-tail.openfaas-fn"),
    (502, {}, b""),
    (503, PROXY, b"No endpoints available for: cloud-tail."),
    (500, PROXY, b"Can't reach service for: cloud-tail."),
    (500, WATCHDOG, b""),
]


@pytest.mark.parametrize(("answer", "error", "tries"), REACHED, ids=lambda v: str(v)[:40])
def test_each_answer_is_read_as_the_docs_say(
    hop_to: Callable[..., HttpHop], answer: Answer, error: type[HopError], tries: int
) -> None:
    with server([answer]) as (url, seen), pytest.raises(error) as e:
        hop_to(url).call(FRAME, context())
    assert len(seen) == tries
    assert e.value.facts["hop"] == url


@pytest.mark.parametrize("answer", STARTING, ids=lambda v: str(v)[:40])
def test_a_function_that_is_starting_is_waited_for_beyond_the_attempts(
    hop_to: Callable[..., HttpHop], answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hops, "_MAX_PAUSE_S", 0.05)
    with server([answer] * 6 + [ECHO]) as (url, seen):
        assert hop_to(url, attempts=2).call(FRAME, context()).frame.segment == "..1"
    assert len(seen) == 7


@pytest.mark.parametrize("answer", STARTING, ids=lambda v: str(v)[:40])
def test_a_function_that_does_not_start_is_unavailable_within_the_deadline(
    hop_to: Callable[..., HttpHop], answer: Answer
) -> None:
    with server([answer]) as (url, _), pytest.raises((HopUnavailable, HopTimeout)) as e:
        hop_to(url).call(FRAME, context(0.5))
    assert e.value.facts["hop"] == url


def test_a_function_that_stays_away_is_tried_only_as_often_as_the_attempts_say(
    hop_to: Callable[..., HttpHop], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hops, "MAX_OUTAGE_S", 0.2)
    monkeypatch.setattr(hops, "_MAX_PAUSE_S", 0.05)
    with server([(503, PROXY, b"")]) as (url, seen):
        hop = hop_to(url, attempts=3)
        for _ in range(2):
            seen.clear()
            with pytest.raises(HopUnavailable):
                hop.call(FRAME, context())
        # Counted from the outage's beginning, which an earlier call saw.
        assert len(seen) == 3


def test_a_single_attempt_tries_nothing_again(hop_to: Callable[..., HttpHop]) -> None:
    with server([(503, PROXY, b""), ECHO]) as (url, seen), pytest.raises(HopUnavailable):
        hop_to(url, attempts=1).call(FRAME, context())
    assert len(seen) == 1


def test_retries_end_with_the_budget_that_all_calls_share(
    hop_to: Callable[..., HttpHop], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hops, "_RETRY_BURST", 2)
    monkeypatch.setattr(hops, "_RETRIES_PER_S", 0.0)
    with server([(503, PROXY, b"")]) as (url, seen):
        hop = hop_to(url)
        for tries in (3, 1):
            seen.clear()
            with pytest.raises(HopUnavailable):
                hop.call(FRAME, context())
            assert len(seen) == tries


def test_a_hop_that_is_closed_is_tried_no_more(hop_to: Callable[..., HttpHop]) -> None:
    hops_made: list[HttpHop] = []

    def closes(c: socket.socket) -> None:
        c.recv(2**16)
        hops_made[0].close()
        c.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")

    with raw_server(closes) as url:
        hops_made.append(hop_to(url))
        with pytest.raises(HopUnavailable, match="503"):
            hops_made[0].call(FRAME, context())


def test_a_retry_budget_comes_back_with_time_and_success() -> None:
    now = [0.0]
    budget = RetryBudget(burst=2, per_second=0.5, per_success=0.5, clock=lambda: now[0])
    assert [budget.take() for _ in range(3)] == [True, True, False]
    now[0] = 2.0
    assert [budget.take() for _ in range(2)] == [True, False]
    budget.succeeded()
    budget.succeeded()
    assert [budget.take() for _ in range(2)] == [True, False]


def test_the_pauses_of_retries_leave_the_global_random_generator_alone() -> None:
    random.seed(1)
    state = random.getstate()
    pauses = backoff(0.1, 1.0)
    drawn = [next(pauses) for _ in range(50)]
    assert random.getstate() == state
    assert all(0.1 <= pause <= 1.1 for pause in drawn)
    assert len(set(drawn)) > 40

    def fail() -> None:
        raise RegistryUnavailable("it is away")

    with pytest.raises(RegistryUnavailable):
        RetryPolicy(attempts=3, timeout_s=0.5)(fail)
    assert random.getstate() == state


def test_each_retry_is_told_in_the_log_with_its_reason(
    hop_to: Callable[..., HttpHop], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "isthmus")
    before = stamina.instrumentation.get_on_retry_hooks()
    try:
        log_retries(logging.getLogger("isthmus"))
        with server([(503, PROXY, b"No endpoints available for: cloud-tail."), ECHO]) as (url, _):
            hop_to(url).call(FRAME, context())
    finally:
        stamina.instrumentation.set_on_retry_hooks(before)
    (line,) = [r for r in caplog.records if r.name == "isthmus"]
    assert "No endpoints available for: cloud-tail." in line.getMessage()
    assert url in line.getMessage()
    assert line.__dict__["facts"]["retry"] == 1


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("run;dur=12.5", 0.0125),
        ('a;dur=1, run;desc="x";dur=3, b;dur=2', 0.003),
        ("RUN;dur=1", 0.0),
        ("run", 0.0),
        ("run;dur=", 0.0),
        ("run;dur=1.2.3", 0.0),
        ("run;dur=" + "9" * 400, 0.0),
        ("run;dur=-1", 0.0),
        ("run;dur=1e300", 0.0),
        ("run;dur=inf", 0.0),
        ("run;dur=²", 0.0),
    ],
    ids=lambda v: str(v)[:30],
)
def test_a_server_timing_that_is_no_number_counts_as_none(header: str, seconds: float) -> None:
    assert stage_seconds(header, "run") == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("2", 2.0), (" 0 ", 0.0), ("", None), ("²", None), ("-1", None), ("1.5", None), ("9" * 400, 86_400.0),
     ("Wed, 21 Oct 2026 07:28:00 GMT", None)],
    ids=lambda v: str(v)[:30],
)  # fmt: skip
def test_a_retry_after_is_read_as_whole_seconds_or_not_at_all(header: str, seconds: float | None) -> None:
    assert retry_after_seconds(header) == seconds


@pytest.mark.parametrize(
    "timing", ["run;dur=1.2.3", "run;dur=" + "9" * 400, ";;;,=,run;dur"], ids=["dots", "huge", "odd"]
)
def test_odd_timings_of_a_hop_do_not_spoil_its_answer(hop_to: Callable[..., HttpHop], timing: str) -> None:
    with server([(200, {"Server-Timing": timing}, None)]) as (url, _):
        assert hop_to(url).call(FRAME, context()).run_s == 0.0


@pytest.mark.parametrize(
    "number", ["NaN", "Infinity", "1e999", "9" * 5000], ids=["nan", "infinity", "too large", "too long"]
)
def test_an_error_of_a_hop_with_numbers_that_json_cannot_say_is_not_passed_on(
    hop_to: Callable[..., HttpHop], number: str
) -> None:
    body = b'{"error": "no", "type": "X", "facts": {"limit": %s}}' % number.encode()
    with server([(400, {}, body)]) as (url, _), pytest.raises(HopRejected) as e:
        hop_to(url).call(FRAME, context())
    assert e.value.facts["error"] == {}


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


def test_a_name_server_that_does_not_answer_is_given_up_at_the_deadline(
    hop_to: Callable[..., HttpHop], monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = threading.Event()

    def silent_resolver(*_: object, **__: object) -> list[object]:
        answered.wait(LONG_S)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", silent_resolver)
    try:
        start = time.monotonic()
        with pytest.raises((HopUnavailable, HopTimeout), match=r"tail\.example"):
            hop_to("http://tail.example/", attempts=1).call(FRAME, context(0.3))
        assert time.monotonic() - start < LONG_S / 2
    finally:
        answered.set()
        wait_for_lookups()


def test_callers_who_ask_for_the_same_name_share_one_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answered = [], threading.Event()

    def slow_resolver(host: str, port: int, **_: object) -> list[object]:
        asked.append(host)
        answered.wait(LONG_S)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", slow_resolver)
    try:
        for _ in range(3):
            with pytest.raises(TimeoutError, match=r"tail\.example"):
                sockets.resolve("tail.example", 80, timeout_s=0.01)
        assert asked == ["tail.example"]
    finally:
        answered.set()
        wait_for_lookups()
    assert sockets.resolve("tail.example", 80, timeout_s=LONG_S)[0][4] == ("192.0.2.1", 80)
    wait_for_lookups()


def test_a_tls_handshake_that_trickles_is_given_up_in_time() -> None:
    def trickle(c: socket.socket) -> None:
        c.recv(2**16)
        record = b"\x16\x03\x03\x40\x00"  # a handshake record of 16 KiB, a byte at a time
        for n in range(int(20 * MUCH_LATER_S)):
            c.sendall(record[n : n + 1] or b"\x02")
            time.sleep(0.05)

    with raw_server(trickle) as url:
        port = int(url.rstrip("/").rpartition(":")[2])
        start = time.monotonic()
        with pytest.raises(TimeoutError, match="handshake"):
            sockets.connect("127.0.0.1", port, timeout_s=0.4, tls=ssl.create_default_context())
        assert time.monotonic() - start < MUCH_LATER_S / 2


def wait_for_lookups() -> None:
    eventually(lambda: not any(t.name.startswith("resolve ") for t in threading.enumerate()))


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
        hop_to(url, attempts=1).call(FRAME, context())
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


def dripping_head(c: socket.socket) -> None:
    c.recv(65536)
    c.sendall(b"HTTP/1.1 200 OK\r\nX: ")
    for _ in range(int(10 * MUCH_LATER_S)):
        time.sleep(0.1)
        c.sendall(b"x")


def dripping_chunks(c: socket.socket) -> None:
    c.recv(65536)
    c.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(int(10 * MUCH_LATER_S)):
        time.sleep(0.1)
        c.sendall(b"1\r\nx\r\n")


@pytest.mark.parametrize("behave", [silent, dripping, dripping_head, dripping_chunks])
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
        c.sendall(b"HTTP/1.1 410 Gone\r\nContent-Length: 0\r\n\r\n")

    with raw_server(sip) as url, pytest.raises(HopRejected):
        hop_to(url, attempts=1, connect_timeout_s=0.05).call(LARGE, context())


def test_a_frame_that_nobody_takes_is_given_up_at_the_deadline(hop_to: Callable[..., HttpHop]) -> None:
    with raw_server(wait_for_the_end) as url:
        start = time.monotonic()
        with pytest.raises(HopTimeout):
            hop_to(url).call(LARGE, context(0.4))
        assert time.monotonic() - start < MUCH_LATER_S / 2


def test_a_refusal_that_comes_while_a_large_frame_is_sent_is_read(hop_to: Callable[..., HttpHop]) -> None:
    refused = doc("RequestTooLarge")

    def refuse(c: socket.socket) -> None:
        c.recv(2**10)
        c.sendall(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: %d\r\n\r\n" % len(refused) + refused)

    with raw_server(refuse) as url, pytest.raises(HopRejected, match="it said so") as e:
        hop_to(url, attempts=1).call(LARGE, context())
    assert e.value.facts["status"] == 413


def test_no_pause_outlasts_the_deadline(hop_to: Callable[..., HttpHop]) -> None:
    def given_up() -> float:
        with server([(503, PROXY, b"")]) as (url, seen):
            start = time.monotonic()
            with pytest.raises((HopUnavailable, HopTimeout)) as e:
                hop_to(url, attempts=50).call(FRAME, context(0.5))
            took = time.monotonic() - start
        assert len(seen) <= 9
        # On a busy machine a try may end at the deadline, or be the only one.
        return took if e.type is HopUnavailable and len(seen) >= 2 else math.inf

    assert least(given_up, 0.5) < 0.5


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


@pytest.mark.parametrize(
    ("timeout", "seconds"), [("2s", 1.8), ("25s", 9.0), ("8s", 7.2), ("400ms", 0.35), ("60ms", 0.03), ("0s", 0.0)]
)
def test_a_function_is_done_before_the_watchdogs_timer_of_the_same_x_timeout(timeout: str, seconds: float) -> None:
    before = time.monotonic()
    deadline = Context.from_headers({"X-Timeout": timeout}, longest_s=9.0).deadline
    assert before + seconds <= deadline.at <= time.monotonic() + seconds


def test_each_hop_ends_before_the_one_that_waits_for_it() -> None:
    headers = {"X-Timeout": "10s"}
    ends = []
    for _ in range(4):
        context = Context.from_headers(headers, longest_s=25.0)
        ends.append(context.deadline.at)
        headers = context.to_headers()
    assert [before - after > 0.05 for before, after in itertools.pairwise(ends)] == [True] * 3
