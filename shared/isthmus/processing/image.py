"""Images to a model's input, as the manifest's `preprocess` says.

The only module that imports Pillow. An image is bounded before it is decoded, becomes upright 8-bit RGB over white,
and is resized by Pillow's filters (antialiased, as torchvision does to a PIL image): training and serving see the same
pixels. Colour profiles are ignored, as training pipelines ignore them. Source: docs/api.md, "Photos".
"""

from __future__ import annotations

import io
import itertools
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
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

from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import ImageMalformed, MediaUnsupported, RequestTooLarge, ShapeMismatch
from isthmus.processing.image_budget import SHARED, ImageMemory
from isthmus.processing.image_memory import (
    announced_size,
    check_parts,
    codes_bytes,
    converting_bytes,
    decoding_bytes,
    finishing_bytes,
    frame_bytes,
    opening_bytes,
    stored_bytes,
    tiff_strips,
    too_much,
    total_bytes,
)
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
_UPRIGHT = (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM)
"""Turns that leave a picture's width its width."""
REDUCING_GAP = 3
"""A picture is reduced to no less than so many times the size that it is resized to; Pillow's documentation calls the
result at this gap nearly indistinguishable from plain resizing."""
_PART_PIXELS = 2**16
_LIGHT_BYTES = 2**20
"""What an opened file may keep while it waits for memory, without being counted."""
_PNG_EXIF, _FRAME_EXIF = (b"eXIf", b"Raw profile", b"adobe.xmp"), (b"EXIF", b"XMP")
"""Names of what may say how a picture is turned, in PNG, and in WebP and GIF."""
_PNG_DEPTH = 24
"""Where a PNG's header has the bits of a sample."""
_BMP_V3, _BMP_ALPHA_MASK = 56, slice(66, 70)
"""The shortest BMP header with a mask for alpha, and where in the file that mask is."""
_quiet = threading.Lock()


def preprocess(
    data: bytes, spec: Mapping[str, Any], *, input: TensorSpec, max_pixels: int, memory: ImageMemory = SHARED
) -> np.ndarray:
    """Decode one image and make the model's input of it, a batch of one.

    Shapes: (1, 3, height, width) or (1, height, width, 3), contiguous, of `spec`'s dtype.
    Units: a pixel is 0 to 255 before `normalize`; `max_pixels` bounds what is decoded and what is resized to, and
    `memory` what that takes, together with other pictures under way. A picture that would take more than half of it is
    reduced on the way, to no less than REDUCING_GAP times what the model resizes it to.

    Raises:
        MediaUnsupported: not an image, or of a kind whose values have no stated range.
        ImageMalformed: an image that cannot be decoded: truncated, corrupt.
        RequestTooLarge: more pixels than `max_pixels`, or more memory than there is; nothing was decoded.
        Overloaded: other pictures hold the memory.
        ShapeMismatch: the array is not what `input` takes.
        ModelError: `spec` is not a preprocess specification.

    Source: docs/api.md, "Photos".
    """
    validate_spec(spec)
    steps = {step["op"]: step for step in spec["steps"]}
    with _opened(data, max_pixels, memory, steps, np.dtype(_DTYPES[spec["dtype"]]).itemsize) as picture:
        image = picture.decoded()
        if (resize := steps.get("resize")) is not None:
            # By the size before any reduction, so that the long side is what it would be without.
            image = image.resize(_resized(picture.upright, resize, max_pixels), _FILTERS[resize["interpolation"]])
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


def decode(data: bytes, *, max_pixels: int, memory: ImageMemory = SHARED) -> Image.Image:
    """The first picture in `data`, upright, 8-bit RGB, what is transparent over white.

    Raises:
        MediaUnsupported, ImageMalformed, RequestTooLarge, Overloaded: as `preprocess`.
    """
    with _opened(data, max_pixels, memory, {}, 0) as picture:
        return picture.decoded()


@dataclass
class _Picture:
    """An opened file whose decoding has its memory: `full` is its size as stored, `factor` how much it is reduced."""

    image: ImageFile.ImageFile
    kind: str
    data: bytes
    full: tuple[int, int]
    factor: int
    max_pixels: int

    def __post_init__(self) -> None:
        self.upright = self.full
        """The size once it is turned upright."""

    def decoded(self) -> Image.Image:
        """The picture, upright, RGB, reduced where it was too large.

        Raises:
            MediaUnsupported, ImageMalformed, RequestTooLarge: it cannot be decoded.
        """
        with _refusing(self.data, self.kind, self.max_pixels):
            self.image.load()
            with _quiet, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                turn = _TRANSPOSE.get(self.image.getexif().get(_ORIENTATION, 1))
            low = _low_bytes(self.data, self.max_pixels) if _has_wide_key(self.image, self.data) else None
            picture = _rgb(self.image, self.data, self.factor, low)
            if turn is None:
                return picture
            if turn not in _UPRIGHT:
                self.upright = _turned(self.full)
            return picture.transpose(turn)


@contextmanager
def _opened(
    data: bytes, max_pixels: int, memory: ImageMemory, steps: Mapping[str, Mapping[str, Any]], itemsize: int
) -> Iterator[_Picture]:
    """An image file, its header read and judged, and the memory held that decoding it and the `steps` take."""
    kind = looks_like_image(data)
    if kind is None:
        raise not_an_image(data)
    check_parts(data, kind)

    def estimate(decoding: int, size: tuple[int, int], plain: bool, turns: bool) -> int:
        converting = converting_bytes(size, makes_rgb=not plain, turns=turns)
        return total_bytes(decoding, converting, _finishing(size, steps, itemsize, max_pixels))

    least, factor, drafted, opening = _least_side(steps), 1, False, opening_bytes(data, kind)
    with ExitStack() as held:
        announced = announced_size(data, kind)
        if announced is None and kind in ("image/gif", "image/webp"):
            raise _malformed(data, kind, "the header is cut off, or none")
        if announced is not None:
            # Pillow allocates these formats' canvas when it opens a file.
            _bound(*announced, max_pixels)
            decoding, turns = frame_bytes(kind, announced) + opening, any(mark in data for mark in _FRAME_EXIF)
            needs = estimate(decoding, announced, False, turns)
            if needs > memory.limit // 2 and least:
                factor = max(1, min(announced) // least)
                needs = estimate(decoding, _reduced(announced, factor), False, turns)
            # What may be, but hardly ever is, makes a picture wait until it is alone; it refuses none.
            needs = max(needs, min(needs + codes_bytes(data, kind, announced), memory.limit))
            _hold(held, memory, needs, announced, kind)
            with _refusing(data, kind, max_pixels):
                image = _open(data, kind, max_pixels)
                if image.size != announced:
                    raise ValueError(f"its header announces {announced}, and its picture has {image.size}")
            yield _Picture(image, kind, data, image.size, factor, max_pixels)
            return
        with memory.taken(_bounded(opening, memory, kind)) if opening > _LIGHT_BYTES else nullcontext():
            with _refusing(data, kind, max_pixels):
                image = _open(data, kind, max_pixels)
            _bound_scans(data, image, kind)
        full = image.size
        turns, plain = _turns(image, data), image.mode == "RGB" and "transparency" not in image.info
        keeps = opening + (stored_bytes("RGB", *full) if _has_wide_key(image, data) else 0)
        needs = estimate(keeps + decoding_bytes(image, full, data), full, plain, turns)
        if needs > memory.limit // 2 and least:
            # libjpeg's own reduction to a half, a quarter or an eighth comes first: it saves the memory of the rest.
            drafted = image.draft(None, (least, least)) is not None
            factor = max(1, min(image.size) // least)
            size = _reduced(image.size, factor)
            needs = estimate(keeps + decoding_bytes(image, full, data), size, plain and factor == 1, turns)
        if opening > _LIGHT_BYTES:
            del image  # while it waits; it is opened again
        _hold(held, memory, needs, full, kind)
        if opening > _LIGHT_BYTES:
            with _refusing(data, kind, max_pixels):
                image = _open(data, kind, max_pixels)
            if drafted:
                image.draft(None, (least, least))
        yield _Picture(image, kind, data, full, factor, max_pixels)


def _bounded(opening: int, memory: ImageMemory, kind: str) -> int:
    """What opening a file takes, if it fits.

    Raises:
        RequestTooLarge: it does not, whatever the picture's size.
    """
    if opening > memory.limit:
        raise RequestTooLarge(
            f"the texts, profiles or tables of this file ({kind}) take {opening} bytes; at most {memory.limit}",
            limit=memory.limit,
            bytes=opening,
            hint="save the image without metadata",
        )
    return opening


def _hold(held: ExitStack, memory: ImageMemory, needs: int, size: tuple[int, int], kind: str) -> None:
    if needs > memory.limit:
        raise too_much(needs, memory.limit, size, kind)
    held.enter_context(memory.taken(needs))


def _finishing(size: tuple[int, int], steps: Mapping[str, Mapping[str, Any]], itemsize: int, max_pixels: int) -> int:
    """Bytes that the steps take of a picture of `size`, turned or not: the larger of both."""
    most = 0
    for start in (size, _turned(size)) if steps else ():
        resized = _resized(start, steps["resize"], max_pixels) if "resize" in steps else start
        crop = steps.get("center_crop")
        made = (crop["size"][1], crop["size"][0]) if crop is not None else resized
        most = max(most, finishing_bytes(start, resized, made, itemsize))
    return most


def _reduced(size: tuple[int, int], factor: int) -> tuple[int, int]:
    return -(-size[0] // factor), -(-size[1] // factor)


def _turns(image: ImageFile.ImageFile, data: bytes) -> bool:
    """Whether the picture may have to be turned; what a PNG says of it may follow the pixels, so its name counts."""
    if isinstance(image, PngImagePlugin.PngImageFile):
        return any(mark in data for mark in _PNG_EXIF)
    with _quiet, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return image.getexif().get(_ORIENTATION, 1) in _TRANSPOSE
        except Exception:  # corrupt EXIF: decoding refuses it
            return True


def _least_side(steps: Mapping[str, Mapping[str, Any]]) -> int:
    """What the shorter side of a reduced picture must have at least; 0 where the model needs all pixels."""
    if (resize := steps.get("resize")) is None:
        return 0
    return REDUCING_GAP * int(resize["short_side"] if "short_side" in resize else max(resize["size"]))


@contextmanager
def _refusing(data: bytes, kind: str, max_pixels: int) -> Iterator[None]:
    """Turns what Pillow raises into errors of the caller's file."""
    try:
        yield
    except (RequestTooLarge, MediaUnsupported):
        raise
    except (Image.DecompressionBombError, MemoryError) as e:
        raise RequestTooLarge(
            f"this image has more pixels than the {max_pixels} that are decoded", limit=max_pixels, media=kind
        ) from e
    except Exception as e:  # Pillow's decoders raise nearly anything on corrupt bytes
        raise _malformed(data, kind, f"{type(e).__name__}: {e}"[:200]) from e


def _malformed(data: bytes, kind: str, reason: str) -> ImageMalformed:
    return ImageMalformed(
        f"these {len(data)} bytes start as {kind} but cannot be decoded",
        media=kind,
        bytes=len(data),
        reason=reason,
        hint="check that the upload is complete and that an image viewer opens the file",
    )


def _open(data: bytes, kind: str, max_pixels: int) -> ImageFile.ImageFile:
    # Pillow warns about headers that it can read all the same. The filters are the process's, hence the lock.
    with _quiet, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = _PLUGINS[kind](io.BytesIO(data))
    _bound(*image.size, max_pixels)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        width, height = (image.tag_v2.get(tag, 1) for tag in (_TILE_WIDTH, _TILE_LENGTH))
        _bound(width, height, max_pixels)  # a tile is decoded whole, however small the image
    return image


def _bound_scans(data: bytes, image: ImageFile.ImageFile, kind: str) -> None:
    """Refuse a JPEG of too many scans, inside another file too: each costs a pass over all pixels."""
    if kind != "image/jpeg" and image.info.get("compression") != "jpeg":
        return
    # Each strip of a TIFF has scans of its own, over its own pixels.
    limit = MAX_SCANS * (tiff_strips(image)[0] if isinstance(image, TiffImagePlugin.TiffImageFile) else 1)
    scans = data.count(b"\xff\xda")
    if scans > limit:
        raise RequestTooLarge(f"a JPEG of {scans} scans; {limit} are decoded", limit=limit, scans=scans)


def _bound(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise RequestTooLarge(
            f"an image of {width} x {height} pixels exceeds the {max_pixels} that are decoded",
            limit=max_pixels,
            pixels=width * height,
            hint="send a smaller image: the model resizes it anyway",
        )


def _has_wide_key(image: ImageFile.ImageFile, data: bytes) -> bool:
    """Whether a PNG says of a colour of 16-bit samples that it is transparent; Pillow drops the lower byte of each."""
    return (
        isinstance(image, PngImagePlugin.PngImageFile)
        and image.mode == "RGB"
        and data[_PNG_DEPTH] == 16
        and "transparency" in image.info
    )


def _low_bytes(data: bytes, max_pixels: int) -> Image.Image:
    """The lower bytes of a PNG's 16-bit colours: its samples, decoded again as if in the other byte order."""
    image = _open(data, "image/png", max_pixels)
    image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]
    image.load()
    return image


def _rgb(image: ImageFile.ImageFile, data: bytes, factor: int, low: Image.Image | None = None) -> Image.Image:
    """A decoded picture as 8-bit RGB, each `factor` by `factor` pixels as their mean.

    `low` has the lower bytes of its samples where they count.
    Part by part: what lies between a picture's own mode and RGB takes up to 20 bytes a pixel.
    """
    if image.mode == "RGB" and "transparency" not in image.info and factor == 1:
        return image
    opaque = isinstance(image, BmpImagePlugin.BmpImageFile) and _is_opaque(image, data)
    width, height = image.size
    made = Image.new("RGB", (-(-width // factor), -(-height // factor)))
    columns = factor * max(1, min(width, _PART_PIXELS) // factor)
    rows = factor * max(1, _PART_PIXELS // (columns * factor))
    for top, left in itertools.product(range(0, height, rows), range(0, width, columns)):
        box = (left, top, min(width, left + columns), min(height, top + rows))
        if low is not None:
            part = _without_key(image.crop(box), low.crop(box), image.info["transparency"])
        else:
            part = _to_rgb(image.crop(box), image, data, opaque)
        made.paste(part.reduce(factor) if factor > 1 else part, (left // factor, top // factor))
    return made


def _to_rgb(picture: Image.Image, source: ImageFile.ImageFile, data: bytes, opaque: bool) -> Image.Image:
    """`picture` is a part of `source`: it lacks the file's tags."""
    if picture.mode == "RGB" and "transparency" not in source.info:
        return picture
    if picture.mode.startswith(("I", "F")):
        return _from_wide(picture, source)
    if opaque or (source.info.get("transparency") is None and picture.mode not in ("RGBA", "LA", "PA", "La", "RGBa")):
        return picture.convert("RGB")
    if isinstance(source, PngImagePlugin.PngImageFile) and picture.mode in ("L", "RGB"):
        picture.info["transparency"] = _as_pixels(source.info["transparency"], data[_PNG_DEPTH])
    rgba = (picture.convert("LA") if picture.mode == "La" else picture).convert("RGBA")
    white = Image.new("RGB", rgba.size, "white")
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white


def _without_key(part: Image.Image, low: Image.Image, key: tuple[int, int, int]) -> Image.Image:
    """The upper bytes of 16-bit colours, white where all 16 bits are the transparent colour's."""
    pixels = np.array(part)
    upper, lower = (np.array([sample >> bits & 255 for sample in key], np.uint8) for bits in (8, 0))
    pixels[((pixels == upper) & (np.asarray(low) == lower)).all(axis=-1)] = 255
    return Image.fromarray(pixels)


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
    return picture.mode == "RGBA" and not (has_mask and _highest(picture, 3))


def _highest(picture: Image.Image, band: int) -> float:
    """The highest value of a band, without a copy of it."""
    extrema: Any = picture.getextrema()
    return float(extrema[band][1])


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


def _turned(size: tuple[int, int]) -> tuple[int, int]:
    return size[1], size[0]


def _resized(size: tuple[int, int], step: Mapping[str, Any], max_pixels: int) -> tuple[int, int]:
    """Width and height that a picture of `size` is resized to.

    Raises:
        RequestTooLarge: more pixels than `max_pixels`.
    """
    if "size" in step:
        height, width = step["size"]
    else:
        short = step["short_side"]
        # The long side is cut off, not rounded, as torchvision does.
        least = min(size)
        width, height = (short if side == least else short * side // least for side in size)
    _bound(width, height, max_pixels)
    return width, height


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
