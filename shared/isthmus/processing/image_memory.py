"""What decoding a picture takes, in bytes: upper bounds from its header, which tests hold against a process's peak.

A picture's file says little of its cost: 57 bytes can announce 64 million rows.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from PIL import ImageFile, JpegImagePlugin, TiffImagePlugin

from isthmus.errors import RequestTooLarge

MAX_MARKERS, MAX_CHUNKS, MAX_TIFF_VALUES, MAX_TIFF_STRIPS, MAX_BLOCKS = 4096, 2**16, 2**20, 2**16, 2**16
"""Segments of a JPEG, chunks of a PNG, values of one TIFF tag, its strips or tiles, blocks before a GIF's first frame:
Pillow keeps a Python object for each, and of a million strips it makes tuples for two seconds."""
MAX_TABLES_BYTES, MAX_RUNS_BYTES = 2 * 2**20, 4 * 2**20
"""Of a JPEG's Exif, Photoshop's resources and quantization tables, and of a BMP in runs: Pillow reads them in Python, a
second for some 4 MB, and answers no other request meanwhile."""
_FIXED = 12 * 2**20
"""Beside the pixels: the decoder's tables and windows, a strip of rows on its way to RGB, an arena's last block."""
_ROW = 16
"""Beside a row's pixels: its pointer, and what rounds the row up."""
_BAND_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}
"""Bytes of a pixel as Pillow stores it; all other modes take four."""
_GIF, _WEBP = 2, 14
"""Bytes of a pixel in the readers of whole frames, as measured and a little more: GIF's canvas; libwebp's two canvases
(RGBA), the frame that it gives, and its own planes of a frame."""
_WEBP_CODES, _WEBP_CODES_BYTES, _WEBP_CODES_BITS = 65536, 12_500, 20
"""Sets of prefix codes in a lossless WebP: at most so many, one for each four by four pixels, each of so many bytes in
libwebp, and of no fewer bits in the file. How many there are, only decoding tells. Source: RFC 9649, 3.7.2."""
_TIFF_LONGS = (1, 2, 6, 7)
_TIFF_STRIPS = (273, 279, 324, 325)
_TIFF_STRIP_BYTES, _TIFF_VALUE_BYTES = 400, 100
"""What Pillow makes of the place of one strip or tile, and of one number in another tag."""
_TEXT_BYTES = 2**20
"""The most that Pillow unpacks of one compressed text in a PNG."""
_JPEG_TABLES = {0xDB: b"", 0xE1: b"Exif\0\0", 0xED: b""}
_PNG_PACKED = (b"iCCP", b"zTXt", b"iTXt")
MAX_TEXTS = 65
"""Pillow refuses the text after which 64 MiB were unpacked."""


def check_parts(data: bytes, kind: str) -> None:
    """Refuse a file of more parts than any encoder writes, before Pillow makes an object of each.

    Raises:
        RequestTooLarge: more markers, chunks, blocks, values or compressed texts than the bounds, or longer tables.
    """
    for walk, limit, what in _WALKS.get(kind, ()):
        if (count := walk(data, limit)) > limit:
            raise RequestTooLarge(
                f"a file of more than {limit} {what} ({kind})", limit=limit, parts=count, hint="save the image anew"
            )


def announced_size(data: bytes, kind: str) -> tuple[int, int] | None:
    """Width and height by the header of those formats whose canvas Pillow allocates when it opens a file."""
    if kind == "image/gif" and len(data) >= 13:
        return _gif_canvas(data)
    if kind == "image/webp" and len(data) >= 25:
        chunk = data[12:16]
        if chunk == b"VP8X" and len(data) >= 30:
            return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
        if chunk == b"VP8 " and len(data) >= 30:
            width, height = struct.unpack_from("<HH", data, 26)
            return width & 0x3FFF, height & 0x3FFF
        if chunk == b"VP8L":
            bits = int.from_bytes(data[21:25], "little")
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return None


def opening_bytes(data: bytes, kind: str) -> int:
    """What opening a file takes, and keeps until its picture is done: profiles, texts, the places of strips."""
    if kind == "image/png":
        return _png_texts(data)
    if kind == "image/jpeg":
        return 3 * _first_scan(data, MAX_MARKERS)[0]
    if kind == "image/tiff":
        return sum(_TIFF_STRIP_BYTES * count if tag in _TIFF_STRIPS else cost for tag, count, cost in _tiff_tags(data))
    return 3 * len(data) if kind == "image/webp" else 2 * len(data) if kind == "image/gif" else 0


def stored_bytes(mode: str, width: int, height: int) -> int:
    """What Pillow's image of that mode and size takes."""
    return height * (width * _BAND_BYTES.get(mode, 4) + _ROW)


def decoding_bytes(image: ImageFile.ImageFile, full: tuple[int, int], data: bytes) -> int:
    """What decoding an opened picture takes at most, its image included; `full` is its size before any reduction."""
    width, height = full
    own = stored_bytes(image.mode, *image.size)
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        padded = (width + 31) * (height + 31)
        # libjpeg keeps all coefficients of a picture whose first scan does not finish it, whether more come or not.
        several = "progressive" in image.info or jpeg_scans(data) > 1 or _scanned(data) < image.layers
        return own + (math.ceil(2 * _planes(image) * padded) if several else 128 * image.layers * (width + 31))
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return own + _tiff_bytes(image, width, height)
    # PNG and BMP come row by row; a BMP of runs is unpacked to one byte a pixel first.
    runs = any(tile[0] == "bmp_rle" for tile in image.tile)
    return own + 32 * width + (2 * width * height if runs else 0)


def frame_bytes(kind: str, size: tuple[int, int]) -> int:
    """What decoding a GIF or WebP takes at most: both are read as whole frames."""
    width, height = size
    mode, each = ("P", _GIF) if kind == "image/gif" else ("RGBA", _WEBP)
    return stored_bytes(mode, width, height) + height * (each * width + _ROW)


def codes_bytes(data: bytes, kind: str, size: tuple[int, int]) -> int:
    """What the tables of prefix codes in a WebP may take at most, hardly ever do, and no header tells."""
    if kind != "image/webp" or not (b"VP8L" in data or b"ALPH" in data):
        return 0
    blocks = -(-size[0] // 4) * -(-size[1] // 4)
    return _WEBP_CODES_BYTES * min(_WEBP_CODES, blocks, 8 * len(data) // _WEBP_CODES_BITS)


def converting_bytes(size: tuple[int, int], *, makes_rgb: bool, turns: bool) -> int:
    """What an upright RGB picture of `size` takes beside the decoded one."""
    return stored_bytes("RGB", *size) * (makes_rgb + turns)


def finishing_bytes(start: tuple[int, int], resized: tuple[int, int], made: tuple[int, int], itemsize: int) -> int:
    """What resizing and cropping take beside the picture at their start, and the arrays of what is made."""
    crossing = stored_bytes("RGB", resized[0], start[1]) + stored_bytes("RGB", *resized) if resized != start else 0
    values = 3 * math.prod(made)
    return crossing + stored_bytes("RGB", *made) + values * (2 + 2 * max(4, itemsize))


def total_bytes(*parts: int) -> int:
    """The estimate of a whole decode, from its phases."""
    return _FIXED + sum(parts)


def too_much(count: int, limit: int, size: tuple[int, int], kind: str) -> RequestTooLarge:
    """The error for a picture that alone exceeds the budget."""
    return RequestTooLarge(
        f"an image of {size[0]} x {size[1]} pixels ({kind}) takes {count} bytes to decode; at most {limit}",
        limit=limit,
        bytes=count,
        pixels=math.prod(size),
        hint="send a smaller image: the model resizes it anyway",
    )


def tiff_strips(image: TiffImagePlugin.TiffImageFile) -> tuple[int, int]:
    """How many strips or tiles a TIFF has, and the pixels of one."""
    width, height = image.size
    tags: Any = image.tag_v2
    if 322 in tags:
        wide, high = max(1, int(tags[322])), max(1, int(tags.get(323, 1)))
    else:
        wide, high = width, max(1, min(height, int(tags.get(TiffImagePlugin.ROWSPERSTRIP, height))))
    return max(1, -(-width // wide)) * max(1, -(-height // high)), wide * high


def _tiff_bytes(image: TiffImagePlugin.TiffImageFile, width: int, height: int) -> int:
    """A TIFF's strips or tiles as libtiff unpacks them, each whole, and JPEG in TIFF as a raster of RGBA."""
    if all(tile[0] == "raw" for tile in image.tile):
        return 32 * width + 2 * width * height
    bits: Any = image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,))
    samples = int(image.tag_v2.get(TiffImagePlugin.SAMPLESPERPIXEL, 1))
    widest = max(map(int, bits), default=1) if isinstance(bits, tuple) else int(bits)
    each = max(samples, len(bits) if isinstance(bits, tuple) else 1) * widest
    _, pixels = tiff_strips(image)
    raster = 4 * width * height if image.info.get("compression") == "jpeg" else 0
    return 2 * pixels * (each // 8 + 1) + raster


def jpeg_scans(data: bytes) -> int:
    """The scans of a JPEG's own picture: those of a thumbnail in its EXIF, and of pictures behind it, are none."""
    start = _first_scan(data, MAX_MARKERS)[0]
    end = data.find(b"\xff\xd9", start)
    return data.count(b"\xff\xda", start, end if end >= 0 else len(data))


def _jpeg_markers(data: bytes, limit: int) -> int:
    return _first_scan(data, limit)[1]


def _jpeg_tables(data: bytes, limit: int) -> int:
    """Bytes of a JPEG's segments that Pillow reads value by value."""
    return _first_scan(data, MAX_MARKERS)[2]


def _first_scan(data: bytes, limit: int) -> tuple[int, int, int]:
    """Where a JPEG's first scan begins, how many segments lie before it, and how long their tables are."""
    at, count, tables = 2, 0, 0
    while count <= limit and (at := data.find(b"\xff", at)) >= 0 and at + 4 <= len(data):
        marker = data[at + 1]
        if marker == 0xDA:
            break
        # Fill bytes, and markers without a length.
        bare = marker in (0, 1, 0xFF) or 0xD0 <= marker <= 0xD9
        length = 0 if bare else int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in _JPEG_TABLES and data.startswith(_JPEG_TABLES[marker], at + 4):
            tables += length
        at += 1 if bare else 2 + length
        count += 1
    return max(at, 0), count, tables


def _planes(image: JpegImagePlugin.JpegImageFile) -> float:
    """How many planes of the picture's size a JPEG's components make: three, or half of that with 4:2:0."""
    across, down = (max((c[i] for c in image.layer), default=0) for i in (1, 2))
    if not across or not down:
        return float(image.layers)
    return sum(c[1] * c[2] for c in image.layer) / (across * down)


def _scanned(data: bytes) -> int:
    """How many components are in a JPEG's first scan."""
    start = _first_scan(data, MAX_MARKERS)[0]
    return data[start + 4] if start + 4 < len(data) else 0


def _gif_canvas(data: bytes) -> tuple[int, int]:
    """The size of a GIF's screen, or of its first frame where that reaches further: Pillow widens the canvas to it.

    Blocks are read as Pillow reads them, odd ones included.
    """
    width, height = struct.unpack_from("<HH", data, 6)
    at, _ = _gif_frame(data, MAX_BLOCKS)
    if at + 9 < len(data) and data[at] == 0x2C:
        left, top, wide, high = struct.unpack_from("<HHHH", data, at + 1)
        return max(width, left + wide), max(height, top + high)
    return int(width), int(height)


def _gif_blocks(data: bytes, limit: int) -> int:
    return _gif_frame(data, limit)[1]


def _gif_frame(data: bytes, limit: int) -> tuple[int, int]:
    """Where a GIF's first frame begins, or its end is, and how many blocks and stray bytes lie before it."""
    count = 0
    at = 13 + (6 << (data[10] & 7) if len(data) > 10 and data[10] & 0x80 else 0)
    while count <= limit and at + 9 < len(data) and data[at] not in (0x2C, 0x3B):
        if data[at] == 0x21:
            at, blocks = _after_extension(data, at + 1)
            count += blocks
        else:
            at += 1
        count += 1
    return at, count


def _after_extension(data: bytes, at: int) -> tuple[int, int]:
    """Where what follows an extension begins, and how many blocks it has."""
    label, size = data[at], data[at + 1]
    more = size > 0 if label == 0xFE else True  # a comment ends with an empty block, others with one after their first
    if label == 0xFF and data[at + 2 : at + 2 + size].startswith(b"NETSCAPE2.0"):
        at += 1 + size
        size = data[at + 1] if at + 1 < len(data) else 0
    at += 2 + size
    blocks = 0
    while more and at < len(data):
        size = data[at]
        at += 1 + size
        more = size > 0
        blocks += 1
    return at, blocks


def _png_texts(data: bytes) -> int:
    """What a PNG's chunks beside its pixels take: letters of up to four bytes where a text is Unicode."""
    taken, texts = 0, 0
    for kind, length in islice(_png_parts(data), MAX_CHUNKS):
        if kind != b"IDAT":
            taken += (5 if kind == b"iTXt" else 3) * length
            if kind in _PNG_PACKED and texts < MAX_TEXTS:
                taken += (5 if kind == b"iTXt" else 2) * _TEXT_BYTES
                texts += 1
    return taken


def _png_chunks(data: bytes, limit: int) -> int:
    return sum(1 for _ in islice(_png_parts(data), limit + 1))


def _png_parts(data: bytes) -> Iterator[tuple[bytes, int]]:
    """A PNG's chunks: the kind of each, and how many of its bytes the file has."""
    at = 8
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], min(length, len(data) - at)
        at += 12 + length


def _png_packed(data: bytes, limit: int) -> int:
    """How many chunks of a PNG beside its pixels are compressed: a kilobyte of each unpacks to a megabyte."""
    return sum(kind in _PNG_PACKED for kind, _ in islice(_png_parts(data), MAX_CHUNKS))


def _bmp_runs(data: bytes, limit: int) -> int:
    """Bytes of a BMP whose pixels are runs; 0 of another."""
    return len(data) if len(data) > 34 and data[14] >= 40 and data[30] in (1, 2) else 0


def _tiff_places(data: bytes, limit: int) -> int:
    return max((count for tag, count, _ in _tiff_tags(data) if tag in _TIFF_STRIPS), default=0)


def _tiff_values(data: bytes, limit: int) -> int:
    """The most values of any tag in a TIFF's first directory, or the number of its tags."""
    most = number = 0
    for number, (_, count, _) in enumerate(_tiff_tags(data), 1):
        if number > limit:
            break
        most = max(most, count)
    return max(most, number)


def _tiff_tags(data: bytes) -> Iterator[tuple[int, int, int]]:
    """The tags of a TIFF's first directory: each one's number, how many values it has, and what those take.

    Texts and profiles are one value, however long. Ends where the directory is cut off, of which Pillow tells.
    """
    order = ">" if data[:2] == b"MM" else "<"
    big = data[2:4] in (b"+\0", b"\0+")
    try:
        if big:
            (at,) = struct.unpack_from(order + "Q", data, 8)
            (tags,) = struct.unpack_from(order + "Q", data, at)
            first, layout = at + 8, order + "HHQ8x"
        else:
            (at,) = struct.unpack_from(order + "I", data, 4)
            (tags,) = struct.unpack_from(order + "H", data, at)
            first, layout = at + 2, order + "HHI4x"
        for n in range(tags):
            tag, kind, count = struct.unpack_from(layout, data, first + n * struct.calcsize(layout))
            single = kind in _TIFF_LONGS
            yield tag, 1 if single else count, 3 * min(count, len(data)) if single else _TIFF_VALUE_BYTES * count
    except struct.error:
        return


_WALKS: Mapping[str, Sequence[tuple[Callable[[bytes, int], int], int, str]]] = {
    "image/jpeg": ((_jpeg_markers, MAX_MARKERS, "parts"), (_jpeg_tables, MAX_TABLES_BYTES, "bytes of tables and Exif")),
    "image/png": ((_png_chunks, MAX_CHUNKS, "parts"), (_png_packed, MAX_TEXTS, "compressed texts and profiles")),
    "image/gif": ((_gif_blocks, MAX_BLOCKS, "parts"),),
    "image/bmp": ((_bmp_runs, MAX_RUNS_BYTES, "bytes of runs"),),
    "image/tiff": ((_tiff_places, MAX_TIFF_STRIPS, "strips or tiles"), (_tiff_values, MAX_TIFF_VALUES, "parts")),
}
"""What bounds each kind: a count, its limit, and what is counted."""
