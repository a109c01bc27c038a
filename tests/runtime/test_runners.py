"""Running segments: right answers, refusals that say what was expected, and one load however many ask."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.segment_id import WHOLE
from isthmus.context import Deadline
from isthmus.errors import (
    DeadlineExceeded,
    IsthmusError,
    Missing,
    NotReady,
    Overloaded,
    RunFailed,
    SegmentTooLarge,
    SettingsError,
    ShapeMismatch,
)
from isthmus.registry import Located
from isthmus.runtime.ort import available_providers, cpu_limit
from isthmus.runtime.ort_runner import OrtRunner
from isthmus.runtime.store import MAX_LOADING, SegmentStore
from support.bundles import (
    TOLERANCE,
    Published,
    bfloat16_model,
    cache_of,
    free_model,
    publish,
    segment_settings,
)
from support.bundles import photos as photos
from support.patience import LONG_S, eventually, until

CPU = ("CPUExecutionProvider",)
CUDA = "CUDAExecutionProvider"


@pytest.fixture(scope="module")
def free(tmp_path_factory: pytest.TempPathFactory) -> Published:
    folder = tmp_path_factory.mktemp("free")
    inputs = {"a": np.ones((2, 32), np.float32), "b": np.ones((1, 32), np.float32)}
    return publish(folder, free_model(folder / "free.onnx"), inputs, partitions=[["1"]])


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Published:
    folder = tmp_path_factory.mktemp("half")
    return publish(folder, bfloat16_model(folder / "half.onnx"), {}, partitions=[["0"]])


def runner_of(published: Published, cache: Path, segment: str = WHOLE, providers: tuple[str, ...] = CPU) -> OrtRunner:
    located = cache_of(published, cache).locate(published.digest, segment)
    return OrtRunner(located.path, located.segment, providers=providers, threads=1)


class Source:
    """A cache whose `locate` counts its calls, and waits for `gate` where there is one."""

    def __init__(self, published: Published, cache: Path, gate: threading.Event | None = None) -> None:
        self._cache = cache_of(published, cache)
        self._gate = gate
        self.calls: list[str] = []
        self.located: list[Located] = []

    def bundle(self, digest: str) -> Bundle:
        return self._cache.bundle(digest)

    def trusts(self, digest: str) -> bool:
        return self._cache.trusts(digest)

    def locate(self, bundle_digest: str, segment_id: str) -> Located:
        self.calls.append(segment_id)
        if self._gate is not None:
            self._gate.wait(LONG_S)
        self.located.append(self._cache.locate(bundle_digest, segment_id))
        return self.located[-1]


def soon(seconds: float = LONG_S) -> Deadline:
    return Deadline.after(seconds)


# One runner


def test_a_segment_gives_its_outputs_by_name(photos: Published, tmp_path: Path) -> None:
    found = runner_of(photos, tmp_path).run(photos.inputs)
    assert list(found) == ["logits"]
    np.testing.assert_allclose(found["logits"], photos.whole["logits"], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("arrays", "tensor", "got"),
    [
        ({}, "x", []),
        ({"x": np.zeros((1, 3, 8, 8), "float32"), "y": np.zeros(1)}, "y", ["x", "y"]),
        ({"image": np.zeros((1, 3, 8, 8), "float32")}, "x", ["image"]),
        ({"x": np.zeros((1, 3, 8, 8), "float64")}, "x", "float64[1, 3, 8, 8]"),
        ({"x": np.zeros((1, 3, 8, 9), "float32")}, "x", "float32[1, 3, 8, 9]"),
        ({"x": np.zeros((3, 8, 8), "float32")}, "x", "float32[3, 8, 8]"),
        ({"x": np.zeros((1, 3, 8, 8), object)}, "x", "object[1, 3, 8, 8]"),
    ],
    ids=["missing", "extra", "name", "dtype", "size", "rank", "object"],
)
def test_a_tensor_that_does_not_fit_is_refused_with_expected_and_got(
    photos: Published, tmp_path: Path, arrays: dict[str, Any], tensor: str, got: object
) -> None:
    with pytest.raises(ShapeMismatch, match=tensor) as e:
        runner_of(photos, tmp_path).run(arrays)
    assert e.value.facts["tensor"] == tensor
    assert e.value.facts["got"] == got
    assert "float32[1, 3, 8, 8]" in str(e.value.facts["expected"])


def test_free_dimensions_take_any_size(free: Published, tmp_path: Path) -> None:
    runner = runner_of(free, tmp_path)
    for rows in (1, 5, 0):
        arrays = {"a": np.ones((rows, 32), np.float32), "b": np.zeros((rows, 32), np.float32)}
        assert runner.run(arrays)["y"].shape == (rows, 32)


def test_free_dimensions_that_do_not_go_together_are_the_callers_fault(free: Published, tmp_path: Path) -> None:
    with pytest.raises(ShapeMismatch) as e:
        runner_of(free, tmp_path).run({"a": np.ones((2, 32), np.float32), "b": np.ones((3, 32), np.float32)})
    assert e.value.facts["got"] == {"a": [2, 32], "b": [3, 32]}
    assert "\n" not in e.value.message


def strided(array: Any) -> Any:
    return np.repeat(array, 2, axis=-1)[..., ::2]


def unaligned(array: Any) -> Any:
    raw = b"\0" + array.tobytes()
    return np.ndarray(array.shape, array.dtype, buffer=memoryview(raw)[1:])


def big_endian(array: Any) -> Any:
    return array.astype(array.dtype.newbyteorder(">"))


def fortran(array: Any) -> Any:
    return np.asfortranarray(array)


@pytest.mark.parametrize("lay", [strided, unaligned, big_endian, fortran])
def test_bytes_that_the_runtime_cannot_use_as_they_lie_are_copied(
    photos: Published, tmp_path: Path, lay: Callable[[Any], Any]
) -> None:
    given = lay(photos.inputs["x"])
    np.testing.assert_array_equal(given, photos.inputs["x"])
    found = runner_of(photos, tmp_path).run({"x": given})
    np.testing.assert_allclose(found["logits"], photos.whole["logits"], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("segment", [WHOLE, "..0"])
def test_bfloat16_goes_in_and_out_beside_other_dtypes(half: Published, tmp_path: Path, rows: int, segment: str) -> None:
    x = np.arange(rows * 4).reshape(rows, 4).astype(ml_dtypes.bfloat16)
    arrays = {"x": x, "scale": np.array(0.5, np.float32)} if segment == WHOLE else {"x": x}
    (found,) = runner_of(half, tmp_path, segment).run(arrays).values()
    expected = x.astype(np.float32) * (0.5 if segment == WHOLE else 1)
    assert found.dtype.name == ("bfloat16" if segment == WHOLE else "float32")
    np.testing.assert_array_equal(found.astype(np.float32), expected)


def test_strided_bfloat16_is_copied(half: Published, tmp_path: Path) -> None:
    x = strided(np.arange(8).reshape(2, 4).astype(ml_dtypes.bfloat16))
    found = runner_of(half, tmp_path).run({"x": x, "scale": np.array(2, np.float32)})
    np.testing.assert_array_equal(found["y"].astype(np.float32), x.astype(np.float32) * 2)


def test_an_unknown_provider_is_refused_and_the_known_are_named(photos: Published, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="CPUExecutionProvider") as e:
        runner_of(photos, tmp_path, providers=("WarpDrive",))
    assert e.value.facts == {"variable": "providers", "value": "WarpDrive"}
    with pytest.raises(SettingsError):
        SegmentStore(cache_of(photos, tmp_path), segment_settings(photos, tmp_path, providers=("WarpDrive",)))


@pytest.mark.parametrize("content", [b"", b"no graph at all", b"\x08\x08\x3a\x05\x0a"])
def test_a_graph_that_cannot_be_loaded_fails_and_names_the_segment(
    photos: Published, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    with pytest.raises(RunFailed) as e:
        OrtRunner(path, photos.bundle.segment(WHOLE), providers=CPU, threads=1)
    assert e.value.facts["segment"] == WHOLE
    assert len(e.value.message) < 700


@pytest.mark.gpu
@pytest.mark.skipif(CUDA not in available_providers(), reason="this onnxruntime has no CUDAExecutionProvider")
def test_the_gpu_gives_what_the_cpu_gives(photos: Published, half: Published, tmp_path: Path) -> None:
    found = runner_of(photos, tmp_path, providers=(CUDA,)).run(photos.inputs)
    np.testing.assert_allclose(found["logits"], photos.whole["logits"], atol=1e-3)
    x = np.arange(4).reshape(1, 4).astype(ml_dtypes.bfloat16)
    given = runner_of(half, tmp_path / "half", providers=(CUDA,)).run({"x": x, "scale": np.array(2, np.float32)})
    np.testing.assert_array_equal(given["y"].astype(np.float32), x.astype(np.float32) * 2)


# The container's CPUs


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"cpu.max": "150000 100000\n"}, 1),
        ({"cpu.max": "20000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "400000 100000\n"}, 4),
        ({"cpu.max": "nonsense"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({}, 8),
    ],
)
def test_the_cpu_limit_is_the_containers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cpus: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_limit(tmp_path) == cpus


# The store


def test_a_segment_is_loaded_once_however_many_ask(photos: Published, tmp_path: Path) -> None:
    source = Source(photos, tmp_path)
    store = SegmentStore(source, segment_settings(photos, tmp_path))
    barrier = threading.Barrier(16)

    def ask(_: int) -> Any:
        barrier.wait(LONG_S)
        return store.run(photos.digest, WHOLE, photos.inputs, soon()).outputs["logits"]

    with ThreadPoolExecutor(16) as pool:
        for found in pool.map(ask, range(16)):
            np.testing.assert_allclose(found, photos.whole["logits"], rtol=TOLERANCE, atol=TOLERANCE)
    assert source.calls == [WHOLE]


def test_different_segments_load_side_by_side(photos: Published, tmp_path: Path) -> None:
    store = SegmentStore(Source(photos, tmp_path), segment_settings(photos, tmp_path))
    with ThreadPoolExecutor(10) as pool:
        for runner in pool.map(lambda s: store.runner(photos.digest, s, soon()), photos.bundle.segments):
            assert runner.segment.id in photos.bundle.segments
    assert {loaded.segment for loaded in store.loaded()} == photos.bundle.segments.keys()


def bytes_of(published: Published, segment: str) -> int:
    return sum(t.length for t in published.bundle.weight_ranges(published.bundle.segment(segment)))


def test_the_least_recently_used_segments_make_room(photos: Published, tmp_path: Path) -> None:
    first = ("..1", "6..", "3..4")
    limit = sum(bytes_of(photos, segment) for segment in first)
    source = Source(photos, tmp_path)
    store = SegmentStore(source, segment_settings(photos, tmp_path, max_loaded_bytes=limit))
    for segment in (*first, "..1"):
        store.runner(photos.digest, segment, soon())
    assert [loaded.segment for loaded in store.loaded()] == ["6..", "3..4", "..1"]
    assert sum(loaded.bytes for loaded in store.loaded()) == limit
    store.runner(photos.digest, "..3", soon())
    assert [loaded.segment for loaded in store.loaded()] == ["..1", "..3"]
    assert source.calls == [*first, "..3"]


def test_a_segment_larger_than_the_bound_is_refused_with_both_sizes(photos: Published, tmp_path: Path) -> None:
    store = SegmentStore(Source(photos, tmp_path), segment_settings(photos, tmp_path, max_loaded_bytes=1000))
    with pytest.raises(SegmentTooLarge) as e:
        store.runner(photos.digest, WHOLE, soon())
    assert e.value.facts == {"segment": WHOLE, "bytes": bytes_of(photos, WHOLE), "limit": 1000}
    assert store.loaded() == []


def test_a_load_slower_than_the_deadline_is_found_by_a_later_request(photos: Published, tmp_path: Path) -> None:
    gate = threading.Event()
    source = Source(photos, tmp_path, gate)
    store = SegmentStore(source, segment_settings(photos, tmp_path))
    for _ in range(2):
        with pytest.raises(NotReady) as e:
            store.runner(photos.digest, WHOLE, soon(0.05))
        assert e.value.facts["retry_after_s"] == 1
    gate.set()
    assert store.runner(photos.digest, WHOLE, soon()).segment.id == WHOLE
    assert source.calls == [WHOLE]


def test_an_unknown_segment_is_refused_while_another_is_still_being_fetched(photos: Published, tmp_path: Path) -> None:
    gate = threading.Event()

    class SlowWhole(Source):
        def locate(self, bundle_digest: str, segment_id: str) -> Located:
            if segment_id == WHOLE:
                gate.wait(LONG_S)
            return super().locate(bundle_digest, segment_id)

    store = SegmentStore(SlowWhole(photos, tmp_path), segment_settings(photos, tmp_path))
    with pytest.raises(NotReady):
        store.runner(photos.digest, WHOLE, soon(0.02))
    with pytest.raises(Missing):
        store.runner(photos.digest, "..77", soon())
    gate.set()


def test_the_loads_that_wait_are_bounded(photos: Published, tmp_path: Path) -> None:
    gate = threading.Event()
    store = SegmentStore(Source(photos, tmp_path, gate), segment_settings(photos, tmp_path))
    try:
        for i in range(MAX_LOADING):
            with pytest.raises(NotReady):
                store.runner(photos.digest, f"..made-up-{i}", soon(0))
        with pytest.raises(Overloaded):
            store.runner(photos.digest, WHOLE, soon(0))
    finally:
        gate.set()
    assert until(lambda: can_load(store, photos))


def test_a_failed_load_is_tried_anew_by_the_next_request(photos: Published, tmp_path: Path) -> None:
    class Flaky(Source):
        def locate(self, bundle_digest: str, segment_id: str) -> Located:
            located = super().locate(bundle_digest, segment_id)
            if len(self.calls) == 1:
                located.path.write_bytes(b"broken")
            return located

    source = Flaky(photos, tmp_path)
    store = SegmentStore(source, segment_settings(photos, tmp_path))
    with pytest.raises(RunFailed):
        store.runner(photos.digest, WHOLE, soon())
    assert store.runner(photos.digest, WHOLE, soon()).segment.id == WHOLE
    assert len(source.calls) == 2


def test_a_timeout_of_the_source_is_not_taken_for_a_slow_load(photos: Published, tmp_path: Path) -> None:
    class Broken(Source):
        def locate(self, bundle_digest: str, segment_id: str) -> Located:
            raise TimeoutError("the disk")

    store = SegmentStore(Broken(photos, tmp_path), segment_settings(photos, tmp_path))
    with pytest.raises(TimeoutError, match="the disk"):
        store.runner(photos.digest, WHOLE, soon())


def test_files_stay_pinned_while_loaded_and_are_released_after_eviction(photos: Published, tmp_path: Path) -> None:
    source = Source(photos, tmp_path)
    limit = bytes_of(photos, WHOLE)
    store = SegmentStore(source, segment_settings(photos, tmp_path, max_loaded_bytes=limit))
    held = store.runner(photos.digest, WHOLE, soon())
    (first,) = source.located
    assert is_pinned(first)
    store.runner(photos.digest, "..6", soon())
    assert [loaded.segment for loaded in store.loaded()] == ["..6"]
    assert is_pinned(first), "a request still runs it"
    held.run(photos.inputs)
    del held
    eventually(lambda: gc.collect() >= 0 and not is_pinned(first))  # its loader may be about to let go of it
    assert is_pinned(source.located[1])


def test_runs_wait_for_a_cpu_no_longer_than_their_deadline(
    photos: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.runtime.store.cpu_limit", lambda: 1)
    store = SegmentStore(Source(photos, tmp_path), segment_settings(photos, tmp_path))
    store.runner(photos.digest, WHOLE, soon())
    inside, leave = threading.Event(), threading.Event()

    class Slow:
        segment = photos.bundle.segment(WHOLE)

        def run(self, arrays: Any) -> dict[str, Any]:
            inside.set()
            leave.wait(LONG_S)
            return {}

    monkeypatch.setattr(store, "runner", lambda *_: Slow())
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(store.run, photos.digest, WHOLE, {}, soon())
        assert inside.wait(LONG_S)
        with pytest.raises(DeadlineExceeded):
            store.run(photos.digest, WHOLE, {}, soon(0.05))
        leave.set()
        assert pending.result(LONG_S).outputs == {}
    store.run(photos.digest, WHOLE, {}, soon())


def is_pinned(located: Located) -> bool:
    release: Any = located._release
    return bool(release.alive)


def can_load(store: SegmentStore, published: Published) -> bool:
    try:
        store.runner(published.digest, WHOLE, soon())
    except IsthmusError:
        return False
    return True
