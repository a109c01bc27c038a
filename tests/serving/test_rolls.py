"""Functions with a baked segment are replaced under load: each response is of one bundle, and no request is lost."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flask import Flask, Response

from isthmus.serving import create_router_app, create_segment_app
from isthmus_tools.graph.extract import bake
from support.bundles import (
    TOLERANCE,
    Published,
    cache_of,
    framed,
    photo,
    publish_photos,
    ready,
    router_settings,
    segment_settings,
    served,
)
from support.patience import eventually
from support.routers import INFER, oip_json

HEAD, TAIL = "..6", "6.."
Served = tuple[int, str, str]
"""Status, version that the response names, and the version whose prediction it has."""


class Place:
    """The URL of a function behind a gateway, where one deployment takes another's place."""

    def __init__(self, app: Flask) -> None:
        self.app: Flask | None = app

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        app = self.app
        return (Response("", 503) if app is None else app)(environ, start_response)

    def replace(self, app: Flask) -> None:
        """Another deployment; in between no replica is ready."""
        self.app = None
        time.sleep(0.05)
        self.app = app


@dataclass
class Rolled:
    """A router before a head and a tail of the first of two versions, and functions of both."""

    versions: tuple[Published, Published]
    functions: dict[tuple[int, str], Flask]
    head: Place
    tail: Place
    router: Flask
    responses: list[Served] = field(default_factory=list)

    def roll(self, place: Place, segment: str) -> None:
        place.replace(self.functions[1, segment])

    def move(self) -> None:
        self.versions[1].registry.move_alias("photos", "prod", self.versions[1].version)

    def send(self) -> Served:
        reply = self.router.test_client().post(INFER, json=oip_json(self.versions[0]))
        if reply.status_code != 200:
            return reply.status_code, "", str(reply.json)
        logits = np.array(reply.json["outputs"][0]["data"], np.float32).reshape(1, 5)
        ran = [
            v.version for v in self.versions if np.allclose(v.whole["logits"], logits, rtol=TOLERANCE, atol=TOLERANCE)
        ]
        assert reply.headers["Isthmus-Version"] == f"photos:{reply.json['model_version']}"
        return 200, reply.json["model_version"], "/".join(ran)

    @contextmanager
    def under_load(self) -> Iterator[None]:
        """Four callers that send one request after the other."""
        ended = threading.Event()

        def call() -> None:
            while not ended.is_set():
                self.responses.append(self.send())

        callers = [threading.Thread(target=call) for _ in range(4)]
        for caller in callers:
            caller.start()
        try:
            yield
        finally:
            ended.set()
            for caller in callers:
                caller.join()

    def served_once_more(self) -> None:
        """Wait until further requests were served."""
        count = len(self.responses)
        eventually(lambda: len(self.responses) > count + 8)


@pytest.fixture
def rolled(tmp_path: Path) -> Iterator[Rolled]:
    registry = tmp_path / "registry"
    versions = (publish_photos(tmp_path / "1", registry=registry), publish_photos(tmp_path / "2", 1, registry))
    with ExitStack() as stack:
        functions = {}
        for i, published in enumerate(versions):
            for segment in (HEAD, TAIL):
                app = functions[i, segment] = baked_function(published, segment, tmp_path / f"baked-{i}{segment}")
                stack.callback(app.extensions["isthmus"].close)
        head, tail = Place(functions[0, HEAD]), Place(functions[0, TAIL])
        hops = [stack.enter_context(served(place)) for place in (head, tail)]
        settings = router_settings(versions[0], tmp_path / "router", hops, guard_share=0.0, refresh_s=0.05)
        router = create_router_app(settings)
        stack.callback(router.extensions["isthmus"].close)
        ready(router.test_client())
        yield Rolled(versions, functions, head, tail, router)


def baked_function(published: Published, segment: str, folder: Path) -> Flask:
    with cache_of(published, folder / "cache").locate(published.digest, segment) as located:
        bake(located, published.registry.manifest(published.digest), folder / "segment")
    settings = segment_settings(published, folder / "none", registry="", segment_dir=str(folder / "segment"))
    app = create_segment_app(settings)
    ready(app.test_client())
    return app


def test_a_roll_of_head_and_tail_under_load_loses_no_request_and_mixes_nothing(rolled: Rolled) -> None:
    with rolled.under_load():
        rolled.served_once_more()
        rolled.move()
        rolled.served_once_more()
        rolled.roll(rolled.head, HEAD)
        time.sleep(0.3)  # no function holds the segment that the other one needs
        rolled.roll(rolled.tail, TAIL)
        rolled.served_once_more()
    first, second = (v.version for v in rolled.versions)
    assert set(rolled.responses) == {(200, first, first), (200, second, second)}, Counter(rolled.responses)
    assert rolled.responses[-1] == (200, second, second)


def test_an_alias_that_moves_after_the_functions_loses_no_request(rolled: Rolled) -> None:
    with rolled.under_load():
        rolled.served_once_more()
        rolled.roll(rolled.tail, TAIL)
        rolled.roll(rolled.head, HEAD)
        time.sleep(0.2)
        rolled.move()
        rolled.served_once_more()
    first, second = (v.version for v in rolled.versions)
    assert set(rolled.responses) == {(200, first, first), (200, second, second)}, Counter(rolled.responses)


def test_functions_that_hold_no_common_bundle_give_a_clear_error(
    rolled: Rolled, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.routing.catalog.MAX_ROLL_S", 0.1)
    rolled.roll(rolled.head, HEAD)
    reply = rolled.router.test_client().post("/", data=photo())
    assert (reply.status_code, reply.json["type"]) == (503, "HopMismatch")
    first, second = (v.digest for v in rolled.versions)
    facts = reply.json["facts"]
    assert (facts["has"], facts["wanted"]) == ([second], first)
    assert "Retry-After" in reply.headers


def test_a_function_of_another_bundle_refuses_run_and_load_with_both_digests(rolled: Rolled) -> None:
    first, second = rolled.versions
    client = rolled.functions[1, HEAD].test_client()
    load = {"bundle": first.digest, "segment": HEAD}
    for reply in (client.post("/", data=framed(first, HEAD)), client.post("/load", json=load)):
        assert (reply.status_code, reply.json["type"]) == (409, "BundleMismatch")
        assert reply.json["facts"] == {"has": [second.digest], "wanted": first.digest}


def test_a_function_that_lost_its_registry_serves_what_it_has_and_refuses_other_bundles(tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    first, second = publish_photos(tmp_path / "1", registry=registry), publish_photos(tmp_path / "2", 1, registry)
    client = ready(create_segment_app(segment_settings(first, tmp_path / "cache", preload=("photos:1",))).test_client())
    assert client.post("/", data=framed(first)).status_code == 200
    registry.rename(tmp_path / "unmounted")
    assert client.post("/", data=framed(first)).status_code == 200
    reply = client.post("/", data=framed(second))
    assert (reply.status_code, reply.json["type"]) == (409, "BundleMismatch")
    assert reply.json["facts"] == {"has": [first.digest], "wanted": second.digest}
