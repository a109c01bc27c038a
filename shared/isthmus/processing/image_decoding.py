"""Decoding of image files to upright 8-bit RGB, within bounds on pixels and memory.

Bounds on the header apply before decoding, and pictures too large for memory are reduced during decoding.
Transparent pixels become white. Colour profiles are ignored, as training pipelines ignore them.
Source: docs/reference/api.md, "Photos".
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

from isthmus.errors import ImageMalformed, MediaUnsupported, RequestTooLarge
from isthmus.processing.image_budget import SHARED, ImageMemory
from isthmus.processing.image_memory import (
    announced_size,
    check_parts,
    codes_bytes,
    converting_bytes,
    decoding_bytes,
    frame_bytes,
    opening_bytes,
    stored_bytes,
    tiff_strips,
    too_much,
    total_bytes,
)
from isthmus.processing.media import ACCEPTED, looks_like_image, not_an_image

# Image.open has formats that start other programs, and reads a phone's multi-picture JPEG as several pictures.
_PLUGINS: Mapping[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "image/jpeg": JpegImagePlugin.JpegImageFile,
    "image/png": PngImagePlugin.PngImageFile,
    "image/webp": WebPImagePlugin.WebPImageFile,
    "image/gif": GifImagePlugin.GifImageFile,
    "image/bmp": BmpImagePlugin.BmpImageFile,
    "image/tiff": TiffImagePlugin.TiffImageFile,
}
MAX_PIXELS = 64_000_000
"""The bound of commands; functions have the setting `max_image_pixels`."""
# Scans of a progressive JPEG: encoders write about ten. Each costs a pass over all pixels, and hardly any bytes.
MAX_SCANS = 256

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
# Transpositions that preserve width and height.
_SAME_SIZE = (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM)
# Conversion to RGB takes up to 20 bytes a pixel, so tiles are converted in turn.
_TILE_PIXELS = 2**16
# Metadata of up to this size is not counted while an opened file waits for memory.
_MAX_UNCOUNTED_BYTES = 2**20
# Names of the metadata that may hold an orientation, in PNG, and in WebP and GIF.
_PNG_EXIF, _FRAME_EXIF = (b"eXIf", b"Raw profile", b"adobe.xmp"), (b"EXIF", b"XMP")
# The offset of the bits per sample in a PNG's header.
_PNG_DEPTH = 24
# The shortest BMP header with a mask of alpha, and the mask's place in the file.
_BMP_V3, _BMP_ALPHA_MASK = 56, slice(66, 70)
# Pillow warns about headers that it can read; filters of warnings belong to the process, hence the lock.
_quiet = threading.Lock()


def decode(data: bytes, *, max_pixels: int, memory: ImageMemory = SHARED) -> Image.Image:
    """The first picture in `data`, upright, 8-bit RGB, transparent pixels over white.

    Raises:
        MediaUnsupported: not an image, or samples without a stated range.
        ImageMalformed: an image that cannot be decoded: truncated, corrupt.
        RequestTooLarge: more pixels than `max_pixels`, or more memory than there is; nothing was decoded.
        Overloaded: other pictures reserve the memory.
    """
    with open_picture(data, max_pixels=max_pixels, memory=memory) as picture:
        return picture.decode()


@dataclass
class Picture:
    """An opened file with the memory for its decoding: `full` is the stored size, `factor` the reduction."""

    image: ImageFile.ImageFile
    kind: str
    data: bytes
    full: tuple[int, int]
    factor: int
    max_pixels: int

    def __post_init__(self) -> None:
        self.upright = self.full
        """The size of the upright picture."""

    def turned(self) -> tuple[int, int]:
        """Width and height of the upright picture, before any reduction, without its pixels.

        Raises:
            ImageMalformed: as the function `decode`.
        """
        with _pillow_errors(self.data, self.kind, self.max_pixels), _quiet, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            transposition = _TRANSPOSE.get(self.image.getexif().get(_ORIENTATION, 1))
        upright = transposition is None or transposition in _SAME_SIZE
        return self.full if upright else (self.full[1], self.full[0])

    def decode(self) -> Image.Image:
        """The upright RGB picture, reduced by `factor`.

        Raises:
            MediaUnsupported, ImageMalformed, RequestTooLarge: as the function `decode`.
        """
        with _pillow_errors(self.data, self.kind, self.max_pixels):
            self.image.load()
            with _quiet, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                transposition = _TRANSPOSE.get(self.image.getexif().get(_ORIENTATION, 1))
            low = _low_bytes(self.data, self.max_pixels) if _has_wide_key(self.image, self.data) else None
            picture = _rgb(self.image, self.data, self.factor, low)
            if transposition is None:
                return picture
            if transposition not in _SAME_SIZE:
                self.upright = self.full[1], self.full[0]
            return picture.transpose(transposition)


@contextmanager
def open_picture(
    data: bytes,
    *,
    max_pixels: int,
    memory: ImageMemory,
    min_side: int = 0,
    finishing: Callable[[tuple[int, int]], int] = lambda size: 0,
) -> Iterator[Picture]:
    """Open an image file, and reserve the memory for decoding, and for `finishing` a picture of that size.

    A picture that needs more than half of the memory is reduced to a shorter side of at least `min_side`, unless 0.

    Raises:
        MediaUnsupported, ImageMalformed, RequestTooLarge, Overloaded: as `decode`.
    """
    kind = looks_like_image(data)
    if kind is None:
        raise not_an_image(data)
    check_parts(data, kind)

    def estimate(decoding: int, size: tuple[int, int], plain: bool, turns: bool) -> int:
        converting = converting_bytes(size, makes_rgb=not plain, turns=turns)
        return total_bytes(decoding, converting, finishing(size))

    factor, drafted, opening = 1, False, opening_bytes(data, kind)
    with ExitStack() as reservation:
        announced = announced_size(data, kind)
        if announced is None and kind in ("image/gif", "image/webp"):
            raise _malformed(data, kind, "the header is cut off, or none")
        if announced is not None:
            # Pillow allocates the canvas of these formats at opening.
            check_pixels(*announced, max_pixels)
            decoding, turns = frame_bytes(kind, announced) + opening, any(mark in data for mark in _FRAME_EXIF)
            needs = estimate(decoding, announced, False, turns)
            if needs > memory.limit // 2 and min_side:
                factor = max(1, min(announced) // min_side)
                needs = estimate(decoding, _reduced(announced, factor), False, turns)
            # Rarely reached bounds may delay a picture until no other is in progress, but never refuse a file.
            needs = max(needs, min(needs + codes_bytes(data, kind, announced), memory.limit))
            _reserve(reservation, memory, needs, announced, kind)
            with _pillow_errors(data, kind, max_pixels):
                image = _open(data, kind, max_pixels)
                if image.size != announced:
                    raise ValueError(f"its header announces {announced}, and its picture has {image.size}")
            yield Picture(image, kind, data, image.size, factor, max_pixels)
            return
        with memory.taken(_bounded(opening, memory, kind)) if opening > _MAX_UNCOUNTED_BYTES else nullcontext():
            with _pillow_errors(data, kind, max_pixels):
                image = _open(data, kind, max_pixels)
            _bound_scans(data, image, kind)
        full = image.size
        turns, plain = _turns(image, data), image.mode == "RGB" and "transparency" not in image.info
        keeps = opening + (stored_bytes("RGB", *full) if _has_wide_key(image, data) else 0)
        needs = estimate(keeps + decoding_bytes(image, full, data), full, plain, turns)
        if needs > memory.limit // 2 and min_side:
            # libjpeg reduces to a half, a quarter or an eighth during decoding, which saves the memory of later steps.
            drafted = image.draft(None, (min_side, min_side)) is not None
            factor = max(1, min(image.size) // min_side)
            size = _reduced(image.size, factor)
            needs = estimate(keeps + decoding_bytes(image, full, data), size, plain and factor == 1, turns)
        if opening > _MAX_UNCOUNTED_BYTES:
            del image  # frees its metadata while the picture waits
        _reserve(reservation, memory, needs, full, kind)
        if opening > _MAX_UNCOUNTED_BYTES:
            with _pillow_errors(data, kind, max_pixels):
                image = _open(data, kind, max_pixels)
            if drafted:
                image.draft(None, (min_side, min_side))
        yield Picture(image, kind, data, full, factor, max_pixels)


def _bounded(opening: int, memory: ImageMemory, kind: str) -> int:
    """Check and return the memory for opening a file.

    Raises:
        RequestTooLarge: the metadata alone exceeds the limit.
    """
    if opening > memory.limit:
        raise RequestTooLarge(
            f"the texts, profiles or tables of this file ({kind}) take {opening} bytes; at most {memory.limit}",
            limit=memory.limit,
            bytes=opening,
            hint="save the image without metadata",
        )
    return opening


def _reserve(reservation: ExitStack, memory: ImageMemory, needs: int, size: tuple[int, int], kind: str) -> None:
    if needs > memory.limit:
        raise too_much(needs, memory.limit, size, kind)
    reservation.enter_context(memory.taken(needs))


def _reduced(size: tuple[int, int], factor: int) -> tuple[int, int]:
    return -(-size[0] // factor), -(-size[1] // factor)


def _turns(image: ImageFile.ImageFile, data: bytes) -> bool:
    """Whether an orientation may apply; a PNG's metadata may follow the pixels, so its name counts."""
    if isinstance(image, PngImagePlugin.PngImageFile):
        return any(mark in data for mark in _PNG_EXIF)
    with _quiet, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return image.getexif().get(_ORIENTATION, 1) in _TRANSPOSE
        except Exception:  # corrupt EXIF: decoding fails
            return True


@contextmanager
def _pillow_errors(data: bytes, kind: str, max_pixels: int) -> Iterator[None]:
    """Convert Pillow's exceptions to errors of the caller's file."""
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
    with _quiet, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = _PLUGINS[kind](io.BytesIO(data))
    check_pixels(*image.size, max_pixels)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        width, height = (image.tag_v2.get(tag, 1) for tag in (_TILE_WIDTH, _TILE_LENGTH))
        check_pixels(width, height, max_pixels)  # a tile is decoded whole, however small the image
    return image


def _bound_scans(data: bytes, image: ImageFile.ImageFile, kind: str) -> None:
    """Check the number of scans of a JPEG, also inside a TIFF."""
    if kind != "image/jpeg" and image.info.get("compression") != "jpeg":
        return
    # Each strip of a TIFF has scans of its own, over its own pixels.
    limit = MAX_SCANS * (tiff_strips(image)[0] if isinstance(image, TiffImagePlugin.TiffImageFile) else 1)
    scans = data.count(b"\xff\xda")
    if scans > limit:
        raise RequestTooLarge(f"a JPEG of {scans} scans; {limit} are decoded", limit=limit, scans=scans)


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Check the size of a picture.

    Raises:
        RequestTooLarge: more pixels than `max_pixels`.
    """
    if width * height > max_pixels:
        raise RequestTooLarge(
            f"an image of {width} x {height} pixels exceeds the {max_pixels} that are decoded",
            limit=max_pixels,
            pixels=width * height,
            hint="send a smaller image: the model resizes it anyway",
        )


def _has_wide_key(image: ImageFile.ImageFile, data: bytes) -> bool:
    """Whether a PNG has a transparent colour of 16-bit samples; Pillow drops their lower bytes."""
    return (
        isinstance(image, PngImagePlugin.PngImageFile)
        and image.mode == "RGB"
        and data[_PNG_DEPTH] == 16
        and "transparency" in image.info
    )


def _low_bytes(data: bytes, max_pixels: int) -> Image.Image:
    """The lower bytes of a PNG's 16-bit samples, from a second decoding in the other byte order."""
    image = _open(data, "image/png", max_pixels)
    image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]
    image.load()
    return image


def _rgb(image: ImageFile.ImageFile, data: bytes, factor: int, low: Image.Image | None = None) -> Image.Image:
    """A decoded picture as 8-bit RGB, reduced to the means of `factor` by `factor` pixels.

    `low` are the lower bytes of its samples, where transparency depends on these.
    """
    if image.mode == "RGB" and "transparency" not in image.info and factor == 1:
        return image
    opaque = isinstance(image, BmpImagePlugin.BmpImageFile) and _is_opaque(image, data)
    width, height = image.size
    result = Image.new("RGB", (-(-width // factor), -(-height // factor)))
    columns = factor * max(1, min(width, _TILE_PIXELS) // factor)
    rows = factor * max(1, _TILE_PIXELS // (columns * factor))
    for top, left in itertools.product(range(0, height, rows), range(0, width, columns)):
        box = (left, top, min(width, left + columns), min(height, top + rows))
        if low is not None:
            part = _without_key(image.crop(box), low.crop(box), image.info["transparency"])
        else:
            part = _to_rgb(image.crop(box), image, data, opaque)
        result.paste(part.reduce(factor) if factor > 1 else part, (left // factor, top // factor))
    return result


def _to_rgb(picture: Image.Image, source: ImageFile.ImageFile, data: bytes, opaque: bool) -> Image.Image:
    """Convert `picture`, a tile of `source` without the file's tags."""
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
    """The upper bytes of 16-bit colours; white where all 16 bits equal the transparent colour."""
    pixels = np.array(part)
    upper, lower = (np.array([sample >> bits & 255 for sample in key], np.uint8) for bits in (8, 0))
    pixels[((pixels == upper) & (np.asarray(low) == lower)).all(axis=-1)] = 255
    return Image.fromarray(pixels)


def _as_pixels(key: int | tuple[int, ...], depth: int) -> int | tuple[int, ...]:
    """A PNG's transparent colour, in samples of `depth` bits, in Pillow's 8-bit pixels.

    Bits beyond the depth are ignored. Source: PNG, third edition, 11.3.1.1.
    """

    def pixel(sample: int) -> int:
        return (sample & 0xFFFF) >> 8 if depth == 16 else (sample & (2**depth - 1)) * 255 // (2**depth - 1)

    return pixel(key) if isinstance(key, int) else tuple(map(pixel, key))


def _is_opaque(picture: Image.Image, data: bytes) -> bool:
    """Whether a BMP's fourth byte is no alpha: its header has no mask of alpha, or the byte is zero in every pixel.

    Programs that write 32 bits a pixel often leave that byte at zero; readers treat the picture as opaque.
    """
    has_mask = int.from_bytes(data[14:18], "little") >= _BMP_V3 and any(data[_BMP_ALPHA_MASK])
    return picture.mode == "RGBA" and not (has_mask and _highest(picture, 3))


def _highest(picture: Image.Image, band: int) -> float:
    """The maximum of a band, without a copy of the band."""
    extrema: Any = picture.getextrema()
    return float(extrema[band][1])


def _from_wide(picture: Image.Image, source: ImageFile.ImageFile) -> Image.Image:
    """8-bit RGB from grey samples wider than a byte; Pillow's conversion would clip at 255."""
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
