"""The catalog under load: no request waits for the registry or for a load, and an alias moves once it may."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isthmus.artifacts.bundle import Bundle
from isthmus.context import Deadline
from isthmus.registry import FolderStore, Registry, Resolved
from isthmus.routing import CanaryTrials, ModelCatalog, RouteCandidate, ServedModel
from support.bundles import publish_photos
from support.hops import Echo
from support.patience import LONG_S, eventually

REFERENCE = "photos:live"


class GatedRegistry(Registry):
    """A registry whose look-ups of names wait for a gate."""

    def __init__(self, folder: Path) -> None:
        super().__init__(FolderStore(folder))
        self.gate = threading.Event()
        self.gate.set()
        self.asked = 0

    def resolve(self, reference: str) -> Resolved:
        self.asked += 1
        assert self.gate.wait(LONG_S)
        return super().resolve(reference)


class OneRoute:
    """Selects the bundle's own partition over a hop that answers anything."""

    def select(self, name: str, digest: str, bundle: Bundle) -> tuple[RouteCandidate, ...]:
        from isthmus.pipeline import plan_route

        return (RouteCandidate(plan_route(digest, bundle, (Echo({}),), None), name="default"),)


class Scene:
    """Two versions, a catalog, and whether the new one may be moved to."""

    def __init__(self, folder: Path) -> None:
        self.versions = (
            publish_photos(folder / "1", registry=folder / "r"),
            publish_photos(folder / "2", 1, folder / "r"),
        )
        self.registry = GatedRegistry(folder / "r")
        self.move(0)
        self.may_move = True
        self.prepared: list[str] = []
        self.catalog: ModelCatalog

    def open(self, refresh_s: float) -> None:
        routes: Any = OneRoute()
        log = logging.getLogger("isthmus")
        self.catalog = ModelCatalog(self.registry, refresh_s, log, routes, self, CanaryTrials(self.registry, log))

    def move(self, version: int) -> None:
        self.versions[version].registry.move_alias("photos", "live", self.versions[version].version)

    def get(self) -> str:
        return self.catalog.get(REFERENCE, Deadline.after(LONG_S)).version

    def prepare(self, model: ServedModel) -> bool:
        """As `Warming`."""
        self.prepared.append(model.version)
        return self.may_move

    def holds(self, model: ServedModel) -> bool:
        """As `Warming`."""
        return self.may_move


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path)
    yield scene
    scene.registry.gate.set()
    scene.catalog.close()


def test_requests_under_load_never_wait_for_the_registry(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expired entry would be waited for: here for as long as the gate is shut."""
    monkeypatch.setattr("isthmus.routing.catalog.MAX_REFRESH_WAIT_S", LONG_S)
    scene.open(refresh_s=4.0)
    first = scene.get()
    asked = scene.registry.asked
    scene.registry.gate.clear()
    scene.move(1)
    seen = set()
    while scene.registry.asked == asked:
        seen.add(scene.get())
        time.sleep(0.01)
    assert seen | {scene.get()} == {first}
    scene.registry.gate.set()
    eventually(lambda: scene.get() == scene.versions[1].version)


def test_an_alias_moves_once_the_new_version_is_prepared(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.routing.catalog._PREPARING_S", 0.02)
    scene.open(refresh_s=0.02)
    first, second = (p.version for p in scene.versions)
    assert scene.get() == first
    scene.may_move = False
    scene.move(1)
    seen = set()

    def asked_often() -> bool:
        seen.add(scene.get())
        return len(scene.prepared) > 3

    eventually(asked_often)
    assert (seen, set(scene.prepared)) == ({first}, {second})
    scene.may_move = True
    eventually(lambda: scene.get() == second)


def test_a_version_by_its_number_needs_no_preparation(scene: Scene) -> None:
    scene.open(refresh_s=0.0)
    scene.may_move = False
    second = scene.versions[1].version
    assert scene.catalog.get(f"photos:{second}", Deadline.after(LONG_S)).version == second
    assert scene.prepared == []


def test_a_version_that_comes_back_before_it_left_is_kept(scene: Scene) -> None:
    scene.open(refresh_s=0.0)
    first = scene.get()
    scene.may_move = False
    scene.move(1)
    assert scene.get() == first
    scene.move(0)
    scene.may_move = True
    assert [scene.get() for _ in range(3)] == [first] * 3


def test_requests_at_once_ask_the_registry_once(scene: Scene) -> None:
    scene.open(refresh_s=0.0)
    scene.get()
    asked = scene.registry.asked
    scene.registry.gate.clear()
    answers: list[str] = []
    threads = [threading.Thread(target=lambda: answers.append(scene.get())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 8
    assert scene.registry.asked == asked + 1
