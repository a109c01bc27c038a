"""The cache of segments: what it fetches, verifies, bounds, and shares between processes."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from isthmus.artifacts.bundle import digest_of, to_json
from isthmus.errors import CacheFull, Missing, RegistryError, SettingsError
from isthmus.registry import FolderStore, Registry, SegmentCache
from support.fake_bundles import Fake, allocated, fill, hold, make_bundle, variant, weights_here
from support.faulty_relay import Relay, flipped, relaying
from support.moto_server import Moto
from support.patience import LONG_S, eventually
from support.s3_server import PATIENCE, store_at, unique_prefix

MIB = 2**20
SPAWN = multiprocessing.get_context("spawn")


class CountingStore(FolderStore):
    """A folder that remembers which ranges were read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.ranges: list[tuple[int, int]] = []

    def read(self, key: str, start: int, stop: int) -> bytes:
        self.ranges.append((start, stop))
        return super().read(key, start, stop)


@pytest.fixture
def store(tmp_path: Path) -> CountingStore:
    return CountingStore(tmp_path / "registry")


@pytest.fixture
def registry(store: CountingStore) -> Registry:
    return Registry(store, PATIENCE)


def make_cache(registry: Registry, tmp_path: Path, limit: int = 100 * MIB) -> SegmentCache:
    return SegmentCache(registry, tmp_path / "cache", limit)


def test_a_located_segment_has_its_graph_and_its_weights(registry: Registry, fake: Fake, tmp_path: Path) -> None:
    registry.publish(fake.bundle, fake.files)
    with make_cache(registry, tmp_path).locate(fake.digest, "..1") as head:
        assert digest_of(head.path.read_bytes()) == head.segment.graph.digest
        assert head.bundle == fake.bundle
        assert head.path.parent == tmp_path / "cache" / fake.bundle.weights.blob.digest[7:]
        assert weights_here(fake, head.path, "..1")
        assert not weights_here(fake, head.path, "1..")


def test_only_what_a_segment_lacks_is_fetched(
    registry: Registry, store: CountingStore, fake: Fake, tmp_path: Path
) -> None:
    registry.publish(fake.bundle, fake.files)
    cache = make_cache(registry, tmp_path)
    t = fake.bundle.weights.tensors
    store.ranges.clear()
    cache.locate(fake.digest, "..1")
    assert store.ranges == [(0, t[1].offset + t[1].length)]
    store.ranges.clear()
    cache.locate(fake.digest, "1..")
    assert store.ranges == [(t[2].offset, t[4].offset + t[4].length)]
    store.ranges.clear()
    located = cache.locate(fake.digest, "..")
    assert store.ranges == []
    assert weights_here(fake, located.path, "..")


def test_another_version_of_the_same_weights_fetches_no_weights(
    registry: Registry, store: CountingStore, fake: Fake, tmp_path: Path
) -> None:
    second = variant(fake, "cut anew")
    registry.publish(fake.bundle, fake.files)
    registry.publish(second.bundle, {})
    cache = make_cache(registry, tmp_path)
    cache.locate(fake.digest, "..")
    store.ranges.clear()
    cache.locate(second.digest, "..1")
    assert store.ranges == []


def test_reads_are_bounded_and_neighbours_are_read_together(
    registry: Registry, store: CountingStore, tmp_path: Path
) -> None:
    fake = make_bundle(tmp_path / "big", lengths=[MIB] * 10 + [20 * MIB + 5] + [1000] * 50, cut=0)
    registry.publish(fake.bundle, fake.files)
    seen: list[tuple[int, int]] = []
    store.ranges.clear()
    cache = make_cache(registry, tmp_path)
    located = cache.locate(fake.digest, "..", progress=lambda done, total: seen.append((done, total)))
    assert weights_here(fake, located.path, "..")
    assert all(stop - start <= 4 * MIB for start, stop in store.ranges)
    assert len(store.ranges) == 3 + 6 + 1
    assert seen[-1] == (30 * MIB + 5 + 50_000,) * 2


def test_a_filled_cache_needs_no_registry(registry: Registry, fake: Fake, tmp_path: Path) -> None:
    registry.publish(fake.bundle, fake.files)
    make_cache(registry, tmp_path).locate(fake.digest, "..")
    nowhere = make_cache(Registry(FolderStore(tmp_path / "none"), PATIENCE), tmp_path)
    assert weights_here(fake, nowhere.locate(fake.digest, "..").path, "..")
    graph = fake.bundle.segments[".."].graph
    with pytest.raises(Missing):
        nowhere.blob(graph)
    make_cache(registry, tmp_path).blob(graph)
    assert digest_of(nowhere.blob(graph)) == graph.digest


def test_an_unknown_segment_is_missing_and_named(registry: Registry, fake: Fake, tmp_path: Path) -> None:
    registry.publish(fake.bundle, fake.files)
    cache = make_cache(registry, tmp_path)
    with pytest.raises(Missing) as caught:
        cache.locate(fake.digest, "..7")
    assert caught.value.facts["exists"] == ["..", "..1", "1.."]
    with pytest.raises(Missing):
        cache.locate("sha256:" + "0" * 64, "..")


def test_a_bit_flipped_on_disk_is_noticed_and_its_tensor_fetched_again(
    registry: Registry, store: CountingStore, fake: Fake, tmp_path: Path
) -> None:
    registry.publish(fake.bundle, fake.files)
    path = make_cache(registry, tmp_path).locate(fake.digest, "..").path
    weights, t = path.parent / "weights.bin", fake.bundle.weights.tensors[3]
    data = weights.read_bytes()
    weights.write_bytes(data[: t.offset] + flipped(data[t.offset : t.offset + t.length]) + data[t.offset + t.length :])
    path.write_bytes(flipped(path.read_bytes()))
    store.ranges.clear()
    again = make_cache(registry, tmp_path).locate(fake.digest, "..")
    assert store.ranges == [(t.offset, t.offset + t.length)]
    assert weights_here(fake, again.path, "..")
    assert digest_of(again.path.read_bytes()) == again.segment.graph.digest


@pytest.mark.parametrize("damage", ["cut", "gone", "ledger lies", "ledger gone", "ledger spoilt", "graph gone"])
def test_a_damaged_cache_heals(registry: Registry, fake: Fake, tmp_path: Path, damage: str) -> None:
    registry.publish(fake.bundle, fake.files)
    path = make_cache(registry, tmp_path).locate(fake.digest, "..").path
    weights, ledger = path.parent / "weights.bin", path.parent / "ledger.json"
    match damage:
        case "cut":
            os.truncate(weights, 100)
        case "gone":
            weights.unlink()
        case "ledger lies":
            weights.write_bytes(bytes(len(fake.weights)))
        case "ledger gone":
            ledger.unlink()
        case "ledger spoilt":
            ledger.write_bytes(b"[[1]")
        case _:
            path.unlink()
    located = make_cache(registry, tmp_path).locate(fake.digest, "..")
    assert weights_here(fake, located.path, "..")
    assert located.path.exists()


def test_the_least_recently_used_weights_go_first(registry: Registry, tmp_path: Path) -> None:
    fakes = [make_bundle(tmp_path / f"f{i}", lengths=[MIB], cut=0, seed=i, name=f"m{i}") for i in range(4)]
    cache = make_cache(registry, tmp_path, 3 * MIB + MIB // 2)
    for fake in fakes:
        registry.publish(fake.bundle, fake.files)
    paths = []
    for i in (0, 1, 2, 0, 3):
        with cache.locate(fakes[i].digest, "..") as located:
            paths.append(located.path)
            assert allocated(tmp_path / "cache") <= 3 * MIB + MIB // 2
        time.sleep(0.02)
    assert [p.parent.exists() for p in paths[1:]] == [False, True, True, True]


def test_weights_in_use_are_never_evicted(registry: Registry, tmp_path: Path) -> None:
    fakes = [make_bundle(tmp_path / f"f{i}", lengths=[MIB], cut=0, seed=i, name=f"m{i}") for i in range(3)]
    for fake in fakes:
        registry.publish(fake.bundle, fake.files)
    cache = make_cache(registry, tmp_path, 2 * MIB + MIB // 2)
    held = [cache.locate(fake.digest, "..") for fake in fakes[:2]]
    with pytest.raises(CacheFull, match="in use") as caught:
        cache.locate(fakes[2].digest, "..")
    assert "cache_bytes" in caught.value.hint
    held[1].release()
    held[1].release()
    cache.locate(fakes[2].digest, "..")
    assert held[0].path.exists()
    assert not held[1].path.exists()


def test_what_another_process_uses_is_kept_until_that_process_ends(registry: Registry, tmp_path: Path) -> None:
    first, second = (make_bundle(tmp_path / f"f{i}", lengths=[MIB], cut=0, seed=i, name=f"m{i}") for i in range(2))
    for fake in (first, second):
        registry.publish(fake.bundle, fake.files)
    cache = make_cache(registry, tmp_path, MIB + MIB // 2)
    cache.locate(first.digest, "..").release()
    held = SPAWN.Event()
    user = SPAWN.Process(
        target=hold, args=(str(tmp_path / "registry"), str(tmp_path / "cache"), first.digest, held), daemon=True
    )
    user.start()
    assert held.wait(LONG_S)
    with pytest.raises(CacheFull):
        cache.locate(second.digest, "..")
    user.kill()
    user.join()
    cache.locate(second.digest, "..")


def test_other_segments_of_the_same_weights_give_way_when_nobody_uses_them(registry: Registry, tmp_path: Path) -> None:
    fake = make_bundle(tmp_path / "f", lengths=[1000, MIB, MIB], cut=2)
    registry.publish(fake.bundle, fake.files)
    cache = make_cache(registry, tmp_path, MIB + MIB // 2)
    head = cache.locate(fake.digest, "..1")
    with pytest.raises(CacheFull):
        cache.locate(fake.digest, "1..")
    assert weights_here(fake, head.path, "..1")
    head.release()
    assert weights_here(fake, cache.locate(fake.digest, "1..").path, "1..")
    assert allocated(tmp_path / "cache") <= MIB + MIB // 2


def test_a_segment_larger_than_the_bound_is_refused_before_anything_is_fetched(
    registry: Registry, store: CountingStore, fake: Fake, tmp_path: Path
) -> None:
    registry.publish(fake.bundle, fake.files)
    cache = make_cache(registry, tmp_path, 100_000)
    store.ranges.clear()
    with pytest.raises(CacheFull, match=r"segment \.\. takes") as caught:
        cache.locate(fake.digest, "..")
    assert caught.value.facts["limit"] == 100_000
    assert store.ranges == []


def test_a_cache_dir_that_cannot_be_written_stops_the_start(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SettingsError) as caught:
        SegmentCache(registry, tmp_path / "file" / "cache", MIB)
    assert caught.value.facts["variable"] == "cache_dir"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk_names_cache_dir_and_leaves_the_cache_usable(
    registry: Registry, tmp_path: Path, small_disk: Path
) -> None:
    fake = make_bundle(tmp_path / "f", lengths=[300_000] + [200_000] * 10, cut=1)
    registry.publish(fake.bundle, fake.files)
    cache = SegmentCache(registry, small_disk, 100 * MIB)
    with pytest.raises(CacheFull, match="full") as caught:
        cache.locate(fake.digest, "1..")
    assert "cache_dir" in caught.value.hint
    (small_disk / fake.bundle.weights.blob.digest[7:] / "weights.bin").unlink()
    assert weights_here(fake, cache.locate(fake.digest, "..1").path, "..1")


def test_two_processes_fill_one_cache_and_fetch_nothing_twice(moto_s3: Moto, tmp_path: Path) -> None:
    fake = make_bundle(tmp_path / "f", lengths=[100_000] * 60 + [9 * MIB], cut=30)
    prefix = unique_prefix()
    Registry(store_at(moto_s3.endpoint, prefix), PATIENCE).publish(fake.bundle, fake.files)
    with relaying(moto_s3.port) as relay:
        relay.delay_s = 0.05
        workers = start_fills(relay, prefix, tmp_path, fake, [["..1", ".."], ["1..", ".."]])
        for worker in workers:
            worker.join(LONG_S)
        assert [w.exitcode for w in workers] == [0, 0]
        assert relay.served < len(fake.weights) + 100_000
        cache = SegmentCache(Registry(store_at(relay.endpoint, prefix), PATIENCE), tmp_path / "cache", 100 * MIB)
        served = relay.served
        assert weights_here(fake, cache.locate(fake.digest, "..").path, "..")
        assert relay.served == served


def test_a_process_killed_in_the_middle_leaves_a_cache_that_another_completes(moto_s3: Moto, tmp_path: Path) -> None:
    fake = make_bundle(tmp_path / "f", lengths=[6 * MIB] * 10, cut=0)
    prefix = unique_prefix()
    Registry(store_at(moto_s3.endpoint, prefix), PATIENCE).publish(fake.bundle, fake.files)
    with relaying(moto_s3.port) as relay:
        relay.delay_s = 0.3
        (victim,) = start_fills(relay, prefix, tmp_path, fake, [[".."]])
        ledger = tmp_path / "cache" / fake.bundle.weights.blob.digest[7:] / "ledger.json"
        eventually(ledger.exists)
        victim.kill()
        victim.join()
    with relaying(moto_s3.port) as relay:  # answers to the dead may still be on their way through the other one
        cache = SegmentCache(Registry(store_at(relay.endpoint, prefix), PATIENCE), tmp_path / "cache", 100 * MIB)
        assert weights_here(fake, cache.locate(fake.digest, "..").path, "..")
        assert relay.served <= 4 * 6 * MIB


def start_fills(
    relay: Relay, prefix: str, tmp_path: Path, fake: Fake, segments: list[list[str]]
) -> list[multiprocessing.context.SpawnProcess]:
    workers = [
        SPAWN.Process(
            target=fill, args=(f"{relay.endpoint}#{prefix}", str(tmp_path / "cache"), 100 * MIB, fake.digest, s)
        )
        for s in segments
    ]
    for worker in workers:
        worker.start()
    return workers


def test_a_reservation_of_a_dead_process_counts_for_nothing(registry: Registry, fake: Fake, tmp_path: Path) -> None:
    registry.publish(fake.bundle, fake.files)
    other = make_bundle(tmp_path / "o", seed=9, name="other")
    registry.publish(other.bundle, other.files)
    cache = make_cache(registry, tmp_path, MIB)
    cache.locate(fake.digest, "..").release()
    target = tmp_path / "cache" / "locks" / f"{fake.bundle.weights.blob.digest[7:]}.target"
    target.write_text(str(10**12))
    cache.locate(other.digest, "..")


def test_manifests_that_tell_of_weights_elsewhere_are_refused(
    registry: Registry, store: CountingStore, fake: Fake, tmp_path: Path
) -> None:
    head = fake.bundle.segments["..1"]
    bad = to_json(replace(fake.bundle, segment_list=(replace(head, weights=((0, 99),)),)))
    store.put(f"blobs/sha256/{digest_of(bad)[7:]}", bad)
    with pytest.raises(RegistryError, match="weights that are not there"):
        make_cache(registry, tmp_path).locate(digest_of(bad), "..1")
