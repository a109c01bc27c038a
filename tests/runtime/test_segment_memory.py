"""The bound on loaded segments: a request evicts the least recently used, a load ahead what nobody uses."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from isthmus.errors import MemoryInUse, SegmentTooLarge
from isthmus.runtime.segment_memory import IN_USE_S, SegmentMemory
from support.patience import LONG_S, until

RUNNER: Any = object()


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def key(segment: str) -> tuple[str, str]:
    return "bundle", segment


def filled(clock: Clock, **sizes: int) -> SegmentMemory:
    """A memory of 100 bytes with segments that requests loaded, in this order."""
    memory = SegmentMemory(100, clock)
    for segment, size in sizes.items():
        memory.reserve(key(segment), size)
        memory.add(key(segment), RUNNER, segment)
    return memory


def names(memory: SegmentMemory) -> list[str]:
    return [loaded.segment for loaded in memory.loaded()]


def test_a_load_ahead_evicts_nothing_that_was_used_lately() -> None:
    clock = Clock()
    memory = filled(clock, a=60, b=40)
    clock.now += IN_USE_S - 1
    for act in (lambda: memory.check(key("c"), 10), lambda: memory.reserve(key("c"), 10, lambda: True)):
        with pytest.raises(MemoryInUse) as e:
            act()
        assert e.value.facts["bytes"] == 10
        assert "max_loaded_bytes" in e.value.hint
    assert names(memory) == ["a", "b"]


def test_a_load_ahead_takes_the_room_of_what_nobody_uses_or_asks_for() -> None:
    clock = Clock()
    memory = filled(clock, a=40, b=40)
    clock.now += IN_USE_S
    memory.touch(key("a"))
    memory.reserve(key("c"), 50, lambda: True)
    assert names(memory) == ["a"]


def test_a_load_ahead_that_has_no_room_even_so_evicts_nothing() -> None:
    clock = Clock()
    memory = filled(clock, a=40, b=40)
    clock.now += IN_USE_S
    memory.get(key("b"))
    with pytest.raises(MemoryInUse):
        memory.reserve(key("c"), 70, lambda: True)
    assert names(memory) == ["a", "b"]


def test_a_request_evicts_what_was_loaded_ahead_and_not_used_first() -> None:
    clock = Clock()
    memory = filled(clock, a=30)
    memory.reserve(key("ahead"), 30, lambda: True)
    memory.add(key("ahead"), RUNNER, "ahead", is_ahead=True)
    memory.reserve(key("b"), 50)
    assert names(memory) == ["a"]


def test_a_request_waits_for_the_room_that_another_load_will_leave() -> None:
    memory = SegmentMemory(100)
    memory.reserve(key("first"), 80)
    entered = threading.Event()

    def load() -> None:
        memory.reserve(key("second"), 80)
        entered.set()

    thread = threading.Thread(target=load)
    thread.start()
    assert not entered.wait(0.05)
    memory.add(key("first"), RUNNER, "first")
    assert entered.wait(LONG_S)
    thread.join()
    assert names(memory) == []


def test_a_load_ahead_is_a_requests_from_the_moment_that_one_waits() -> None:
    memory = filled(Clock(), a=100)
    is_ahead = iter([False])
    memory.reserve(key("b"), 100, lambda: next(is_ahead))
    assert names(memory) == []


def test_reservations_count_and_end() -> None:
    memory = SegmentMemory(100)
    memory.reserve(key("a"), 60)
    with pytest.raises(MemoryInUse):
        memory.check(key("b"), 50)
    memory.discard(key("a"))
    memory.check(key("b"), 50)


def test_more_than_the_bound_is_refused_with_both_sizes() -> None:
    with pytest.raises(SegmentTooLarge) as e:
        SegmentMemory(100).check(key("a"), 101)
    assert (e.value.facts["bytes"], e.value.facts["limit"]) == (101, 100)


def test_looking_is_not_using() -> None:
    memory = filled(Clock(), a=10, b=10)
    assert memory.peek(key("a")) is RUNNER
    assert memory.touch(key("a"))
    assert key("a") in memory
    assert names(memory) == ["a", "b"]
    memory.get(key("a"))
    assert names(memory) == ["b", "a"]
    assert until(lambda: memory.get(key("c")) is None)


def test_equal_segments_of_two_bundles_are_in_memory_once() -> None:
    memory = filled(Clock(), a=60)
    assert memory.share(("other", "a"), "b") is None
    assert memory.share(("other", "a"), "a") is RUNNER
    assert memory.get(("other", "a")) is RUNNER
    assert [loaded.bytes for loaded in memory.loaded()] == [60]
    memory.reserve(key("b"), 60)
    assert memory.get(("other", "a")) is memory.get(key("a")) is None


def test_a_use_of_one_bundle_keeps_a_shared_segment_for_all() -> None:
    clock = Clock()
    memory = filled(clock, a=60)
    memory.share(("other", "a"), "a")
    clock.now += IN_USE_S
    memory.get(("other", "a"))
    with pytest.raises(MemoryInUse):
        memory.check(key("b"), 60)


def test_two_loads_of_equal_segments_at_once_keep_one() -> None:
    memory = SegmentMemory(100)
    for bundle in ("one", "other"):
        memory.reserve((bundle, "a"), 50)
    for bundle in ("one", "other"):
        memory.add((bundle, "a"), RUNNER, "a")
    assert [loaded.bytes for loaded in memory.loaded()] == [50]
    memory.check(key("b"), 50)
    memory.discard(("one", "a"))
    assert names(memory) == []


def test_bundles_of_a_shared_segment_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.runtime.segment_memory.MAX_SHARED", 2)
    memory = filled(Clock(), a=60)
    for n in range(5):
        assert memory.share((f"bundle-{n}", "a"), "a") is RUNNER
    assert sum((f"bundle-{n}", "a") in memory for n in range(5)) == 1
