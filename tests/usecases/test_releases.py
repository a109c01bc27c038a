"""publish, promote, pull and verify: what is visible has run, what is fetched is what is needed."""

from __future__ import annotations

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from isthmus.artifacts.bundle import Blob, digest_of
from isthmus.errors import AliasMoved, Corrupt, Missing, ModelError, RegistryError, RequestMalformed, StoreFull
from isthmus.registry import FolderStore, Registry, open_registry
from isthmus.registry import blob_copies as copies
from isthmus.registry.content import blob_key
from isthmus.registry.run_records import never_run
from isthmus.security.audit import AuditLog
from isthmus.settings import RegistrySettings
from isthmus_tools.usecases import publish as publishing
from isthmus_tools.usecases.publish import PromoteRequest, PublishRequest, promote, publish
from isthmus_tools.usecases.pull import PullRequest, pull
from isthmus_tools.usecases.verify import VerifyRequest, verify
from isthmus_tools.usecases.version_diff import diff_versions
from support.bundles import Published, publish_photos


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return publish_photos(tmp_path_factory.mktemp("source"))


@pytest.fixture
def settings(source: Published, tmp_path: Path) -> RegistrySettings:
    return RegistrySettings(registry=str(source.folder), cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def target(settings: RegistrySettings, tmp_path: Path) -> RegistrySettings:
    return replace(settings, registry=str(tmp_path / "target"), cache_dir=str(tmp_path / "target-cache"))


def broken(published: Published, folder: Path) -> str:
    """A version, numbered behind the back of the commands, whose tail is no graph; returns its number."""
    bundle, junk = published.bundle, b"no graph"
    path = folder / "junk"
    path.write_bytes(junk)
    segments = tuple(
        structs.replace(s, graph=Blob(digest_of(junk), len(junk))) if s.id == "6.." else s for s in bundle.segment_list
    )
    version = published.registry.publish(structs.replace(bundle, segment_list=segments), {digest_of(junk): path})
    return version.version


def test_a_published_version_has_run_and_is_whole_in_its_target(
    settings: RegistrySettings, target: RegistrySettings
) -> None:
    result = publish(PublishRequest(model="photos", registry=settings, target=target, alias="live"))
    there = open_registry(target)
    assert {run.segment for run in result.runs} == set(result.bundle.segments)
    assert never_run(there, result.bundle) == []
    assert there.resolve("photos:live").digest == there.resolve("photos").digest == result.version.digest
    assert verify(VerifyRequest(model="photos", registry=target)).is_good
    again = publish(PublishRequest(model="photos", registry=settings, target=target))
    assert (again.copied_bytes, again.version) == (0, result.version)


def test_a_version_that_does_not_run_is_neither_published_nor_promoted(
    tmp_path: Path, target: RegistrySettings
) -> None:
    published = publish_photos(tmp_path / "own")
    number = broken(published, tmp_path)
    settings = RegistrySettings(registry=str(published.folder), cache_dir=str(tmp_path / "c"))
    with pytest.raises(ModelError, match=r"segment 6\.\. of photos does not run"):
        publish(PublishRequest(model=f"photos:{number}", registry=settings, target=target, alias="live"))
    assert open_registry(target).models() == []
    with pytest.raises(ModelError, match="does not run"):
        promote(PromoteRequest(model=f"photos:{number}", registry=settings))
    assert published.registry.resolve("photos").version == "1"
    assert [fault for fault in [verify(VerifyRequest(model=f"photos:{number}", registry=settings))] if fault.run_fault]


def test_promote_runs_what_never_ran_and_nothing_twice(tmp_path: Path) -> None:
    published = publish_photos(tmp_path / "own")
    settings = RegistrySettings(registry=str(published.folder), cache_dir=str(tmp_path / "c"))
    first = promote(PromoteRequest(model="photos:1", registry=settings, alias="live", expected=0))
    assert {run.segment for run in first.runs} == set(published.bundle.segments)
    published.registry.publish(structs.replace(published.bundle, source={"note": "2"}), {})
    second = promote(PromoteRequest(model="photos:2", registry=settings, alias="live"))
    assert (second.runs, second.move.before.number, second.move.after.counter) == ([], "1", 2)
    with pytest.raises(AliasMoved, match="its counter is 2, not 1"):
        promote(PromoteRequest(model="photos:1", registry=settings, alias="live", expected=1))


def test_every_change_is_in_the_audit_log_and_a_lost_entry_is_recovered(tmp_path: Path) -> None:
    published = publish_photos(tmp_path / "own")
    registry = published.registry
    registry.publish(structs.replace(published.bundle, source={"note": "2"}), {})
    registry.move_alias("photos", "prod", "2", moved_by="ci@host")
    log = AuditLog(registry.store, registry.retry_policy)
    entries = [(e.what, e.facts.get("version"), e.facts.get("counter")) for e in log.entries()]
    assert entries == [("publish", "1", None), ("promote", "1", 1), ("publish", "2", None), ("promote", "2", 2)]
    assert list(log.entries())[-1].who == "ci@host"
    for key in ("audit/000000000004", "audit/head"):
        registry.store.delete(key)
    documents = list(registry.alias_documents("photos"))
    versions = [(v.name, v.version, v.digest) for v in registry.versions("photos")]
    assert registry.changes.recover(versions, documents) == 0  # its writer may be about to append
    with ThreadPoolExecutor(4) as pool:
        together = pool.map(lambda _: registry.changes.recover(versions, documents, settled_s=0), range(4))
    assert sum(together) == 1  # collections at the same time
    assert list(log.entries())[-1].facts["recovered"] is True
    assert log.verify().broken is None


def test_a_pulled_segment_moves_its_bytes_alone(settings: RegistrySettings, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    store_read, store_get = FolderStore.read, FolderStore.get

    def counted(self: FolderStore, key: str, start: int, stop: int) -> bytes:
        read.append(stop - start)
        return store_read(self, key, start, stop)

    def counted_get(self: FolderStore, key: str, *, max_bytes: int) -> bytes:
        data = store_get(self, key, max_bytes=max_bytes)
        read.append(len(data))
        return data

    bundle = open_registry(settings).resolve("photos").bundle
    head = bundle.segment("..1")
    weights = sum(t.length for t in bundle.weight_ranges(head))
    manifest = len(open_registry(settings).manifest(open_registry(settings).resolve("photos").digest))
    monkeypatch.setattr(FolderStore, "read", counted)
    monkeypatch.setattr(FolderStore, "get", counted_get)
    result = pull(PullRequest(model="photos", registry=settings, segment="..1"))
    assert list(result.segments) == ["..1"]
    # The manifest is read by the resolution and by the cache; the pointers are some hundred bytes.
    assert sum(read) <= weights + head.graph.size + 2 * manifest + 2000 < bundle.weights.blob.size + 2 * manifest
    read.clear()
    assert pull(PullRequest(model="photos", registry=settings, segment="..1")).fetched_bytes == 0
    assert sum(read) <= manifest + 2000


def test_a_pulled_version_keeps_number_and_alias_and_an_interrupted_pull_goes_on(
    settings: RegistrySettings, target: RegistrySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "RANGE_BYTES", 4096)
    fetch, interrupted = copies._ranges, [True]

    def cut_off(registry: Registry, blob: Blob, start: int) -> Any:
        for i, part in enumerate(fetch(registry, blob, start)):
            if interrupted and i == 2:
                raise KeyboardInterrupt
            yield part

    monkeypatch.setattr(copies, "_ranges", cut_off)
    with pytest.raises(KeyboardInterrupt):
        pull(PullRequest(model="photos", registry=settings, folder=target.registry))
    assert open_registry(target).models() == []
    begun = sum(path.stat().st_size for path in Path(target.registry, ".pulls").iterdir())
    interrupted.clear()
    result = pull(PullRequest(model="photos", registry=settings, folder=target.registry))
    there = open_registry(target)
    assert (there.resolve("photos").version, there.alias("photos", "prod").counter) == (result.version.version, 1)
    assert begun >= 4096
    assert list(Path(target.registry, ".pulls").iterdir()) == []
    assert verify(VerifyRequest(model="photos", registry=target)).is_good


def test_a_full_disk_in_mid_pull_is_named_and_cleaned_up(
    settings: RegistrySettings, target: RegistrySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "RANGE_BYTES", 4096)
    fetch = copies._ranges

    def full(registry: Registry, blob: Blob, start: int) -> Any:
        for i, part in enumerate(fetch(registry, blob, start)):
            if i == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield part

    monkeypatch.setattr(copies, "_ranges", full)
    with pytest.raises(StoreFull, match=r"is full; what was fetched of .* is removed") as caught:
        pull(PullRequest(model="photos", registry=settings, folder=target.registry))
    assert "run the same command again" in caught.value.hint
    assert list(Path(target.registry, ".pulls").iterdir()) == []
    assert open_registry(target).models() == []


def test_a_disk_without_room_for_the_version_is_refused_before_the_first_byte(
    settings: RegistrySettings, target: RegistrySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr("isthmus_tools.usecases.pull.shutil.disk_usage", lambda _: usage)
    with pytest.raises(StoreFull, match="100 B free"):
        pull(PullRequest(model="photos", registry=settings, folder=target.registry))
    assert not Path(target.registry, ".pulls").exists()


def test_a_pull_never_takes_an_alias_back_or_a_number_away(
    settings: RegistrySettings, target: RegistrySettings, tmp_path: Path
) -> None:
    pull(PullRequest(model="photos", registry=settings, folder=target.registry))
    there = open_registry(target)
    bundle = there.resolve("photos").bundle
    there.publish(structs.replace(bundle, source={"note": "here"}), {}, alias="prod")
    with pytest.raises(AliasMoved, match=r"is at move 2, and in .* at 1"):
        pull(PullRequest(model="photos", registry=settings, folder=target.registry))
    other = publish_photos(tmp_path / "other", seed=9)
    with pytest.raises(RegistryError, match=r"photos:1 in .* is sha256"):
        pull(PullRequest(model="photos:1", registry=replace(settings, registry=str(other.folder)), folder=there.url))
    assert there.resolve("photos").version == "2"


def test_a_registry_takes_no_single_segment(settings: RegistrySettings, target: RegistrySettings) -> None:
    with pytest.raises(RequestMalformed, match="whole versions") as caught:
        pull(PullRequest(model="photos", registry=settings, folder=target.registry, segment="..1"))
    assert "--cache" in caught.value.hint
    with pytest.raises(Missing, match="no segment"):
        pull(PullRequest(model="photos", registry=settings, segment="..99"))


def test_verify_names_every_damaged_blob_and_runs_nothing_then(tmp_path: Path) -> None:
    published = publish_photos(tmp_path / "own")
    settings = RegistrySettings(registry=str(published.folder), cache_dir=str(tmp_path / "c"))
    weights, graph = published.bundle.weights.blob, published.bundle.segment("..1").graph
    for blob in (weights, graph):
        path = published.folder / blob_key(blob.digest)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    (published.folder / blob_key(published.bundle.segment("6..").graph.digest)).unlink()
    result = verify(VerifyRequest(model="photos", registry=settings))
    expected = {weights.digest, graph.digest, published.bundle.segment("6..").graph.digest}
    assert ({fault.digest for fault in result.faults}, result.runs, result.is_good) == (expected, (), False)


def test_a_blob_that_arrives_wrong_twice_leaves_no_file(settings: RegistrySettings, tmp_path: Path) -> None:
    registry = open_registry(settings)
    blob = registry.resolve("photos").bundle.weights.blob
    path = tmp_path / "partial"
    path.write_bytes(b"\0" * 1000)  # of an interrupted fetch that a power failure spoilt
    copies.fetch_blob(registry, blob, path)
    assert digest_of(path.read_bytes()) == blob.digest
    wrong = Blob("sha256:" + "0" * 64, 8)
    registry.store.put(blob_key(wrong.digest), b"8 bytes.")
    with pytest.raises(Corrupt):
        copies.fetch_blob(registry, wrong, tmp_path / "wrong")
    registry.store.delete(blob_key(wrong.digest))
    assert not (tmp_path / "wrong").exists()


def test_a_diff_names_segments_cuts_sizes_and_plans(tmp_path: Path) -> None:
    published = publish_photos(tmp_path / "own")
    fewer = tuple(s for s in published.bundle.segment_list if "3" not in (s.id.start, s.id.stop))
    cuts = tuple(c for c in published.bundle.cut_list if c.name != "3")
    changed = structs.replace(published.bundle, segment_list=fewer, cut_list=cuts, default_cuts=("1",))
    published.registry.publish(changed, {})
    found = diff_versions(published.registry, "photos:1", "photos:2")
    assert (found.cuts.removed, found.cuts.added) == (("3",), ())
    assert "..3" in found.segments.removed
    assert found.new_bytes == 0
    assert not diff_versions(published.registry, "photos", "photos:1").segments
    json.dumps(found.document())


def test_a_publish_to_a_place_without_conditions_moves_no_byte(
    settings: RegistrySettings, monkeypatch: pytest.MonkeyPatch, target: RegistrySettings
) -> None:
    def refuse(self: FolderStore) -> None:
        raise RegistryError("no conditions")

    monkeypatch.setattr(FolderStore, "require_conditions", refuse)
    monkeypatch.setattr(publishing, "fetch_blob", lambda *_: pytest.fail("a blob was fetched"))
    with pytest.raises(RegistryError, match="no conditions"):
        publish(PublishRequest(model="photos", registry=settings, target=target))
    assert not Path(target.registry).exists()
