"""An alias with a canary in a router: who gets it, what responses and metrics say, and its rollback."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from isthmus.artifacts.canary import Canary, CanaryRule
from isthmus.errors import Denied
from isthmus.registry import Registry
from isthmus.security.audit import AuditLog
from isthmus.serving import create_router_app
from support.bundles import Published, metrics, photo, publish_photos, ready, router_settings
from support.patience import eventually

PHOTO = photo(seed=3)
# Nothing of these ends a trial by chance: two random models differ in most predictions.
LENIENT = CanaryRule(max_disagreement=1.0, max_errors=1.0, max_latency_ratio=1000)


@dataclass
class Release:
    """A router of its own process, and the two versions of its alias prod."""

    stable: Published
    tried: Published
    app: Flask
    client: FlaskClient

    @property
    def registry(self) -> Registry:
        return self.stable.registry

    def begin(self, share: float = 0.5, rule: CanaryRule = LENIENT) -> None:
        present = self.registry.alias("photos", "prod")
        canary = Canary(int(self.tried.version), self.tried.digest, share, present.counter + 1, rule)
        self.registry.move_alias("photos", "prod", self.stable.version, canary=canary)

    def send(self, caller: str = "", **headers: str) -> Any:
        return self.app.test_client().post("/", data=PHOTO, headers={"X-Caller": caller, **headers})

    def version(self, caller: str) -> str:
        return str(self.send(caller).json["model_version"])

    def versions(self, callers: int = 40) -> dict[str, str]:
        return {f"caller {i}": self.version(f"caller {i}") for i in range(callers)}

    def begun(self) -> None:
        """Wait until the canary has callers: its segments are loaded by then."""
        eventually(lambda: self.tried.version in self.versions().values())

    def trial(self) -> dict[str, Any]:
        trial: dict[str, Any] = self.client.get("/routes").json["canaries"][-1]
        return trial


@contextmanager
def released(folder: Path, **given: Any) -> Iterator[Release]:
    registry = folder / "registry"
    stable, tried = (publish_photos(folder / str(seed), seed, registry) for seed in (0, 1))
    settings = {"caller_header": "X-Caller", "refresh_s": 0.05, "canary_compared": 0.0} | given
    app = create_router_app(router_settings(stable, folder / "cache", ("local",), **settings))
    try:
        yield Release(stable, tried, app, ready(app.test_client()))
    finally:
        app.extensions["isthmus"].close()


@pytest.fixture
def release(tmp_path: Path) -> Iterator[Release]:
    with released(tmp_path) as made:
        yield made


def test_a_caller_stays_with_its_version_while_the_alias_moves_under_load(release: Release) -> None:
    release.begin(0.4)
    release.begun()
    before = release.versions()
    assert set(before.values()) == {"1", "2"}
    ended, statuses = threading.Event(), Counter[int]()

    def call() -> None:
        while not ended.is_set():
            statuses[release.send().status_code] += 1

    callers = [threading.Thread(target=call) for _ in range(3)]
    for each in callers:
        each.start()
    canary = release.registry.alias("photos", "prod").canary
    assert canary is not None
    grown = Canary(canary.version, canary.digest, 0.7, canary.began, canary.rule)
    release.registry.move_alias("photos", "prod", "1", canary=grown)
    eventually(lambda: release.trial()["share"] == 0.7)
    after = release.versions()
    release.registry.move_alias("photos", "prod", "2")
    eventually(lambda: set(release.versions().values()) == {"2"})
    ended.set()
    for each in callers:
        each.join()
    assert set(statuses) == {200}
    assert {c for c, v in before.items() if v == "2"} < {c for c, v in after.items() if v == "2"}


def test_responses_and_metrics_say_which_version_served(release: Release) -> None:
    assert "Isthmus-Release" not in release.send("a").headers, "no canary yet"
    release.begin()
    release.begun()
    for i in range(20):
        reply = release.send(f"caller {i}")
        name = {"1": "stable", "2": "canary"}[reply.json["model_version"]]
        assert reply.headers["Isthmus-Version"] == f"photos:{reply.json['model_version']}"
        assert reply.headers["Isthmus-Release"] == name
    trial, seen = release.trial(), metrics(release.client)
    labels = (("alias", "prod"), ("model", "photos"), ("outcome", "ok"), ("release", "canary"))
    assert seen["isthmus_canary_requests_total", labels] == trial["canary"]["requests"] > 0
    assert seen["isthmus_canary_share", (("alias", "prod"), ("model", "photos"))] == 0.5
    assert seen["isthmus_version_requests_total", (("model", "photos"), ("outcome", "ok"), ("version", "2"))] > 0
    assert trial["canary"]["median_s"] > 0


def test_requests_without_a_name_are_drawn_one_by_one_or_by_the_header_of_the_setting(tmp_path: Path) -> None:
    with released(tmp_path, canary_header="X-Session") as release:
        release.begin()
        release.begun()
        drawn = {str(release.send().json["model_version"]) for _ in range(40)}
        assert drawn == {"1", "2"}
        for session in "abc":
            assert len({release.send(**{"X-Session": session}).json["model_version"] for _ in range(8)}) == 1


def test_a_version_by_its_number_is_not_drawn(release: Release) -> None:
    release.begin(0.99)
    release.begun()
    client = release.app.test_client()
    replies = [client.post("/?model=photos:1", data=PHOTO, headers={"X-Caller": str(i)}) for i in range(10)]
    assert {reply.json["model_version"] for reply in replies} == {"1"}
    assert all("Isthmus-Release" not in reply.headers for reply in replies)


def test_a_canary_that_fails_requests_is_rolled_back_at_once_with_an_audit_entry(
    release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    release.begin(rule=CanaryRule(min_requests=3))
    release.begun()
    fail_runs_of(release.tried, monkeypatch)
    statuses = [release.send(f"caller {i}").status_code for i in range(60)]
    assert 3 <= statuses.count(500) <= 20
    assert set(statuses[-20:]) == {200}, "not one request more goes to the canary"
    eventually(lambda: release.registry.alias("photos", "prod").canary is None)
    eventually(lambda: release.trial()["is_alias_moved"])
    assert release.registry.alias("photos", "prod").number == "1"
    entry = AuditLog(release.registry.store, release.registry.retry_policy)
    facts = [e.facts for e in entry.entries() if e.what == "canary rollback"]
    assert [(f["alias"], f["reason"], f["canary"]) for f in facts] == [("prod", "errors", "2")]
    labels = (("alias", "prod"), ("model", "photos"), ("moved", "yes"), ("reason", "errors"))
    assert metrics(release.client)["isthmus_canary_rollbacks_total", labels] == 1


def test_a_router_that_may_not_write_stops_its_own_requests_and_says_so(
    release: Release, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    release.begin(rule=CanaryRule(min_requests=3))
    release.begun()

    def deny(*_: object, **__: object) -> None:
        raise Denied("this key may only read", registry="r")

    monkeypatch.setattr("isthmus.registry.registry.Registry.move_alias", deny)
    fail_runs_of(release.tried, monkeypatch)
    with caplog.at_level(logging.WARNING, "isthmus"):
        statuses = [release.send(f"caller {i}").status_code for i in range(60)]
        eventually(lambda: "the alias keeps its canary" in caplog.text)
    assert set(statuses[-20:]) == {200}
    assert release.registry.alias("photos", "prod").canary is not None
    assert {release.version(f"caller {i}") for i in range(20)} == {"1"}, "after further looks at the alias too"
    labels = (("alias", "prod"), ("model", "photos"), ("moved", "no"), ("reason", "errors"))
    assert metrics(release.client)["isthmus_canary_rollbacks_total", labels] == 1


def test_a_canary_whose_predictions_differ_is_rolled_back(tmp_path: Path) -> None:
    with released(tmp_path, canary_compared=1.0) as release:
        release.begin(rule=CanaryRule(4, max_disagreement=0.2, max_errors=1.0, max_latency_ratio=1000))
        release.begun()
        seeds = itertools.count()

        def differs() -> bool:
            release.app.test_client().post("/", data=photo(seed=next(seeds)))
            return str(release.trial()["reason"]) == "disagreement"

        eventually(differs)
        assert release.trial()["differed"] > 0
        eventually(lambda: set(release.versions(10).values()) == {"1"})


def fail_runs_of(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the runtime fail in each segment of that version."""
    from isthmus.errors import RunFailed
    from isthmus.runtime.store import SegmentStore

    run = SegmentStore.run

    def failing(store: Any, bundle: str, *rest: Any) -> Any:
        if bundle == published.digest:
            raise RunFailed("a kernel fails", segment="..")
        return run(store, bundle, *rest)

    monkeypatch.setattr("isthmus.runtime.store.SegmentStore.run", failing)
