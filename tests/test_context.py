"""Contexts of calls: durations, deadlines and the headers that carry them."""

from __future__ import annotations

import itertools
import time

import pytest

from isthmus.context import Context, parse_duration
from isthmus.errors import (
    RequestMalformed,
)


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
    # Of a later version, the fields of version 00 go on.
    for later in ("01-" + trace[3:] + "-new", "cc" + trace[2:]):
        assert Context.from_headers({"traceparent": later}, longest_s=9).traceparent == trace
    for wrong in (trace + "-new", "ff" + trace[2:], trace.upper(), trace + "\n", "01-" + trace[3:] + "-" + "x" * 300):
        assert Context.from_headers({"traceparent": wrong}, longest_s=9).traceparent != wrong
    odd = Context.from_headers({"traceparent": trace, "tracestate": "a=1,\r\n b=2"}, longest_s=9)
    assert odd.tracestate == ""
    made = Context.from_headers({"X-Call-Id": "a\nb", "traceparent": "00-0-0-0", "X-Timeout": "1h"}, longest_s=99)
    assert made.call_id != "a\nb"
    assert made.traceparent.startswith("00-")
    assert 60 < made.deadline.remaining() <= 99


@pytest.mark.parametrize(
    ("timeout", "seconds"), [("2s", 1.8), ("25s", 9.0), ("8s", 7.2), ("400ms", 0.35), ("60ms", 0.03)]
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


@pytest.mark.parametrize(
    "timeout", ["0s", "0ms", "0.000s", "0h0m0s", "-1s", "-0s", "1e9s", "inf", "NaN", "5", "s", "1s,2s"]
)
def test_a_deadline_that_is_none_is_the_callers_mistake(timeout: str) -> None:
    with pytest.raises(RequestMalformed) as e:
        Context.from_headers({"X-Timeout": timeout}, longest_s=9.0)
    assert e.value.facts["header"] == "X-Timeout"


@pytest.mark.parametrize("timeout", ["999999999999h", "1h" * 5000, "10000h59m"])
def test_a_huge_deadline_is_the_functions_own(timeout: str) -> None:
    assert 8.0 < Context.from_headers({"X-Timeout": timeout}, longest_s=9.0).deadline.remaining() <= 9.0


TRACE = "00-" + "c" * 32 + "-" + "d" * 16 + "-01"


@pytest.mark.parametrize(("flags", "forwarded"), [("00", "00"), ("01", "01"), ("03", "03"), ("ff", "03"), ("fc", "00")])
def test_flags_that_no_version_defines_are_not_forwarded(flags: str, forwarded: str) -> None:
    context = Context.from_headers({"traceparent": TRACE[:-2] + flags}, longest_s=9)
    assert context.traceparent == TRACE[:-2] + forwarded


@pytest.mark.parametrize(
    ("tracestate", "forwarded"),
    [
        ("a=1,b=2", "a=1,b=2"),
        ("a=1, b=2,\t c@d=3,,", "a=1,b=2,c@d=3"),
        ("a=1,nothing", ""),
        ("A=1", ""),
        ("a=1=2", ""),
        ("a=caf\u00e9", ""),
        ("a=\x00", ""),
        ("=1", ""),
        (",".join(f"k{i}=v" for i in range(40)), ",".join(f"k{i}=v" for i in range(32))),
        ("a=1,b=" + "x" * 256 + ",c=" + "y" * 256, "a=1,b=" + "x" * 256),
        ("a=" + "x" * 600, ""),
        (",".join(f"k{i}={'v' * 200}" for i in range(1000)), ",".join(f"k{i}={'v' * 200}" for i in range(2))),
        ("," * 100_000, ""),
    ],
)
def test_tracestate_is_forwarded_within_its_limits_or_not_at_all(tracestate: str, forwarded: str) -> None:
    context = Context.from_headers({"traceparent": TRACE, "tracestate": tracestate}, longest_s=9)
    assert context.tracestate == forwarded


def test_a_tracestate_without_its_parent_is_dropped() -> None:
    assert Context.from_headers({"traceparent": TRACE + "x", "tracestate": "a=1"}, longest_s=9).tracestate == ""
