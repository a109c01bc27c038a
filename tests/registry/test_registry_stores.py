"""One contract for every store: a folder and S3 behave the same."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

import pytest

from isthmus.errors import ConditionsIgnored, Corrupt, Denied, Missing, RegistryError, RegistryUnavailable
from isthmus.registry import BlobStore, FolderStore, Registry, S3Store
from support.fake_bundles import make_bundle
from support.ports import free_port
from support.s3_server import PATIENCE, S3Server, store_at, unique_prefix
from support.stores import COMPARING, STORES, make_store


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    return make_store(request.param, request, tmp_path)


@pytest.fixture(params=COMPARING)
def comparing(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    """Stores that enforce conditional writes."""
    return make_store(request.param, request, tmp_path)


def test_get_gives_what_was_put(store: BlobStore) -> None:
    store.put("blobs/sha256/ab", b"\x00content")
    assert store.get("blobs/sha256/ab", max_bytes=8) == b"\x00content"


def test_put_replaces_what_was_there(store: BlobStore) -> None:
    store.put("models/m/aliases/prod", b"1")
    store.put("models/m/aliases/prod", b"2")
    assert store.get("models/m/aliases/prod", max_bytes=10) == b"2"


def test_empty_content_is_content(store: BlobStore) -> None:
    store.put("blobs/empty", b"")
    assert store.exists("blobs/empty")
    assert store.size("blobs/empty") == 0
    assert store.get("blobs/empty", max_bytes=0) == b""
    assert store.read("blobs/empty", 0, 0) == b""


def test_get_refuses_more_than_max_bytes(store: BlobStore) -> None:
    store.put("blobs/long", b"12345")
    with pytest.raises(RegistryError, match=r"blobs/long .* exceeds 4 bytes"):
        store.get("blobs/long", max_bytes=4)


def test_read_gives_exactly_the_range(store: BlobStore) -> None:
    store.put("blobs/a", bytes(range(100)))
    assert store.read("blobs/a", 10, 20) == bytes(range(10, 20))
    assert store.read("blobs/a", 0, 100) == bytes(range(100))
    assert store.read("blobs/a", 99, 100) == b"\x63"
    assert store.read("blobs/a", 50, 50) == b""


@pytest.mark.parametrize(("start", "stop"), [(90, 101), (100, 101), (500, 600)])
def test_read_past_the_end_is_corrupt_and_names_the_blob(store: BlobStore, start: int, stop: int) -> None:
    store.put("blobs/a", bytes(100))
    with pytest.raises(Corrupt, match="blobs/a") as caught:
        store.read("blobs/a", start, stop)
    assert caught.value.facts["blob"] == "blobs/a"


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (5, 4)])
def test_read_refuses_a_range_that_runs_backwards(store: BlobStore, start: int, stop: int) -> None:
    with pytest.raises(RegistryError, match="not a range"):
        store.read("blobs/a", start, stop)


def test_a_key_that_is_not_there_is_missing(store: BlobStore) -> None:
    assert not store.exists("blobs/none")
    assert store.size("blobs/none") is None
    for ask in (lambda: store.get("blobs/none", max_bytes=9), lambda: store.read("blobs/none", 0, 1)):
        with pytest.raises(Missing) as caught:
            ask()
        assert caught.value.facts == {
            "kind": "blob",
            "name": "blobs/none",
            "exists": [],
            "registry": store.url,
            "blob": "blobs/none",
        }


def test_a_folder_of_keys_is_not_a_key(store: BlobStore) -> None:
    store.put("models/m/versions/1", b"x")
    assert not store.exists("models/m")
    with pytest.raises(Missing):
        store.get("models/m", max_bytes=9)


def test_put_if_absent_stores_once(store: BlobStore) -> None:
    assert store.put_if_absent("models/m/versions/1", b"mine") is True
    assert store.put_if_absent("models/m/versions/1", b"other") is False
    assert store.get("models/m/versions/1", max_bytes=9) == b"mine"


def test_a_tag_is_that_of_the_content(store: BlobStore) -> None:
    store.put("models/m/aliases/prod", b"1")
    data, tag = store.get_tagged("models/m/aliases/prod", max_bytes=1)
    assert (data, tag) == (b"1", store.get_tagged("models/m/aliases/prod", max_bytes=9)[1])
    store.put("models/m/aliases/prod", b"2")
    assert store.get_tagged("models/m/aliases/prod", max_bytes=1)[1] != tag
    with pytest.raises(Missing):
        store.get_tagged("models/m/aliases/none", max_bytes=1)
    with pytest.raises(RegistryError, match="exceeds 0 bytes"):
        store.get_tagged("models/m/aliases/prod", max_bytes=0)


def test_put_if_match_replaces_what_was_read_and_nothing_newer(comparing: BlobStore) -> None:
    key = "models/m/aliases/prod"
    assert comparing.put_if_match(key, b"1", "") is True
    assert comparing.put_if_match(key, b"x", "") is False
    _, tag = comparing.get_tagged(key, max_bytes=9)
    assert comparing.put_if_match(key, b"2", tag) is True
    assert comparing.put_if_match(key, b"3", tag) is False
    assert comparing.get(key, max_bytes=9) == b"2"
    assert comparing.put_if_match("models/m/aliases/none", b"1", tag) is False
    assert not comparing.exists("models/m/aliases/none")


def test_of_many_that_compare_and_set_at_once_none_is_lost(comparing: BlobStore) -> None:
    key, gate = "models/m/aliases/prod", threading.Barrier(6)
    comparing.put(key, b"0")

    def add() -> None:
        gate.wait()
        for _ in range(3):
            while True:
                data, tag = comparing.get_tagged(key, max_bytes=99)
                # A name beside the number: equal bytes of two writers would count as one write.
                if comparing.put_if_match(key, b"%d %d" % (int(data.split()[0]) + 1, threading.get_ident()), tag):
                    break

    threads = [threading.Thread(target=add) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert comparing.get(key, max_bytes=99).split()[0] == b"18"


@pytest.mark.parametrize("kind", COMPARING[1:])
def test_a_write_whose_response_was_lost_is_read_back(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    store: Any = make_store(kind, request, tmp_path)
    replace, lose = store.replace, [True]

    def lossy(key: str, data: bytes, etag: str) -> str | None:
        result = replace(key, data, etag)
        if lose.pop():
            lose.append(False)
            raise RegistryUnavailable("the connection was dropped")
        lose.append(False)
        return result

    store.replace = lossy
    assert store.put_if_match("models/m/aliases/prod", b"1", "") is True
    assert store.get("models/m/aliases/prod", max_bytes=9) == b"1"


def test_a_store_that_ignores_conditions_is_refused_before_anything_is_published(
    s3_server: S3Server, tmp_path: Path
) -> None:
    store = store_at(s3_server.endpoint, unique_prefix())
    fake = make_bundle(tmp_path)
    registry = Registry(store, PATIENCE)
    with pytest.raises(ConditionsIgnored, match="does not compare before it writes") as caught:
        registry.publish(fake.bundle, fake.files)
    assert "MinIO" in caught.value.hint
    assert store.list("") == []


def test_put_file_streams_a_file_of_many_parts(store: BlobStore, tmp_path: Path) -> None:
    path = tmp_path / "big"
    part = hashlib.sha256(b"seed").digest() * 2**15
    with path.open("wb") as f:
        for _ in range(37):
            f.write(part)
    store.put_file("blobs/big", path)
    store.put_file("blobs/big", path)
    assert store.size("blobs/big") == 37 * 2**20
    assert store.read("blobs/big", 2**24 - 7, 2**24 + 7) == (part * 2)[2**20 - 7 : 2**20 + 7]


def test_list_gives_sorted_keys_under_the_prefix_alone(store: BlobStore) -> None:
    for key in ("models/b/versions/2", "models/b/versions/10", "models/bb/versions/1", "blobs/x"):
        store.put(key, b"x")
    assert store.list("models/b/") == ["models/b/versions/10", "models/b/versions/2"]
    assert store.list("") == ["blobs/x", "models/b/versions/10", "models/b/versions/2", "models/bb/versions/1"]
    assert store.list("models/none/") == []


def test_delete_removes_and_may_be_repeated(store: BlobStore) -> None:
    store.put("blobs/x", b"x")
    store.delete("blobs/x")
    store.delete("blobs/x")
    assert not store.exists("blobs/x")


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "../x", "a/../b", "a//b", "a/", ".hidden", "a\\b", "a/b\n", "a b", "ä"]
)
def test_a_key_that_could_leave_the_store_is_refused(store: BlobStore, key: str) -> None:
    for ask in (
        lambda: store.get(key, max_bytes=9),
        lambda: store.read(key, 0, 1),
        lambda: store.put(key, b""),
        lambda: store.put_if_absent(key, b""),
        lambda: store.put_if_match(key, b"", "x"),
        lambda: store.size(key),
        lambda: store.delete(key),
    ):
        with pytest.raises(RegistryError, match="is not a key"):
            ask()


def test_one_of_many_that_put_if_absent_at_once_wins_in_a_folder(tmp_path: Path) -> None:
    store, won, gate = FolderStore(tmp_path), list[int](), threading.Barrier(8)

    def put(i: int) -> None:
        gate.wait()
        if store.put_if_absent("models/m/versions/1", b"%d" % i):
            won.append(i)

    threads = [threading.Thread(target=put, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(won) == 1
    assert store.get("models/m/versions/1", max_bytes=9) == b"%d" % won[0]


def test_a_folder_or_bucket_that_is_not_there_is_missing_as_a_whole(s3_server: S3Server, tmp_path: Path) -> None:
    bucket = S3Store("no-such-bucket", endpoint=s3_server.endpoint, key_id="TESTKEYID", secret="test-secret-key")
    for store in (FolderStore(tmp_path / "none"), bucket):
        for ask in (lambda s=store: s.list(""), lambda s=store: s.get("blobs/x", max_bytes=9)):
            with pytest.raises(Missing, match="there is no registry at") as caught:
                ask()
            assert caught.value.facts["kind"] == "registry"


def test_what_a_folder_staged_is_gone_after_a_put(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.put("a/b", b"1")
    assert store.put_if_absent("a/b", b"2") is False
    with pytest.raises(RegistryUnavailable):
        store.put("a/b/c", b"a file is in the way")
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["b"]


def test_a_wrong_secret_is_denied_and_named_by_its_files(s3_server: S3Server) -> None:
    store = store_at(s3_server.endpoint, secret="wrong")
    for ask in (
        lambda: store.get("blobs/x", max_bytes=1),
        lambda: store.size("blobs/x"),
        lambda: store.put("blobs/x", b""),
        lambda: store.list(""),
    ):
        with pytest.raises(Denied, match="refused our credentials") as caught:
            ask()
        assert "s3-access-key-id" in caught.value.hint
        assert "wrong" not in str(caught.value)


def test_a_server_that_is_not_there_is_unavailable() -> None:
    store = store_at(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(RegistryUnavailable, match="blobs/x") as caught:
        store.get("blobs/x", max_bytes=1)
    assert caught.value.facts == {"registry": store.url, "blob": "blobs/x"}


def test_one_try_may_take_a_share_of_the_whole_time() -> None:
    assert PATIENCE.try_s * PATIENCE.attempts < PATIENCE.timeout_s
