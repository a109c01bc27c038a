"""The trigger's loop over a queue in this process and scripted replies of the router."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from isthmus.errors import BrokerRefused, MessageTooLarge, ResultStoreUnavailable
from isthmus.events import limits, processing, trigger
from isthmus.events.broker import Delivery
from isthmus.events.call import CallLease
from isthmus.events.calls import Calls
from isthmus.events.claims import ClaimStore, parse_claim
from isthmus.events.message import Message
from isthmus.events.publishing import ResultPlace
from isthmus.events.route import Outcome, RouterReply
from isthmus.events.stores.sqlite import SqliteRecords
from isthmus.registry import FolderStore
from support.patience import LONG_S
from support.queue_broker import MessageList, QueueDelivery, away
from support.trigger_setup import AWAY, BUSY, DONE, FAILED, REFUSED, UNCLEAR, Setup, messages, until
from support.trigger_setup import setup as setup
from support.trigger_setup import short_pauses as short_pauses


def test_each_message_has_one_result_of_its_id(setup: Setup) -> None:
    done = setup.drain(*messages(50))
    assert sorted(setup.results.ids) == sorted(f"m{i}" for i in range(50))
    assert {delivery.ended for delivery in setup.broker.delivered} == {"ack"}
    assert done.status().counts["done"] == 50
    result = setup.results.messages[0]
    assert (result.body, result.headers["content-type"], result.headers["x-isthmus-status"]) == (
        b"{}",
        "application/json",
        "200",
    )


def test_a_result_names_the_file_that_was_sent(setup: Setup) -> None:
    setup.drain(Message(b"", "m", headers={"x-isthmus-file": "cat.jpg", "camera": "3"}))
    assert setup.results.messages[0].headers["x-isthmus-file"] == "cat.jpg"


def test_a_message_that_comes_again_has_no_second_result(setup: Setup) -> None:
    setup.drain(*messages(5))
    again = setup.drain(*messages(5), *messages(5))
    assert sorted(setup.results.ids) == [f"m{i}" for i in range(5)]
    assert again.status().counts["duplicates"] == 10
    assert len(setup.route.called) == 5


def test_two_deliveries_at_once_have_one_result(setup: Setup) -> None:
    setup.route.answer = lambda message: (time.sleep(0.05), DONE)[1]
    setup.drain(*messages(1), *messages(1), *messages(1))
    assert (setup.results.ids, setup.route.called) == (["m0"], ["m0"])


def test_a_refused_message_goes_to_the_dead_letters_at_once_with_the_reason(setup: Setup) -> None:
    setup.route.answer = lambda message: REFUSED if message.id == "m1" else DONE
    setup.drain(*messages(3))
    assert sorted(setup.results.ids) == ["m0", "m2"]
    (letter,) = setup.dead.messages
    assert (letter.id, letter.body) == ("m1", b"photo")
    headers = letter.headers
    assert headers["x-isthmus-reason"] == "no photo"
    assert (headers["x-isthmus-attempts"], headers["x-isthmus-status"]) == ("1", "400")
    assert setup.calls.get("m1").state == "failed"


def test_a_failing_message_has_its_attempts_and_then_is_a_dead_letter(setup: Setup) -> None:
    setup.route.answer = lambda message: FAILED if message.id == "m1" else DONE
    setup.drain(*messages(3))
    assert setup.route.called.count("m1") == 3
    assert setup.dead.ids == ["m1"]
    assert setup.dead.messages[0].headers["x-isthmus-attempts"] == "3"


def test_without_dead_letters_an_error_goes_where_results_go(setup: Setup) -> None:
    setup.dead_letters = None
    setup.route.answer = lambda message: REFUSED
    setup.drain(*messages(1))
    (result,) = setup.results.messages
    assert (result.id, result.headers["x-isthmus-status"]) == ("m0", "400")
    assert b"no photo" in result.body


def test_a_message_that_failed_once_is_done_at_the_next_attempt(setup: Setup) -> None:
    replies = iter([FAILED, DONE])
    setup.route.answer = lambda message: next(replies)
    setup.drain(*messages(1))
    assert (setup.results.ids, setup.dead.ids) == (["m0"], [])


@pytest.mark.parametrize("reply", [BUSY, AWAY, UNCLEAR], ids=lambda reply: reply.outcome.value)
def test_a_router_that_is_busy_or_away_costs_no_attempt(setup: Setup, reply: RouterReply) -> None:
    left = [reply] * 20
    setup.route.answer = lambda message: left.pop() if left else DONE
    setup.drain(*messages(3), concurrency=1)
    assert sorted(setup.results.ids) == ["m0", "m1", "m2"]
    assert setup.dead.ids == []


def test_a_message_that_alone_gets_no_response_is_a_dead_letter(setup: Setup) -> None:
    begun = threading.Event()
    sent = itertools.count()

    def answer(message: Message) -> RouterReply:
        begun.wait(LONG_S)
        if message.id == "slow":
            # Until another message is done: what a timeout of a router that serves others is like. Not for ever: after
            # an unclear reply this message may have the only slot, and no other is done meanwhile.
            before, end = running.status().counts["done"], time.monotonic() + 0.5
            while running.status().counts["done"] == before and time.monotonic() < end:
                time.sleep(0.005)
            return UNCLEAR
        setup.broker.send(Message(b"", f"m{next(sent)}"))
        return DONE

    setup.route.answer = answer
    setup.broker.send(Message(b"", "slow"), Message(b"", "m"))
    with setup.running() as running:
        begun.set()
        until(lambda: bool(setup.dead.ids))
    assert setup.dead.ids == ["slow"]
    assert setup.dead.messages[0].headers["x-isthmus-attempts"] == "3"


def test_a_busy_router_lowers_the_number_of_requests(setup: Setup) -> None:
    setup.route.answer = lambda message: BUSY if setup.route.parallel > 2 else (time.sleep(0.02), DONE)[1]
    setup.broker.send(*messages(40))
    limits_seen = set()
    with setup.running(concurrency=8) as running:
        while not running.is_empty():
            limits_seen.add(running.status().limit)
            time.sleep(0.005)
    assert min(limits_seen) <= 3
    assert sorted(setup.results.ids) == sorted(f"m{i}" for i in range(40))


def test_no_more_is_fetched_than_the_route_can_do(setup: Setup) -> None:
    free = threading.Event()
    setup.route.answer = lambda message: (free.wait(LONG_S), DONE)[1]
    setup.broker.send(*messages(100))
    with setup.running(concurrency=4) as running:
        until(lambda: setup.route.parallel == 4)
        time.sleep(0.1)
        assert len(setup.broker.delivered) <= 12
        assert running.status().in_work <= 8
        free.set()
        until(running.is_empty)
    assert setup.route.most_parallel == 4


def test_messages_are_fetched_several_at_a_time(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    fetch = setup.broker.fetch

    def counted(count: int, wait_s: float) -> Sequence[Delivery]:
        counts.append(count)
        return fetch(count, wait_s)

    monkeypatch.setattr(setup.broker, "fetch", counted)
    setup.drain(*messages(60), concurrency=4)
    # The size of a message is known from the first.
    assert counts[0] == 1
    assert min(counts[1:]) >= 4


def test_requests_that_waited_for_an_absent_router_are_sent_together_once_it_responds() -> None:
    limit = limits.RouteLimit(4)
    limit.note(Outcome.AWAY)
    together = threading.Barrier(5)

    def request() -> None:
        with limit.slot():
            together.wait(LONG_S)

    threads = [threading.Thread(target=request) for _ in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: together.n_waiting == 1)
    limit.note(Outcome.DONE)
    together.wait(LONG_S)
    for thread in threads:
        thread.join()


def test_a_counterpart_is_away_until_each_operation_that_waits_for_it_has_succeeded() -> None:
    """A full spool can be read: its state must not change with each read."""
    told: list[tuple[str, str]] = []
    availability = limits.Availability(threading.Event(), lambda name, reason: told.append((name, reason)))
    has_room = threading.Event()

    def add() -> None:
        if not has_room.is_set():
            raise ResultStoreUnavailable("no room", store="spool")

    adding = threading.Thread(target=availability.until, args=("spool", add, (ResultStoreUnavailable,)))
    adding.start()
    until(lambda: "spool" in availability.away)
    assert availability.until("spool", lambda: "entries", (ResultStoreUnavailable,)) == "entries"
    assert availability.away == {"spool": "no room"}
    has_room.set()
    adding.join()
    assert availability.away == {}
    assert told == [("spool", "no room"), ("spool", "")]


def test_a_counterpart_whose_operation_ends_with_another_error_is_not_away() -> None:
    availability = limits.Availability(threading.Event(), lambda name, reason: None)
    errors = iter([ResultStoreUnavailable("away", store="spool"), ValueError("defect")])

    def fail() -> None:
        raise next(errors)

    with pytest.raises(ValueError, match="defect"):
        availability.until("spool", fail, (ResultStoreUnavailable,))
    assert availability.away == {}


def test_bodies_in_memory_are_bounded(setup: Setup) -> None:
    free = threading.Event()
    setup.route.answer = lambda message: (free.wait(LONG_S), DONE)[1]
    setup.broker.send(*(Message(bytes(1000), f"m{i}") for i in range(50)))
    with setup.running(concurrency=16, max_work_bytes="3000") as running:
        until(lambda: setup.route.parallel > 0)
        time.sleep(0.1)
        assert running.status().work_bytes <= 3000
        free.set()
        until(running.is_empty)
    assert len(setup.results.ids) == 50


def test_messages_of_one_key_run_one_after_the_other(setup: Setup) -> None:
    active: set[str] = set()

    def answer(message: Message) -> RouterReply:
        camera = message.headers["camera"]
        assert camera not in active
        active.add(camera)
        time.sleep(0.002)
        active.remove(camera)
        return DONE

    setup.route.answer = answer
    sent = [Message(b"", f"{camera}{i}", headers={"camera": camera}) for i in range(20) for camera in "abc"]
    setup.drain(*sent, order_by="header:Camera")
    for camera in "abc":
        assert [m for m in setup.results.ids if m[0] == camera] == [f"{camera}{i}" for i in range(20)]
    assert setup.route.most_parallel > 1


def test_a_message_that_must_wait_holds_up_its_key_alone(setup: Setup) -> None:
    failures = [FAILED, FAILED]
    setup.route.answer = lambda message: failures.pop() if message.id == "a0" and failures else DONE
    sent = [Message(b"", f"{key}{i}", key) for i in range(5) for key in "ab"]
    setup.drain(*sent, order_by="source", retry_after="100ms")
    ids = setup.results.ids
    assert [m for m in ids if m[0] == "a"] == [f"a{i}" for i in range(5)]
    assert ids.index("b4") < ids.index("a0")


def test_a_dead_letter_lets_the_rest_of_its_key_go_on(setup: Setup) -> None:
    setup.route.answer = lambda message: FAILED if message.id == "m0" else DONE
    setup.drain(*messages(3), order_by="source")
    assert (setup.results.ids, setup.dead.ids) == (["m1", "m2"], ["m0"])


def test_every_place_gets_the_result_and_one_that_is_away_is_waited_for(setup: Setup) -> None:
    alerts = MessageList("alerts")
    alerts.errors = [away("alerts")] * 3
    setup.places.append(ResultPlace("alerts", alerts))
    setup.drain(*messages(2))
    assert sorted(setup.results.ids) == sorted(alerts.ids) == ["m0", "m1"]


def test_a_place_that_comes_and_goes_does_not_fill_the_log(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    publish, failed = setup.results.publish, set()

    def failing_once(message: Message) -> None:
        if message.id not in failed:
            failed.add(message.id)
            raise away("results")
        publish(message)

    monkeypatch.setattr(setup.results, "publish", failing_once)
    # Functions of other tests in this process set a level of their own on the loggers above.
    caplog.set_level(logging.INFO, "isthmus.events.trigger")
    with setup.running():
        for count, message in enumerate(messages(30), start=1):
            setup.broker.send(message)
            until(lambda: len(setup.results.ids) == count)  # noqa: B023
    assert len(setup.results.ids) == 30
    assert len([r for r in caplog.records if "results" in r.getMessage()]) <= 22  # of 60
    assert "comes and goes" in caplog.text


def test_nothing_is_acknowledged_while_a_place_is_away(setup: Setup) -> None:
    setup.results.errors = [away("results")] * 1000
    setup.broker.send(*messages(1))
    with setup.running() as running:
        until(lambda: "results" in running.status().away)
        assert not running.status().is_ready
        assert not setup.broker.delivered[0].ended
        setup.results.errors.clear()
        until(running.is_empty)
        assert running.status().is_ready
    assert setup.results.ids == ["m0"]


def test_after_a_crash_between_two_places_the_second_alone_is_served(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processing, "LEASE_S", 0.05)
    alerts = MessageList("alerts")
    setup.places.append(ResultPlace("alerts", alerts))
    # What a trigger leaves that died after the first place.
    lease = setup.calls.begin("m0", "dead owner", 0.05)
    assert isinstance(lease, CallLease)
    setup.calls.publish(setup.calls.finish(lease, 200, "", b"{}"), "results")
    setup.drain(*messages(1))
    assert (setup.results.ids, alerts.ids, setup.route.called) == ([], ["m0"], [])


def test_the_message_of_a_dead_trigger_is_taken_over_when_its_lease_expires(setup: Setup) -> None:
    setup.calls.begin("m0", "dead owner", 0.1)
    setup.drain(*messages(1))
    assert setup.results.ids == ["m0"]
    assert setup.calls.get("m0").attempts == 2


def test_a_message_whose_triggers_died_is_a_dead_letter_in_the_end(setup: Setup) -> None:
    for _ in range(3):
        setup.calls.begin("m0", "dead owner", 0.0)
    setup.drain(*messages(1), attempts=3)
    assert (setup.route.called, setup.dead.ids) == ([], ["m0"])
    assert "3 attempts ended without an outcome" in setup.dead.messages[0].headers["x-isthmus-reason"]


def test_a_store_that_is_away_stops_the_acknowledgements_and_nothing_else(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish, left = setup.calls.finish, [True] * 5

    def failing(*arguments: Any, **named: Any) -> CallLease:
        if left:
            left.pop()
            raise ResultStoreUnavailable("the disk is full")
        return finish(*arguments, **named)

    monkeypatch.setattr(setup.calls, "finish", failing)
    setup.drain(*messages(2))
    assert sorted(setup.results.ids) == ["m0", "m1"]
    assert sorted(setup.route.called) == ["m0", "m1"]


def test_a_broker_that_is_away_is_waited_for_and_said(setup: Setup) -> None:
    setup.broker.error = away("nats://127.0.0.1:4222")
    setup.broker.send(*messages(1))
    with setup.running() as running:
        until(lambda: "source" in running.status().away)
        setup.broker.error = None
        until(running.is_empty)
    assert setup.results.ids == ["m0"]


def test_a_stop_finishes_what_is_in_work_and_gives_the_rest_back(setup: Setup) -> None:
    setup.route.answer = lambda message: (time.sleep(0.1), DONE)[1]
    setup.broker.send(*messages(30))
    with setup.running(concurrency=2) as running:
        until(lambda: setup.route.parallel == 2)
    assert running.status().counts["done"] == len(setup.results.ids) >= 2
    assert {delivery.ended for delivery in setup.broker.delivered} == {"ack", "retry"}
    assert setup.broker.is_closed
    # Leases are released: another trigger begins at once, and no attempt is counted.
    other = setup.drain()
    assert sorted(setup.results.ids) == sorted(f"m{i}" for i in range(30))
    assert other.status().counts["duplicates"] == 0
    assert {setup.calls.get(f"m{i}").attempts for i in range(30)} == {1}


def test_a_stop_ends_waits_for_a_router_that_is_away(setup: Setup) -> None:
    setup.route.answer = lambda message: AWAY
    setup.broker.send(*messages(5))
    with setup.running() as running:
        until(lambda: not running.status().is_ready)
    assert {delivery.ended for delivery in setup.broker.delivered} == {"retry"}


def test_a_stop_ends_although_the_broker_hangs(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trigger, "_CLOSE_S", 0.1)
    hung, closed = threading.Event(), threading.Event()
    monkeypatch.setattr(QueueDelivery, "retry", lambda self, after_s: hung.wait())
    monkeypatch.setattr(QueueDelivery, "ack", lambda self: hung.wait())
    monkeypatch.setattr(setup.broker, "close", hung.wait)
    monkeypatch.setattr(setup.results, "close", closed.set)
    setup.broker.send(*messages(10))
    running = setup.trigger()
    running.start()
    until(lambda: bool(setup.results.ids))
    running.stop(0.1)
    assert closed.wait(LONG_S)
    hung.set()


def test_leases_are_renewed_although_the_broker_hangs(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processing, "LEASE_S", 0.3)
    monkeypatch.setattr(trigger, "LEASE_S", 0.3)
    hung, free = threading.Event(), threading.Event()
    monkeypatch.setattr(QueueDelivery, "extend", lambda self: hung.wait())
    setup.broker.extend_every_s = 0.1
    setup.route.answer = lambda message: (free.wait(LONG_S), DONE)[1]
    setup.broker.send(*messages(1))
    with setup.running() as running:
        until(lambda: setup.route.parallel == 1)
        first = setup.calls.get("m0").lease_until
        until(lambda: setup.calls.get("m0").lease_until > first + 1)
        hung.set()
        free.set()
        until(running.is_empty)


def test_a_result_that_comes_back_as_a_message_is_refused(setup: Setup) -> None:
    setup.drain(*messages(1))
    result = setup.results.messages[0]
    setup.drain(Message(result.body, "other", headers=result.headers))
    assert setup.dead.ids == ["other"]
    assert setup.route.called == ["m0"]


def test_a_message_has_come_through_a_bounded_number_of_triggers(setup: Setup) -> None:
    setup.drain(Message(b"", "m", headers={"x-isthmus-trigger": ",".join("abcdefghijklmnopq")}))
    assert setup.dead.ids == ["m"]


def test_a_result_names_the_triggers_on_its_way(setup: Setup) -> None:
    setup.drain(Message(b"", "m", headers={"x-isthmus-trigger": "first"}))
    assert setup.results.messages[0].headers["x-isthmus-trigger"] == "first,t"


def test_a_dead_letter_that_is_sent_again_begins_anew(setup: Setup) -> None:
    setup.route.answer = lambda message: REFUSED
    setup.drain(*messages(1))
    setup.route.answer = lambda message: DONE
    setup.drain(*messages(1))
    assert setup.results.ids == []
    setup.drain(setup.dead.messages[0])
    assert setup.results.ids == ["m0"]


def test_a_dead_letter_that_runs_in_a_circle_ends(setup: Setup) -> None:
    setup.route.answer = lambda message: REFUSED
    setup.drain(*messages(1))
    for _ in range(20):
        setup.drain(setup.dead.messages[-1])
    assert len(setup.dead.messages) == 16
    assert setup.dead.messages[-1].headers["x-isthmus-deaths"] == "16"
    assert len({letter.deduplication_id for letter in setup.dead.messages}) == 16


def test_a_result_that_its_place_refused_is_published_when_its_dead_letter_comes_again(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processing, "LEASE_S", 0.05)
    alerts = MessageList("alerts")
    setup.places.append(ResultPlace("alerts", alerts))
    setup.results.refuses = {"m0": BrokerRefused("no such topic", broker="b")}
    setup.drain(*messages(1))
    setup.results.refuses.clear()
    setup.drain(*setup.dead.messages)
    assert (setup.results.ids, alerts.ids, setup.route.called) == (["m0"], ["m0"], ["m0"])


def test_two_deliveries_to_one_trigger_publish_once_though_the_lease_expired(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As after a machine's sleep: the clock says that all leases are over, and the broker delivers again.
    monkeypatch.setattr(processing, "LEASE_S", 0.0)
    monkeypatch.setattr(setup.calls, "renew", lambda lease, lease_s: True)
    together = threading.Barrier(2)
    setup.route.answer = lambda message: (together.wait(LONG_S), DONE)[1]
    publish = setup.results.publish

    def slow(message: Message) -> None:
        time.sleep(0.2)
        publish(message)

    monkeypatch.setattr(setup.results, "publish", slow)
    finish = setup.calls.finish

    def finished(lease: CallLease, *arguments: Any, **named: Any) -> CallLease:
        long = lease._replace(call=msgspec.structs.replace(lease.call, lease_until=lease.call.updated + LONG_S))
        return finish(long, *arguments, **named)

    monkeypatch.setattr(setup.calls, "finish", finished)
    setup.drain(*messages(1), *messages(1))
    assert (setup.results.ids, setup.route.called) == (["m0"], ["m0", "m0"])


def test_a_dead_letter_with_headers_too_large_for_its_place_is_sent_without_them(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = setup.dead.publish

    def bounded(message: Message) -> None:
        if sum(map(len, message.headers.values())) > 1000:
            raise MessageTooLarge("headers", bytes=2000, limit=1000)
        publish(message)

    monkeypatch.setattr(setup.dead, "publish", bounded)
    setup.route.answer = lambda message: REFUSED
    setup.drain(Message(b"photo", "m0", headers={"note": "x" * 2000}))
    (letter,) = setup.dead.messages
    assert (letter.body, letter.headers["x-isthmus-reason"]) == (b"photo", "no photo")
    assert "note" not in letter.headers


def test_a_result_too_large_for_its_place_is_a_dead_letter_with_both_numbers(setup: Setup) -> None:
    setup.results.max_bytes = 1
    setup.drain(*messages(1))
    assert setup.dead.ids == ["m0"]
    assert "too large" in setup.dead.messages[0].headers["x-isthmus-reason"]
    assert setup.calls.get("m0").state == "done"


def test_a_place_that_refuses_a_result_is_tried_and_then_left(setup: Setup) -> None:
    setup.results.refuses = {"m0": BrokerRefused("no such topic", broker="b")}
    done = setup.drain(*messages(2))
    assert (setup.results.ids, setup.dead.ids) == (["m1"], ["m0"])
    assert done.status().counts["refused"] == 1


def test_a_dead_letter_too_large_for_its_place_is_told_without_its_body(setup: Setup) -> None:
    setup.dead.max_bytes = 1
    setup.route.answer = lambda message: REFUSED
    setup.drain(*messages(1))
    (letter,) = setup.dead.messages
    assert (letter.body, letter.headers["x-isthmus-bytes"]) == (b"", "5")


def test_a_defect_costs_a_message_its_attempts_and_not_the_others_theirs(
    setup: Setup, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processing, "LEASE_S", 0.02)

    def answer(message: Message) -> RouterReply:
        if message.id == "m1":
            raise KeyError("defect")
        return DONE

    setup.route.answer = answer
    setup.drain(*messages(3))
    assert sorted(setup.results.ids) == ["m0", "m2"]
    assert setup.dead.ids == ["m1"]
    assert "KeyError" in caplog.text


def test_long_work_is_extended_and_its_lease_renewed(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processing, "LEASE_S", 0.3)
    monkeypatch.setattr(trigger, "LEASE_S", 0.3)
    setup.broker.extend_every_s = 0.1
    setup.route.answer = lambda message: (time.sleep(1.0), DONE)[1]
    setup.broker.send(*messages(1))
    with setup.running() as running:
        until(lambda: setup.route.parallel == 1)
        time.sleep(0.6)
        assert setup.calls.get("m0").lease_until > time.time()
        until(running.is_empty)
    assert setup.broker.delivered[0].extensions > 3


def test_expired_calls_and_objects_are_removed(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trigger, "_BACKLOG_EVERY_S", 0.01)
    (tmp_path / "claims").mkdir()
    now = time.time() - 7200
    setup.claims = ClaimStore(FolderStore(tmp_path / "claims"), max_bytes=100, keep_s=60, clock=lambda: now)
    setup.claims.deposit(b"old")
    now = time.time()
    swept = threading.Event()
    monkeypatch.setattr(setup.calls, "sweep", swept.set)
    with setup.running():
        until(lambda: swept.is_set() and not [p for p in (tmp_path / "claims").rglob("*") if p.is_file()])


def test_a_claim_is_redeemed_and_a_large_result_deposited(setup: Setup, tmp_path: Path) -> None:
    (tmp_path / "claims").mkdir()
    setup.claims = ClaimStore(FolderStore(tmp_path / "claims"), max_bytes=10**7, keep_s=3600)
    setup.results.max_bytes = 1000
    bodies = []
    large = RouterReply(Outcome.DONE, 200, "text/plain", bytes(2000))
    setup.route.answer = lambda message: (bodies.append((message.body, message.content_type)), large)[1]
    setup.drain(Message(setup.claims.deposit(bytes(5000), "image/png").encode(), "m0", headers={"content-type": "x/y"}))
    assert bodies == [(bytes(5000), "image/png")]
    (result,) = setup.results.messages
    assert setup.claims.redeem(parse_claim(result.body)) == bytes(2000)


def test_a_claim_whose_object_is_gone_is_a_dead_letter(setup: Setup, tmp_path: Path) -> None:
    (tmp_path / "claims").mkdir()
    setup.claims = ClaimStore(FolderStore(tmp_path / "claims"), max_bytes=10**7, keep_s=3600)
    claim = setup.claims.deposit(b"photo")
    (tmp_path / "claims" / claim.key).unlink()
    setup.drain(Message(claim.encode(), "m0"))
    assert (setup.route.called, setup.dead.messages[0].headers["x-isthmus-status"]) == ([], "410")


def test_a_recorded_result_whose_object_is_gone_is_a_dead_letter(setup: Setup, tmp_path: Path) -> None:
    (tmp_path / "claims").mkdir()
    claims = ClaimStore(FolderStore(tmp_path / "claims"), max_bytes=10**7, keep_s=3600)
    records = SqliteRecords(tmp_path / "own.sqlite")
    setup.calls = Calls(records, keep_s=3600, objects=claims)
    lease = setup.calls.begin("m0", "dead owner", 0.0)
    assert isinstance(lease, CallLease)
    ended = setup.calls.finish(lease, 200, "", bytes(10**6))
    assert ended.call.result
    (tmp_path / "claims" / parse_claim(ended.call.result.reference.encode()).key).unlink()
    setup.drain(*messages(1))
    records.close()
    assert (setup.results.ids, setup.dead.ids) == ([], ["m0"])


def test_a_drained_trigger_takes_nothing_more_and_its_records_stay_open(setup: Setup) -> None:
    started = setup.trigger()
    started.start()
    setup.broker.send(*messages(3))
    until(started.is_empty)
    started.drain(LONG_S)
    started.drain(LONG_S)
    assert setup.broker.is_closed
    setup.broker.send(*messages(5))
    assert setup.calls.get("m1").state == "done"
    started.stop()
    assert started.status().counts["received"] == 3
