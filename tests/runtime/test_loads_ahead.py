"""Loads ahead of requests: in the background, bounded, once for any number of calls, and in no request's way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.segment_id import WHOLE
from isthmus.context import Deadline
from isthmus.errors import MemoryInUse, Missing, Overloaded, RegistryError, SegmentTooLarge
from isthmus.registry import Located
from isthmus.runtime.store import SegmentStore
from isthmus_tools.planner.publishing import publish_plan
from support.bundles import Published, cache_of, segment_settings
from support.bundles import photos as photos
from support.patience import LONG_S, eventually
from support.plans import candidate, plan_for


class GatedSource:
    """A cache whose `locate` waits for the gates of some segments, and fails where it is told to."""

    def __init__(self, published: Published, cache: Path) -> None:
        self._cache = cache_of(published, cache)
        self.gates: dict[str, threading.Event] = {}
        self.failing: set[str] = set()
        self.calls: list[str] = []

    def bundle(self, digest: str) -> Bundle:
        return self._cache.bundle(digest)

    def trusts(self, digest: str) -> bool:
        return self._cache.trusts(digest)

    def locate(self, bundle_digest: str, segment_id: str) -> Located:
        self.calls.append(segment_id)
        if (gate := self.gates.get(segment_id)) is not None:
            assert gate.wait(LONG_S)
        if segment_id in self.failing:
            raise RegistryError("the registry is broken")
        return self._cache.locate(bundle_digest, segment_id)


def soon(seconds: float = LONG_S) -> Deadline:
    return Deadline.after(seconds)


@pytest.fixture
def source(photos: Published, tmp_path: Path) -> Iterator[GatedSource]:
    source = GatedSource(photos, tmp_path)
    yield source
    for gate in source.gates.values():
        gate.set()


Stores = Callable[..., SegmentStore]


@pytest.fixture
def store_of(photos: Published, source: GatedSource, tmp_path: Path) -> Iterator[Stores]:
    opened: list[SegmentStore] = []

    def open_one(**given: Any) -> SegmentStore:
        opened.append(SegmentStore(source, segment_settings(photos, tmp_path, **given)))  # type: ignore[arg-type]
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


def bytes_of(published: Published, *segments: str) -> int:
    bundle = published.bundle
    return sum(t.length for s in segments for t in bundle.weight_ranges(bundle.segment(s)))


def loaded(store: SegmentStore) -> set[str]:
    return {each.segment for each in store.loaded()}


def test_any_number_of_calls_is_one_load(photos: Published, store_of: Stores, source: GatedSource) -> None:
    store, source.gates["..6"] = store_of(), threading.Event()
    with ThreadPoolExecutor(8) as pool:
        assert not any(pool.map(lambda _: store.load(photos.digest, "..6", soon()), range(32)))
    source.gates["..6"].set()
    eventually(lambda: store.load(photos.digest, "..6", soon()))
    assert source.calls == ["..6"]


def test_what_cannot_be_loaded_is_refused_at_once(photos: Published, store_of: Stores, source: GatedSource) -> None:
    store = store_of(max_loaded_bytes=1000)
    with pytest.raises(Missing):
        store.load(photos.digest, "..99", soon())
    with pytest.raises(Missing):
        store.load("sha256:" + "0" * 64, WHOLE, soon())
    with pytest.raises(SegmentTooLarge):
        store.load(photos.digest, WHOLE, soon())
    assert source.calls == []


def test_a_load_ahead_leaves_what_requests_use(photos: Published, store_of: Stores) -> None:
    store = store_of(max_loaded_bytes=bytes_of(photos, "..6", "6.."))
    store.runner(photos.digest, "..6", soon())
    with pytest.raises(MemoryInUse) as e:
        store.load(photos.digest, WHOLE, soon())
    assert e.value.facts["segment"] == WHOLE
    assert loaded(store) == {"..6"}
    store.load(photos.digest, "6..", soon())
    eventually(lambda: loaded(store) == {"..6", "6.."})


def test_a_request_overtakes_loads_ahead_that_have_not_begun(
    photos: Published, store_of: Stores, source: GatedSource
) -> None:
    store, source.gates["..1"] = store_of(), threading.Event()
    for segment in ("..1", "..6", "6.."):
        assert not store.load(photos.digest, segment, soon())
    assert store.runner(photos.digest, "6..", soon()).segment.id == "6.."
    assert loaded(store) == {"6.."}
    source.gates["..1"].set()
    eventually(lambda: loaded(store) == {"..1", "..6", "6.."})
    assert sorted(source.calls) == ["..1", "..6", "6.."]


def test_a_request_joins_a_load_ahead_that_has_begun(photos: Published, store_of: Stores, source: GatedSource) -> None:
    store, source.gates["..1"] = store_of(), threading.Event()
    store.load(photos.digest, "..1", soon())
    eventually(lambda: source.calls == ["..1"])
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(store.runner, photos.digest, "..1", soon())
        source.gates["..1"].set()
        assert waiting.result(LONG_S).segment.id == "..1"
    assert source.calls == ["..1"]


def test_a_load_ahead_that_a_request_joined_evicts_as_a_requests_load_does(
    photos: Published, store_of: Stores, source: GatedSource
) -> None:
    store, source.gates[WHOLE] = store_of(max_loaded_bytes=bytes_of(photos, WHOLE)), threading.Event()
    store.load(photos.digest, WHOLE, soon())
    eventually(lambda: source.calls == [WHOLE])
    store.runner(photos.digest, "6..", soon())
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(store.runner, photos.digest, WHOLE, soon())
        source.gates[WHOLE].set()
        assert waiting.result(LONG_S).segment.id == WHOLE
    assert loaded(store) == {WHOLE}


def test_requests_run_loaded_segments_while_another_is_loaded(
    photos: Published, store_of: Stores, source: GatedSource
) -> None:
    store, source.gates["..6"] = store_of(), threading.Event()
    store.runner(photos.digest, WHOLE, soon())
    store.load(photos.digest, "..6", soon())
    ran = store.run(photos.digest, WHOLE, photos.inputs, soon())
    assert (ran.load_s, source.gates["..6"].is_set()) == (0.0, False)


def test_the_first_run_of_a_segment_states_its_load(photos: Published, store_of: Stores) -> None:
    store = store_of()
    runs = [store.run(photos.digest, WHOLE, photos.inputs, soon()).load_s for _ in range(3)]
    assert runs[0] > 0
    assert runs[1:] == [0.0, 0.0]


def test_the_next_call_is_told_why_a_load_failed(photos: Published, store_of: Stores, source: GatedSource) -> None:
    store = store_of()
    source.failing.add("..6")
    store.load(photos.digest, "..6", soon())

    def fails() -> bool:
        try:
            store.load(photos.digest, "..6", soon())
        except RegistryError as e:
            return e.message == "the registry is broken"
        return False

    eventually(fails)
    source.failing.clear()
    assert store.runner(photos.digest, "..6", soon()).segment.id == "..6", "a request tries at once"


def test_loads_that_wait_are_bounded(photos: Published, store_of: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.runtime.store.MAX_AHEAD", 2)
    gate = threading.Event()
    monkeypatch.setattr(GatedSource, "locate", lambda *_: gate.wait(LONG_S) and None)
    store = store_of()
    try:
        for segment in ("..1", "..6"):
            assert not store.load(photos.digest, segment, soon())
        with pytest.raises(Overloaded):
            store.load(photos.digest, "6..", soon())
        assert not store.load(photos.digest, "..1", soon())
    finally:
        monkeypatch.undo()
        gate.set()


def test_a_version_with_another_plan_shares_what_is_loaded(
    photos: Published, store_of: Stores, source: GatedSource
) -> None:
    """Full memory, all of it in use: the new plan's version needs no room."""
    planned = publish_plan(photos.registry, photos.bundle, {}, plan_for(photos.bundle, candidate()))
    assert planned.digest != photos.digest
    store = store_of(max_loaded_bytes=bytes_of(photos, "..6", "6.."))
    for segment in ("..6", "6.."):
        store.runner(photos.digest, segment, soon())
        assert store.load(planned.digest, segment, soon())
        assert store.run(planned.digest, segment, inputs_of(photos, store, segment), soon()).load_s == 0
    assert sum(each.bytes for each in store.loaded()) == bytes_of(photos, "..6", "6..")
    assert source.calls == ["..6", "6.."]


def inputs_of(photos: Published, store: SegmentStore, segment: str) -> Any:
    head = photos.inputs if segment.startswith("..") else None
    return head or store.run(photos.digest, "..6", photos.inputs, soon()).outputs


def test_a_load_that_fails_leaves_its_room(photos: Published, store_of: Stores, source: GatedSource) -> None:
    store = store_of(max_loaded_bytes=bytes_of(photos, WHOLE))
    source.failing.add(WHOLE)
    with pytest.raises(RegistryError):
        store.runner(photos.digest, WHOLE, soon())
    source.failing.clear()
    assert store.runner(photos.digest, WHOLE, soon()).segment.id == WHOLE
