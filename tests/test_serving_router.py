"""The router: photos, JSON and Open Inference Protocol in; through real sockets; answers and errors out."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import urllib3
from flask import Flask, Response
from flask.testing import FlaskClient
from PIL import Image
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from werkzeug.datastructures import EnvironHeaders
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from bundles import (
    LABELS,
    TOLERANCE,
    Published,
    free_model,
    metrics,
    photo,
    photo_array,
    publish,
    publish_photos,
    ready,
    router_settings,
    segment_settings,
    served,
    until,
)
from isthmus.errors import SettingsError
from isthmus.processing.classify import classify
from isthmus.serving import create_router_app, create_segment_app, oip
from patience import LONG_S, least
from segments import run_whole

TRACE = "00-" + "c" * 32 + "-" + "d" * 16 + "-01"
INFER = "/v2/models/photos/infer"


def before(app: Flask, act: Callable[[dict[str, Any]], Response | None]) -> None:
    """Let `act` see each request first; what it returns is the answer."""
    inner = app.wsgi_app

    def enter(environ: dict[str, Any], start_response: Any) -> Any:
        answer = act(environ)
        return inner(environ, start_response) if answer is None else answer(environ, start_response)

    app.wsgi_app = enter  # type: ignore[method-assign]


@dataclass
class Chain:
    """A router before a head and a tail, each on a socket of its own; what the two were sent."""

    router: Flask
    client: FlaskClient
    hops: tuple[str, str]
    seen: list[dict[str, str]]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return publish_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def chain(photos: Published, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    seen: list[dict[str, str]] = []
    apps = []
    for name in ("head", "tail"):
        app = create_segment_app(segment_settings(photos, tmp_path_factory.mktemp(name)))
        before(app, lambda environ: seen.append(dict(EnvironHeaders(environ))))
        apps.append(app)
    with served(apps[0]) as head, served(apps[1]) as tail:
        router = create_router_app(router_settings(photos, tmp_path_factory.mktemp("router"), (head, tail)))
        yield Chain(router, ready(router.test_client()), (head, tail), seen)


@pytest.fixture
def client(chain: Chain) -> FlaskClient:
    chain.seen.clear()
    return chain.client


def local_router(published: Published, cache: Path, **given: Any) -> FlaskClient:
    return ready(create_router_app(router_settings(published, cache, ("local",), **given)).test_client())


def expected_classes(published: Published, data: bytes, top_k: int = 3) -> Any:
    logits = run_whole(published.onnx, [{"x": photo_array(data)}])[0]["logits"]
    after: Any = published.bundle.postprocess
    return classify(logits, after, tuple(LABELS), top_k)[0]


def assert_classes(found: Any, expected: Any) -> None:
    assert [(c["label"], c["index"]) for c in found] == [(c["label"], c["index"]) for c in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["probability"] == pytest.approx(other["probability"], abs=TOLERANCE)


def oip_json(published: Published, **changes: Any) -> dict[str, Any]:
    x = published.inputs["x"]
    tensor = {"name": "x", "shape": list(x.shape), "datatype": "FP32", "data": x.ravel().tolist()} | changes
    return {"id": "me", "inputs": [tensor]}


# Photos


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP"])
def test_a_photo_is_classified_as_the_whole_model_does(client: FlaskClient, photos: Published, format: str) -> None:
    data = photo(format=format)
    answer = client.post("/", data=data)
    assert answer.status_code == 200
    doc = answer.json
    assert_classes(doc["classes"], expected_classes(photos, data))
    assert (doc["model_name"], doc["model_version"]) == ("photos", "1")
    assert doc["route"]["photo_bytes"] == len(data)
    assert doc["route"]["input_bytes"] == 3 * 8 * 8 * 4
    assert doc["route"]["crossed_bytes"] == 16 * 4 * 4 * 4
    assert [s["segment"] for s in doc["route"]["segments"]] == ["..6", "6.."]


def test_a_photo_in_json_gives_the_same(client: FlaskClient, photos: Published) -> None:
    data = photo(seed=4)
    answer = client.post("/", json={"image": base64.b64encode(data).decode(), "top_k": 2})
    assert_classes(answer.json["classes"], expected_classes(photos, data, 2))
    assert_classes(client.post("/?top_k=5", data=data).json["classes"], expected_classes(photos, data, 5))


def test_server_timing_holds_every_stage(client: FlaskClient) -> None:
    header = client.post("/", data=photo()).headers["Server-Timing"]
    names = [part.strip().split(";")[0] for part in header.split(",")]
    assert names == ["preprocess", "hop0", "hop0-run", "hop1", "hop1-run", "postprocess", "total"]
    assert 'hop0;desc="..6";dur=' in header
    assert 'hop1-run;desc="6..";dur=' in header


def test_the_requests_identity_comes_back_and_goes_on_to_every_hop(client: FlaskClient, chain: Chain) -> None:
    sent = {
        "X-Call-Id": "call-9",
        "traceparent": TRACE,
        "tracestate": "a=1,b=2",
        "X-Timeout": "9s",
        "Authorization": "Bearer secret",
        "X-Callback-Url": "http://evil/",
    }
    answer = client.post("/", data=photo(), headers=sent)
    assert (answer.headers["X-Call-Id"], answer.headers["traceparent"]) == ("call-9", TRACE)
    assert answer.json["id"] == "call-9"
    assert len(chain.seen) == 2
    for headers in chain.seen:
        assert headers["X-Call-Id"] == "call-9"
        assert headers["Traceparent"] == TRACE
        assert headers["Tracestate"] == "a=1,b=2"
        assert headers["X-Timeout"].endswith("ms")
        assert 0 < int(headers["X-Timeout"][:-2]) <= 9000
        assert not headers.keys() & {"Authorization", "X-Callback-Url"}


def test_a_trace_that_is_none_is_begun_anew(client: FlaskClient, chain: Chain) -> None:
    client.post("/", data=photo(), headers={"traceparent": TRACE + "-more", "tracestate": "a=1"})
    assert chain.seen[0]["Traceparent"] == chain.seen[1]["Traceparent"] != TRACE
    assert "Tracestate" not in chain.seen[0]


def test_a_long_tracestate_loses_whole_members(client: FlaskClient, chain: Chain) -> None:
    members = [f"vendor{i}=" + "v" * 40 for i in range(20)]
    client.post("/", data=photo(), headers={"traceparent": TRACE, "tracestate": ",".join(members)})
    kept = chain.seen[0]["Tracestate"].split(",")
    assert kept == members[: len(kept)]
    assert len(kept) == 10


BOMB = io.BytesIO()
Image.new("1", (9000, 9000)).save(BOMB, "PNG")


@pytest.mark.parametrize(
    ("body", "status", "type"),
    [
        (b"", 400, "ImageMalformed"),
        (b"<!doctype html><title>login</title>", 415, "MediaUnsupported"),
        (b"\x00\x01\x02\x03", 415, "MediaUnsupported"),
        (b"hello", 415, "MediaUnsupported"),
        (b"[1, 2]", 415, "MediaUnsupported"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, 400, "ImageMalformed"),
        (photo()[:-40], 400, "ImageMalformed"),
        (BOMB.getvalue(), 413, "RequestTooLarge"),
        (b'{"image": "%%%"}', 400, "RequestMalformed"),
        (b'{"image": 7}', 400, "RequestMalformed"),
        (b'{"image": ""}', 400, "ImageMalformed"),
        (b'{"picture": ""}', 400, "RequestMalformed"),
        (b'{"image": ', 400, "RequestMalformed"),
        (b'{"inputs": 3}', 400, "RequestMalformed"),
        (b'{"a":' * 5000, 400, "RequestMalformed"),
    ],
    ids=lambda v: str(v)[:24],
)
def test_what_is_no_photo_is_refused_with_what_it_is(
    client: FlaskClient, chain: Chain, body: bytes, status: int, type: str
) -> None:
    answer = client.post("/", data=body)
    assert (answer.status_code, answer.json["type"]) == (status, type), answer.json
    assert not chain.seen
    assert len(answer.data) < 4000


@pytest.mark.parametrize("top_k", ["0", "-1", "many", "1.5", "9" * 9])
def test_a_top_k_that_is_no_count_is_refused(client: FlaskClient, top_k: str) -> None:
    answer = client.post(f"/?top_k={top_k}", data=photo())
    assert (answer.status_code, answer.json["facts"]) == (400, {"parameter": "top_k"})


def test_a_model_for_tensors_says_so_when_a_photo_comes(photos: Published, tmp_path: Path) -> None:
    folder = tmp_path / "free"
    folder.mkdir()
    free = publish(folder, free_model(folder / "free.onnx"), {}, partitions=[["1"]])
    answer = local_router(free, tmp_path / "cache").post("/", data=photo())
    assert (answer.status_code, answer.json["facts"]) == (415, {"accepted": ["Open Inference Protocol"]})
    assert "/v2/models/free/infer" in answer.json["error"]


# Open Inference Protocol


@pytest.mark.parametrize(
    "path", ["/", INFER, "/v2/models/photos/versions/1/infer", "/v2/models/photos/versions/prod/infer"]
)
def test_json_tensors_give_the_whole_models_answer(client: FlaskClient, photos: Published, path: str) -> None:
    doc = client.post(path, json=oip_json(photos)).json
    assert (doc["id"], doc["model_name"], doc["model_version"]) == ("me", "photos", "1")
    assert doc["parameters"] == {"segments": "..6,6..", "crossed_bytes": 1024}
    (output,) = doc["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("logits", "FP32", [1, 5])
    np.testing.assert_allclose(output["data"], photos.whole["logits"][0], atol=TOLERANCE)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("base", ["", "/function/router"])
def test_tritons_client_gets_the_whole_models_answer(chain: Chain, photos: Published, base: str, binary: bool) -> None:
    app = DispatcherMiddleware(Flask("gateway"), {base: chain.router}) if base else chain.router
    with served(app) as url:
        triton = InferenceServerClient(url.removeprefix("http://") + base)
        try:
            assert triton.is_server_live()
            assert triton.is_server_ready()
            assert triton.is_model_ready("photos")
            assert triton.is_model_ready("photos", "1")
            assert not triton.is_model_ready("photos", "7")
            assert triton.get_server_metadata()["extensions"] == ["binary_tensor_data"]
            meta = triton.get_model_metadata("photos")
            assert meta["versions"] == ["1"]
            assert meta["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [1, 3, 8, 8]}]
            x = photos.inputs["x"]
            tensor = InferInput("x", list(x.shape), "FP32").set_data_from_numpy(x, binary_data=binary)
            wanted = [InferRequestedOutput("logits", binary_data=binary)]
            result = triton.infer("photos", [tensor], outputs=wanted, request_id="t-1", headers={"X-Call-Id": "c"})
            assert result.get_response()["id"] == "t-1"
            np.testing.assert_allclose(result.as_numpy("logits"), photos.whole["logits"], atol=TOLERANCE)
        finally:
            triton.close()


def test_a_gateways_path_reaches_the_photo_endpoint_with_and_without_a_slash(chain: Chain) -> None:
    app = DispatcherMiddleware(Flask("gateway"), {"/function/router": chain.router})
    with served(app) as url, urllib3.PoolManager() as pool:
        for path in ("/function/router", "/function/router/", "/function/router?top_k=1"):
            assert pool.request("POST", url + path, body=photo(), redirect=False).status == 200


def test_unknown_models_and_versions_are_missing_and_name_what_exists(client: FlaskClient, photos: Published) -> None:
    cases: list[tuple[str, str, list[str]]] = [
        ("/v2/models/nothing/infer", "model", ["photos"]),
        ("/v2/models/photos/versions/9/infer", "version", ["1"]),
        ("/v2/models/photos/versions/canary/infer", "alias", ["prod"]),
        ("/?model=other", "model", ["photos"]),
        ("/?model=", "model", ["photos"]),
    ]
    for path, kind, exists in cases:
        answer = client.post(path, json=oip_json(photos))
        assert (answer.status_code, answer.json["type"]) == (404, "Missing"), path
        assert (answer.json["facts"]["kind"], answer.json["facts"]["exists"]) == (kind, exists)
    assert client.post("/v2/models/..%2f..%2fetc/infer", json=oip_json(photos)).status_code == 404
    for path in ("/v2/models/nothing", "/v2/models/nothing/ready", "/v2/models/photos/versions/9"):
        assert client.get(path).status_code == 404


@pytest.mark.parametrize(
    ("changes", "type"),
    [
        ({"name": "y"}, "ShapeMismatch"),
        ({"shape": [1, 3, 8, 9]}, "ShapeMismatch"),
        ({"datatype": "FP64"}, "ShapeMismatch"),
        ({"data": [1.0]}, "RequestMalformed"),
        ({"data": None}, "RequestMalformed"),
        ({"shape": "big"}, "RequestMalformed"),
    ],
)
def test_a_wrong_tensor_is_refused_before_any_hop(
    client: FlaskClient, chain: Chain, photos: Published, changes: dict[str, Any], type: str
) -> None:
    answer = client.post(INFER, json=oip_json(photos, **changes))
    assert (answer.status_code, answer.json["type"]) == (400, type)
    assert not chain.seen


def test_free_dimensions_that_the_graph_refuses_are_a_400_over_http(tmp_path: Path) -> None:
    free = publish(tmp_path, free_model(tmp_path / "free.onnx"), {}, partitions=[["1"]])
    body = {
        "inputs": [
            {"name": name, "shape": [rows, 32], "datatype": "FP32", "data": [0.5] * (32 * rows)}
            for name, rows in (("a", 2), ("b", 3))
        ]
    }
    with served(create_segment_app(segment_settings(free, tmp_path / "cache"))) as url:
        client = ready(create_router_app(router_settings(free, tmp_path / "router", (url,))).test_client())
        answer = client.post("/", json=body)
    assert (answer.status_code, answer.json["type"]) == (400, "ShapeMismatch")


def test_the_v2_endpoints_are_there(client: FlaskClient) -> None:
    assert client.get("/v2").json["name"] == "isthmus"
    assert client.get("/v2/health/live").json == {"live": True}
    assert client.get("/v2/health/ready").json == {"ready": True}
    assert client.get("/v2/models/photos/ready").json == {"name": "photos", "version": "1", "ready": True}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/", 405),
        ("PUT", "/v2", 405),
        ("GET", INFER, 405),
        ("GET", "/v2//health", 404),
    ],
)
def test_wrong_paths_and_methods_answer_json(client: FlaskClient, method: str, path: str, status: int) -> None:
    answer = client.open(path, method=method)
    assert (answer.status_code, answer.content_type) == (status, "application/json")
    assert answer.json.keys() >= {"error", "type", "facts"}
    assert ("Allow" in answer.headers) == (status == 405)


# Hops that fail


def test_a_tail_that_is_down_is_named_within_the_deadline(chain: Chain, photos: Published, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as s:
        down = f"http://127.0.0.1:{s.getsockname()[1]}/"
    client = ready(create_router_app(router_settings(photos, tmp_path, (chain.hops[0], down))).test_client())
    start = time.monotonic()
    answer = client.post("/", data=photo(), headers={"X-Timeout": "30s"})
    assert time.monotonic() - start < 20
    assert (answer.status_code, answer.json["type"]) == (503, "HopUnavailable")
    assert answer.json["facts"]["hop"] == down
    assert answer.headers["Retry-After"] == "1"
    assert metrics(client)["isthmus_hop_errors_total", (("error", "HopUnavailable"), ("hop", down))] == 1


def test_a_tail_that_hangs_is_given_up_at_the_deadline(chain: Chain, photos: Published, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as s:
        hung = f"http://127.0.0.1:{s.getsockname()[1]}/"
        client = ready(create_router_app(router_settings(photos, tmp_path, (chain.hops[0], hung))).test_client())

        def given_up() -> float:
            start = time.monotonic()
            answer = client.post("/", data=photo(), headers={"X-Timeout": "400ms"})
            took = time.monotonic() - start
            assert answer.status_code == 504
            # A pause before that hop is called uses the time up elsewhere.
            is_right = (answer.json["type"], answer.json["facts"].get("hop")) == ("HopTimeout", hung)
            return took if is_right else math.inf

        assert 0.4 <= least(given_up, 1.0) < 1.0


@pytest.mark.parametrize(
    ("status", "headers", "body", "type", "code", "retry_after"),
    [
        (429, {"Retry-After": "3600"}, b"", "HopBusy", 429, "3600"),
        (503, {"Retry-After": "77"}, b"", "HopUnavailable", 503, "77"),
        (404, {}, b"error finding function", "HopRejected", 502, None),
        (500, {}, b'{"error": "bad", "type": "RunFailed", "facts": {}}', "HopRejected", 502, None),
        (400, {}, b"x" * 2**20, "HopRejected", 502, None),
        (200, {}, b"<html>", "HopRejected", 502, None),
    ],
)
def test_what_a_hop_answers_is_told_shortly_and_truly(
    photos: Published,
    tmp_path: Path,
    status: int,
    headers: dict[str, str],
    body: bytes,
    type: str,
    code: int,
    retry_after: str | None,
) -> None:
    stub = Flask("stub")
    stub.post("/")(lambda: Response(body, status, headers))
    with served(stub) as url:
        client = ready(create_router_app(router_settings(photos, tmp_path, (url,))).test_client())
        answer = client.post("/", data=photo(), headers={"X-Timeout": "30s"})
    assert (answer.status_code, answer.json["type"]) == (code, type)
    assert answer.json["facts"]["hop"] == url
    assert answer.headers.get("Retry-After") == retry_after
    assert len(answer.data) < 2000


def test_a_hop_that_is_still_loading_is_waited_for(photos: Published, tmp_path: Path) -> None:
    app = create_segment_app(segment_settings(photos, tmp_path / "hop"))
    answers = iter([Response(status=503, headers={"Retry-After": "1"})])
    before(app, lambda environ: next(answers, None) if environ["REQUEST_METHOD"] == "POST" else None)
    with served(app) as url:
        client = ready(create_router_app(router_settings(photos, tmp_path, (url,))).test_client())
        assert client.post("/", data=photo()).status_code == 200
    assert next(answers, None) is None


# What the router knows


def test_it_is_not_ready_until_its_model_is_published(photos: Published, tmp_path: Path) -> None:
    folder = tmp_path / "registry"
    folder.mkdir()
    settings = router_settings(photos, tmp_path / "cache", ("local",), registry=str(folder))
    client = create_router_app(settings).test_client()
    assert until(lambda: "photos" in client.get("/ready").json["error"])
    for answer in (
        client.get("/ready"),
        client.get("/v2/health/ready"),
        client.get("/v2/models/photos/ready"),
        client.post("/", data=photo()),
    ):
        assert (answer.status_code, answer.json["type"], answer.headers["Retry-After"]) == (503, "NotReady", "1")
    assert client.get("/v2/health/live").status_code == 200
    publish_photos(tmp_path / "late", registry=folder)
    assert ready(client).post("/", data=photo()).status_code == 200


def test_a_registry_that_goes_away_takes_nothing_with_it(tmp_path: Path) -> None:
    mine = publish_photos(tmp_path / "mine")
    client = local_router(mine, tmp_path / "cache", refresh_s=0.0)
    assert client.post("/", data=photo()).status_code == 200
    shutil.rmtree(mine.folder)
    for emptied in (False, True):
        if emptied:
            mine.folder.mkdir()  # a share that is not mounted
        for _ in range(3):
            assert client.post("/", data=photo()).status_code == 200
            assert client.get("/v2/models/photos").json["versions"] == ["1"]


def test_an_alias_that_moves_brings_the_new_version_after_refresh_s(tmp_path: Path) -> None:
    first = publish_photos(tmp_path / "first")
    quick = local_router(first, tmp_path / "cache", refresh_s=0.1)
    slow = local_router(first, tmp_path / "cache2", refresh_s=3600.0)
    assert quick.post("/", data=photo()).json["model_version"] == "1"
    second = publish_photos(tmp_path / "second", seed=1, registry=first.folder)
    assert second.version == "2"
    first.registry.set_alias("photos", "prod", "2")
    assert until(lambda: quick.post("/", data=photo()).json["model_version"] == "2")
    answer = quick.post("/", data=photo()).json
    assert_classes(answer["classes"], expected_classes(second, photo()))
    assert quick.post("/?model=photos:1", data=photo()).json["model_version"] == "1"
    assert quick.get("/v2/models/photos").json["versions"] == ["1", "2"]
    assert slow.post("/", data=photo()).json["model_version"] == "1"


def test_a_registry_that_hangs_delays_no_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = publish_photos(tmp_path / "mine")
    client = local_router(mine, tmp_path / "cache", refresh_s=0.0)
    assert client.post("/", data=photo()).status_code == 200
    gate = threading.Event()
    monkeypatch.setattr("isthmus.registry.Registry.resolve", lambda *_: gate.wait(LONG_S) and None)
    try:
        start = time.monotonic()
        for _ in range(5):
            assert client.post("/", data=photo()).status_code == 200
        assert time.monotonic() - start < LONG_S / 2
    finally:
        gate.set()


def test_the_cuts_setting_chooses_the_partition(photos: Published, tmp_path: Path) -> None:
    client = local_router(photos, tmp_path, cuts=("3", "4"))
    doc = client.post("/", data=photo()).json
    assert [s["segment"] for s in doc["route"]["segments"]] == ["..3", "3..4", "4.."]
    assert_classes(doc["classes"], expected_classes(photos, photo()))


def test_a_local_hop_is_measured_and_gauged(photos: Published, tmp_path: Path) -> None:
    client = local_router(photos, tmp_path, preload=("photos@head", "photos@tail"))
    assert metrics(client)["isthmus_loaded_segments", ()] == 2, "preloads are in memory before it is ready"
    client.post("/", data=photo())
    found = metrics(client)
    assert found["isthmus_loaded_bytes", ()] == sum(t.length for t in photos.bundle.weights.tensors)
    assert found["isthmus_stage_seconds_count", (("stage", "hop1-run"),)] == 1


def test_counters_move_and_hops_are_labels(chain: Chain, photos: Published) -> None:
    def value(name: str, **labels: str) -> float:
        return metrics(chain.client).get((name, tuple(sorted(labels.items()))), 0.0)

    head, tail = chain.hops
    before = {hop: value("isthmus_hop_sent_bytes_total", hop=hop) for hop in chain.hops}
    answered = value("isthmus_requests_total", endpoint="answer", code="200")
    doc = chain.client.post("/", data=photo()).json
    for hop, stage in zip(chain.hops, doc["route"]["segments"], strict=True):
        assert value("isthmus_hop_sent_bytes_total", hop=hop) - before[hop] == stage["sent_bytes"] > 0
    assert value("isthmus_hop_received_bytes_total", hop=head) > value("isthmus_hop_received_bytes_total", hop=tail) > 0
    assert value("isthmus_requests_total", endpoint="answer", code="200") == answered + 1
    chain.client.post(INFER, json=oip_json(photos))
    assert value("isthmus_requests_total", endpoint="infer", code="200") >= 1


def test_what_callers_send_never_becomes_a_label(client: FlaskClient, photos: Published) -> None:
    def traffic(marked: str) -> set[Any]:
        client.post(f"/?model={marked}", data=photo())
        client.post(f"/v2/models/{marked}/versions/{marked}/infer", json=oip_json(photos))
        client.get(f"/v2/models/{marked}")
        client.get(f"/{marked}")
        metrics(client)
        return set(metrics(client))

    assert traffic("one") == traffic("two")


def test_one_request_too_many_is_told_when_to_come_back(photos: Published, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as s:
        hung = f"http://127.0.0.1:{s.getsockname()[1]}/"
        app = create_router_app(router_settings(photos, tmp_path, (hung,), max_concurrency=1, hop_attempts=1))
        client = ready(app.test_client())
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(app.test_client().post, "/", data=photo())
            assert until(lambda: metrics(client)["isthmus_requests_in_flight", ()] == 1)
            refused = client.post("/", data=photo())
            assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
            s.settimeout(LONG_S)
            s.accept()[0].close()
            assert first.result(LONG_S).status_code == 503
        assert metrics(client)["isthmus_requests_in_flight", ()] == 0


def test_errors_never_hold_a_stack_trace(
    chain: Chain, photos: Published, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("secret")

    monkeypatch.setattr("isthmus.serving.router.preprocess", broken)
    answer = chain.client.post("/", data=photo())
    assert (answer.status_code, answer.json["type"]) == (500, "InternalError")
    assert not any(told in answer.data for told in (b"secret", b"Traceback", b"KeyError", b".py"))


@pytest.mark.parametrize(
    ("given", "variable"),
    [
        ({"hops": ()}, "hops"),
        ({"hops": ("cloud-tail",)}, "hops"),
        ({"hops": ("http://",)}, "hops"),
        ({"hops": ("http://tail:99999/",)}, "hops"),
        ({"hops": ("http://user:secret@tail/",)}, "hops"),
        ({"preload": ("@",)}, "preload"),
        ({"registry": "", "segment_dir": "/baked"}, "registry"),
        ({"registry": "gs://bucket"}, "registry"),
        ({"providers": ("NoSuchProvider",)}, "providers"),
    ],
)
def test_wrong_settings_stop_the_factory_and_name_the_variable(
    photos: Published, tmp_path: Path, given: dict[str, Any], variable: str
) -> None:
    settings = router_settings(photos, tmp_path, **{"hops": ("local",)} | given)
    with pytest.raises(SettingsError) as e:
        create_router_app(settings)
    assert e.value.facts["variable"] == variable


def test_a_segment_id_cannot_end_a_header() -> None:
    from isthmus.serving.work import Timings

    timings = Timings()
    timings.add("hop0", 0.001, 'a"\r\nX-Evil: 1')
    assert timings.header().startswith('hop0;desc="a___X-Evil__1";dur=1.000, total;dur=')


def test_two_hundred_requests_at_sixteen_at_once_are_all_answered_right(chain: Chain, photos: Published) -> None:
    data = [photo(seed=i) for i in range(10)]
    expected = [expected_classes(photos, one) for one in data]
    with served(chain.router) as url, urllib3.PoolManager(maxsize=16, block=True) as pool, ThreadPoolExecutor(16) as t:

        def ask(i: int) -> str:
            answer = pool.request("POST", url, body=data[i % 10], headers={"X-Call-Id": f"c{i}"}, retries=False)
            assert answer.status == 200, answer.data
            doc = json.loads(answer.data)
            assert_classes(doc["classes"], expected[i % 10])
            return str(doc["id"])

        assert sorted(t.map(ask, range(200))) == sorted(f"c{i}" for i in range(200))


def test_the_answer_documented_for_the_photo_endpoint_is_the_one_given(client: FlaskClient) -> None:
    doc = client.post("/", data=photo()).json
    text = (Path(__file__).parents[1] / "docs" / "api.md").read_text()
    shown = json.loads(text.partition("The answer:\n\n```json\n")[2].partition("```")[0])
    assert doc.keys() == shown.keys()
    assert doc["route"].keys() == shown["route"].keys()
    assert doc["route"]["segments"][0].keys() == shown["route"]["segments"][0].keys()
    assert doc["classes"][0].keys() == shown["classes"][0].keys()
    assert oip.HEADER_LENGTH in text


def test_a_router_with_remote_hops_never_loads_the_runtime(photos: Published, tmp_path: Path) -> None:
    script = """if True:
        import os, sys
        from isthmus.serving import create_router_app
        from isthmus.settings import RouterSettings
        create_router_app(RouterSettings.from_env(os.environ))
        sys.exit(sorted({"onnxruntime", "onnx", "boto3", "torch"} & sys.modules.keys()) or 0)"""
    env = {"registry": str(photos.folder), "cache_dir": str(tmp_path), "model": "photos", "hops": "http://tail/"}
    subprocess.run([sys.executable, "-c", script], env={**os.environ, **env, "log_level": "error"}, check=True)
