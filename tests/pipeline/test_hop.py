"""Hops over HTTP against real servers: what each failure means and what is tried again."""

from __future__ import annotations

import logging
import random
import socket
import time
from collections.abc import Callable

import pytest
import stamina.instrumentation

from isthmus.context import parse_duration
from isthmus.errors import (
    HopBusy,
    HopError,
    HopRejected,
    HopTimeout,
    HopUnavailable,
    RegistryUnavailable,
    ShapeMismatch,
    ValueRefused,
)
from isthmus.http.pool import retry_after_seconds, stage_seconds
from isthmus.pipeline import HttpHop, hop_retries
from isthmus.registry.retry_policy import RetryPolicy
from isthmus.retries import RetryBudget, backoff, log_retries
from isthmus.wire import frame as frames
from support.hop_servers import (
    ECHO,
    FRAME,
    MIDDLEWARE,
    PROXY,
    WATCHDOG,
    Answer,
    context,
    doc,
    raw_server,
    server,
)
from support.hop_servers import hop_to as hop_to
from support.patience import LONG_S


def test_a_frame_goes_there_and_back_with_the_requests_identity(hop_to: Callable[..., HttpHop]) -> None:
    start = time.monotonic()
    with server([ECHO]) as (url, seen):
        reply = hop_to(url).call(FRAME, context())
    took = time.monotonic() - start
    assert reply.frame.tensors["x"].tolist() == [0, 1, 2, 3]
    assert reply.run_s == pytest.approx(0.000125)
    assert reply.sent_bytes == reply.received_bytes == len(frames.encode(FRAME))
    headers = seen[0]
    assert headers["X-Call-Id"] == "call-1"
    assert headers["Traceparent"] == "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    assert headers["Tracestate"] == "vendor=1"
    assert headers["Content-Type"] == frames.CONTENT_TYPE
    assert LONG_S - took - 0.001 <= parse_duration(headers["X-Timeout"]) <= LONG_S
    assert "Authorization" not in headers
    assert "X-Callback-Url" not in headers


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
    monkeypatch.setattr(hop_retries, "_MAX_PAUSE_S", 0.05)
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
    monkeypatch.setattr(hop_retries, "MAX_OUTAGE_S", 0.2)
    monkeypatch.setattr(hop_retries, "_MAX_PAUSE_S", 0.05)
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
    monkeypatch.setattr(hop_retries, "_WAIT_BURST", 2)
    monkeypatch.setattr(hop_retries, "_WAITS_PER_S", 0.0)
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


def test_a_reply_says_how_long_the_function_had_the_call_and_why(hop_to: Callable[..., HttpHop]) -> None:
    timing = "queue;dur=0.03, decode;dur=0.01, load;dur=0.005, wait;dur=0.02, run;dur=0.1, total;dur=0.2"
    with server([(200, {"Server-Timing": timing}, None)]) as (url, _):
        reply = hop_to(url).call(FRAME, context())
    assert reply.served == pytest.approx((0.0002, 0.00005, 0.000005))
    assert 0.0002 <= reply.exchange.first_byte_s <= reply.exchange.whole_s
    assert reply.exchange.connect_s > 0  # its first connection


def test_a_function_that_leaves_out_the_total_had_the_call_for_its_stages(hop_to: Callable[..., HttpHop]) -> None:
    with server([(200, {"Server-Timing": "wait;dur=0.02, run;dur=0.1"}, None)]) as (url, _):
        assert hop_to(url).call(FRAME, context()).served.total_s == pytest.approx(0.00012)


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


def test_a_hop_that_comes_back_is_reached_by_a_later_try(hop_to: Callable[..., HttpHop]) -> None:
    with server([(503, PROXY, b"No endpoints"), (500, WATCHDOG, b""), ECHO]) as (url, seen):
        assert hop_to(url).call(FRAME, context()).frame.segment == "..1"
    assert len(seen) == 3


def test_retry_after_is_honoured(hop_to: Callable[..., HttpHop]) -> None:
    with server([(503, {"Retry-After": "1"}, doc("NotReady")), ECHO]) as (url, _):
        start = time.monotonic()
        hop_to(url).call(FRAME, context())
    assert time.monotonic() - start >= 1.0


def test_a_retry_after_of_nothing_is_tried_again(hop_to: Callable[..., HttpHop]) -> None:
    with server([(503, {"Retry-After": "0"}, b""), ECHO]) as (url, _):
        assert hop_to(url).call(FRAME, context()).frame.segment == "..1"
