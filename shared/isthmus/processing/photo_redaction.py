"""Redaction of photos: faces blurred and regions filled, in the decoded picture, before the model's pre-processing.

Source: docs/how-to/redaction.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from PIL import Image

from isthmus.arrays import Array
from isthmus.artifacts.redaction import Redaction
from isthmus.errors import ModelError
from isthmus.processing.image_memory import stored_bytes

# Colours along a side of a blurred face: nothing else of the face is left.
BLUR_COLOURS = 4
# Beyond these the whole picture is blurred, so that a picture of endless boxes takes bounded time.
MAX_FACES = 256
_GREY = (128, 128, 128)
# Boxes of one face overlap by more than this share of their union.
_SAME_FACE = 0.3
_EVERYWHERE = 1e9

Box = tuple[int, int, int, int]


class FaceDetector(Protocol):
    """Finds faces in a square picture."""

    @property
    def side(self) -> int:
        """Pixels of the picture's side."""
        ...

    @property
    def working_bytes(self) -> int:
        """Bound on the memory of one run."""
        ...

    def boxes(self, picture: Array) -> tuple[Array, Array]:
        """Candidate boxes with a score each.

        Shapes: picture (1, 3, side, side), float32 RGB of 0 to 255; boxes (n, 4), left, top, right and bottom in
        pixels; scores (n,).

        Raises:
            RunFailed: the detector failed.
            DeadlineExceeded: the request's deadline passed.
        """
        ...


@dataclass(frozen=True)
class PhotoRedactor:
    """Redacts pictures in place; `counts` gets the numbers of faces and regions."""

    redaction: Redaction
    detector: FaceDetector | None = None
    counts: MutableMapping[str, int] | None = None

    def counting(self, counts: MutableMapping[str, int]) -> PhotoRedactor:
        """The same redactor with other counts: those of one photo."""
        return replace(self, counts=counts)

    def working_bytes(self, size: tuple[int, int]) -> int:
        """Memory of redacting a picture of `size`, beside the picture."""
        if self.detector is None:
            return 0
        # The largest blurred box is a copy of the picture, enlarged from BLUR_COLOURS in two steps.
        return 3 * stored_bytes("RGB", *size) + self.detector.working_bytes

    def redact(self, picture: Image.Image) -> None:
        """Blur the faces of an upright RGB picture, and fill its regions.

        Raises:
            As `FaceDetector.boxes`: without its result nothing of the photo goes on.
        """
        faces = list(self._faces(picture))
        for box in faces:
            _blur(picture, box)
        for region in self.redaction.regions:
            # Outwards to whole pixels; a reduced picture has the same shares.
            left, top = math.floor(region.x * picture.width), math.floor(region.y * picture.height)
            right = math.ceil((region.x + region.width) * picture.width)
            bottom = math.ceil((region.y + region.height) * picture.height)
            picture.paste(_GREY, (left, top, min(right, picture.width), min(bottom, picture.height)))
        if self.counts is not None:
            if self.redaction.faces is not None:
                self.counts["redacted_faces"] = len(faces)
            if self.redaction.regions:
                self.counts["redacted_regions"] = len(self.redaction.regions)

    def _faces(self, picture: Image.Image) -> Iterator[Box]:
        faces = self.redaction.faces
        if faces is None:
            return
        if self.detector is None:
            raise ModelError("the bundle's face detector is not loaded, and its photos go nowhere without")
        side = self.detector.side
        scale = side / max(picture.size)
        small = picture.resize([max(1, round(length * scale)) for length in picture.size], Image.Resampling.BILINEAR)
        square = Image.new("RGB", (side, side))
        square.paste(small)
        pixels = np.ascontiguousarray(np.asarray(square, np.float32).transpose(2, 0, 1)[np.newaxis])
        boxes, scores = self.detector.boxes(pixels)
        found = scores >= faces.threshold
        x, y = (full / reduced for full, reduced in zip(picture.size, small.size, strict=True))
        for left, top, right, bottom in joined_boxes(boxes[found], scores[found]):
            across, down = faces.margin * (right - left), faces.margin * (bottom - top)
            yield _clipped(((left - across) * x, (top - down) * y, (right + across) * x, (bottom + down) * y), picture)


def joined_boxes(boxes: Array, scores: Array) -> Iterator[tuple[float, float, float, float]]:
    """One box for each face: the hull of boxes that overlap the best. Boxes of everything beyond MAX_FACES."""
    boxes = boxes[np.argsort(-scores, kind="stable")].astype(np.float64)
    for _ in range(MAX_FACES):
        if not len(boxes):
            return
        corner, opposite = np.maximum(boxes[:, :2], boxes[0, :2]), np.minimum(boxes[:, 2:], boxes[0, 2:])
        shared = np.prod(np.maximum(opposite - corner, 0), axis=1)
        areas = np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=1)
        same = shared > _SAME_FACE * (areas + areas[0] - shared)
        same[0] = True
        yield *boxes[same, :2].min(axis=0).tolist(), *boxes[same, 2:].max(axis=0).tolist()
        boxes = boxes[~same]
    if len(boxes):
        # Finite, so that margins can be computed.
        yield 0.0, 0.0, _EVERYWHERE, _EVERYWHERE


def _clipped(box: tuple[float, float, float, float], picture: Image.Image) -> Box:
    """The box in whole pixels within the picture."""
    left, top, right, bottom = (
        min(max(value, 0.0), float(limit)) for value, limit in zip(box, picture.size * 2, strict=True)
    )
    return math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)


def _blur(picture: Image.Image, box: Box) -> None:
    """Replace a box by BLUR_COLOURS x BLUR_COLOURS means of it, smoothly enlarged."""
    size = box[2] - box[0], box[3] - box[1]
    if min(size) < 1:
        return
    means = picture.crop(box).resize((BLUR_COLOURS, BLUR_COLOURS), Image.Resampling.BOX)
    picture.paste(means.resize(size, Image.Resampling.BILINEAR), box)
