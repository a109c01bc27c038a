"""Records in a JetStream bucket, with a real server that dies."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nats
import pytest

from isthmus.errors import ConfigurationMalformed, MessageTooLarge, ResultStoreUnavailable
from isthmus.events.records import MAX_RECORD_BYTES
from isthmus.events.stores.jetstream import JetStreamRecords
from support.nats_server import NatsServer
from support.patience import eventually, until


@pytest.fixture
def records(nats_server: NatsServer) -> Iterator[JetStreamRecords]:
    store = JetStreamRecords(f"{nats_server.url}/{uuid.uuid4().hex}", keep_s=3600)
    yield store
    store.close()


def test_a_deleted_record_can_be_made_again_with_another_version(records: JetStreamRecords) -> None:
    first = records.create("a", b"1")
    assert first
    assert records.delete("a", first)
    again = records.create("a", b"1")
    assert again not in (None, first)
    assert list(records.keys()) == ["a"]


def test_of_many_threads_that_create_a_key_one_does(records: JetStreamRecords) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: (i % 20, records.create(f"k{i % 20}", b"x")), range(160)))
    assert sorted(key for key, version in made if version) == list(range(20))
    assert sorted(records.keys()) == sorted(f"k{i}" for i in range(20))


def test_many_keys_are_all_listed(records: JetStreamRecords) -> None:
    names = [f"k{i}" for i in range(600)]  # more than the client's buffer of updates
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: records.create(name, b""), names))
    assert sorted(records.keys()) == sorted(names)


def test_an_empty_store_has_no_keys_and_nothing_to_sweep(records: JetStreamRecords) -> None:
    assert (list(records.keys()), records.sweep(0.0)) == ([], 0)


def test_a_sweep_removes_what_was_written_before(records: JetStreamRecords) -> None:
    for i in range(3):
        records.create(f"k{i}", b"")
    assert records.sweep(3600) == 0
    assert records.sweep(-1.0) == 3
    assert list(records.keys()) == []


def test_the_server_removes_records_after_their_lifetime(nats_server: NatsServer) -> None:
    store = JetStreamRecords(f"{nats_server.url}/{uuid.uuid4().hex}", keep_s=1)
    store.create("a", b"1")
    eventually(lambda: store.get("a") is None)
    assert store.create("a", b"2")
    store.close()


def test_a_value_over_the_limit_is_refused(records: JetStreamRecords) -> None:
    assert records.create("fits", bytes(MAX_RECORD_BYTES - 1024))
    with pytest.raises(MessageTooLarge):
        records.create("large", bytes(MAX_RECORD_BYTES + 2048))


def test_records_outlive_a_kill_of_the_server(own_nats_server: NatsServer) -> None:
    store = JetStreamRecords(f"{own_nats_server.url}/calls", keep_s=3600)
    version = store.create("a", b"1")
    own_nats_server.kill()
    with pytest.raises(ResultStoreUnavailable, match=r"Connect call failed|broke|closed"):
        store.get("a")
    own_nats_server.restart()
    assert until(lambda: answers(lambda: store.get("a") == (b"1", version)))
    store.close()


def test_a_store_that_was_emptied_or_removed_is_made_again(own_nats_server: NatsServer) -> None:
    store = JetStreamRecords(f"{own_nats_server.url}/calls", keep_s=3600)
    lost = store.create("a", b"1")
    assert lost
    own_nats_server.restart(empty=True)
    assert until(lambda: answers(lambda: store.get("a") is None))
    assert store.create("a", b"2")  # of the revision that the lost record had
    assert store.update("a", b"late", lost) is None
    assert not store.delete("a", lost)

    async def remove() -> None:
        client = await nats.connect(own_nats_server.url)
        await client.jetstream().delete_key_value("calls")
        await client.close()

    asyncio.run(remove())
    assert store.get("a") is None
    assert store.create("a", b"3")
    store.close()


def test_the_url_shows_no_credentials(tmp_path: Path) -> None:
    server = NatsServer(tmp_path / "nats", 'authorization { user: "u", password: "s3cret" }')
    store = JetStreamRecords(f"nats://u:s3cret@127.0.0.1:{server.port}/calls", keep_s=3600)
    assert store.url == f"{server.url}/calls"
    assert store.create("a", b"")
    store.close()
    server.kill()


@pytest.mark.parametrize("url", ["nats://127.0.0.1:4222", "nats://127.0.0.1:4222/", "nats:///b", "nats://h/a.b"])
def test_a_url_without_a_bucket_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationMalformed, match="nats://HOST:PORT/BUCKET"):
        JetStreamRecords(url, keep_s=1)


def answers(condition: Callable[[], bool]) -> bool:
    try:
        return condition()
    except ResultStoreUnavailable:
        return False
