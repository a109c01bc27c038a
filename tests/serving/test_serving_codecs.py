"""Functions run on what came packed: by the plain codecs, or as the photo that it was."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flask.testing import FlaskClient
from msgspec.structs import replace
from typer.testing import CliRunner

from isthmus.artifacts.bundle import Blob, digest_of
from isthmus.artifacts.segment_id import WHOLE
from isthmus.codecs import EncodedTensor, Encoding, encode_tensor
from isthmus.errors import FrameMalformed
from isthmus.registry import FolderStore, Registry
from isthmus.serving import create_segment_app
from isthmus.wire import frame as frames
from isthmus.wire.frame import Frame
from isthmus_tools.cli import app
from support.bundles import TOLERANCE, Published, pair_model, photo, photo_array, publish, ready, segment_settings
from support.bundles import photos as photos
from support.paths import ROOT
from support.plain_codecs import PLAIN, Array, back, relu

BOUND = 2**20


@pytest.fixture
def client(photos: Published, tmp_path: Path) -> FlaskClient:
    return ready(create_segment_app(segment_settings(photos, tmp_path / "cache")).test_client())


def ask(client: FlaskClient, published: Published, segment: str, **given: Any) -> Any:
    frame = Frame(**{"tensors": {}, "bundle": published.digest, "segment": segment} | given)
    return client.post("/", data=frames.encode(frame))


def logits(answer: Any) -> Array:
    assert answer.status_code == 200, answer.data
    return frames.decode(answer.data, max_bytes=BOUND).tensors["logits"]


def as_photo(data: bytes, shape: tuple[int, ...] = (1, 3, 8, 8)) -> dict[str, EncodedTensor]:
    return {"x": EncodedTensor("photo/1", "float32", shape, data)}


# int8-token/1 makes a map of rows of eight values no smaller.
@pytest.mark.parametrize("codec", [codec for codec in PLAIN if codec != "int8-token/1"])
def test_a_function_runs_its_segment_on_what_came_packed(client: FlaskClient, photos: Published, codec: str) -> None:
    array = relu(1, 16, 8, 8)
    encoded = encode_tensor(array, Encoding(codec))
    assert isinstance(encoded, EncodedTensor)
    got = logits(ask(client, photos, "1..", encoded={"r1": encoded}))
    assert np.array_equal(got, logits(ask(client, photos, "1..", tensors={"r1": back(codec, array)})))


def test_a_photo_as_it_came_is_answered_as_its_tensor(client: FlaskClient, photos: Published) -> None:
    for data in (photo(), photo(format="JPEG"), photo((30, 20))):
        got = logits(ask(client, photos, WHOLE, encoded=as_photo(data)))
        if data == photo():
            np.testing.assert_allclose(
                got, logits(ask(client, photos, WHOLE, tensors={"x": photo_array(data)})), atol=1e-6
            )
        assert np.isfinite(got).all()
    assert np.abs(photos.whole["logits"] - logits(ask(client, photos, WHOLE, tensors=photos.inputs))).max() <= TOLERANCE


@pytest.mark.parametrize(
    ("encoded", "status", "type"),
    [
        (as_photo(b"GIF89a"), 400, "ImageMalformed"),
        (as_photo(photo()[:60]), 400, "ImageMalformed"),
        (as_photo(b"%PDF-1.4 " * 9), 415, "MediaUnsupported"),
        (as_photo(b""), 400, "ImageMalformed"),
        (as_photo(photo(), (1, 3, 9, 9)), 400, "ShapeMismatch"),
        ({"y": as_photo(photo())["x"]}, 400, "ShapeMismatch"),
        ({"x": EncodedTensor("photo/1", "float16", (1, 3, 8, 8), photo())}, 400, "ShapeMismatch"),
    ],
)
def test_a_bad_photo_is_the_callers_fault(
    client: FlaskClient, photos: Published, encoded: dict[str, EncodedTensor], status: int, type: str
) -> None:
    answer = ask(client, photos, WHOLE, encoded=encoded)
    assert (answer.status_code, answer.json["type"]) == (status, type), answer.data


def test_a_photo_beyond_the_pixels_allowed_is_refused_undecoded(photos: Published, tmp_path: Path) -> None:
    settings = segment_settings(photos, tmp_path / "cache", max_image_pixels=100)
    small = ready(create_segment_app(settings).test_client())
    answer = ask(small, photos, WHOLE, encoded=as_photo(photo((20, 20))))
    assert (answer.status_code, answer.json["type"]) == (413, "RequestTooLarge")


def test_a_photo_needs_a_bundle_that_takes_photos(client: FlaskClient, photos: Published, tmp_path: Path) -> None:
    zeros = {"x": np.zeros((1, 32), "float32"), "mask": np.ones((1, 32), "float32")}
    pair = publish(tmp_path, pair_model(tmp_path / "pair.onnx"), zeros)
    other = ready(create_segment_app(segment_settings(pair, tmp_path / "cache")).test_client())
    answer = ask(other, pair, WHOLE, tensors={"mask": zeros["mask"]}, encoded=as_photo(photo(), (1, 32)))
    assert (answer.status_code, answer.json["type"], answer.json["facts"]["rule"]) == (400, "FrameMalformed", "payload")
    assert "no tensor of that name from a photo" in answer.json["error"]
    for digest, status in (("", 400), ("../../etc/passwd", 400), ("sha256:" + "0" * 64, 404)):
        assert ask(client, photos, WHOLE, encoded=as_photo(photo()), bundle=digest).status_code == status
    with pytest.raises(FrameMalformed) as e:
        frames.decode(frames.encode(Frame({}, encoded=as_photo(photo()))), max_bytes=BOUND)
    assert e.value.facts["rule"] == "table"


def test_mutated_photos_are_answered_or_refused(client: FlaskClient, photos: Published) -> None:
    rng = random.Random(5)
    seeds = [photo(format=kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")]
    statuses = set()
    for _ in range(300):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        statuses.add(ask(client, photos, WHOLE, encoded=as_photo(bytes(data))).status_code)
    assert statuses <= {200, 400, 413, 415}
    assert 200 in statuses


def test_package_bakes_the_tables_that_each_function_needs(
    photos: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = {name: frames.encode(Frame({"of": np.array(i)})) for i, name in enumerate(["p6", "r1"])}
    blobs = {name: Blob(digest_of(data), len(data)) for name, data in tables.items()}
    files = {}
    for name, data in tables.items():
        files[blobs[name].digest] = tmp_path / name
        files[blobs[name].digest].write_bytes(data)
    bundle = replace(photos.bundle, name="calibrated", tables=blobs)
    photos.registry.publish(bundle, files)
    root = ROOT
    shutil.copy(root / "stack.yml", tmp_path)
    shutil.copytree(root / "functions", tmp_path / "functions")
    monkeypatch.chdir(tmp_path)
    arguments = ["package", "calibrated", "--output", "out", "--registry", photos.folder, "--json"]
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    made = tmp_path / "out" / "calibrated"
    kept = {d.name: {f.name for f in (d / "segment" / "blobs").glob("*")} for d in made.iterdir() if d.is_dir()}
    assert kept == {
        "calibrated-head": set(),
        "calibrated-tail": {blobs["p6"].digest[7:]},
        "calibrated-router": set(),
    }
    small = Registry(FolderStore(made / "calibrated-router" / "registry"))
    assert [small.blob(blobs[name]) for name in tables] == list(tables.values())
