"""Warming: hops load the segments of candidate routes before traffic moves there, within memory, and without thrash."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from isthmus.artifacts.segment_id import WHOLE
from isthmus.context import Context, Deadline
from isthmus.errors import HopMismatch, HopUnavailable, IsthmusError, MemoryInUse, NotReady, RegistryError
from isthmus.pipeline import HopReply, Route, plan_route
from isthmus.pipeline.hop import ServedTimes
from isthmus.routing import Estimates, RouteCandidate, ServedModel, Warming, WatchedHop, watch
from isthmus.routing.warming import MAX_MOVE_WAIT_S, RECHECK_S, WANTED_S
from isthmus.wire.frame import Frame
from support.bundles import Published
from support.bundles import photos as photos
from support.hop_servers import context
from support.patience import eventually

LOG = logging.getLogger("isthmus")


class LoadingHop:
    """A hop with so much room for segments, which loads when it is told to, and says what it was asked for."""

    encodes = True

    def __init__(self, name: str, room: int = 100) -> None:
        self.name, self.room = name, room
        self.asked: list[str] = []
        self.memory: set[str] = set()
        self.is_loading = False
        self.error: IsthmusError | None = None

    def load(self, bundle: str, segment: str, deadline: Deadline) -> bool:
        self.asked.append(segment)
        if self.error is not None:
            raise self.error
        if segment in self.memory:
            return True
        if len(self.memory) >= self.room:
            raise MemoryInUse("no room", segment=segment)
        if not self.is_loading:
            self.memory.add(segment)
        return False

    def call(self, frame: Frame, context: Context) -> HopReply:
        if self.error is not None:
            raise self.error
        load_s = 0.0 if frame.segment in self.memory else 0.5
        self.memory.add(frame.segment)
        return HopReply(frame, 0.01, served=ServedTimes(0.01 + load_s, 0.0, load_s))

    def close(self) -> None:
        """No-op."""


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Scene:
    """A warming over two scripted hops, asked by hand, and a model of four candidates."""

    def __init__(self, published: Published) -> None:
        self.edge, self.cloud, self.clock = LoadingHop("edge"), LoadingHop("cloud"), Clock()
        self.hops = watch(((self.edge,), (self.cloud,)), Estimates())
        self.warming = Warming(self.hops, LOG, self.clock)
        self.warming._thread = object()  # type: ignore[assignment]  # asked by hand
        self.model = model_of(published, self.hops)

    def loaded(self) -> set[str]:
        return set(self.warming.loaded(self.model))

    def ask(self, seconds: float = 0.0) -> set[str]:
        """The loaded candidates after the questions that are due so much later."""
        self.clock.now += seconds
        self.warming.ask()
        return self.loaded()

    def settle(self) -> set[str]:
        for _ in range(3):
            self.ask(1.0)
        return self.loaded()

    def call(self, hop: WatchedHop, segment: str) -> None:
        hop.call(Frame({}, self.model.digest, segment, "r"), context())


def model_of(published: Published, hops: tuple[WatchedHop, ...]) -> ServedModel:
    def split(cut: str, seconds: float) -> RouteCandidate:
        route = plan_route(published.digest, published.bundle, hops, (cut,))
        return RouteCandidate(route, name=f"split-{cut}", planned_s=seconds)

    def whole(name: str, hop: WatchedHop, seconds: float) -> RouteCandidate:
        segment = published.bundle.segment(WHOLE)
        return RouteCandidate(
            Route(published.digest, published.bundle, (segment,), (hop,)), name=name, planned_s=seconds
        )

    candidates = (split("6", 0.1), split("1", 0.2), whole("cloud", hops[1], 0.3), whole("edge", hops[0], 0.9))
    return ServedModel(published.name, published.version, published.digest, published.bundle, None, candidates)


@pytest.fixture
def scene(photos: Published) -> Scene:
    return Scene(photos)


def test_the_choice_alone_is_taken_at_the_very_start(scene: Scene) -> None:
    assert scene.loaded() == {"split-6"}
    scene.edge.is_loading = scene.cloud.is_loading = True
    assert scene.settle() == {"split-6"}


def test_a_candidate_is_taken_once_all_its_hops_have_its_segments(scene: Scene) -> None:
    scene.cloud.is_loading = True
    scene.loaded()
    assert scene.settle() == {"split-6", "edge"}
    scene.cloud.is_loading = False
    assert scene.settle() == {"split-6", "split-1", "cloud", "edge"}


def test_the_choice_is_asked_for_first_then_the_edge_alone_then_the_quickest(scene: Scene) -> None:
    scene.loaded()
    scene.ask()
    assert scene.edge.asked == ["..6", "..", "..1"]
    assert scene.cloud.asked == ["6..", "1..", ".."]


def test_loaded_segments_are_asked_for_rarely_and_those_that_load_soon(scene: Scene) -> None:
    scene.edge.memory |= {"..6", "..", "..1"}
    scene.loaded()
    scene.cloud.is_loading = True
    scene.ask()
    scene.edge.asked.clear()
    scene.cloud.asked.clear()
    scene.ask(0.1)
    assert scene.edge.asked == []
    assert scene.cloud.asked == ["6..", "1..", ".."]
    scene.loaded()
    scene.ask(RECHECK_S)
    assert scene.edge.asked == ["..6", "..", "..1"]


def test_memory_keeps_the_best_routes_and_nothing_is_asked_for_in_turns(scene: Scene) -> None:
    scene.edge.room = 2
    scene.loaded()
    assert scene.settle() == {"split-6", "cloud", "edge"}
    assert scene.edge.memory == {"..6", ".."}
    assert "1.." not in scene.cloud.memory, "the tail of a head without room"
    asked = len(scene.edge.asked)
    for _ in range(20):
        scene.ask(1.0)
    assert scene.edge.memory == {"..6", ".."}
    assert len(scene.edge.asked) - asked <= 4


def test_a_version_without_requests_is_left_alone_until_they_return(scene: Scene) -> None:
    scene.loaded()
    scene.settle()
    scene.clock.now += WANTED_S + 1
    scene.edge.asked.clear()
    scene.warming.ask()
    assert scene.edge.asked == []
    scene.loaded()
    scene.warming.ask()
    assert scene.edge.asked == ["..6", "..", "..1"]


@pytest.mark.parametrize("error", [HopUnavailable("away"), NotReady("starting"), RegistryError("broken")])
def test_no_error_ends_the_questions(scene: Scene, error: IsthmusError) -> None:
    scene.cloud.error = error
    scene.loaded()
    assert scene.settle() == {"split-6", "edge"}
    scene.cloud.error = None
    scene.ask(60.0)
    assert scene.settle() == {"split-6", "split-1", "cloud", "edge"}


def test_a_hop_that_is_away_is_asked_once_and_not_for_each_segment(scene: Scene) -> None:
    scene.cloud.error = HopUnavailable("away")
    scene.loaded()
    scene.ask()
    assert scene.cloud.asked == ["6.."]


def test_a_function_that_was_not_reached_is_taken_to_have_lost_its_memory(scene: Scene) -> None:
    scene.loaded()
    scene.settle()
    scene.cloud.error = HopUnavailable("away")
    with pytest.raises(HopUnavailable):
        scene.call(scene.hops[1], "6..")
    assert scene.loaded() == {"edge"}
    assert scene.warming.ask() < 1.0, "it is asked again soon, not when a loaded segment would be"
    scene.cloud.error = None
    scene.cloud.memory.clear()
    scene.cloud.is_loading = True
    assert scene.settle() == {"edge"}, "it is back, and loads"
    scene.cloud.is_loading = False
    assert scene.settle() == {"split-6", "split-1", "cloud", "edge"}


def test_a_hop_that_is_away_is_asked_for_lost_segments_again_soon(scene: Scene) -> None:
    scene.loaded()
    scene.settle()
    scene.cloud.error = HopUnavailable("away")
    with pytest.raises(HopUnavailable):
        scene.call(scene.hops[1], "6..")
    for _ in range(5):
        assert scene.warming.ask() <= 1.0
        scene.clock.now += 1.0


def test_a_cold_load_of_a_loaded_segment_puts_the_others_in_doubt(scene: Scene) -> None:
    scene.loaded()
    scene.settle()
    scene.edge.memory.clear()
    scene.edge.is_loading = True
    scene.call(scene.hops[0], "..6")
    assert scene.loaded() == {"split-6", "cloud"}
    scene.edge.asked.clear()
    scene.ask()
    assert scene.edge.asked == ["..", "..1"], "the one that ran is loaded"


def test_a_segment_that_ran_is_loaded(scene: Scene) -> None:
    scene.loaded()
    scene.call(scene.hops[0], "..")
    assert scene.loaded() == {"split-6", "edge"}


def test_where_no_candidate_is_loaded_the_choice_is_taken(scene: Scene) -> None:
    scene.loaded()
    scene.settle()
    for hop in (scene.edge, scene.cloud):
        hop.error = HopUnavailable("away")
    for watched, segment in zip(scene.hops, ("..6", "6.."), strict=True):
        with pytest.raises(HopUnavailable):
            scene.call(watched, segment)
    assert scene.loaded() == {"split-6"}


def test_two_routers_at_one_function_do_not_drive_each_other_out(photos: Published) -> None:
    """The edge has room for two segments; the second router prefers another route."""
    one, other = Scene(photos), Scene(photos)
    other.edge = one.edge
    other.hops = watch(((one.edge,), (other.cloud,)), Estimates())
    other.warming = Warming(other.hops, LOG, other.clock)
    other.warming._thread = object()  # type: ignore[assignment]
    first, second, *rest = model_of(photos, other.hops).candidates
    other.model = ServedModel("photos", "1", photos.digest, photos.bundle, None, (second, first, *rest))
    one.edge.room = 2
    one.loaded()
    one.settle()
    for _ in range(5):
        other.loaded()
        other.settle()
        one.settle()
    assert one.edge.memory == {"..6", ".."}
    assert one.loaded() == {"split-6", "cloud", "edge"}
    assert other.loaded() == {"split-1", "split-6", "cloud", "edge"}, "its choice was never loaded, and may be taken"


def test_a_new_version_is_moved_to_once_its_choice_is_loaded(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.routing.warming.PREPARE_S", 0.0)
    scene.edge.is_loading = True
    assert not scene.warming.prepare(scene.model)
    scene.ask()
    assert not scene.warming.prepare(scene.model)
    scene.edge.is_loading = False
    scene.settle()
    assert scene.warming.prepare(scene.model)


def test_a_new_version_is_moved_to_after_a_while_in_any_case(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.routing.warming.PREPARE_S", 0.0)
    scene.edge.error = HopUnavailable("away")
    assert not scene.warming.prepare(scene.model)
    scene.ask(MAX_MOVE_WAIT_S + 1)
    assert scene.warming.prepare(scene.model)


def test_a_new_version_without_room_beside_the_old_one_is_moved_to(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.routing.warming.PREPARE_S", 0.0)
    scene.edge.room = 0
    assert not scene.warming.prepare(scene.model)
    scene.ask()
    assert scene.warming.prepare(scene.model)


def test_a_hop_that_holds_another_bundle_is_named_once(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOG.name)
    scene.cloud.error = HopMismatch("cloud answered 409")
    scene.loaded()
    scene.settle()
    said = [record for record in caplog.records if "holds another bundle" in record.message]
    assert [record.facts["segment"] for record in said] == ["6..", "1..", ".."]  # type: ignore[attr-defined]
    assert "isthmus package" in said[0].facts["hint"]  # type: ignore[attr-defined]


def test_versions_are_bounded(scene: Scene, photos: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.routing.warming.MAX_MODELS", 2)
    for digest in ("a", "b", "c"):
        scene.clock.now += 1
        candidates = model_of(photos, scene.hops).candidates
        scene.warming.loaded(ServedModel("photos", digest, digest, photos.bundle, None, candidates))
    assert set(scene.warming._models) == {"b", "c"}


def test_the_thread_asks_and_ends(photos: Published, tmp_path: Any) -> None:
    scene = Scene(photos)
    scene.warming._thread = None
    scene.warming._clock = __import__("time").monotonic
    scene.loaded()
    eventually(lambda: scene.loaded() == {"split-6", "split-1", "cloud", "edge"})
    thread: Any = scene.warming._thread
    scene.warming.close()
    eventually(lambda: not thread.is_alive())
