"""The audit log: one linear chain, and every alteration that a chain can show is named by its first entry."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import boto3
import pytest

from isthmus.errors import RegistryError
from isthmus.registry import BlobStore, FolderStore, S3Store
from isthmus.security.audit import AuditLog, ChainCheck, ChainMark, local_user
from support.moto_server import KEY_ID, REGION, SECRET
from support.moto_server import moto_endpoint as moto_endpoint
from support.s3_server import PATIENCE

WRITERS = 20


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    if request.param == "folder":
        (tmp_path / "registry").mkdir()
        return FolderStore(tmp_path / "registry")
    return moto_store(request.getfixturevalue("moto_endpoint"))


@pytest.fixture
def folder(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path)


def moto_store(endpoint: str) -> S3Store:
    bucket, keys = f"audit-{uuid4().hex}", {"aws_access_key_id": KEY_ID, "aws_secret_access_key": SECRET}
    client = boto3.client("s3", endpoint_url=endpoint, region_name=REGION, **keys)
    client.create_bucket(Bucket=bucket)
    client.close()
    place = {"endpoint": endpoint, "region": REGION, "key_id": KEY_ID, "secret": SECRET}
    return S3Store(bucket, "", retry_policy=PATIENCE, **place)


def log_of(store: BlobStore) -> AuditLog:
    return AuditLog(store, PATIENCE)


def filled(store: BlobStore, count: int = 5) -> AuditLog:
    log = log_of(store)
    for number in range(count):
        log.append("ann@laptop", "promote", {"model": "m", "version": str(number)})
    return log


def test_entries_come_back_in_their_order_and_the_chain_verifies(store: BlobStore) -> None:
    log = filled(store)
    entries = list(log.entries())
    assert [entry.number for entry in entries] == [1, 2, 3, 4, 5]
    assert [entry.facts["version"] for entry in entries] == list("01234")
    assert {(entry.who, entry.what) for entry in entries} == {("ann@laptop", "promote")}
    check = log.verify()
    assert (check.verified.number, check.broken) == (5, None)
    assert [entry.number for entry in log.entries(after=3)] == [4, 5]


def test_an_empty_log_verifies(store: BlobStore) -> None:
    log = log_of(store)
    store.put("models/m/versions/1", b"x")
    assert log.verify() == ChainCheck(ChainMark(), None)
    assert list(log.entries()) == []


def test_twenty_writers_at_once_make_one_linear_chain(store: BlobStore) -> None:
    store.put("models/m/versions/1", b"x")
    # Conflicts are quadratic, and requests to the server of S3 take milliseconds each.
    each = 3 if isinstance(store, FolderStore) else 1
    start, numbers = threading.Barrier(WRITERS), list[int]()

    def write(name: str) -> None:
        log = log_of(store)
        start.wait()
        for _ in range(each):
            numbers.append(log.append(name, "publish", {}).number)

    threads = [threading.Thread(target=write, args=(f"writer-{n}",)) for n in range(WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(1, WRITERS * each + 1))
    check = log_of(store).verify()
    assert (check.verified.number, check.broken) == (WRITERS * each, None)
    assert {entry.who for entry in log_of(store).entries()} == {f"writer-{n}" for n in range(WRITERS)}


def key(number: int) -> str:
    return f"audit/{number:012d}"


def content(store: BlobStore, number: int) -> bytes:
    return store.get(key(number), max_bytes=2**20)


def alter_who(store: BlobStore) -> None:
    store.put(key(3), content(store, 3).replace(b"ann@laptop", b"bob@laptop"))


def alter_number(store: BlobStore) -> None:
    store.put(key(3), content(store, 3).replace(b'"number":3', b'"number":4'))


def damage(store: BlobStore) -> None:
    store.put(key(3), b"{")


def lengthen(store: BlobStore) -> None:
    store.put(key(3), content(store, 3) + b" " * 20_000)


def swap(store: BlobStore) -> None:
    third, fourth = content(store, 3), content(store, 4)
    store.put(key(3), fourth)
    store.put(key(4), third)


def alter_the_last(store: BlobStore) -> None:
    store.put(key(5), content(store, 5).replace(b"ann@laptop", b"bob@laptop"))


def remove(store: BlobStore) -> None:
    store.delete(key(3))


def add_a_field(store: BlobStore) -> None:
    store.put(key(3), content(store, 3).replace(b'{"at"', b'{"also":1,"at"'))


def truncate(store: BlobStore) -> None:
    for number in (3, 4, 5):
        store.delete(key(number))


def truncate_and_append(store: BlobStore) -> None:
    truncate(store)
    log_of(store).append("eve@laptop", "promote", {})


@pytest.mark.parametrize(
    ("alteration", "broken"),
    [
        # An altered entry shows at the one after it, whose digest of it differs.
        (alter_who, 4),
        (alter_number, 3),
        (damage, 3),
        (lengthen, 3),
        (swap, 3),
        (remove, 3),
        (alter_the_last, 5),
        (add_a_field, 3),
        (truncate, 3),
        (truncate_and_append, 3),
    ],
)
def test_the_first_broken_entry_is_named(
    alteration: Callable[[BlobStore], None], broken: int, folder: FolderStore
) -> None:
    log = filled(folder)
    alteration(folder)
    check = log.verify()
    assert check.broken is not None
    assert check.broken.number == broken, check.broken.reason
    assert check.verified.number == broken - 1


def test_an_end_that_was_cut_off_with_its_head_shows_by_a_checkpoint_alone(folder: FolderStore) -> None:
    log = filled(folder)
    checkpoint = log.verify().verified
    folder.delete(key(5))
    folder.delete("audit/head")
    assert log.verify().broken is None
    broken = log.verify(checkpoint).broken
    assert broken is not None
    assert (broken.number, broken.reason) == (5, "it is missing: there were 5 entries")
    log.append("eve@laptop", "promote", {})
    replaced = log.verify(checkpoint).broken
    assert replaced is not None
    assert (replaced.number, replaced.reason) == (5, "it was altered: its digest was another")


def test_a_log_goes_on_where_head_or_last_entry_are_damaged(folder: FolderStore) -> None:
    log = filled(folder, 2)
    folder.put("audit/head", b"nonsense")
    assert log.append("ann", "gc", {}).number == 3
    folder.put(key(3), b"damaged")
    folder.delete("audit/head")
    assert log.append("ann", "gc", {}).number == 4
    broken = log.verify().broken
    assert broken is not None
    assert broken.number == 3
    with pytest.raises(RegistryError, match="entry 3"):
        list(log.entries())


def test_an_entry_has_a_bound(folder: FolderStore) -> None:
    with pytest.raises(RegistryError, match="at most 16384 bytes"):
        log_of(folder).append("ann", "publish", {"note": "x" * 20_000})


def test_a_checkpoint_is_read_as_it_is_written() -> None:
    checkpoint = ChainMark(41, "sha256:" + "ab" * 32)
    assert ChainMark.parse(str(checkpoint)) == checkpoint
    assert ChainMark.parse("41:sha256:" + "ab" * 32) == checkpoint
    for text in ("", "41", "x@sha256:" + "ab" * 32, "41@sha256:ab"):
        assert ChainMark.parse(text) is None


def test_the_user_of_a_command_has_a_name_and_a_machine() -> None:
    name, _, machine = local_user().partition("@")
    assert name
    assert machine
