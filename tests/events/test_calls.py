"""The state machine of a call: leases, attempts, one result, places that have it, expiry."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from isthmus.errors import CallUnknown, MessageTooLarge, ResultStoreUnavailable
from isthmus.events.call import Call, CallLease
from isthmus.events.calls import MAX_INLINE_BYTES, Calls
from isthmus.events.records import MAX_RECORD_BYTES
from isthmus.events.stores.sqlite import SqliteRecords


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Objects:
    """An object store in this process."""

    def __init__(self) -> None:
        self.bodies: dict[str, bytes] = {}

    def put(self, body: bytes, content_type: str) -> str:
        self.bodies[f"object:{len(self.bodies)}"] = bytes(body)
        return f"object:{len(self.bodies) - 1}"

    def get(self, reference: str) -> bytes:
        return self.bodies[reference]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def records(tmp_path: Path, clock: Clock) -> Iterator[SqliteRecords]:
    store = SqliteRecords(tmp_path / "records.sqlite", clock=clock)
    yield store
    store.close()


@pytest.fixture
def calls(records: SqliteRecords, clock: Clock) -> Calls:
    return Calls(records, keep_s=3600, clock=clock)


def lease(calls: Calls, call_id: str = "m", owner: str = "a", lease_s: float = 10) -> CallLease:
    begun = calls.begin(call_id, owner, lease_s, "photos.1")
    assert isinstance(begun, CallLease)
    return begun


def test_a_call_runs_and_is_done_with_its_result(calls: Calls) -> None:
    begun = lease(calls)
    assert (begun.call.state, begun.call.attempts, begun.call.source) == ("running", 1, "photos.1")
    calls.finish(begun, 200, "application/json", b"{}")
    call = calls.get("m")
    assert call.state == "done"
    assert call.result
    assert (call.result.status, call.result.content_type, calls.body(call.result)) == (200, "application/json", b"{}")


def test_a_second_delivery_of_a_finished_call_gets_the_result(calls: Calls) -> None:
    calls.finish(lease(calls), 200, "", b"1")
    again = calls.begin("m", "b", 10)
    assert isinstance(again, Call)
    assert again.result
    assert calls.body(again.result) == b"1"


def test_a_call_in_work_is_nobody_elses_until_its_lease_expires(calls: Calls, clock: Clock) -> None:
    lease(calls)
    other = calls.begin("m", "b", 10)
    assert isinstance(other, Call)
    assert (other.state, other.lease_until) == ("running", clock.now + 10)
    clock.now += 10.5
    assert lease(calls, owner="b").call.attempts == 2


def test_an_owner_that_asks_again_after_a_lost_response_has_its_lease(calls: Calls) -> None:
    lease(calls)
    again = lease(calls)
    assert again.call.attempts == 1
    ended = calls.finish(again, 200, "", b"1")
    taken = calls.take_over(ended.call, "a", 10)
    assert taken
    assert taken.call == ended.call


def test_the_lease_of_long_work_covers_the_publishing_of_its_result(calls: Calls, clock: Clock) -> None:
    begun = lease(calls)
    for _ in range(5):
        clock.now += 8
        assert calls.renew(begun, 10)
    ended = calls.finish(begun, 200, "", b"1")
    clock.now += 9
    assert calls.take_over(ended.call, "b", 10) is None
    clock.now += 2
    assert calls.take_over(ended.call, "b", 10)


def test_a_renewed_lease_holds_on(calls: Calls, clock: Clock) -> None:
    begun = lease(calls)
    clock.now += 8
    assert calls.renew(begun, 10)
    clock.now += 8
    assert isinstance(calls.begin("m", "b", 10), Call)


def test_a_lost_lease_cannot_be_renewed(calls: Calls, clock: Clock) -> None:
    begun = lease(calls)
    clock.now += 11
    lease(calls, owner="b")
    assert not calls.renew(begun, 10)


def test_a_renewed_lease_does_not_stand_in_the_way_of_its_owner(calls: Calls) -> None:
    begun = lease(calls)
    calls.renew(begun, 20)
    calls.release(begun, "the router is busy", blame=False)
    begun = lease(calls)
    calls.renew(begun, 20)
    assert calls.finish(begun, 200, "", b"1").call.owner == "a"
    assert calls.renew(begun, 20)
    assert calls.get("m").state == "done"


def test_a_failed_call_begins_again_only_when_told_to(calls: Calls) -> None:
    calls.fail(lease(calls), 400, "no photo")
    assert isinstance(calls.begin("m", "a", 10), Call)
    again = calls.begin("m", "a", 10, deaths=1)
    assert isinstance(again, CallLease)
    assert (again.call.attempts, again.call.result) == (1, None)


def test_a_redelivered_dead_letter_begins_no_second_time(calls: Calls) -> None:
    calls.fail(lease(calls), 400, "no photo")
    again = calls.begin("m", "b", 10, deaths=1)
    assert isinstance(again, CallLease)
    calls.fail(again, 400, "no photo again")
    redelivered = calls.begin("m", "c", 10, deaths=1)
    assert isinstance(redelivered, Call)
    assert redelivered.reason == "no photo again"
    assert isinstance(calls.begin("m", "c", 10, deaths=2), CallLease)


def test_a_place_that_refused_the_result_lacks_it_when_the_dead_letter_is_sent_again(calls: Calls) -> None:
    ended = calls.publish(calls.finish(lease(calls), 200, "", b"1"), "nats results")
    calls.publish(ended, "callback", is_refusal=True)
    assert calls.get("m").document()["refused"] == ["callback"]
    again = calls.begin("m", "b", 10, deaths=1)
    assert isinstance(again, Call)
    assert (again.state, again.published, again.refused) == ("done", ("nats results",), ())


def test_a_place_is_noted_although_the_store_lost_the_record(calls: Calls, records: SqliteRecords) -> None:
    ended = calls.finish(lease(calls), 200, "", b"1")
    records.delete("m", ended.version)
    calls.publish(ended, "nats results")
    assert (calls.get("m").state, calls.get("m").published) == ("done", ("nats results",))


def test_a_place_is_not_noted_for_a_call_that_began_again(calls: Calls, clock: Clock) -> None:
    ended = calls.fail(lease(calls), 400, "no photo")
    clock.now += 11
    calls.begin("m", "b", 10, deaths=1)
    calls.publish(ended, "dead")
    assert (calls.get("m").state, calls.get("m").published) == ("running", ())


def test_calls_of_two_scopes_share_ids_and_nothing_else(records: SqliteRecords, clock: Clock) -> None:
    one, other = (Calls(records, keep_s=3600, scope=scope, clock=clock) for scope in ("one", "other"))
    one.finish(lease(one), 200, "", b"1")
    assert lease(other).call.attempts == 1


def test_a_released_attempt_counts_only_with_blame(calls: Calls) -> None:
    calls.release(lease(calls), "the router is busy", blame=False)
    assert (calls.get("m").attempts, calls.get("m").state) == (0, "queued")
    calls.release(lease(calls), "the model failed", blame=True)
    assert (calls.get("m").attempts, calls.get("m").reason) == (1, "the model failed")
    assert lease(calls).call.attempts == 2


def test_the_first_result_stays(calls: Calls, clock: Clock) -> None:
    slow = lease(calls)
    clock.now += 11
    calls.finish(lease(calls, owner="b"), 200, "", b"first")
    ended = calls.finish(slow, 200, "", b"second")
    assert ended.call.owner == "b"
    assert ended.call.result
    assert ended.call.result.body == b"first"


def test_an_owner_whose_lease_was_taken_over_may_still_be_first(calls: Calls, clock: Clock) -> None:
    slow = lease(calls)
    clock.now += 11
    other = lease(calls, owner="b")
    calls.finish(slow, 200, "", b"first")
    assert calls.finish(other, 200, "", b"second").call.result == calls.get("m").result
    assert calls.get("m").owner == "a"


def test_of_many_owners_one_begins_and_one_result_stays(calls: Calls) -> None:
    with ThreadPoolExecutor(8) as pool:
        begun = list(pool.map(lambda i: calls.begin("m", f"owner {i}", 10), range(32)))
    assert sum(isinstance(b, CallLease) for b in begun) == 1


def test_a_failed_call_has_the_error_as_its_result(calls: Calls) -> None:
    calls.fail(lease(calls), 400, "no photo", {"error": "no photo", "type": "ImageMalformed"})
    call = calls.get("m")
    assert (call.state, call.reason) == ("failed", "no photo")
    assert call.result
    assert call.result.status == 400
    assert b"ImageMalformed" in call.result.body


def test_an_endless_error_is_cut(calls: Calls) -> None:
    calls.fail(lease(calls), 400, "x" * 10**6, {"error": "x" * 10**6})
    assert len(calls.get("m").reason) == 1000


def test_places_that_have_the_result_are_noted_once(calls: Calls) -> None:
    ended = calls.finish(lease(calls), 200, "", b"1")
    stale = calls.publish(ended, "nats results")
    calls.publish(ended, "mqtt alerts")
    calls.publish(stale, "nats results")
    assert calls.get("m").published == ("nats results", "mqtt alerts")


def test_unpublished_results_are_taken_over_after_the_lease(calls: Calls, clock: Clock) -> None:
    ended = calls.finish(lease(calls), 200, "", b"1")
    assert calls.take_over(ended.call, "b", 10) is None
    clock.now += 11
    taken = calls.take_over(ended.call, "b", 10)
    assert taken
    assert (taken.call.owner, taken.call.state) == ("b", "done")


def test_a_released_call_that_is_over_stays_so(calls: Calls) -> None:
    ended = calls.finish(lease(calls), 200, "", b"1")
    calls.release(ended, "stopping", blame=False)
    assert calls.get("m").state == "done"
    assert calls.take_over(ended.call, "b", 10)


def test_a_queued_call_begins_with_its_first_attempt(calls: Calls) -> None:
    assert calls.queue("m", "photos").state == "queued"
    assert lease(calls).call.attempts == 1
    assert calls.queue("m").state == "running"


def test_an_expired_call_is_unknown_and_its_id_new(calls: Calls, clock: Clock) -> None:
    calls.finish(lease(calls), 200, "", b"1")
    clock.now += 3601
    with pytest.raises(CallUnknown, match="no call m"):
        calls.get("m")
    assert lease(calls).call.attempts == 1


def test_a_sweep_removes_expired_calls(calls: Calls, clock: Clock, records: SqliteRecords) -> None:
    calls.finish(lease(calls), 200, "", b"1")
    clock.now += 3601
    lease(calls, "young")
    assert calls.sweep() == 1
    assert list(records.keys()) == ["young"]


def test_waiting_ends_with_the_result(calls: Calls) -> None:
    begun = lease(calls)
    threading.Timer(0.05, calls.finish, (begun, 200, "", b"1")).start()
    assert calls.wait("m", 30).state == "done"


def test_waiting_ends_with_a_result_of_another_process(calls: Calls, records: SqliteRecords, clock: Clock) -> None:
    begun = lease(calls)
    other = Calls(records, keep_s=3600, clock=clock)
    threading.Timer(0.05, other.finish, (begun, 200, "", b"1")).start()
    assert calls.wait("m", 30).state == "done"


def test_waiting_for_progress_ends_with_the_next_state_and_not_with_a_longer_lease(calls: Calls) -> None:
    queued = calls.queue("m")
    begun = lease(calls)
    running = calls.wait("m", 30, since=queued)
    assert running.state == "running"
    calls.renew(begun, 60)
    assert calls.wait("m", 0.02, since=running).progress == running.progress
    threading.Timer(0.05, calls.release, (begun, "the model failed"), {"blame": True}).start()
    assert calls.wait("m", 30, since=running).reason == "the model failed"


def test_waiting_ends_at_its_time(calls: Calls) -> None:
    lease(calls)
    assert calls.wait("m", 0.02).state == "running"


def test_a_large_result_goes_to_the_object_store(records: SqliteRecords, clock: Clock) -> None:
    objects = Objects()
    calls = Calls(records, keep_s=3600, objects=objects, clock=clock)
    body = bytes(3_200_000)
    ended = calls.finish(lease(calls), 200, "application/octet-stream", body)
    assert ended.call.result
    assert (ended.call.result.size, ended.call.result.body) == (len(body), b"")
    assert calls.body(ended.call.result) == body


def test_a_large_result_without_an_object_store_is_refused_with_both_numbers(calls: Calls) -> None:
    with pytest.raises(MessageTooLarge, match=f"{MAX_INLINE_BYTES + 1} bytes exceeds a record's {MAX_INLINE_BYTES}"):
        calls.finish(lease(calls), 200, "", bytes(MAX_INLINE_BYTES + 1))


def test_the_largest_record_fits_every_store(calls: Calls, records: SqliteRecords) -> None:
    ended = calls.finish(lease(calls), 200, "t" * 300, bytes(MAX_INLINE_BYTES))
    for i in range(16):
        ended = calls.publish(ended, f"{i:02}" + "p" * 2000)
    stored = records.get("m")
    assert stored
    assert len(stored.value) <= MAX_RECORD_BYTES


def test_a_record_of_something_else_is_an_error(calls: Calls, records: SqliteRecords) -> None:
    records.create("m", b"\xc1")
    with pytest.raises(ResultStoreUnavailable, match="no call"):
        calls.get("m")


def test_the_document_of_a_call_has_no_body(calls: Calls) -> None:
    document = calls.finish(lease(calls), 200, "application/json", b"{}").call.document()
    assert document["result"] == {"status": 200, "content_type": "application/json", "size": 2, "reference": ""}
    assert document["state"] == "done"
