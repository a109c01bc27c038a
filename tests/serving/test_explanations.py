"""Explanations over HTTP: the head is called once, the tail for each hidden part, and faults are errors as JSON."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flask.testing import FlaskClient
from onnx import TensorProto, helper
from PIL import Image

from isthmus.serving import create_router_app, create_segment_app
from support.bundles import (
    Published,
    metrics,
    photo,
    publish,
    publish_photos,
    ready,
    router_settings,
    save,
    segment_settings,
    served,
    value,
    weight,
)
from support.bundles import photos as photos
from support.explained import CELL, CLASSES, PIXELS, picture, sentence
from support.routers import Chain, local_router, oip_json
from support.routers import chain as chain
from support.routers import client as client


def drawn(pixels: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(file, "PNG")
    return file.getvalue()


def explained(client: FlaskClient, path: str, **body: Any) -> Any:
    answer = client.post(path, **body)
    assert answer.status_code == 200, answer.get_data(as_text=True)
    return answer.json


def test_the_head_is_called_once_and_the_tail_for_each_window(client: FlaskClient, chain: Chain) -> None:
    before = metrics(client)
    document = explained(client, "/explain?grid=4", data=photo())
    assert (document["explanation"]["at"], document["explanation"]["runs"]) == ("cut 6", 25)
    sent = {
        hop: metrics(client)[key] - before.get(key, 0.0)
        for hop in chain.hops
        for key in [("isthmus_hop_tensor_bytes_total", (("hop", hop),))]
    }
    head, tail = chain.hops
    assert sent == {head: 768, tail: 26 * 1024}
    # The prediction and 25 copies went over the link.
    segments = document["route"]["segments"]
    assert document["route"]["link_bytes"] == 26 * segments[1]["sent_bytes"]
    assert [s["segment"] for s in segments] == ["..6", "6.."]


def test_the_class_is_the_predicted_one_and_its_probability_the_predictions(client: FlaskClient) -> None:
    document = explained(client, "/explain", data=photo())
    predicted = client.post("/", data=photo()).json["classes"][0]
    assert document["class"] == predicted


def test_a_class_is_named_by_index_or_label(client: FlaskClient) -> None:
    by_index, by_label = (explained(client, f"/explain?class={name}", data=photo()) for name in ("3", "DOG"))
    assert by_index["class"] == by_label["class"]
    assert by_index["class"]["label"] == "dog"


def test_tensors_and_base64_are_explained_too(client: FlaskClient, photos: Published) -> None:
    path = "/v2/models/photos/versions/1/explain?grid=2"
    assert explained(client, path, json=oip_json(photos))["explanation"]["grid"] == [2, 2]
    assert "part" not in explained(client, path, json=oip_json(photos))["explanation"]


def test_what_decided_in_a_photo_is_named(tmp_path: Path) -> None:
    published = picture(tmp_path / "model", preprocess=PIXELS, postprocess=CLASSES, labels=["dark", "bright"])
    router = local_router(published, tmp_path / "cache", cuts="0")
    document = explained(router, "/explain?grid=4", data=drawn(np.full((8, 8, 3), 255)))
    assert document["class"]["label"] == "bright"
    assert np.unravel_index(np.argmax(document["explanation"]["drops"]), (4, 4)) == CELL
    assert document["explanation"]["areas"][0]["where"] == "centre"


@pytest.mark.parametrize(
    ("size", "orientation", "part"),
    [((64, 32), 1, [0.25, 0.0, 0.5, 1.0]), ((32, 64), 1, [0.0, 0.25, 1.0, 0.5]), ((64, 32), 6, [0.0, 0.25, 1.0, 0.5])],
)
def test_the_part_that_the_model_sees_is_of_the_upright_photo(
    tmp_path: Path, size: tuple[int, int], orientation: int, part: list[float]
) -> None:
    steps = [
        {"op": "resize", "short_side": 8, "interpolation": "nearest"},
        {"op": "center_crop", "size": [8, 8]},
        *PIXELS["steps"][1:],  # type: ignore[index]
    ]
    published = picture(tmp_path / "model", preprocess={**PIXELS, "steps": steps}, postprocess=CLASSES)
    router = local_router(published, tmp_path / "cache", cuts="0")
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.new("RGB", size, (255, 255, 255)).save(file, "JPEG", exif=exif)
    assert explained(router, "/explain?grid=2", data=file.getvalue())["explanation"]["part"] == part


def test_tokens_have_a_weight_each(tmp_path: Path) -> None:
    published = sentence(tmp_path / "model")
    router = local_router(published, tmp_path / "cache", cuts="0")
    ids = published.inputs["input_ids"]
    tensor = {"name": "input_ids", "shape": list(ids.shape), "datatype": "INT64", "data": ids.ravel().tolist()}
    document = explained(router, "/v2/models/sentence/explain", json={"inputs": [tensor]})
    assert (document["explanation"]["of"], document["explanation"]["grid"]) == ("sequence", [1, 6])
    assert int(np.argmax(document["explanation"]["drops"])) == 2
    assert document["explanation"]["batches"] == 1


@pytest.mark.parametrize(
    ("query", "body", "status", "type"),
    [
        ("", b"no photo", 415, "MediaUnsupported"),
        ("", b"\x89PNG\r\n\x1a\n", 400, "ImageMalformed"),
        ("", b"{}", 400, "RequestMalformed"),
        ("class=fox", photo(), 400, "RequestMalformed"),
        ("class=5", photo(), 400, "RequestMalformed"),
        ("class=-1", photo(), 400, "RequestMalformed"),
        ("grid=0", photo(), 400, "RequestMalformed"),
        ("grid=33", photo(), 400, "RequestMalformed"),
        ("grid=1e3", photo(), 400, "RequestMalformed"),
        ("grid=16", photo(), 413, "RequestTooLarge"),
        ("output=none", photo(), 400, "RequestMalformed"),
        ("model=nobody", photo(), 404, "Missing"),
    ],
)
def test_a_request_that_cannot_be_explained_is_refused(
    client: FlaskClient, query: str, body: bytes, status: int, type: str
) -> None:
    answer = client.post(f"/explain?{query}", data=body)
    assert (answer.status_code, answer.json["type"]) == (status, type)


def test_similar_labels_are_told(client: FlaskClient) -> None:
    assert client.post("/explain?class=doge", data=photo()).json["facts"]["exists"] == ["dog"]


def test_several_photos_are_refused(client: FlaskClient) -> None:
    images = [base64.b64encode(photo()).decode()] * 2
    answer = client.post("/explain", json={"images": images})
    assert (answer.status_code, answer.json["type"]) == (400, "RequestMalformed")


def test_the_setting_bounds_the_runs(photos: Published, tmp_path: Path) -> None:
    router = local_router(photos, tmp_path, explain_runs=8)
    assert explained(router, "/explain?grid=1", data=photo())["explanation"]["runs"] == 1
    answer = router.post("/explain?grid=2", data=photo())
    assert (answer.status_code, answer.json["facts"]) == (413, {"limit": 8})


def test_a_tail_that_dies_is_an_error_that_names_it(photos: Published, tmp_path: Path) -> None:
    apps = [create_segment_app(segment_settings(photos, tmp_path / name)) for name in ("head", "tail")]
    with served(apps[0]) as head:
        with served(apps[1]) as tail:
            settings = router_settings(photos, tmp_path / "router", (head, tail), hop_attempts=1)
            router = ready(create_router_app(settings).test_client())
            assert router.post("/explain", data=photo()).status_code == 200
        answer = router.post("/explain", data=photo(), headers={"X-Timeout": "5s"})
    assert (answer.status_code, answer.json["type"]) == (503, "HopUnavailable")
    assert tail in json.dumps(answer.json)


def test_a_model_of_tensors_alone_explains_no_photo(tmp_path: Path) -> None:
    router = local_router(sentence(tmp_path / "model"), tmp_path / "cache")
    answer = router.post("/explain", data=photo())
    assert (answer.status_code, answer.json["type"]) == (415, "MediaUnsupported")


def test_labels_are_of_the_declared_output_alone(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["logits"]),
        helper.make_node("Concat", ["logits", "logits"], ["twice"], axis=1),
    ]
    outputs = [value("logits", 1, 2), value("twice", 1, 4)]
    model = save(tmp_path / "two.onnx", nodes, [value("x", 1, 3, 8, 8)], outputs, [weight("w", 192, 2)])
    x = np.ones((1, 3, 8, 8), np.float32)
    published = publish(tmp_path, model, {"x": x}, preprocess=PIXELS, postprocess=CLASSES, labels=["dark", "bright"])
    router = local_router(published, tmp_path / "cache")
    for number in (1, 3):
        document = explained(router, f"/explain?output=twice&class={number}", data=photo())
        assert (document["class"]["index"], document["class"]["label"]) == (number, None)
    assert explained(router, "/explain?class=1", data=photo())["class"]["label"] == "bright"


def test_an_id_that_the_tokens_type_does_not_hold_is_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["ids"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["f", "w"], ["logits"]),
    ]
    inputs, outputs = [value("ids", 1, 6, dtype=TensorProto.UINT8)], [value("logits", 1, 2)]
    model = save(tmp_path / "small.onnx", nodes, inputs, outputs, [weight("w", 6, 2)])
    router = local_router(publish(tmp_path, model, {"ids": np.ones((1, 6), np.uint8)}), tmp_path / "cache")
    body = {"inputs": [{"name": "ids", "shape": [1, 6], "datatype": "UINT8", "data": [1] * 6}]}
    for number, status in ((255, 200), (256, 400)):
        answer = router.post(f"/v2/models/small/explain?hidden_id={number}", json=body)
        assert answer.status_code == status, answer.text


def test_copies_count_as_memory(photos: Published, tmp_path: Path) -> None:
    router = local_router(photos, tmp_path, max_request_bytes=2**20, max_working_bytes=7 * 2**20)
    assert router.post("/", data=photo()).status_code == 200
    answer = router.post("/explain", data=photo())
    assert (answer.status_code, answer.json["type"]) == (413, "RequestTooLarge"), answer.text


def test_dozens_of_runs_leave_the_headers_short(tmp_path: Path) -> None:
    router = local_router(publish_photos(tmp_path / "model"), tmp_path / "cache")
    answer = router.post("/explain", data=photo())
    assert answer.json["explanation"]["runs"] == 25
    assert len(answer.headers["Server-Timing"]) < 400
    assert answer.json["timings_ms"]["hidden"] > 0
