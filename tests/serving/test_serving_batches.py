"""Several photos in one request: a prediction or an error for each, in order; other errors are the whole request's."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flask.testing import FlaskClient

from isthmus.client import Client
from isthmus.errors import HopRejected, RequestTooLarge
from isthmus.processing.media import MAX_PHOTOS
from isthmus.serving import create_router_app
from support.bundles import Published, free_model, photo, publish, ready, router_settings, served
from support.bundles import photos as photos
from support.routers import Chain, assert_classes, expected_classes, local_router, served_router
from support.routers import chain as chain
from support.routers import client as client

PHOTOS = [photo(seed=seed) for seed in range(3)]


def free(folder: Path) -> Published:
    rows = np.zeros((1, 32), np.float32)
    return publish(folder, free_model(folder / "free.onnx"), {"a": rows, "b": rows})


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_a_form_of_several_files_gives_a_prediction_for_each_in_order(client: FlaskClient, photos: Published) -> None:
    body = b"".join(
        b'--b\r\nContent-Disposition: form-data; name="f%d"; filename="f"\r\n\r\n%s\r\n' % (i, data)
        for i, data in enumerate(PHOTOS)
    )
    answer = client.post("/?top_k=2", data=body + b"--b--\r\n")
    assert answer.status_code == 200, answer.text
    assert (answer.json["model_name"], answer.json["model_version"]) == ("photos", "1")
    assert len(answer.json["predictions"]) == len(PHOTOS)
    for prediction, data in zip(answer.json["predictions"], PHOTOS, strict=True):
        assert_classes(prediction["classes"], expected_classes(photos, data, 2))
        assert prediction["route"]["photo_bytes"] == len(data)
        assert [s["segment"] for s in prediction["route"]["segments"]] == ["..6", "6.."]
    # Headers stay short: a stage's time is the sum over the photos.
    stages = [stage.partition(";")[0] for stage in answer.headers["Server-Timing"].split(", ")]
    assert stages.count("hop0") == 1


def test_a_list_in_json_gives_what_single_photos_give(client: FlaskClient, photos: Published) -> None:
    answer = client.post("/", json={"images": [text(data) for data in PHOTOS], "top_k": 2})
    assert answer.status_code == 200, answer.text
    for prediction, data in zip(answer.json["predictions"], PHOTOS, strict=True):
        assert_classes(prediction["classes"], expected_classes(photos, data, 2))


def test_a_batch_of_one_is_a_batch(client: FlaskClient) -> None:
    body = b'--b\r\nContent-Disposition: form-data; name="images"; filename="f"\r\n\r\n%s\r\n--b--\r\n' % PHOTOS[0]
    for answer in (client.post("/", json={"images": [text(PHOTOS[0])]}), client.post("/", data=body)):
        assert len(answer.json["predictions"]) == 1, answer.text


def test_the_error_of_a_photo_stands_in_its_place(client: FlaskClient, photos: Published) -> None:
    images = [text(PHOTOS[0]), "*", text(b"%PDF"), text(PHOTOS[1][:100]), text(PHOTOS[2])]
    answer = client.post("/", json={"images": images})
    assert answer.status_code == 200, answer.text
    first, *wrong, last = answer.json["predictions"]
    assert_classes(first["classes"], expected_classes(photos, PHOTOS[0]))
    assert_classes(last["classes"], expected_classes(photos, PHOTOS[2]))
    assert [each["type"] for each in wrong] == ["RequestMalformed", "MediaUnsupported", "ImageMalformed"]
    assert "letter 1 is '*'" in wrong[0]["error"]


@pytest.mark.parametrize(
    ("document", "status", "error"),
    [
        ({"images": []}, 400, "images is no list of photos"),
        ({"images": "iVBO"}, 400, "images is no list of photos"),
        ({"images": ["a"], "image": "b"}, 400, "the JSON object has image and images"),
        ({"images": ["a"], "top_k": 0}, 400, "top_k is '0'"),
        ({"images": ["a"] * (MAX_PHOTOS + 1)}, 413, f"at most {MAX_PHOTOS} are taken"),
    ],
)
def test_a_batch_against_the_rules_is_refused(client: FlaskClient, document: Any, status: int, error: str) -> None:
    answer = client.post("/", json=document)
    assert answer.status_code == status
    assert error in answer.json["error"]


def test_an_error_of_the_model_or_a_hop_is_the_whole_batchs(photos: Published, tmp_path: Path) -> None:
    without = local_router(free(tmp_path), tmp_path / "cache")
    assert without.post("/", json={"images": [text(PHOTOS[0])]}).status_code == 415
    settings = router_settings(photos, tmp_path / "router", ("http://127.0.0.1:9",), hop_attempts=1, deadline_s=1.0)
    answer = ready(create_router_app(settings).test_client()).post("/", json={"images": [text(d) for d in PHOTOS]})
    assert (answer.status_code, answer.json["type"]) == (503, "HopUnavailable")


def test_a_batch_of_tensors_is_a_leading_dimension(tmp_path: Path) -> None:
    rows = np.arange(96, dtype=np.float32).reshape(3, 32)
    with served_router(router_settings(free(tmp_path), tmp_path / "cache", ("local",))) as url:
        caller = Client(url)
        whole = caller.infer({"a": rows, "b": rows}, model="free").outputs["y"]
        one = caller.infer({"a": rows[1:2], "b": rows[1:2]}, model="free").outputs["y"]
    assert whole.shape == (3, 32)
    np.testing.assert_allclose(whole[1:2], one, rtol=1e-5)


def test_the_client_sends_batches_as_they_are(chain: Chain, photos: Published) -> None:
    with served(chain.router) as url:
        caller = Client(url)
        predictions = caller.photos([PHOTOS[0], b"no photo", PHOTOS[1]], top_k=2)
        assert_classes(predictions[0]["classes"], expected_classes(photos, PHOTOS[0], 2))
        assert predictions[1]["type"] == "MediaUnsupported"
        assert_classes(predictions[2]["classes"], expected_classes(photos, PHOTOS[1], 2))
        assert {p["model_name"] for p in predictions} == {"photos"}
        assert caller.photos([]) == []
        with pytest.raises(RequestTooLarge, match="has 33 photos"):
            caller.photos(PHOTOS * 11)


def test_the_client_refuses_what_is_no_routers_batch() -> None:
    def short(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [])
        return [b'{"model_name": "a", "model_version": "1", "predictions": []}']

    with served(short) as url, pytest.raises(HopRejected, match="not as a router does"):
        Client(url).photos(PHOTOS)
