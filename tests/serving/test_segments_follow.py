"""A router and a function that loses its memory: traffic comes back once the segments are loaded, and no one waits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from flask import Response
from flask.testing import FlaskClient
from werkzeug.serving import make_server

from isthmus.artifacts.plan import Error, Sources, Terms
from isthmus.serving import create_router_app, create_segment_app
from isthmus_tools.planner.publishing import publish_plan
from support.bundles import Published, metrics, photo, publish_photos, ready, router_settings, segment_settings
from support.patience import eventually
from support.plans import candidate, plan_for
from support.ports import free_port
from support.routers import assert_classes, expected_classes

PHOTO = photo(seed=5)
SPLIT, EDGE = "split-6", "edge-float"
MEASURED = Sources("measured", "measured")


@pytest.fixture
def planned(tmp_path: Path) -> Published:
    """A model whose plan has a split, and the edge alone as a degraded route: the split is taken wherever it can be."""
    photos = publish_photos(tmp_path / "model")
    terms = Terms(edge_run=0.001, cloud_run=0.001, sources=MEASURED)
    split = candidate(SPLIT, "split", 0.002, cuts=("6",), predicted=terms, up_bytes=1024)
    edge = candidate(EDGE, "edge", 0.001, error=Error(0.1, 5, 0.1))
    plan = plan_for(photos.bundle, split, candidates=(split, edge))
    publish_plan(photos.registry, photos.bundle, {}, plan, alias="prod")
    return photos


@dataclass
class Tail:
    """A function at a fixed port, which can be replaced by a new process that has nothing loaded."""

    published: Published
    folder: Path
    port: int = field(default_factory=free_port)
    may_load: threading.Event = field(default_factory=threading.Event)
    client: FlaskClient | None = None

    @contextmanager
    def process(self) -> Iterator[None]:
        app = create_segment_app(segment_settings(self.published, self.folder))
        self.client = ready(app.test_client())

        def enter(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
            if environ["PATH_INFO"] == "/load" and not self.may_load.is_set():
                return Response("{}", 202)(environ, start_response)
            return app(environ, start_response)

        server = make_server("127.0.0.1", self.port, enter, threaded=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
            server.server_close()
            app.extensions["isthmus"].close()

    def cold_runs(self) -> float:
        """Seconds that requests waited for loads in the present process."""
        assert self.client is not None
        return metrics(self.client).get(("isthmus_stage_seconds_sum", (("stage", "load"),)), 0.0)


def test_a_function_that_comes_back_gets_requests_once_its_segments_are_loaded(
    planned: Published, tmp_path: Path
) -> None:
    tail = Tail(planned, tmp_path / "tail")
    tail.may_load.set()
    hops = ("local", f"http://127.0.0.1:{tail.port}")
    settings = router_settings(planned, tmp_path / "router", hops, hop_attempts=1, guard_share=0.0)
    app = create_router_app(settings)
    client = ready(app.test_client())

    def route() -> str:
        reply = client.post("/", data=PHOTO)
        assert reply.status_code == 200, reply.json
        assert_classes(reply.json["classes"], expected_classes(planned, PHOTO))
        return str(reply.json["route"]["name"])

    with tail.process():
        eventually(lambda: route() == SPLIT)
    assert {route() for _ in range(5)} == {EDGE}, "the tail is gone"
    tail.may_load.clear()
    with tail.process():
        for _ in range(30):
            assert route() == EDGE, "the tail is back and has not loaded its segment"
        tail.may_load.set()
        eventually(lambda: route() == SPLIT)
        assert tail.cold_runs() == 0
    app.extensions["isthmus"].close()
