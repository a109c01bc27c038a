"""POST /load of a segment function, alone and as a router's hop asks it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, Response
from flask.testing import FlaskClient

from isthmus.artifacts.segment_id import WHOLE
from isthmus.context import Deadline
from isthmus.errors import HopRejected, HopTimeout, HopUnavailable, MemoryInUse, SegmentTooLarge
from isthmus.pipeline import HttpHop
from isthmus.serving import create_segment_app
from support.bundles import Published, metrics, ready, segment_settings, served
from support.bundles import photos as photos
from support.hop_servers import doc
from support.hop_servers import hop_to as hop_to
from support.patience import LONG_S, eventually, until
from support.ports import free_port

NO_BUNDLE = "sha256:" + "0" * 64


@pytest.fixture
def client(photos: Published, tmp_path: Path) -> FlaskClient:
    return ready(create_segment_app(segment_settings(photos, tmp_path / "cache")).test_client())


def load(client: FlaskClient, bundle: str, segment: str) -> Any:
    return client.post("/load", json={"bundle": bundle, "segment": segment})


def test_a_segment_is_loaded_in_the_background(client: FlaskClient, photos: Published) -> None:
    answer = load(client, photos.digest, "..6")
    assert (answer.status_code, answer.json["state"]) in ((202, "loading"), (200, "loaded"))
    eventually(lambda: load(client, photos.digest, "..6").status_code == 200)
    answer = load(client, photos.digest, "..6")
    assert answer.json == {"bundle": photos.digest, "segment": "..6", "state": "loaded"}
    assert metrics(client)["isthmus_loaded_segments", ()] == 1


@pytest.mark.parametrize(
    ("body", "status", "type"),
    [
        (b"", 400, "RequestMalformed"),
        (b"[]", 400, "RequestMalformed"),
        (b"\xff", 400, "RequestMalformed"),
        (b"[" * 8000, 400, "RequestMalformed"),
        (b'{"bundle": 1, "segment": ".."}', 400, "RequestMalformed"),
        (b'{"bundle": "../../etc/passwd", "segment": ".."}', 400, "RequestMalformed"),
        (json.dumps({"bundle": NO_BUNDLE, "segment": "..", "more": 1}).encode(), 400, "RequestMalformed"),
        (b" " * 8193, 413, "RequestTooLarge"),
        (json.dumps({"bundle": NO_BUNDLE, "segment": ".."}).encode(), 404, "Missing"),
    ],
)
def test_a_bad_body_is_refused(client: FlaskClient, body: bytes, status: int, type: str) -> None:
    answer = client.post("/load", data=body)
    assert (answer.status_code, answer.json["type"]) == (status, type)


def test_an_unknown_segment_names_those_that_exist(client: FlaskClient, photos: Published) -> None:
    answer = load(client, photos.digest, "..99")
    assert (answer.status_code, answer.json["facts"]["exists"]) == (404, sorted(photos.bundle.segments))


@pytest.mark.parametrize("details", [True, False])
def test_a_load_without_room_says_what_to_do(photos: Published, tmp_path: Path, details: bool) -> None:
    whole = sum(t.length for t in photos.bundle.weight_ranges(photos.bundle.segment(WHOLE)))
    settings = segment_settings(photos, tmp_path, max_loaded_bytes=whole, expose_details=details)
    client = ready(create_segment_app(settings).test_client())
    assert until(lambda: load(client, photos.digest, WHOLE).status_code == 200)
    answer = load(client, photos.digest, "..6")
    assert (answer.status_code, answer.json["type"]) == (507, "MemoryInUse")
    assert "max_loaded_bytes" in answer.json["hint"]
    assert load(client, photos.digest, WHOLE).status_code == 200


# As a hop asks


def test_a_hop_loads_segments_of_a_real_function(photos: Published, tmp_path: Path, hop_to: Any) -> None:
    app = create_segment_app(segment_settings(photos, tmp_path))
    ready(app.test_client())
    with served(app) as url:
        hop: HttpHop = hop_to(url)
        eventually(lambda: hop.load(photos.digest, "6..", Deadline.after(LONG_S)))
        with pytest.raises(HopRejected) as e:
            hop.load(photos.digest, "..99", Deadline.after(LONG_S))
        assert e.value.facts["status"] == 404


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (507, doc("MemoryInUse"), MemoryInUse),
        (507, doc("SegmentTooLarge"), SegmentTooLarge),
        (404, doc("Missing"), HopRejected),
        (404, b"no such function", HopUnavailable),
        (503, doc("NotReady"), HopUnavailable),
        (504, b"", HopTimeout),
        (500, doc("RunFailed"), HopRejected),
    ],
)
def test_a_hop_raises_what_the_function_answers(hop_to: Any, status: int, body: bytes, error: type[Exception]) -> None:
    with loading_server(status, body) as url, pytest.raises(error):
        hop_to(url).load(NO_BUNDLE, "..", Deadline.after(LONG_S))


@pytest.mark.parametrize("type", ["NotFound", "MethodNotAllowed"])
def test_a_function_without_the_path_counts_as_loaded(hop_to: Any, type: str) -> None:
    with loading_server(404, doc(type)) as url:
        assert hop_to(url).load(NO_BUNDLE, "..", Deadline.after(LONG_S))


def test_a_hop_that_nobody_reaches_is_unavailable(hop_to: Any) -> None:
    with pytest.raises(HopUnavailable):
        hop_to(f"http://127.0.0.1:{free_port()}").load(NO_BUNDLE, "..", Deadline.after(LONG_S))


def loading_server(status: int, body: bytes) -> Any:
    app = Flask("loading")
    app.add_url_rule("/load", view_func=lambda: Response(body, status), methods=["POST"])
    return served(app)
