"""A photo as a model's input: the one conversion, for serving, the command line, trials and calibration."""

from __future__ import annotations

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Bundle
from isthmus.processing.image import MAX_PIXELS, preprocess
from isthmus.processing.image_budget import SHARED, ImageMemory
from isthmus.processing.image_spec import photo_tensor


def model_input(
    bundle: Bundle, photo: bytes, *, max_pixels: int = MAX_PIXELS, memory: ImageMemory = SHARED
) -> dict[str, Array]:
    """Decode `photo` and pre-process it as `bundle` declares; the result holds that one input, by its name.

    Shapes: a batch of one; see `image.preprocess`, which also states the bounds.

    Raises:
        MediaUnsupported: the bundle declares no pre-processing of photos, or the bytes are no image.
        ImageMalformed, RequestTooLarge, Overloaded, ShapeMismatch: as `image.preprocess`.
    """
    tensor = photo_tensor(bundle)
    array = preprocess(photo, bundle.preprocess or {}, input=tensor, max_pixels=max_pixels, memory=memory)
    return {tensor.name: array}
