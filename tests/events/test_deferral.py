"""Messages that wait for the cloud in the spool, over scripted replies of the router."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from isthmus.errors import StoreDamaged
from isthmus.events.call import CallLease
from isthmus.events.configuration import MIN_SPOOL_BYTES, parse_configuration
from isthmus.events.message import CONTINUATION, Message
from isthmus.events.route import Outcome, RouterReply
from isthmus.events.spool import EventSpool
from isthmus.events.trigger import Trigger
from support.patience import LONG_S
from support.queue_broker import away
from support.trigger_setup import AWAY, DONE, FAILED, REFUSED, UNCLEAR, Setup, messages, until
from support.trigger_setup import setup as setup
from support.trigger_setup import short_pauses as short_pauses


class Cloud:
    """Replies of a router whose tail is reached or not: a continuation, or the result of one."""

    def __init__(self, *, has_head: bool = True) -> None:
        self.is_up = threading.Event()
        self.has_head = has_head
        self.rest: list[str] = []
        self.away = AWAY
        self.finished = DONE
        self.padding = b""

    def answer(self, message: Message) -> RouterReply:
        is_rest = message.content_type == CONTINUATION
        if is_rest:
            self.rest.append(message.id)
            assert message.body == b"rest of " + message.id.encode() + self.padding
        if self.is_up.is_set():
            return self.finished if is_rest else DONE
        if is_rest or not self.has_head:
            return self.away
        body = b"rest of " + message.id.encode() + self.padding
        return RouterReply(Outcome.DEFERRED, 503, CONTINUATION, body, "the tail is away")


@pytest.fixture
def cloud(setup: Setup) -> Cloud:
    scripted = Cloud()
    setup.route.answer = scripted.answer
    return scripted


@pytest.fixture
def spool(tmp_path: Path) -> str:
    return f"[spool]\nfolder = '{tmp_path / 'spool'}'\n"


def spooled(running: Trigger) -> int:
    status = running.status().spool
    assert status
    return status.entries


def test_messages_wait_on_the_disk_and_are_finished_when_the_cloud_is_back(
    setup: Setup, cloud: Cloud, spool: str
) -> None:
    setup.broker.send(*messages(20, headers={"content-type": "image/jpeg", "content-encoding": "gzip"}))
    with setup.running(spool=spool) as running:
        until(lambda: spooled(running) == 20)
        # The broker has been told, the caller has not.
        until(lambda: {delivery.ended for delivery in setup.broker.delivered} == {"ack"})
        assert setup.results.ids == []
        until(lambda: setup.calls.get("m0").state == "queued")
        assert "waits for the cloud" in setup.calls.get("m0").reason
        status = running.status()
        assert status.is_ready
        assert status.spool
        assert (status.spool.bytes > 0, "cannot be reached" in status.spool.away or status.spool.away != "") == (
            True,
            True,
        )
        cloud.is_up.set()
        until(running.is_empty)
        assert running.status().spool.away == ""  # type: ignore[union-attr]
    counts = running.status().counts
    assert sorted(setup.results.ids) == sorted(f"m{i}" for i in range(20))
    assert (counts["spooled"], counts["drained"], counts["done"], counts["failed"]) == (20, 20, 20, 0)
    assert setup.results.messages[0].headers["x-isthmus-source"] == "photos"
    assert setup.calls.get("m0").attempts == 1


def test_without_a_spool_no_continuation_is_asked_for(setup: Setup) -> None:
    waits: list[int | None] = []
    call = setup.route.call

    def noting(message: Message, wait_s: int | None = None) -> RouterReply:
        waits.append(wait_s)
        return call(message, wait_s)

    setup.route.call = noting  # type: ignore[method-assign]
    setup.drain(*messages(1))
    assert waits == [None]


def test_the_router_waits_as_configured_and_hardly_once_the_cloud_is_away(
    setup: Setup, cloud: Cloud, spool: str
) -> None:
    waits: list[tuple[str, int | None]] = []
    call = setup.route.call

    def noting(message: Message, wait_s: int | None = None) -> RouterReply:
        waits.append((message.content_type, wait_s))
        return call(message, wait_s)

    setup.route.call = noting  # type: ignore[method-assign]
    with setup.running(spool=f"{spool}wait = '7s'") as running:
        setup.broker.send(Message(b"", "m0"))
        until(lambda: spooled(running) == 1)
        setup.broker.send(Message(b"", "m1"))
        until(lambda: spooled(running) == 2)
        until(lambda: len(cloud.rest) > 0)
    assert [wait for kind, wait in waits if kind != CONTINUATION] == [7, 0]
    assert {wait for kind, wait in waits if kind == CONTINUATION} == {None}


def test_a_spooled_message_that_comes_again_is_a_duplicate(setup: Setup, cloud: Cloud, spool: str) -> None:
    setup.broker.send(*messages(3))
    with setup.running(spool=spool) as running:
        until(lambda: spooled(running) == 3)
        setup.broker.send(*messages(3))
        until(lambda: running.status().counts["duplicates"] == 3)
        assert spooled(running) == 3
        cloud.is_up.set()
        until(running.is_empty)
    assert sorted(setup.results.ids) == ["m0", "m1", "m2"]


def test_what_was_spooled_before_a_restart_is_finished_after_it(setup: Setup, cloud: Cloud, spool: str) -> None:
    setup.broker.send(*messages(5))
    with setup.running(spool=spool) as running:
        until(lambda: spooled(running) == 5)
    cloud.is_up.set()
    setup.drain(spool=spool)
    assert sorted(setup.results.ids) == [f"m{i}" for i in range(5)]


def test_an_entry_whose_call_is_over_is_only_removed(setup: Setup, cloud: Cloud, spool: str, tmp_path: Path) -> None:
    """What a trigger leaves that died between the publication of a result and the removal of its entry."""
    left = EventSpool(tmp_path / "spool", MIN_SPOOL_BYTES)
    left.add(Message(b"rest of m0", "m0", headers={"content-type": CONTINUATION}))
    left.close()
    lease = setup.calls.begin("m0", "dead owner", 0.0)
    assert isinstance(lease, CallLease)
    setup.calls.publish(setup.calls.finish(lease, 200, "", b"{}"), "results")
    setup.drain(spool=spool)
    assert (setup.results.ids, cloud.rest) == ([], [])


def test_an_entry_that_was_spooled_and_not_acknowledged_is_finished_once(
    setup: Setup, cloud: Cloud, spool: str, tmp_path: Path
) -> None:
    left = EventSpool(tmp_path / "spool", MIN_SPOOL_BYTES)
    left.add(Message(b"rest of m0", "m0", headers={"content-type": CONTINUATION}))
    left.close()
    setup.calls.begin("m0", "dead owner", 0.1)
    cloud.is_up.set()
    setup.drain(Message(b"photo", "m0"), spool=spool)
    assert setup.results.ids == ["m0"]


def test_results_of_a_key_keep_their_order_over_an_outage(setup: Setup, cloud: Cloud, spool: str) -> None:
    def sent(numbers: range) -> list[Message]:
        return [Message(b"", f"{key}{i}", key) for i in numbers for key in "abc"]

    with setup.running(spool=spool, order_by="source") as running:
        setup.broker.send(*sent(range(100, 110)))
        until(lambda: spooled(running) == 30)
        # Behind what is spooled, while it is drained.
        setup.broker.send(*sent(range(110, 115)))
        cloud.is_up.set()
        setup.broker.send(*sent(range(115, 120)))
        until(running.is_empty)
    for key in "abc":
        assert [m for m in setup.results.ids if m[0] == key] == [f"{key}{i}" for i in range(100, 120)]


def test_a_message_does_not_overtake_the_spooled_ones_of_its_key(
    setup: Setup, cloud: Cloud, spool: str, tmp_path: Path
) -> None:
    """Even one that needs no cloud; others do not wait."""
    setup.broker.send(Message(b"", "a0", "a"))
    answer = setup.route.answer
    setup.route.answer = lambda message: DONE if message.body == b"easy" else answer(message)
    with setup.running(spool=spool, order_by="source") as running:
        until(lambda: spooled(running) == 1)
        setup.broker.send(Message(b"easy", "a1", "a"), Message(b"easy", "b0", "b"))
        until(lambda: setup.results.ids == ["b0"])
        until(lambda: "a1" in setup.route.called)
        cloud.is_up.set()
        until(running.is_empty)
    assert setup.results.ids == ["b0", "a0", "a1"]


@pytest.mark.parametrize("reply", [AWAY, UNCLEAR], ids=lambda reply: reply.outcome.value)
def test_a_cloud_that_stays_away_costs_no_attempt(setup: Setup, cloud: Cloud, spool: str, reply: RouterReply) -> None:
    cloud.away = reply
    setup.broker.send(*messages(2))
    with setup.running(spool=spool, attempts=2) as running:
        until(lambda: len(cloud.rest) > 8)
        # Others that need no cloud do not put the blame on them.
        setup.route.answer = lambda message: DONE if message.body == b"easy" else cloud.answer(message)
        before = len(cloud.rest)
        setup.broker.send(*(Message(b"easy", f"e{i}") for i in range(30)))
        until(lambda: len(cloud.rest) > before + 8)
        cloud.is_up.set()
        until(running.is_empty)
    assert setup.dead.ids == []
    assert {"m0", "m1"} < set(setup.results.ids)


@pytest.mark.parametrize(("reply", "tries"), [(REFUSED, 1), (FAILED, 3)], ids=["refused", "failed"])
def test_a_continuation_that_cannot_be_finished_is_a_dead_letter(
    setup: Setup, cloud: Cloud, spool: str, reply: RouterReply, tries: int
) -> None:
    cloud.finished = reply
    cloud.is_up.set()
    setup.route.answer = lambda message: (
        cloud.answer(message) if message.content_type == CONTINUATION else Cloud().answer(message)
    )
    setup.drain(*messages(1), spool=spool)
    (letter,) = setup.dead.messages
    assert (letter.id, letter.body, letter.content_type) == ("m0", b"rest of m0", CONTINUATION)
    assert letter.headers["x-isthmus-reason"] == reply.reason
    assert (setup.calls.get("m0").state, len(cloud.rest), setup.results.ids) == ("failed", tries, [])


def test_a_full_spool_leaves_messages_with_their_broker(setup: Setup, cloud: Cloud, spool: str) -> None:
    cloud.padding = bytes(100_000)
    setup.broker.send(*messages(40))
    with setup.running(spool=f"{spool}max_bytes = '1MiB'") as running:
        until(lambda: "spool" in running.status().away)
        assert "do not fit" in running.status().away["spool"]
        held = len(setup.broker.unended)
        assert held > 0
        called = len([m for m in setup.route.called if m not in cloud.rest])
        # Its threads wait with what they have: the head's work is not done again, and nothing more is fetched.
        assert called <= spooled(running) + 8
        cloud.is_up.set()
        until(running.is_empty)
    assert sorted(setup.results.ids) == sorted(f"m{i}" for i in range(40))
    assert len(setup.results.ids) == 40
    assert running.status().counts["dropped"] == 0


def test_a_stop_gives_messages_back_that_a_full_spool_did_not_take(setup: Setup, cloud: Cloud, spool: str) -> None:
    cloud.padding = bytes(100_000)
    setup.broker.send(*messages(40))
    with setup.running(spool=f"{spool}max_bytes = '1MiB'") as running:
        until(lambda: "spool" in running.status().away)
    cloud.is_up.set()
    setup.drain(spool=f"{spool}max_bytes = '1MiB'")
    assert sorted(setup.results.ids) == sorted(f"m{i}" for i in range(40))


def test_the_oldest_are_dropped_where_that_is_configured(setup: Setup, cloud: Cloud, spool: str) -> None:
    cloud.padding = bytes(100_000)
    with setup.running(spool=f"{spool}max_bytes = '1MiB'\nfull = 'drop-oldest'", concurrency=1) as running:
        for message in messages(30):
            setup.broker.send(message)
            until(lambda: running.status().counts["spooled"] == int(message.id[1:]) + 1)  # noqa: B023
        dropped = running.status().counts["dropped"]
        assert dropped == running.status().counts["failed"] == len(setup.dead.ids) > 10
        assert spooled(running) == 30 - dropped
        cloud.is_up.set()
        until(running.is_empty)
    assert sorted(setup.results.ids + setup.dead.ids) == sorted(f"m{i}" for i in range(30))
    letter = setup.dead.messages[0]
    assert (letter.headers["x-isthmus-reason"], letter.headers["x-isthmus-status"]) == (
        "dropped: the spool was full",
        "507",
    )
    # One that is in work is passed over.
    assert {f"m{i}" for i in range(dropped + 1, 30)} <= set(setup.results.ids)
    assert setup.calls.get(letter.id).state == "failed"


def test_one_that_never_fits_drops_nothing(setup: Setup, cloud: Cloud, spool: str) -> None:
    setup.broker.send(Message(b"", "m0"))
    with setup.running(spool=f"{spool}max_bytes = '1MiB'\nfull = 'drop-oldest'") as running:
        until(lambda: spooled(running) == 1)
        cloud.padding = bytes(2**21)
        setup.route.answer = lambda message: Cloud.answer(cloud, message) if message.id == "m1" else AWAY
        setup.broker.send(Message(b"", "m1"))
        until(lambda: "spool" in running.status().away)
        assert spooled(running) == 1
        setup.route.answer = lambda message: DONE
        until(lambda: "m0" in setup.results.ids)
    assert setup.dead.ids == []


def test_messages_without_a_head_stay_with_their_broker(setup: Setup, cloud: Cloud, spool: str) -> None:
    cloud.has_head = False
    setup.broker.send(*messages(3))
    with setup.running(spool=spool) as running:
        until(lambda: "router" in running.status().away)
        assert (spooled(running), setup.broker.delivered[0].ended) == (0, "")
        cloud.is_up.set()
        until(running.is_empty)
    assert sorted(setup.results.ids) == ["m0", "m1", "m2"]


@pytest.mark.parametrize("reply", [AWAY, UNCLEAR], ids=lambda reply: reply.outcome.value)
def test_messages_without_a_head_are_spooled_where_that_is_configured(
    setup: Setup, cloud: Cloud, spool: str, reply: RouterReply
) -> None:
    cloud.has_head, cloud.away = False, reply
    sent = messages(50, headers={"content-type": "image/jpeg"})
    setup.broker.send(*sent)
    with setup.running(spool=f"{spool}messages = true") as running:
        until(lambda: spooled(running) == 50)
        cloud.is_up.set()
        until(running.is_empty)
    assert sorted(setup.results.ids) == sorted(message.id for message in sent)
    assert (cloud.rest, running.status().counts["drained"]) == ([], 50)


def test_a_place_that_is_away_keeps_the_entry(setup: Setup, cloud: Cloud, spool: str) -> None:
    setup.broker.send(*messages(1))
    with setup.running(spool=spool) as running:
        until(lambda: spooled(running) == 1)
        setup.results.errors = [away("results")] * 1000
        cloud.is_up.set()
        until(lambda: "results" in running.status().away)
        assert spooled(running) == 1
        setup.results.errors.clear()
        until(running.is_empty)
    assert setup.results.ids == ["m0"]


@pytest.mark.parametrize(
    ("table", "where"),
    [
        ("max_bytes = '1MB'", "spool.max_bytes"),
        ("wait = '500ms'", "spool.wait"),
        ("wait = '1m'", "spool.wait"),
        ("full = 'drop-newest'", "spool.full"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(spool: str, table: str, where: str) -> None:
    with pytest.raises(Exception, match=where.replace(".", "\\.")):
        parse_configuration(f"[source]\nkind = 'nats'\nsubject = 'x'\n{spool}{table}\n", {})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_file_that_is_damaged_meanwhile_ends_the_trigger(
    setup: Setup, cloud: Cloud, spool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its next start moves the file aside."""
    setup.broker.send(*messages(1))
    running = setup.trigger(spool=spool)
    running.start()
    until(lambda: spooled(running) == 1)

    def damaged(*arguments: object) -> bool:
        raise StoreDamaged("the file is damaged")

    monkeypatch.setattr(EventSpool, "contains", damaged)
    setup.broker.send(Message(b"", "m1"))
    until(lambda: fails(running))
    running.stop(LONG_S)
    assert setup.results.ids == []


def fails(trigger: Trigger) -> bool:
    try:
        trigger.check()
    except StoreDamaged:
        return True
    return False
