"""Photos on a route: the model's input as a file that the last hop decodes, redacted where the bundle says so."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.choice import PHOTO_ID
from isthmus.artifacts.plan import Candidate
from isthmus.codecs import EncodedTensor
from isthmus.errors import ModelError, PlanMalformed
from isthmus.pipeline.hop import Hop
from isthmus.processing.image_budget import SHARED, ImageMemory
from isthmus.processing.image_spec import has_canvas, made_shape, photo_tensor
from isthmus.wire.frame import DTYPES

if TYPE_CHECKING:  # Pillow is slow to import
    from isthmus.processing.photo_redaction import PhotoRedactor

# JPEG quality of a redacted photo where the route would have sent the file as it came.
REDACTED_QUALITY = 95


@dataclass(frozen=True)
class PhotoInput:
    """A model input that the last hop makes of a photo's file.

    The file is sent as it came, or, with a `jpeg_quality` of 1 to 99, as a JPEG of the part that `preprocess` takes.
    Where the bundle `redacts` photos no file is sent as it came, but as a JPEG of the redacted picture.
    """

    tensor: str
    dtype: str
    shape: tuple[int, ...]
    jpeg_quality: int = 0
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    redacts: bool = False

    @property
    def compresses(self) -> bool:
        """Whether the file that is sent is another than the photo."""
        return bool(self.jpeg_quality) or self.redacts

    @property
    def nbytes(self) -> int:
        """Size of the input as an array."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def encode(
        self,
        photo: bytes,
        *,
        max_pixels: int | None = None,
        memory: ImageMemory = SHARED,
        redactor: PhotoRedactor | None = None,
    ) -> dict[str, EncodedTensor]:
        """The photo as the encoded form of that input.

        Raises:
            ModelError: the bundle redacts photos, and there is no redactor.
            As `processing.image.preprocess`, where the photo is compressed anew.
        """
        if self.redacts and redactor is None:
            raise ModelError("the bundle redacts photos, and there is no redactor for this one")
        if self.compresses or redactor is not None:
            # Pillow is slow to import, and photos as they came need none.
            from isthmus.processing.image import MAX_PIXELS, as_jpeg

            pixels = MAX_PIXELS if max_pixels is None else max_pixels
            quality = self.jpeg_quality or REDACTED_QUALITY
            photo = as_jpeg(photo, self.preprocess, quality, max_pixels=pixels, memory=memory, redactor=redactor)
        return {self.tensor: EncodedTensor(PHOTO_ID, self.dtype, self.shape, photo)}


def photo_input(candidate: Candidate, bundle: Bundle, hops: Sequence[Hop]) -> PhotoInput | None:
    """The input that the last hop makes of photos; None where the plan has photos decoded here, or that hop is local.

    Raises:
        PlanMalformed: the bundle's pre-processing gives no input of a fixed shape; or it redacts photos, and keeps no
            part of them that a JPEG could carry.
    """
    if candidate.input != "photo" or not hops[-1].encodes:
        return None
    spec = bundle.preprocess
    shape = None if spec is None else made_shape(spec)
    if spec is None or shape is None:
        raise PlanMalformed(f"{candidate.name} sends photos as they came, and {bundle.name} takes none", where="input")
    if not sends_photos(bundle):
        raise PlanMalformed(
            f"{candidate.name} sends photos, and {bundle.name} redacts photos that no JPEG can replace", where="input"
        )
    coding = candidate.codecs.get(photo_tensor(bundle).name)
    return photo_of(bundle, shape, 0 if coding is None else jpeg_quality(coding.quality))


def photo_of(bundle: Bundle, shape: tuple[int, ...], quality: int = 0) -> PhotoInput:
    """The input of `shape` that a bundle's pre-processing makes of photos, sent with a JPEG `quality`, or as they came.

    Raises:
        MediaUnsupported: the bundle declares no pre-processing of photos.
    """
    tensor = photo_tensor(bundle)
    redacts = bundle.redaction is not None and bundle.redaction.of_photos
    return PhotoInput(tensor.name, tensor.dtype, shape, quality, bundle.preprocess or {}, redacts)


def sends_photos(bundle: Bundle) -> bool:
    """Whether a route may send photos: of a bundle that redacts these, only where a JPEG keeps the model's part."""
    return bundle.redaction is None or not bundle.redaction.of_photos or has_canvas(bundle.preprocess or {})


def jpeg_quality(quality: float) -> int:
    """The JPEG quality of a plan's coding `photo/1`; 0 for 1, the photo as it came."""
    return max(1, round(100 * quality)) if quality < 1 else 0
