"""Redaction of photos: what is left of a face and of a region, within which bounds, and that nothing fails open."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Blob
from isthmus.artifacts.redaction import FaceBlur, Redaction, Region
from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import ModelError, RequestTooLarge, RunFailed
from isthmus.processing.image import as_jpeg, preprocess
from isthmus.processing.image_budget import ImageMemory
from isthmus.processing.photo_redaction import BLUR_COLOURS, MAX_FACES, PhotoRedactor

SPEC: dict[str, Any] = {
    "kind": "image",
    "input": "x",
    "steps": [{"op": "resize", "size": [40, 40], "interpolation": "nearest"}, {"op": "layout", "to": "NCHW"}],
    "dtype": "uint8",
}
INPUT = TensorSpec("x", "uint8", (1, 3, 40, 40))
BLUR = FaceBlur(Blob("sha256:" + "0" * 64, 1), threshold=0.5, margin=0.25)


class FakeDetector:
    side, working_bytes = 100, 1000

    def __init__(self, boxes: Sequence[Sequence[float]] = (), scores: Sequence[float] = ()) -> None:
        self._boxes, self._scores = np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32)
        self.pictures: list[Array] = []

    def boxes(self, picture: Array) -> tuple[Array, Array]:
        self.pictures.append(picture)
        return self._boxes, self._scores


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def changed(before: Image.Image, after: Image.Image) -> tuple[int, int, int, int]:
    """The box around all pixels that differ."""
    rows, columns = np.nonzero((np.asarray(before) != np.asarray(after)).any(axis=2))
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def saved(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def test_a_face_is_blurred_with_its_margin_and_nothing_else() -> None:
    detector = FakeDetector([[20, 10, 40, 30], [21, 11, 41, 30], [60, 30, 70, 40]], [0.9, 0.6, 0.4])
    before, counts = noise(400, 200), dict[str, int]()
    after = before.copy()
    PhotoRedactor(Redaction(faces=BLUR), detector, counts).redact(after)
    # Four pixels of the photo are one of the detector's picture; a quarter of the hull on each side.
    assert changed(before, after) == (59, 20, 185, 140)
    assert counts == {"redacted_faces": 1}
    (picture,) = detector.pictures
    assert (picture.shape, picture.dtype) == ((1, 3, 100, 100), np.float32)
    assert picture[:, :, :50].max() > 100
    assert picture[:, :, 50:].max() == 0


def test_of_a_face_a_few_colours_are_left() -> None:
    detector = FakeDetector([[0, 0, 100, 100]], [1.0])
    photo, counts = noise(128, 128), dict[str, int]()
    PhotoRedactor(Redaction(faces=BLUR), detector, counts).redact(photo)
    # Bilinear enlargement of 4 x 4 means: any 5 x 5 samples on a line through two means tell them all.
    means = np.asarray(photo.resize((BLUR_COLOURS, BLUR_COLOURS), Image.Resampling.BOX), np.float64)
    again = Image.fromarray(np.uint8(means)).resize((128, 128), Image.Resampling.BILINEAR)
    assert np.abs(np.asarray(again, np.float64) - np.asarray(photo, np.float64)).max() < 16
    assert np.asarray(photo, np.float64).std() < 8 < np.asarray(noise(128, 128), np.float64).std()


def test_a_region_is_filled_outwards_to_whole_pixels_in_every_size() -> None:
    redactor = PhotoRedactor(Redaction(regions=(Region(0.5, 0, 0.5, 0.255),)))
    for size in ((100, 100), (33, 7)):
        picture = noise(*size)
        redactor.redact(picture)
        filled = (np.asarray(picture) == 128).all(axis=2)
        assert filled[: int(np.ceil(0.255 * size[1])), int(0.5 * size[0]) :].all()
        assert filled.sum() == int(np.ceil(0.255 * size[1])) * (size[0] - int(0.5 * size[0]))


def test_endless_faces_blur_the_whole_picture() -> None:
    boxes = [[x, y, x + 1, y + 1] for x in range(0, 100, 2) for y in range(0, 100, 2)]
    before, counts = noise(100, 100), dict[str, int]()
    after = before.copy()
    PhotoRedactor(Redaction(faces=BLUR), FakeDetector(boxes, [1.0] * len(boxes)), counts).redact(after)
    assert changed(before, after) == (0, 0, 100, 100)
    assert counts["redacted_faces"] == MAX_FACES + 1


def test_the_models_input_is_that_of_the_redacted_picture() -> None:
    redactor = PhotoRedactor(
        Redaction(faces=BLUR, regions=(Region(0, 0.9, 1, 0.1),)), FakeDetector([[20, 20, 60, 60]], [0.9])
    )
    photo, redacted = noise(160, 160), noise(160, 160)
    redactor.redact(redacted)
    found = preprocess(saved(photo), SPEC, input=INPUT, max_pixels=10**6, redactor=redactor)
    np.testing.assert_array_equal(found, preprocess(saved(redacted), SPEC, input=INPUT, max_pixels=10**6))
    jpegs = [
        as_jpeg(saved(each), SPEC, 90, max_pixels=10**6, redactor=by)
        for each, by in ((photo, redactor), (redacted, None))
    ]
    assert jpegs[0] == jpegs[1] != as_jpeg(saved(photo), SPEC, 90, max_pixels=10**6)


def test_the_memory_of_redaction_is_reserved_before_decoding() -> None:
    detector = FakeDetector()
    detector.working_bytes = 10**9
    redactor, memory = PhotoRedactor(Redaction(faces=BLUR), detector), ImageMemory(10**8)
    with pytest.raises(RequestTooLarge):
        preprocess(saved(noise(50, 50)), SPEC, input=INPUT, max_pixels=10**6, memory=memory, redactor=redactor)
    assert not detector.pictures


def test_a_detector_that_fails_or_lacks_lets_no_photo_through() -> None:
    class Failing(FakeDetector):
        def boxes(self, picture: Array) -> tuple[Array, Array]:
            raise RunFailed("no")

    for detector, error in ((None, ModelError), (Failing(), RunFailed)):
        with pytest.raises(error):
            preprocess(
                saved(noise(50, 50)),
                SPEC,
                input=INPUT,
                max_pixels=10**6,
                redactor=PhotoRedactor(Redaction(faces=BLUR), detector),
            )
