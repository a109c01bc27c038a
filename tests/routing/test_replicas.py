"""Tiers of several URLs: who is called, what a failure costs, and that hedged calls win, end and stay few."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from isthmus.context import Abandonment, Context, Deadline
from isthmus.errors import HopUnavailable, SettingsError, StateMissing
from isthmus.pipeline import HopReply, HttpHop
from isthmus.pipeline.hop import check_hops
from isthmus.routing.estimates import Estimates
from isthmus.routing.replicas import HEDGE_BURST, HEDGED_CALLS, Replicas, watch
from isthmus.settings import tier_of, urls_of
from isthmus.wire.frame import Frame, Step
from support.hop_servers import ECHO, FRAME, PROXY, context, raw_server, server
from support.hop_servers import hop_to as hop_to
from support.patience import LONG_S, eventually
from support.ports import free_port

USUAL_S = 0.04
"""Seconds of the calls before hedging begins, and so the 95th percentile of a hundred."""


class Script:
    """A replica that answers after `pause_s`, or fails."""

    encodes = True

    def __init__(self, name: str) -> None:
        self.name = name
        self.calls = self.abandoned = 0
        self.pause_s = 0.0
        self.fails = False
        self.raises: Exception | None = None

    def call(self, frame: Any, context: Context) -> HopReply:
        self.calls += 1
        if self.fails:
            raise HopUnavailable("away", hop=self.name)
        if self.raises is not None:
            raise self.raises
        ended = threading.Event()
        with (context.abandonment or Abandonment()).ended_by(ended.set):
            if ended.wait(self.pause_s):
                self.abandoned += 1
                raise HopUnavailable("abandoned", hop=self.name)
        return HopReply(frame, 0.0)

    def close(self) -> None:
        """Nothing is open."""


@contextmanager
def tier(*hops: Any) -> Iterator[Replicas]:
    (made,) = watch((hops,), Estimates())
    assert isinstance(made, Replicas)
    for hop in made.watched:
        hop.memory.tell(FRAME.bundle, FRAME.segment, is_loaded=True)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def scripts() -> Iterator[tuple[Script, Script, Replicas]]:
    one, other = Script("http://one"), Script("http://other")
    with tier(one, other) as replicas:
        yield one, other, replicas


def test_replicas_take_turns_and_the_busy_one_is_spared(scripts: tuple[Script, Script, Replicas]) -> None:
    one, other, replicas = scripts
    for _ in range(10):
        replicas.call(FRAME, context())
    assert (one.calls, other.calls) == (5, 5)
    one.pause_s, abandonment = LONG_S, Abandonment()
    busy = threading.Thread(target=abandoned_call, args=(replicas.watched[0], abandonment))
    busy.start()
    eventually(lambda: replicas.watched[0].in_flight == 1)
    for _ in range(10):
        replicas.call(FRAME, context())
    assert (one.calls, other.calls) == (6, 15)
    abandonment.abandon()
    busy.join()


def abandoned_call(hop: Any, abandonment: Abandonment) -> None:
    with pytest.raises(HopUnavailable):
        hop.call(FRAME, replace(context(), abandonment=abandonment))


def test_the_next_replica_answers_where_one_fails(scripts: tuple[Script, Script, Replicas]) -> None:
    one, other, replicas = scripts
    one.fails = True
    for _ in range(10):
        assert replicas.call(FRAME, context()).frame.segment == "..1"
    # Nobody knows what the one has in memory when it is back: it is not the first choice until it loads ahead.
    assert (one.calls, other.calls) == (1, 10)
    assert replicas.load(FRAME.bundle, FRAME.segment, Deadline.after(LONG_S))
    one.fails = False
    known(replicas, 10)
    assert one.calls == 6


def test_a_tier_whose_replicas_all_fail_fails(scripts: tuple[Script, Script, Replicas]) -> None:
    one, other, replicas = scripts
    one.fails = other.fails = True
    for _ in range(4):
        with pytest.raises(HopUnavailable, match="away"):
            replicas.call(FRAME, context())
    assert not replicas.allows()
    with pytest.raises(HopUnavailable, match="is not called"):
        replicas.call(FRAME, replace(context(), limits={replicas.name: Deadline.after(LONG_S)}))


def known(replicas: Replicas, calls: int = 100) -> None:
    """Make calls of which enough are slow: of calls of microseconds, any pause of the machine would be hedged."""
    scripts = [hop.inner for hop in replicas.watched]
    for i in range(calls):
        for script in scripts:
            assert isinstance(script, Script)
            script.pause_s = USUAL_S if i < HEDGED_CALLS - 1 else 0.0
        replicas.call(FRAME, context())


def test_a_hedged_call_wins_against_a_slow_replica_which_is_abandoned(
    scripts: tuple[Script, Script, Replicas],
) -> None:
    one, other, replicas = scripts
    known(replicas)
    one.pause_s = LONG_S
    began = time.monotonic()
    for _ in range(2):  # of which one begins at the slow replica
        replicas.call(FRAME, context())
    assert time.monotonic() - began < LONG_S / 2
    eventually(lambda: one.abandoned == 1)
    (slow,) = [hop.state() for hop in replicas.watched if hop.name == one.name]
    assert (slow.hedged, slow.hedges_won, slow.breaker) == (1, 1, "closed")
    assert other.abandoned == 0


def test_the_first_call_wins_where_its_hedge_is_slower_still(scripts: tuple[Script, Script, Replicas]) -> None:
    one, other, replicas = scripts
    known(replicas)
    # After as many calls of each, the first replica's turn has come; its hedge goes to the other one.
    one.pause_s, other.pause_s = 2.0, LONG_S
    replicas.call(FRAME, context())
    eventually(lambda: (one.abandoned, other.abandoned) == (0, 1))
    assert sum(hop.state().hedged for hop in replicas.watched) == 1
    assert sum(hop.state().hedges_won for hop in replicas.watched) == 0


def test_hedged_calls_stay_within_their_budget(scripts: tuple[Script, Script, Replicas]) -> None:
    one, other, replicas = scripts
    known(replicas)
    one.pause_s = other.pause_s = 1.5 * USUAL_S
    before = one.calls + other.calls
    for _ in range(60):
        replicas.call(FRAME, context())
    assert 0 < one.calls + other.calls - before - 60 <= HEDGE_BURST + 60 * 0.05 + 1


def test_nothing_is_hedged_before_the_tail_is_known(scripts: tuple[Script, Script, Replicas]) -> None:
    one, other, replicas = scripts
    known(replicas, HEDGED_CALLS - 1)
    one.pause_s = other.pause_s = 2 * USUAL_S
    replicas.call(FRAME, context())
    assert one.calls + other.calls == HEDGED_CALLS


def test_a_hedge_that_fails_leaves_the_first_call_running(scripts: tuple[Script, Script, Replicas]) -> None:
    one, other, replicas = scripts
    known(replicas)
    for hop in (one, other):
        hop.pause_s = 0.2
    other.fails = True
    for _ in range(2):
        assert replicas.call(FRAME, context()).frame.segment == "..1"


def test_a_call_over_http_that_is_abandoned_ends_at_once(hop_to: Callable[..., HttpHop]) -> None:
    closed = threading.Event()

    def silent(c: socket.socket) -> None:
        while c.recv(65536):
            pass
        closed.set()

    abandonment = Abandonment()
    with raw_server(silent) as url:
        timer = threading.Timer(0.2, abandonment.abandon)
        timer.start()
        with pytest.raises(HopUnavailable):
            hop_to(url).call(FRAME, replace(context(), abandonment=abandonment, waits=False))
        assert closed.wait(LONG_S)
        timer.join()


def test_a_call_that_was_abandoned_before_it_began_ends_at_once(hop_to: Callable[..., HttpHop]) -> None:
    abandonment = Abandonment()
    abandonment.abandon()
    with server([ECHO]) as (url, _), pytest.raises(HopUnavailable):
        hop_to(url).call(FRAME, replace(context(), abandonment=abandonment, waits=False))


def test_a_real_replica_that_is_stopped_costs_no_more_than_a_hedge(hop_to: Callable[..., HttpHop]) -> None:
    is_stopped, ended = threading.Event(), threading.Event()

    def stops(c: socket.socket) -> None:
        while c.recv(65536):
            if is_stopped.is_set():
                ended.wait(LONG_S)
                return
            c.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")

    is_stopped.set()
    with raw_server(stops) as stopped, server([ECHO]) as (alive, seen), tier(hop_to(stopped), hop_to(alive)) as both:
        for _ in range(6):
            assert both.call(FRAME, context(1.0)).frame.segment == "..1"
        assert len(seen) == 6
        ended.set()


def test_a_dead_replica_is_passed_over(hop_to: Callable[..., HttpHop]) -> None:
    dead = f"http://127.0.0.1:{free_port()}/"
    with server([ECHO]) as (alive, seen), tier(hop_to(dead), hop_to(alive)) as both:
        for _ in range(10):
            both.call(FRAME, context())
        assert len(seen) == 10
        assert [hop.state().failures for hop in both.watched] == [1, 0]


def test_the_last_replica_is_waited_for(hop_to: Callable[..., HttpHop]) -> None:
    starting = (503, PROXY, b"No endpoints")
    with (
        server([starting, starting, ECHO]) as (one, _),
        server([starting, starting, ECHO]) as (other, _),
        tier(hop_to(one), hop_to(other)) as both,
    ):
        assert both.call(FRAME, context()).frame.segment == "..1"


def test_an_entry_of_hops_may_name_several_urls() -> None:
    tier = "http://a.example/function/tail|https://b.example/function/tail"
    check_hops(("local", tier))
    assert urls_of(tier) == ("http://a.example/function/tail", "https://b.example/function/tail")
    assert tier_of(urls_of(tier)) == tier


@pytest.mark.parametrize(
    "tier",
    [
        "local|http://a.example",
        "http://a.example|",
        "http://a.example|http://a.example",
        "http://u:p@a|http://b",
        "|",
        "|".join(f"http://a.example:{port}" for port in range(1, 18)),
    ],
)
def test_replicas_that_cannot_be_are_refused_at_the_start(tier: str) -> None:
    with pytest.raises(SettingsError, match="hops"):
        check_hops((tier,))


def step(session: str) -> Frame:
    return FRAME._replace(step=Step(session, 3))


def test_steps_of_a_session_go_to_the_replica_that_has_its_state(scripts: tuple[Script, Script, Replicas]) -> None:
    one, other, replicas = scripts
    for _ in range(5):
        replicas.call(step("a"), context())
    for _ in range(3):
        replicas.call(step("b"), context())
    assert sorted((one.calls, other.calls)) == [3, 5]
    replicas.end_session("a", Deadline.after(LONG_S))
    replicas.end_session("b", Deadline.after(LONG_S))
    for _ in range(2):
        replicas.call(step("a"), context())
    assert sorted((one.calls, other.calls)) in ([3, 7], [5, 5])


def test_a_session_moves_to_the_next_replica_where_its_own_fails_and_stays_there(
    scripts: tuple[Script, Script, Replicas],
) -> None:
    one, other, replicas = scripts
    replicas.call(step("a"), context())
    first, second = (one, other) if one.calls else (other, one)
    first.fails = True
    second.raises = StateMissing("not here", session="a", position=0)
    with pytest.raises(StateMissing):
        replicas.call(step("a"), context())
    second.raises, first.fails = None, False
    for hop in replicas.watched:
        hop.memory.tell(FRAME.bundle, FRAME.segment, is_loaded=True)
    for _ in range(5):
        replicas.call(step("a"), context())
    assert (first.calls, second.calls) == (2, 6)


def test_steps_are_never_hedged(scripts: tuple[Script, Script, Replicas]) -> None:
    one, other, replicas = scripts
    for script in (one, other):
        script.pause_s = USUAL_S
    for _ in range(HEDGED_CALLS + 1):
        replicas.call(step("a"), context())
    first, second = (one, other) if one.calls else (other, one)
    first.pause_s = 10 * USUAL_S
    replicas.call(step("a"), context())
    assert (second.calls, first.abandoned) == (0, 0)
