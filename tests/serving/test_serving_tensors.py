"""Tensors through a router and real sockets: the Open Inference Protocol, as JSON and as Triton's client speaks it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import urllib3
from flask import Flask
from flask.testing import FlaskClient
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from isthmus.serving import create_router_app, create_segment_app
from support.bundles import (
    TOLERANCE,
    Published,
    free_model,
    photo,
    publish,
    ready,
    router_settings,
    segment_settings,
    served,
)
from support.bundles import photos as photos
from support.routers import INFER, Chain, oip_json
from support.routers import chain as chain
from support.routers import client as client


@pytest.mark.parametrize(
    "path", ["/", INFER, "/v2/models/photos/versions/1/infer", "/v2/models/photos/versions/prod/infer"]
)
def test_json_tensors_give_the_whole_models_answer(client: FlaskClient, photos: Published, path: str) -> None:
    doc = client.post(path, json=oip_json(photos)).json
    assert (doc["id"], doc["model_name"], doc["model_version"]) == ("me", "photos", "1")
    facts = doc["parameters"]
    assert (facts.keys(), facts["segments"], facts["link_raw_bytes"]) == (
        {"segments", "link_bytes", "link_raw_bytes", "isthmus.route"},
        "..6,6..",
        1024,
    )
    assert facts["link_bytes"] > 1024
    (output,) = doc["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("logits", "FP32", [1, 5])
    np.testing.assert_allclose(output["data"], photos.whole["logits"][0], rtol=TOLERANCE, atol=TOLERANCE)


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
            np.testing.assert_allclose(
                result.as_numpy("logits"), photos.whole["logits"], rtol=TOLERANCE, atol=TOLERANCE
            )
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
