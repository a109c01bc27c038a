"""The contract of record stores, for each of them: compare-and-set of small values, by several writers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import boto3
import pytest

from isthmus.errors import ConfigurationMalformed, ResultStoreUnavailable
from isthmus.events.records import RecordStore
from isthmus.events.stores.jetstream import JetStreamRecords
from isthmus.events.stores.objects import ObjectRecords
from isthmus.events.stores.sqlite import SqliteRecords
from isthmus.registry import RetryPolicy, S3Store
from support.moto_server import REGION
from support.nats_server import NatsServer
from support.ports import free_port
from support.s3_server import KEY_ID, SECRET, S3Server, store_at, unique_prefix
from support.s3_server import s3_server as s3_server
from support.stores import make_remote

HASTE = RetryPolicy(attempts=2, timeout_s=2)


def s3_store(endpoint: str, bucket: str) -> S3Store:
    client = boto3.client(
        "s3", endpoint_url=endpoint, region_name=REGION, aws_access_key_id=KEY_ID, aws_secret_access_key=SECRET
    )
    client.create_bucket(Bucket=bucket)
    client.close()
    return S3Store(bucket, "calls", endpoint=endpoint, region=REGION, key_id=KEY_ID, secret=SECRET, retry_policy=HASTE)


@pytest.fixture(params=["sqlite", "s3", "jetstream", "gs", "az", "hdfs"])
def records(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RecordStore]:
    store: RecordStore
    if request.param == "sqlite":
        store = SqliteRecords(tmp_path / "records.sqlite")
    elif request.param == "jetstream":
        server: NatsServer = request.getfixturevalue("nats_server")
        store = JetStreamRecords(f"{server.url}/{uuid4().hex}", keep_s=3600)
    elif request.param != "s3":
        store = ObjectRecords(make_remote(request.param, request))
    else:
        store = ObjectRecords(s3_store(request.getfixturevalue("moto_endpoint"), f"b{uuid4().hex}"))
    yield store
    store.close()


def test_a_key_is_created_once(records: RecordStore) -> None:
    version = records.create("a", b"1")
    assert version
    assert records.create("a", b"2") is None
    assert records.get("a") == (b"1", version)
    assert records.get("b") is None


def test_a_value_is_replaced_only_over_the_version_that_was_read(records: RecordStore) -> None:
    first = records.create("a", b"1")
    assert first
    second = records.update("a", b"2", first)
    assert second
    assert records.update("a", b"3", first) is None
    assert records.get("a") == (b"2", second)
    assert records.update("absent", b"1", first) is None


def test_writing_an_equal_value_is_a_new_version(records: RecordStore) -> None:
    first = records.create("a", b"1")
    assert first
    second = records.update("a", b"1", first)
    assert second
    assert second != first
    assert records.update("a", b"2", first) is None


def test_a_removed_key_is_absent_and_can_be_created_again(records: RecordStore) -> None:
    first = records.create("a", b"1")
    assert first
    assert not records.delete("a", "another")
    assert records.delete("a", first)
    assert records.get("a") is None
    assert list(records.keys()) == []
    second = records.create("a", b"2")
    assert second
    assert records.update("a", b"3", first) is None
    assert records.get("a") == (b"2", second)


def test_of_many_writers_of_a_version_one_wins(records: RecordStore) -> None:
    first = records.create("a", b"0")
    assert first
    with ThreadPoolExecutor(8) as pool:
        versions = list(pool.map(lambda i: records.update("a", b"%d" % i, first), range(16)))
        created = list(pool.map(lambda i: records.create("b", b"%d" % i), range(16)))
    assert len([v for v in versions if v]) == 1
    assert len([v for v in created if v]) == 1
    winner = next(i for i, v in enumerate(versions) if v)
    assert records.get("a") == (b"%d" % winner, versions[winner])


def test_all_keys_are_listed_and_old_ones_swept(records: RecordStore) -> None:
    for i in range(5):
        assert records.create(f"key-{i}", bytes(i))
    assert sorted(records.keys()) == [f"key-{i}" for i in range(5) if i or records.get("key-0")]
    assert records.sweep(older_than_s=3600) == 0
    time.sleep(1.1)  # S3 states whole seconds
    assert records.sweep(older_than_s=0) >= 4
    assert list(records.keys()) == []


def test_values_up_to_the_bound_come_back_as_they_were(records: RecordStore) -> None:
    value = bytes(range(256)) * 1024
    assert records.create("a", value)
    stored = records.get("a")
    assert stored is not None
    assert stored.value == value


def test_a_server_that_ignores_conditions_is_refused(s3_server: S3Server) -> None:
    with pytest.raises(ConfigurationMalformed, match="does not enforce conditional writes"):
        ObjectRecords(store_at(s3_server.endpoint, unique_prefix(), retry_policy=HASTE))


def test_a_server_that_is_away_is_unavailable() -> None:
    store = store_at(f"http://127.0.0.1:{free_port()}", retry_policy=HASTE)
    with pytest.raises(ResultStoreUnavailable):
        ObjectRecords(store)
