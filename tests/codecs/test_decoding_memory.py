"""What decoding a frame takes in memory: it is known, counted and refused before any of it is allocated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flask.testing import FlaskClient

from isthmus.arrays import DTYPES, Array
from isthmus.artifacts.choice import TRANSFORM_ID
from isthmus.codecs import EncodedTensor, Encoding, encode_tensor, find_codec
from isthmus.codecs.transform.planes import Layout
from isthmus.codecs.transform.rows import RowTable
from isthmus.codecs.transform.table import PlaneTable
from isthmus.errors import FrameTooLarge, ShapeMismatch
from isthmus.serving import create_segment_app
from isthmus.wire import frame as frames
from isthmus.wire.frame import Frame, Outline
from isthmus_tools.calibration.rows import RowModel
from isthmus_tools.calibration.transforms import learn_planes
from support.activations import activations
from support.bundles import Published, ready, segment_settings
from support.bundles import photos as photos
from support.patience import peak_of
from support.plain_codecs import PLAIN
from support.row_tables import sentence, table_of

COUNT = 2**17
DIGEST = "sha256:" + "0" * 64
SLACK = 2**16
"""Bytes of small objects, and of other threads."""


def contents(dtype: np.dtype[Any]) -> dict[str, Array]:
    """Values that codecs keep in different ways."""
    rng = np.random.default_rng(0)
    if dtype.kind in "iub":
        return {
            "flags": rng.integers(0, 2, COUNT).astype(dtype),
            "few bits": rng.integers(0, 100, COUNT).astype(dtype),
            "bytes that compress": (rng.integers(0, 3, COUNT) * (2 ** (8 * dtype.itemsize - 2) // 3)).astype(dtype),
        }
    noise = rng.normal(size=COUNT)
    return {
        "noise": noise.astype(dtype),
        "half zeros": np.maximum(noise, 0).astype(dtype),
        "two values": (noise > 0).astype(dtype),
        "words that compress": np.round(np.repeat(noise[: COUNT // 64], 64), 2).astype(dtype),
    }


def assert_bounded(codec: str, array: Array, payload: bytes, table: object = None) -> None:
    bound = array.nbytes + find_codec(codec).working_bytes(array.dtype, array.shape) + SLACK
    view = memoryview(payload).toreadonly()
    decode = find_codec(codec).decode
    assert peak_of(lambda: decode(view, array.dtype, array.shape, table), bound) < bound


@pytest.mark.parametrize("codec", PLAIN)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_codec_allocates_no_more_than_it_says(codec: str, dtype: str) -> None:
    for array in contents(DTYPES[dtype]).values():
        for shape in ((COUNT,), (2, COUNT // 128, 8, 8)):
            for quality in (0.7, 1.0):
                encoded = encode_tensor(array.reshape(shape), Encoding(codec, quality))
                if isinstance(encoded, EncodedTensor):
                    assert_bounded(codec, array.reshape(shape), bytes(encoded.payload))


@pytest.fixture(scope="module")
def small_planes() -> PlaneTable:
    """The table of a tensor whose planes are too small for coefficients to be sorted four at a time."""
    return learn_planes(activations((1, 32, 7, 7))[1:], layout=Layout(4, 1))


@pytest.fixture(scope="module")
def rows() -> RowTable:
    return table_of(RowModel(8, rotated=True, ridge=0.3))


@pytest.mark.parametrize("quality", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_transform_allocates_no_more_than_it_says_the_first_time(
    dtype: str, quality: float, small_planes: PlaneTable
) -> None:
    codec = TRANSFORM_ID
    array = np.tile(activations((1, 32, 7, 7), 1)[0], (90, 1, 1, 1)).astype(dtype)
    if quality == 0.3:  # nearly every coefficient is larger than its model expects
        array += np.random.default_rng(1).standard_t(3, size=array.shape).astype(dtype)
    payload = bytes(find_codec(codec).encode(array, Encoding(codec, quality, small_planes)))
    bound = array.nbytes + find_codec(codec).working_bytes(array.dtype, array.shape) + SLACK

    def decode() -> None:
        table = PlaneTable.from_arrays(small_planes.to_arrays())
        find_codec(codec).decode(memoryview(payload), array.dtype, array.shape, table)

    assert peak_of(decode, bound) < bound


def test_rows_allocate_no_more_than_they_say(rows: RowTable) -> None:
    array = np.concatenate([sentence(np.random.default_rng(3), 19)] * 300, axis=1)
    payload = bytes(find_codec(TRANSFORM_ID).encode(array, Encoding(TRANSFORM_ID, 0.8, rows)))
    assert_bounded(TRANSFORM_ID, array, payload, rows)


def test_a_few_bytes_that_stand_for_a_large_tensor_are_refused_before_anything_is_made_for_it(
    small_planes: PlaneTable,
) -> None:
    zeros = bytes((small_planes.steps[0] & 255, 0))
    tensor = EncodedTensor(TRANSFORM_ID, "float32", (5000, 32, 7, 7), zeros)
    data = frames.encode(Frame({}, DIGEST, "..1", encoded={"x": tensor}))
    assert len(data) < 300

    def refuse() -> None:
        with pytest.raises(FrameTooLarge) as e:
            frames.decode(data, max_bytes=64 * 2**20, tables=lambda *_: small_planes)
        assert e.value.facts == {"rule": "unpacked", "limit": 64 * 2**20}

    assert peak_of(refuse, 2**20) < 2**20


@pytest.mark.parametrize("codec", [*PLAIN, TRANSFORM_ID])
def test_the_bound_of_a_frame_holds_for_the_tensor_with_the_memory_that_decoding_takes(codec: str) -> None:
    shape, dtype = (1000,), np.dtype("float32")
    needed = 4000 + find_codec(codec).working_bytes(dtype, shape)
    data = frames.encode(Frame({}, encoded={"x": EncodedTensor(codec, "float32", shape, b"")}))
    with pytest.raises(FrameTooLarge) as e:
        frames.decode(data, max_bytes=needed - 1)
    assert e.value.facts["rule"] == "unpacked"

    outlines: list[Outline] = []

    def refuse(outline: Outline) -> None:
        outlines.append(outline)
        raise ShapeMismatch("not this one")

    with pytest.raises(ShapeMismatch):
        frames.decode(data, max_bytes=needed, accept=refuse)
    assert outlines == [Outline("", "", {"x": ("float32", shape)}, 4000, needed - 4000)]


def test_what_takes_a_reader_too_much_memory_travels_raw() -> None:
    large = np.zeros(13 * 2**20, "float32")
    assert encode_tensor(large, Encoding("int8/1")) is large
    assert isinstance(encode_tensor(large, Encoding("half/1")), EncodedTensor)


def test_tensors_that_a_segment_does_not_take_are_not_decoded(photos: Published, tmp_path: Path) -> None:
    client: FlaskClient = ready(create_segment_app(segment_settings(photos, tmp_path / "cache")).test_client())
    vast = EncodedTensor("lossless/3", "float32", (1, 16, 500, 500), bytes(4))
    data = frames.encode(Frame({}, photos.digest, "1..", encoded={"r1": vast}))
    client.post("/", data=data)  # what is read of the bundle is kept

    def refuse() -> None:
        answer = client.post("/", data=data)
        assert (answer.status_code, answer.json["type"]) == (400, "ShapeMismatch")
        assert "r1" in answer.json["error"]

    assert peak_of(refuse, 2**20) < 2**20
