"""Upper bounds on the memory of decoding a picture, in bytes, from its header; tests compare them to measured peaks.

The size of a file says little about its cost: 57 bytes can declare 64 million rows.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from PIL import ImageFile, JpegImagePlugin, TiffImagePlugin

from isthmus.errors import RequestTooLarge

# Segments of a JPEG, chunks of a PNG, values of a TIFF tag, strips or tiles, blocks before a GIF's first frame: Pillow
# creates a Python object for each, and takes two seconds for a million strips.
MAX_MARKERS, MAX_CHUNKS, MAX_TIFF_VALUES, MAX_TIFF_STRIPS, MAX_BLOCKS = 4096, 2**16, 2**20, 2**16, 2**16
# A JPEG's Exif, Photoshop resources and quantisation tables, and the runs of a BMP: Pillow parses these in Python, a
# second for some 4 MB, and holds the interpreter's lock meanwhile.
MAX_TABLES_BYTES, MAX_RUNS_BYTES = 2 * 2**20, 4 * 2**20
# Beside the pixels: the decoder's tables and windows, a tile during conversion to RGB, an arena's last block.
_FIXED = 12 * 2**20
# Beside the pixels of a row: its pointer, and its padding.
_ROW = 16
# Bytes of a pixel in Pillow's storage; all other modes take four.
_BAND_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}
# Bytes of a pixel in the readers of whole frames, as measured with a margin: the canvas of a GIF; libwebp's two
# canvases (RGBA), the decoded frame, and the planes of a frame.
_GIF, _WEBP = 2, 14
# Sets of prefix codes in a lossless WebP: their maximum, also limited to a set for each 4 x 4 pixels; the bytes of a
# set in libwebp, and its least bits in the file. Only decoding reveals their number. Source: RFC 9649, 3.7.2.
_WEBP_CODES, _WEBP_CODES_BYTES, _WEBP_CODES_BITS = 65536, 12_500, 20
_TIFF_LONGS = (1, 2, 6, 7)
_TIFF_STRIPS = (273, 279, 324, 325)
# Pillow's objects for the offset of a strip or tile, and for a number in another tag.
_TIFF_STRIP_BYTES, _TIFF_VALUE_BYTES = 400, 100
# Pillow's bound on a compressed text in a PNG.
_TEXT_BYTES = 2**20
_JPEG_TABLES = {0xDB: b"", 0xE1: b"Exif\0\0", 0xED: b""}
_PNG_COMPRESSED = (b"iCCP", b"zTXt", b"iTXt")
# Pillow refuses a text beyond 64 MiB of decompressed texts.
MAX_TEXTS = 65


def check_parts(data: bytes, kind: str) -> None:
    """Refuse a file of more parts than encoders write, before Pillow creates an object for each.

    Raises:
        RequestTooLarge: more markers, chunks, blocks, values or compressed texts than the bounds, or longer tables.
    """
    for walk, limit, what in _WALKS.get(kind, ()):
        if (count := walk(data, limit)) > limit:
            raise RequestTooLarge(
                f"a file of more than {limit} {what} ({kind})", limit=limit, parts=count, hint="save the image anew"
            )


def announced_size(data: bytes, kind: str) -> tuple[int, int] | None:
    """Width and height in the header of a GIF or WebP: Pillow allocates the canvas when it opens the file."""
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
    """Memory from opening a file to the end of its decoding: profiles, texts, offsets of strips."""
    if kind == "image/png":
        return _png_texts(data)
    if kind == "image/jpeg":
        return 3 * _first_scan(data, MAX_MARKERS)[0]
    if kind == "image/tiff":
        return sum(_TIFF_STRIP_BYTES * count if tag in _TIFF_STRIPS else cost for tag, count, cost in _tiff_tags(data))
    return 3 * len(data) if kind == "image/webp" else 2 * len(data) if kind == "image/gif" else 0


def stored_bytes(mode: str, width: int, height: int) -> int:
    """Memory of Pillow's image of that mode and size."""
    return height * (width * _BAND_BYTES.get(mode, 4) + _ROW)


def decoding_bytes(image: ImageFile.ImageFile, full: tuple[int, int], data: bytes) -> int:
    """Bound on decoding an opened picture, its image included; `full` is its size before any reduction."""
    width, height = full
    own = stored_bytes(image.mode, *image.size)
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        padded = (width + 31) * (height + 31)
        # libjpeg stores all coefficients unless the first scan completes the picture, even if no scan follows.
        several = "progressive" in image.info or jpeg_scans(data) > 1 or _scanned(data) < image.layers
        return own + (math.ceil(2 * _planes(image) * padded) if several else 128 * image.layers * (width + 31))
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return own + _tiff_bytes(image, width, height)
    # PNG and BMP are decoded row by row, but a BMP of runs first to a byte a pixel.
    runs = any(tile[0] == "bmp_rle" for tile in image.tile)
    return own + 32 * width + (2 * width * height if runs else 0)


def frame_bytes(kind: str, size: tuple[int, int]) -> int:
    """Bound on decoding a GIF or WebP: both are decoded as whole frames."""
    width, height = size
    mode, each = ("P", _GIF) if kind == "image/gif" else ("RGBA", _WEBP)
    return stored_bytes(mode, width, height) + height * (each * width + _ROW)


def codes_bytes(data: bytes, kind: str, size: tuple[int, int]) -> int:
    """Bound on the tables of prefix codes in a WebP, which real files hardly ever reach."""
    if kind != "image/webp" or not (b"VP8L" in data or b"ALPH" in data):
        return 0
    blocks = -(-size[0] // 4) * -(-size[1] // 4)
    return _WEBP_CODES_BYTES * min(_WEBP_CODES, blocks, 8 * len(data) // _WEBP_CODES_BITS)


def converting_bytes(size: tuple[int, int], *, makes_rgb: bool, turns: bool) -> int:
    """Memory of an upright RGB picture of `size` beside the decoded picture."""
    return stored_bytes("RGB", *size) * (makes_rgb + turns)


def finishing_bytes(start: tuple[int, int], resized: tuple[int, int], cropped: tuple[int, int], itemsize: int) -> int:
    """Memory of resizing and cropping beside the picture at `start`, and of the resulting arrays."""
    resizing = stored_bytes("RGB", resized[0], start[1]) + stored_bytes("RGB", *resized) if resized != start else 0
    values = 3 * math.prod(cropped)
    return resizing + stored_bytes("RGB", *cropped) + values * (2 + 2 * max(4, itemsize))


def total_bytes(*parts: int) -> int:
    """The estimate of decoding, from its phases."""
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
    """The number of strips or tiles of a TIFF, and the pixels of each."""
    width, height = image.size
    tags: Any = image.tag_v2
    if 322 in tags:
        wide, high = max(1, int(tags[322])), max(1, int(tags.get(323, 1)))
    else:
        wide, high = width, max(1, min(height, int(tags.get(TiffImagePlugin.ROWSPERSTRIP, height))))
    return max(1, -(-width // wide)) * max(1, -(-height // high)), wide * high


def _tiff_bytes(image: TiffImagePlugin.TiffImageFile, width: int, height: int) -> int:
    """Memory of libtiff: it decodes strips or tiles as a whole, and JPEG in TIFF to a raster of RGBA."""
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
    """The number of scans of a JPEG's first picture, without thumbnails and further pictures."""
    start = _first_scan(data, MAX_MARKERS)[0]
    end = data.find(b"\xff\xd9", start)
    return data.count(b"\xff\xda", start, end if end >= 0 else len(data))


def _jpeg_markers(data: bytes, limit: int) -> int:
    return _first_scan(data, limit)[1]


def _jpeg_tables(data: bytes, limit: int) -> int:
    """Bytes of a JPEG's segments that Pillow parses in Python."""
    return _first_scan(data, MAX_MARKERS)[2]


def _first_scan(data: bytes, limit: int) -> tuple[int, int, int]:
    """The offset of a JPEG's first scan, the number of segments before, and the bytes of their tables."""
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
    """The number of full-size planes of a JPEG's components: three, or half of that with 4:2:0."""
    across, down = (max((c[i] for c in image.layer), default=0) for i in (1, 2))
    if not across or not down:
        return float(image.layers)
    return sum(c[1] * c[2] for c in image.layer) / (across * down)


def _scanned(data: bytes) -> int:
    """The number of components in a JPEG's first scan."""
    start = _first_scan(data, MAX_MARKERS)[0]
    return data[start + 4] if start + 4 < len(data) else 0


def _gif_canvas(data: bytes) -> tuple[int, int]:
    """The size of a GIF's screen, enlarged to its first frame as in Pillow.

    Blocks are parsed as in Pillow, malformed blocks included.
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
    """The offset of a GIF's first frame, or of its end, and the number of blocks and stray bytes before."""
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
    """The offset behind an extension, and the number of its blocks."""
    label, size = data[at], data[at + 1]
    # Comments end with an empty block, other extensions with a block after their first.
    more = size > 0 if label == 0xFE else True
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
    """Memory of a PNG's chunks beside its pixels; a letter of Unicode text takes up to four bytes."""
    size, texts = 0, 0
    for kind, length in islice(_png_parts(data), MAX_CHUNKS):
        if kind != b"IDAT":
            size += (5 if kind == b"iTXt" else 3) * length
            if kind in _PNG_COMPRESSED and texts < MAX_TEXTS:
                size += (5 if kind == b"iTXt" else 2) * _TEXT_BYTES
                texts += 1
    return size


def _png_chunks(data: bytes, limit: int) -> int:
    return sum(1 for _ in islice(_png_parts(data), limit + 1))


def _png_parts(data: bytes) -> Iterator[tuple[bytes, int]]:
    """A PNG's chunks: the kind of each, and its bytes within the file."""
    at = 8
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], min(length, len(data) - at)
        at += 12 + length


def _png_compressed(data: bytes, limit: int) -> int:
    """The number of compressed chunks beside a PNG's pixels: a kilobyte may expand to a megabyte."""
    return sum(kind in _PNG_COMPRESSED for kind, _ in islice(_png_parts(data), MAX_CHUNKS))


def _bmp_runs(data: bytes, limit: int) -> int:
    """Bytes of a BMP of runs; 0 for other BMP."""
    return len(data) if len(data) > 34 and data[14] >= 40 and data[30] in (1, 2) else 0


def _tiff_places(data: bytes, limit: int) -> int:
    return max((count for tag, count, _ in _tiff_tags(data) if tag in _TIFF_STRIPS), default=0)


def _tiff_values(data: bytes, limit: int) -> int:
    """The largest number of values of a tag in a TIFF's first directory, or the number of its tags."""
    largest = number = 0
    for number, (_, count, _) in enumerate(_tiff_tags(data), 1):
        if number > limit:
            break
        largest = max(largest, count)
    return max(largest, number)


def _tiff_tags(data: bytes) -> Iterator[tuple[int, int, int]]:
    """The tags of a TIFF's first directory: number, count of values, and memory of each.

    Texts and profiles are a single value, however long. Ends at a truncated directory, an error that Pillow reports.
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
    "image/png": ((_png_chunks, MAX_CHUNKS, "parts"), (_png_compressed, MAX_TEXTS, "compressed texts and profiles")),
    "image/gif": ((_gif_blocks, MAX_BLOCKS, "parts"),),
    "image/bmp": ((_bmp_runs, MAX_RUNS_BYTES, "bytes of runs"),),
    "image/tiff": ((_tiff_places, MAX_TIFF_STRIPS, "strips or tiles"), (_tiff_values, MAX_TIFF_VALUES, "parts")),
}
"""The bounds of each media type: a function that counts, its limit, and the name of the parts."""
