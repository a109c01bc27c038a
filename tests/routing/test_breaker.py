"""Circuit breakers: what opens one, what closes it again, and that calls with too little time prove nothing."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from typing import Any

import pytest

from isthmus.context import Abandonment, Context, Deadline
from isthmus.errors import HopBusy, HopError, HopRejected, HopTimeout, HopUnavailable
from isthmus.pipeline import HopReply
from isthmus.routing import breaker as breakers
from isthmus.routing.breaker import Breaker
from isthmus.routing.estimates import Estimates
from isthmus.routing.readiness import ReadinessProber
from isthmus.routing.watched_hop import WatchedHop
from support.hop_servers import FRAME, context, server
from support.hop_servers import hop_to as hop_to
from support.patience import eventually


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Scripted:
    """A hop that answers, or fails with `error`."""

    name, encodes = "tail", True

    def __init__(self) -> None:
        self.error: HopError | None = None
        self.foreign = False

    def call(self, frame: Any, context: Context) -> HopReply:
        if self.error is not None:
            raise self.error
        return HopReply(frame._replace(request="another") if self.foreign else frame, 0.0)

    def close(self) -> None:
        """Nothing is open."""


def fail(breaker: Breaker, times: int = 1) -> None:
    for _ in range(times):
        breaker.failed(breaker.enter(always=True) or pytest.fail("no entry"))


def succeed(breaker: Breaker, times: int = 1) -> None:
    for _ in range(times):
        breaker.succeeded(breaker.enter(always=True) or pytest.fail("no entry"))


def test_failures_in_a_row_open_a_breaker_and_a_success_between_them_does_not() -> None:
    breaker = Breaker()
    fail(breaker, breakers.MAX_CONSECUTIVE - 1)
    succeed(breaker)
    fail(breaker, breakers.MAX_CONSECUTIVE - 1)
    assert breaker.state == "closed"
    fail(breaker)
    assert (breaker.state, breaker.allows(), breaker.enter()) == ("open", False, None)


def test_a_hop_that_fails_every_other_call_opens_its_breaker_once_there_are_enough_calls() -> None:
    breaker = Breaker()
    calls = 0
    while breaker.state == "closed":
        succeed(breaker)
        fail(breaker)
        calls += 2
    assert calls == breakers.MIN_CALLS


def test_failures_outside_the_window_do_not_count() -> None:
    clock = Clock()
    breaker = Breaker(clock=clock)
    for _ in range(breakers.MIN_CALLS):
        succeed(breaker)
        fail(breaker)
        clock.now += breakers.WINDOW_S / 4
    assert breaker.state == "closed"


def test_a_half_open_breaker_lets_one_call_through_at_a_time() -> None:
    breaker = Breaker()
    fail(breaker, 3)
    breaker.probed(True)
    entries = [breaker.enter() for _ in range(5)]
    assert [entry is not None for entry in entries] == [True, False, False, False, False]
    assert not breaker.allows()
    assert entries[0] is not None
    breaker.left(entries[0])
    assert breaker.allows()
    succeed(breaker)
    assert breaker.state == "closed"


def test_a_failed_trial_opens_the_breaker_again() -> None:
    breaker = Breaker()
    fail(breaker, 3)
    breaker.probed(True)
    fail(breaker)
    assert (breaker.state, breaker.openings) == ("open", 2)


def test_calls_from_before_an_opening_do_not_open_the_breaker_again() -> None:
    breaker = Breaker()
    stale = [breaker.enter() for _ in range(8)]
    fail(breaker, 3)
    breaker.probed(True)
    for entry in stale:
        assert entry is not None
        breaker.failed(entry)
    assert breaker.state == "half-open"


def test_a_hop_that_comes_and_goes_has_to_succeed_more_and_more_often() -> None:
    clock = Clock()
    breaker = Breaker(clock=clock)
    fail(breaker, 3)
    needed = []
    for _ in range(6):
        clock.now += 1
        breaker.probed(True)
        trials = 0
        while breaker.state == "half-open":
            succeed(breaker)
            trials += 1
        needed.append(trials)
        fail(breaker, 3)
    assert needed == [1, 2, 4, 8, 8, 8]
    clock.now += 1
    breaker.probed(True)
    succeed(breaker, 8)
    clock.now += breakers.CALM_S
    fail(breaker, 3)
    breaker.probed(True)
    succeed(breaker)
    assert breaker.state == "closed"


def test_probes_come_soon_after_an_opening_and_then_once_a_second() -> None:
    clock = Clock()
    breaker = Breaker(clock=clock)
    assert breaker.probe_at() is None
    fail(breaker, 3)
    pauses = []
    while clock.now < 130:
        at = breaker.probe_at()
        assert at is not None
        pauses.append(at - clock.now)
        clock.now = at
        breaker.probed(False)
    assert pauses[0] == pauses[1] == 0.25
    assert max(pauses) == pauses[-1] == 1.0


def test_without_any_probe_a_request_tries_after_a_while() -> None:
    clock = Clock()
    breaker = Breaker(clock=clock)
    fail(breaker, 3)
    clock.now += breakers.UNPROBED_S
    assert breaker.allows()
    succeed(breaker)
    assert breaker.state == "closed"


def test_a_clock_that_stands_still_leaves_the_breaker_working() -> None:
    breaker = Breaker(clock=lambda: 0.0)
    fail(breaker, 100)
    assert breaker.state == "open"
    breaker.probed(True)
    succeed(breaker)
    assert breaker.state == "closed"


def watched() -> tuple[Scripted, WatchedHop]:
    inner = Scripted()
    return inner, WatchedHop(inner, Estimates(), Breaker())


COUNTED = [HopUnavailable("x", hop="tail"), HopRejected("x", hop="tail", status=200), HopRejected("x", status=500)]
UNCOUNTED = [HopBusy("x", hop="tail"), HopRejected("x", hop="tail", status=404), HopRejected("x", status=413)]


@pytest.mark.parametrize("error", [*COUNTED, *UNCOUNTED], ids=lambda e: f"{type(e).__name__} {e.facts.get('status')}")
def test_only_failures_of_the_hop_itself_open_its_breaker(error: HopError) -> None:
    inner, hop = watched()
    inner.error = error
    for _ in range(12):
        with pytest.raises(HopError):
            hop.call(FRAME, context())
    assert hop.breaker.state == ("open" if error in COUNTED else "closed")


def test_a_response_to_another_request_counts_as_a_failure() -> None:
    inner, hop = watched()
    inner.foreign = True
    for _ in range(3):
        hop.call(FRAME, context())
    assert hop.breaker.state == "open"


@pytest.mark.parametrize("error", [HopTimeout("late", hop="tail"), HopUnavailable("no connection in time", hop="tail")])
def test_a_callers_tiny_timeout_does_not_open_the_breaker(error: HopError) -> None:
    inner, hop = watched()
    for _ in range(30):
        hop.times.add(FRAME, 0.05)
    inner.error = error
    for seconds in (0.0, 0.04):
        for _ in range(20):
            late = replace(context(), deadline=Deadline.after(seconds))
            if isinstance(error, HopUnavailable):
                late = replace(late, deadline=Deadline.after(0.0))
            with pytest.raises(HopError):
                hop.call(FRAME, late)
    assert hop.breaker.state == "closed"


def test_timeouts_of_calls_that_had_longer_than_nearly_all_calls_take_open_the_breaker() -> None:
    inner, hop = watched()
    for _ in range(30):
        hop.times.add(FRAME, 0.05)
    inner.error = HopTimeout("late", hop="tail")
    for _ in range(3):
        with pytest.raises(HopTimeout):
            hop.call(FRAME, context(0.08))
    assert hop.breaker.state == "open"


def test_an_abandoned_call_says_nothing_about_the_hop() -> None:
    inner, hop = watched()
    inner.error = HopUnavailable("it broke off", hop="tail")
    abandonment = Abandonment()
    abandonment.abandon()
    for _ in range(12):
        with pytest.raises(HopUnavailable):
            hop.call(FRAME, replace(context(), abandonment=abandonment))
    assert hop.breaker.state == "closed"


def test_an_open_breaker_refuses_calls_that_have_another_way_and_passes_those_that_have_none() -> None:
    _, hop = watched()
    fail(hop.breaker, 3)
    with pytest.raises(HopUnavailable, match="is not called"):
        hop.call(FRAME, replace(context(), limits={"tail": Deadline.after(60)}))
    assert hop.call(FRAME, context()).frame.segment == "..1"
    assert hop.breaker.state == "closed"


def test_a_hop_that_answers_get_ready_gets_a_trial(hop_to: Any) -> None:
    with server([(503, {}, b"")]) as (url, _):
        hop = WatchedHop(hop_to(url), Estimates(), Breaker())
        assert not hop.is_ready(1.0)  # this server has no GET /ready
    _, ready = watched()
    prober = ReadinessProber([hop, ready], logging.getLogger("isthmus"))
    try:
        assert not [t for t in threading.enumerate() if t.name == "probe hops"]
        fail(hop.breaker, 3)
        fail(ready.breaker, 3)
        eventually(lambda: ready.breaker.state == "half-open")
        assert hop.breaker.state == "open"
    finally:
        prober.close()
    assert not [t for t in threading.enumerate() if t.name == "probe hops"]
