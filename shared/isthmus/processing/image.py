"""Images to a model's input, as the manifest's `preprocess` says.

The only module that imports Pillow. An image is bounded before it is decoded, becomes upright 8-bit RGB over white,
and is resized by Pillow's filters (antialiased, as torchvision does to a PIL image): training and serving see the same
pixels. Colour profiles are ignored, as training pipelines ignore them. Source: docs/api.md, "Photos".
"""

from __future__ import annotations

import io
import struct
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from isthmus.bundle import TensorSpec
from isthmus.errors import ImageMalformed, MediaUnsupported, RequestTooLarge, ShapeMismatch
from isthmus.processing.image_spec import validate_spec
from isthmus.processing.media import ACCEPTED, looks_like_image, not_an_image

__all__ = ["ACCEPTED", "MAX_PIXELS", "decode", "looks_like_image", "not_an_image", "preprocess", "validate_spec"]

# The plugins themselves, not Image.open: it would try formats that start other programs, and treat a phone's
# multi-picture JPEG as something else than its first picture.
_PLUGINS: Mapping[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "image/jpeg": JpegImagePlugin.JpegImageFile,
    "image/png": PngImagePlugin.PngImageFile,
    "image/webp": WebPImagePlugin.WebPImageFile,
    "image/gif": GifImagePlugin.GifImageFile,
    "image/bmp": BmpImagePlugin.BmpImageFile,
    "image/tiff": TiffImagePlugin.TiffImageFile,
}
MAX_PIXELS = 64_000_000
"""What commands decode at most; a function has its setting `max_image_pixels`."""
MAX_SCANS = 256
"""Scans of a progressive JPEG; encoders write about ten. Each costs a pass over all pixels and hardly any bytes."""

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
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION, _BITS, _PHOTOMETRIC, _TILE_WIDTH, _TILE_LENGTH = 0x0112, 258, 262, 322, 323
_PNG_DEPTH = 24
"""Where a PNG's header has the bits of a sample."""
_BMP_V3, _BMP_ALPHA_MASK = 56, slice(66, 70)
"""The shortest BMP header with a mask for alpha, and where in the file that mask is."""
_quiet = threading.Lock()


def preprocess(data: bytes, spec: Mapping[str, Any], *, input: TensorSpec, max_pixels: int) -> np.ndarray:
    """Decode one image and make the model's input of it, a batch of one.

    Shapes: (1, 3, height, width) or (1, height, width, 3), contiguous, of `spec`'s dtype.
    Units: a pixel is 0 to 255 before `normalize`; `max_pixels` bounds what is decoded and what is resized to.

    Raises:
        MediaUnsupported: not an image, or of a kind whose values have no stated range.
        ImageMalformed: an image that cannot be decoded: truncated, corrupt.
        RequestTooLarge: more pixels than `max_pixels`; nothing was decoded.
        ShapeMismatch: the array is not what `input` takes.
        ModelError: `spec` is not a preprocess specification.

    Source: docs/api.md, "Photos".
    """
    validate_spec(spec)
    image = decode(data, max_pixels=max_pixels)
    steps = {step["op"]: step for step in spec["steps"]}
    if "resize" in steps:
        image = _resize(image, steps["resize"], max_pixels)
    if "center_crop" in steps:
        image = _center_crop(image, *steps["center_crop"]["size"])
    array = _to_array(image, steps, spec["dtype"])
    _check_fits(array, spec, input)
    return array


def grey_picture(height: int, width: int) -> bytes:
    """A PNG of that many pixels, all of a middle grey."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), (128, 128, 128)).save(file, "PNG")
    return file.getvalue()


def decode(data: bytes, *, max_pixels: int) -> Image.Image:
    """The first picture in `data`, upright, 8-bit RGB, what is transparent over white.

    Raises:
        MediaUnsupported, ImageMalformed, RequestTooLarge: as `preprocess`.
    """
    kind = looks_like_image(data)
    if kind is None:
        raise not_an_image(data)
    try:
        image = _open(data, kind, max_pixels)
        image.load()
        with _quiet, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            orientation = image.getexif().get(_ORIENTATION, 1)
        picture: Image.Image = image
        if (turn := _TRANSPOSE.get(orientation)) is not None:
            picture = image.transpose(turn)
        return _to_rgb(picture, image, data)
    except (RequestTooLarge, MediaUnsupported):
        raise
    except (Image.DecompressionBombError, MemoryError) as e:
        raise RequestTooLarge(
            f"this image has more pixels than the {max_pixels} that are decoded", limit=max_pixels, media=kind
        ) from e
    except Exception as e:  # Pillow's decoders raise nearly anything on corrupt bytes
        reason = f"{type(e).__name__}: {e}"[:200]
        raise ImageMalformed(
            f"these {len(data)} bytes start as {kind} but cannot be decoded",
            media=kind,
            bytes=len(data),
            reason=reason,
            hint="check that the upload is complete and that an image viewer opens the file",
        ) from e


def _open(data: bytes, kind: str, max_pixels: int) -> ImageFile.ImageFile:
    if kind == "image/gif" and len(data) >= 10:
        width, height = struct.unpack_from("<HH", data, 6)
        _bound(width, height, max_pixels)  # Pillow allocates the canvas when it opens one
    # Pillow warns about headers that it can read all the same. The filters are the process's, hence the lock.
    with _quiet, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = _PLUGINS[kind](io.BytesIO(data))
    _bound(*image.size, max_pixels)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        width, height = (image.tag_v2.get(tag, 1) for tag in (_TILE_WIDTH, _TILE_LENGTH))
        _bound(width, height, max_pixels)  # a tile is decoded whole, however small the image
    if kind == "image/jpeg" or image.info.get("compression") == "jpeg":
        scans = data.count(b"\xff\xda")
        if scans > MAX_SCANS:
            raise RequestTooLarge(f"a JPEG of {scans} scans; {MAX_SCANS} are decoded", limit=MAX_SCANS, scans=scans)
    return image


def _bound(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise RequestTooLarge(
            f"an image of {width} x {height} pixels exceeds the {max_pixels} that are decoded",
            limit=max_pixels,
            pixels=width * height,
            hint="send a smaller image: the model resizes it anyway",
        )


def _to_rgb(picture: Image.Image, source: ImageFile.ImageFile, data: bytes) -> Image.Image:
    """`picture` is `source`, turned upright: it may lack the file's tags."""
    if picture.mode == "RGB" and "transparency" not in source.info:
        return picture
    if picture.mode.startswith(("I", "F")):
        return _from_wide(picture, source)
    if source.info.get("transparency") is None and picture.mode not in ("RGBA", "LA", "PA", "La", "RGBa"):
        return picture.convert("RGB")
    if isinstance(source, BmpImagePlugin.BmpImageFile) and _is_opaque(picture, data):
        return picture.convert("RGB")
    if isinstance(source, PngImagePlugin.PngImageFile) and picture.mode in ("L", "RGB"):
        picture.info["transparency"] = _as_pixels(source.info["transparency"], data[_PNG_DEPTH])
    rgba = (picture.convert("LA") if picture.mode == "La" else picture).convert("RGBA")
    white = Image.new("RGB", rgba.size, "white")
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white


def _as_pixels(key: int | tuple[int, ...], depth: int) -> int | tuple[int, ...]:
    """A PNG's transparent colour, in samples of `depth` bits, as the 8-bit pixels that Pillow makes of such samples.

    Bits beyond the depth do not count. Source: PNG, third edition, 11.3.1.1.
    """

    def pixel(sample: int) -> int:
        return (sample & 0xFFFF) >> 8 if depth == 16 else (sample & (2**depth - 1)) * 255 // (2**depth - 1)

    return pixel(key) if isinstance(key, int) else tuple(map(pixel, key))


def _is_opaque(picture: Image.Image, data: bytes) -> bool:
    """Whether a BMP's fourth byte is no alpha: its header has no mask for one, or it is zero in every pixel.

    Programs that write 32 bits a pixel often leave that byte at zero; readers take such a picture as opaque.
    """
    has_mask = int.from_bytes(data[14:18], "little") >= _BMP_V3 and any(data[_BMP_ALPHA_MASK])
    return picture.mode == "RGBA" and not (has_mask and picture.getchannel("A").getextrema()[1])


def _from_wide(picture: Image.Image, source: ImageFile.ImageFile) -> Image.Image:
    """8-bit RGB of grey samples wider than a byte; Pillow's own conversion clips them at 255."""
    values = np.asarray(picture)
    tags = source.tag_v2 if isinstance(source, TiffImagePlugin.TiffImageFile) else {}
    if picture.mode.startswith("I;16"):
        top = 4095 if tags.get(_BITS) == (12,) else 65535
    elif picture.mode == "F" and values.min() >= 0 and values.max() <= 1:  # false for NaN
        top = 1
    else:
        raise MediaUnsupported(
            f"an image of mode {picture.mode}: its samples have no stated range",
            accepted=ACCEPTED,
            got=picture.mode,
            hint="send 8 or 16 bits a sample, or floats between 0 and 1",
        )
    grey = np.clip(np.rint(values * (255 / top)), 0, 255).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero; Pillow inverts only 8 bits and fewer
        grey = 255 - grey
    if (key := source.info.get("transparency")) is not None:
        grey[values == key] = 255
    return Image.fromarray(grey).convert("RGB")


def _resize(image: Image.Image, step: Mapping[str, Any], max_pixels: int) -> Image.Image:
    if "size" in step:
        height, width = step["size"]
    else:
        short = step["short_side"]
        # The long side is cut off, not rounded, as torchvision does.
        least = min(image.size)
        width, height = (short if side == least else short * side // least for side in image.size)
    _bound(width, height, max_pixels)
    return image.resize((width, height), _FILTERS[step["interpolation"]])


def _center_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """The middle; a side shorter than the crop is padded with black. Halves round as in torchvision."""
    left, top = (
        round((have - want) / 2) if have >= want else -((want - have) // 2)
        for have, want in zip(image.size, (width, height), strict=True)
    )
    return image.crop((left, top, left + width, top + height))


def _to_array(image: Image.Image, steps: Mapping[str, Mapping[str, Any]], dtype: str) -> np.ndarray:
    # Arithmetic on planes: ten times as fast as on interleaved channels, and the same values.
    array = np.ascontiguousarray(np.asarray(image)[np.newaxis].transpose(0, 3, 1, 2))  # (1, 3, height, width), uint8
    if "normalize" in steps:
        work = np.float64 if dtype == "float64" else np.float32
        mean, std = (np.asarray(steps["normalize"][key], work)[:, np.newaxis, np.newaxis] for key in ("mean", "std"))
        array = np.subtract(array, mean, dtype=work)
        array /= std
    if steps["layout"]["to"] == "NHWC":
        array = array.transpose(0, 2, 3, 1)
    return np.ascontiguousarray(array, _DTYPES[dtype])


def _check_fits(array: np.ndarray, spec: Mapping[str, Any], input: TensorSpec) -> None:
    fits = len(array.shape) == len(input.shape) and all(
        isinstance(want, str) or want == have for want, have in zip(input.shape, array.shape, strict=False)
    )
    if spec["input"] != input.name or spec["dtype"] != input.dtype or not fits:
        got = f"{spec['input']}: {spec['dtype']} {list(array.shape)}"
        expected = f"{input.name}: {input.dtype} {list(input.shape)}"
        raise ShapeMismatch(
            f"this image makes {got}; the model takes {expected}", tensor=input.name, expected=expected, got=got
        )
