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
