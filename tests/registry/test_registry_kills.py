"""Processes killed in the middle of publishes, promotions and collections, and twenty at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.moto_server import Moto
from support.registry_kills import Job, Killer, Nursery, Place, audit_problems, problems, wait_for
from support.s3_server import unique_prefix


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as warm:
        yield warm


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "folder":
        return Place(folder=str(tmp_path / "registry"))
    server: Moto = request.getfixturevalue("moto_s3")
    return Place(endpoint=server.endpoint, prefix=unique_prefix())


def test_a_kill_at_any_moment_leaves_a_consistent_registry(place: Place, tmp_path: Path, nursery: Nursery) -> None:
    killer = Killer(nursery, place, str(tmp_path / "files"), str(tmp_path / "log"))
    for _ in range(5):  # two processes each
        killer.round(0.3 if place.folder else 0.6)
    assert killer.problems == []
    assert killer.killed == 10
    assert audit_problems(place.open()) == []


def test_of_twenty_that_publish_and_promote_at_once_none_is_lost(tmp_path: Path, nursery: Nursery) -> None:
    place, log = Place(folder=str(tmp_path / "registry")), str(tmp_path / "log")
    Job(place, str(tmp_path / "files"), log, 100, ["publish"], 1).run()
    Job(place, str(tmp_path / "files"), log, 101, ["publish"], 1).run()
    kinds = [["publish"], ["promote"]] * 10
    wait_for([nursery.start(Job(place, str(tmp_path / "files"), log, n, kind, 1)) for n, kind in enumerate(kinds)])
    registry, lines = place.open(), Path(log).read_text().splitlines()
    assert problems(registry, log) == []
    assert audit_problems(registry) == []
    # Two before, and each publisher's own.
    assert len(registry.versions("fake")) == sum(line.startswith("version") for line in lines) == 12
    assert registry.alias("fake", "live").counter == sum(line.startswith("move") for line in lines)
