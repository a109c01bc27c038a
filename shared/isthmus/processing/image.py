"""Pre-processing of images: a file to the input of a model, by the `preprocess` of its bundle.

Pillow's filters resize with antialiasing, as torchvision does to a PIL image, so training and serving see the same
pixels. Source: docs/reference/api.md, "Photos".
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
from PIL import Image

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import ModelError, ShapeMismatch
from isthmus.processing.image_budget import SHARED, ImageMemory
from isthmus.processing.image_decoding import MAX_PIXELS as MAX_PIXELS
from isthmus.processing.image_decoding import check_pixels, open_picture
from isthmus.processing.image_memory import finishing_bytes
from isthmus.processing.image_spec import photo_tensor, photos_refused, validate_spec
from isthmus.processing.photo_redaction import PhotoRedactor

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_DTYPES: Mapping[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float64": np.dtype(np.float64),
    "uint8": np.dtype(np.uint8),
}
# A picture is reduced to at least three times the size of the resize step: Pillow's documentation calls the result at
# this gap nearly indistinguishable from plain resizing.
REDUCING_GAP = 3


def check_classifies(bundle: Bundle, instead: str) -> None:
    """Check that a bundle makes classes of photos; `instead` says what else to do with it.

    Raises:
        MediaUnsupported: it declares no processing of photos.
    """
    if bundle.preprocess is None or bundle.postprocess is None:
        raise photos_refused(bundle, "declares no pre- and post-processing for photos", instead)


def model_input(
    bundle: Bundle,
    photo: bytes,
    *,
    max_pixels: int = MAX_PIXELS,
    memory: ImageMemory = SHARED,
    redactor: PhotoRedactor | None = None,
) -> dict[str, Array]:
    """Decode `photo`, redact it and pre-process it as `bundle` declares: the model's input, by its name.

    Shapes and bounds: see `preprocess`.

    Raises:
        ModelError: the bundle redacts photos, and there is no redactor.
        MediaUnsupported: the bundle declares no pre-processing of photos, or the bytes are no image.
        ImageMalformed, RequestTooLarge, Overloaded, ShapeMismatch: as `preprocess`.
    """
    if redactor is None and bundle.redaction is not None and bundle.redaction.of_photos:
        raise ModelError(f"{bundle.name} redacts photos, and there is no redactor for this one")
    tensor = photo_tensor(bundle)
    spec = bundle.preprocess or {}
    array = preprocess(photo, spec, input=tensor, max_pixels=max_pixels, memory=memory, redactor=redactor)
    return {tensor.name: array}


def sample_input(bundle: Bundle, photo: bytes) -> dict[str, Array]:
    """The model's input of an engineer's own sample, which no redaction changes; errors as `model_input`."""
    tensor = photo_tensor(bundle)
    return {tensor.name: preprocess(photo, bundle.preprocess or {}, input=tensor, max_pixels=MAX_PIXELS)}


def preprocess(
    data: bytes,
    spec: Mapping[str, Any],
    *,
    input: TensorSpec,
    max_pixels: int,
    memory: ImageMemory = SHARED,
    redactor: PhotoRedactor | None = None,
) -> Array:
    """Decode an image and pre-process the picture to the model's input.

    Shapes: (1, 3, height, width) or (1, height, width, 3), contiguous, of `spec`'s dtype.
    Units: a pixel is 0 to 255 before `normalize`. `max_pixels` bounds the stored and the resized picture, `memory` the
    memory of all pictures in progress. A picture that needs more than half of the budget is reduced during decoding, to
    at least REDUCING_GAP times the size of the resize step.

    Raises:
        MediaUnsupported, ImageMalformed, RequestTooLarge, Overloaded: as `image_decoding.decode`.
        ShapeMismatch: the array does not fit `input`.
        ModelError: `spec` is not a preprocess specification.

    Source: docs/reference/api.md, "Photos".
    """
    steps = _steps_of(spec)
    with _cropped(data, steps, spec["dtype"], max_pixels, memory, redactor) as image:
        array = _to_array(image, steps, spec["dtype"])
    _check_fits(array, spec, input)
    return array


def seen_part(
    data: bytes, spec: Mapping[str, Any], *, max_pixels: int = MAX_PIXELS, memory: ImageMemory = SHARED
) -> tuple[float, float, float, float]:
    """The part of the upright picture that the model sees: left, top, width and height, as shares of its sides.

    A part beyond 0 to 1 is a crop larger than the picture.

    Raises:
        As `preprocess`, but for ShapeMismatch.
    """
    steps = _steps_of(spec)
    with open_picture(data, max_pixels=max_pixels, memory=memory, min_side=_min_side(steps)) as picture:
        size = picture.turned()
    if (resize := steps.get("resize")) is not None:
        size = _resized(size, resize, max_pixels)
    if "center_crop" not in steps:
        return 0.0, 0.0, 1.0, 1.0
    height, width = steps["center_crop"]["size"]
    left, top = (_crop_start(side, crop) for side, crop in zip(size, (width, height), strict=True))
    return left / size[0], top / size[1], width / size[0], height / size[1]


def as_jpeg(
    data: bytes,
    spec: Mapping[str, Any],
    quality: int,
    *,
    max_pixels: int,
    memory: ImageMemory = SHARED,
    redactor: PhotoRedactor | None = None,
) -> bytes:
    """The part of an image that `spec` takes, redacted and resized as `spec` does, as a JPEG.

    `preprocess` of the JPEG changes no size and crops the same part, so the compression is the only difference. Around
    the crop the pixels of its border are repeated: they make the size that the resize step leaves as it is, and cost
    few bytes.

    Raises:
        As `preprocess`, but for ShapeMismatch.
    """
    steps = _steps_of(spec)
    with _cropped(data, steps, spec["dtype"], max_pixels, memory, redactor) as image:
        pixels = np.asarray(image)  # (height, width, 3), uint8
        width, height = _canvas(image.size, steps)
        left, top = (_crop_start(side, crop) for side, crop in zip((width, height), image.size, strict=True))
        around = ((top, height - top - image.height), (left, width - left - image.width), (0, 0))
        # Of the pixels alone, since Pillow would write comments and profiles of the photo too.
        picture = Image.fromarray(np.pad(pixels, around, mode="edge"))
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality, optimize=True)
    return file.getvalue()


def _canvas(size: tuple[int, int], steps: Mapping[str, Mapping[str, Any]]) -> tuple[int, int]:
    """Width and height that the resize step maps to themselves, with room for a crop of `size`."""
    resize = steps.get("resize", {})
    if "size" in resize:
        return resize["size"][1], resize["size"][0]
    return max(size[0], resize.get("short_side", 0)), max(size[1], resize.get("short_side", 0))


def _steps_of(spec: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    validate_spec(spec)
    return {step["op"]: step for step in spec["steps"]}


@contextmanager
def _cropped(
    data: bytes,
    steps: Mapping[str, Mapping[str, Any]],
    dtype: str,
    max_pixels: int,
    memory: ImageMemory,
    redactor: PhotoRedactor | None = None,
) -> Iterator[Image.Image]:
    """The decoded, redacted, resized and cropped picture, with the memory for all steps reserved for the block."""

    def finishing(size: tuple[int, int]) -> int:
        redacting = 0 if redactor is None else redactor.working_bytes(size)
        return redacting + _finishing_bytes(size, steps, _DTYPES[dtype].itemsize, max_pixels)

    with open_picture(
        data, max_pixels=max_pixels, memory=memory, min_side=_min_side(steps), finishing=finishing
    ) as picture:
        image = picture.decode()
        if redactor is not None:
            redactor.redact(image)
        if (resize := steps.get("resize")) is not None:
            # From the size before any reduction, so that the long side is independent of the reduction.
            image = image.resize(_resized(picture.upright, resize, max_pixels), _FILTERS[resize["interpolation"]])
        if "center_crop" in steps:
            image = _center_crop(image, *steps["center_crop"]["size"])
        yield image


def grey_picture(height: int, width: int) -> bytes:
    """A PNG of uniform grey, height by width pixels."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), (128, 128, 128)).save(file, "PNG")
    return file.getvalue()


def _finishing_bytes(
    size: tuple[int, int], steps: Mapping[str, Mapping[str, Any]], itemsize: int, max_pixels: int
) -> int:
    """Memory of the steps on a picture of `size` in bytes, the maximum over both orientations."""
    result = 0
    for start in (size, (size[1], size[0])):
        resized = _resized(start, steps["resize"], max_pixels) if "resize" in steps else start
        crop = steps.get("center_crop")
        cropped = (crop["size"][1], crop["size"][0]) if crop is not None else resized
        result = max(result, finishing_bytes(start, resized, cropped, itemsize))
    return result


def _min_side(steps: Mapping[str, Mapping[str, Any]]) -> int:
    """The least shorter side of a reduced picture; 0 where the model needs all pixels."""
    if (resize := steps.get("resize")) is None:
        return 0
    return REDUCING_GAP * int(resize["short_side"] if "short_side" in resize else max(resize["size"]))


def _resized(size: tuple[int, int], step: Mapping[str, Any], max_pixels: int) -> tuple[int, int]:
    """Width and height of a picture of `size` after the resize step.

    Raises:
        RequestTooLarge: more pixels than `max_pixels`.
    """
    if "size" in step:
        height, width = step["size"]
    else:
        short = step["short_side"]
        # The long side is truncated, as in torchvision.
        shorter = min(size)
        width, height = (short if side == shorter else short * side // shorter for side in size)
    check_pixels(width, height, max_pixels)
    return width, height


def _center_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """The centre; a side shorter than the crop is padded with black. Halves round as in torchvision."""
    x, y = (_crop_start(side, crop) for side, crop in zip(image.size, (width, height), strict=True))
    return image.crop((x, y, x + width, y + height))


def _crop_start(side: int, crop: int) -> int:
    return round((side - crop) / 2) if side >= crop else -((crop - side) // 2)


def _to_array(image: Image.Image, steps: Mapping[str, Mapping[str, Any]], dtype: str) -> Array:
    # Planes, since arithmetic on interleaved channels takes ten times as long.
    array = np.ascontiguousarray(np.asarray(image)[np.newaxis].transpose(0, 3, 1, 2))  # (1, 3, height, width), uint8
    if "normalize" in steps:
        work = np.float64 if dtype == "float64" else np.float32
        mean, std = (np.asarray(steps["normalize"][key], work)[:, np.newaxis, np.newaxis] for key in ("mean", "std"))
        array = np.subtract(array, mean, dtype=work)
        array /= std
    if steps["layout"]["to"] == "NHWC":
        array = array.transpose(0, 2, 3, 1)
    return np.ascontiguousarray(array, _DTYPES[dtype])


def _check_fits(array: Array, spec: Mapping[str, Any], input: TensorSpec) -> None:
    compatible = len(array.shape) == len(input.shape) and all(
        isinstance(declared, str) or declared == size for declared, size in zip(input.shape, array.shape, strict=False)
    )
    if spec["input"] != input.name or spec["dtype"] != input.dtype or not compatible:
        got = f"{spec['input']}: {spec['dtype']} {list(array.shape)}"
        expected = f"{input.name}: {input.dtype} {list(input.shape)}"
        raise ShapeMismatch(
            f"this image makes {got}; the model takes {expected}", tensor=input.name, expected=expected, got=got
        )
