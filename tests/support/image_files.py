"""Large pictures of every format, mode and order of rows, of which nearly all pixels are alike."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import tifffile
from PIL import Image

SPEC: dict[str, Any] = {
    "kind": "image",
    "input": "x",
    "steps": [
        {"op": "resize", "short_side": 64, "interpolation": "bicubic"},
        {"op": "center_crop", "size": [64, 64]},
        {"op": "layout", "to": "NCHW"},
    ],
    "dtype": "float32",
}
"""Pre-processing to a centre crop of 64 x 64."""

WIDTH, HEIGHT = 2000, 1600
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour: int, *more: bytes, interlaced: bool = False) -> bytes:
    """A PNG of zeros; its passes follow Adam7 where it is interlaced."""
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    packer, data = zlib.compressobj(1), b""
    for x, y, dx, dy in passes if interlaced else [(0, 0, 1, 1)]:
        wide, high = -(-(width - x) // dx), -(-(height - y) // dy)
        row = bytes(1 + (wide * depth * _CHANNELS[colour] + 7) // 8)
        for _ in range(high):
            data += packer.compress(row)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, int(interlaced)))
    body = chunk(b"IDAT", data + packer.flush())
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + body + chunk(b"IEND", b"")


def bmp_of_runs(width: int, height: int) -> bytes:
    """A BMP of 8 bits whose rows are runs (RLE8)."""
    row = b"".join(bytes((min(255, width - x), 1)) for x in range(0, width, 255)) + b"\0\0"
    body, palette = row * height + b"\0\1", bytes(1024)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(body), 0, 0, 256, 0)
    start = 14 + len(info) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + info + palette + body


def _saved(mode: str, format: str, **options: Any) -> bytes:
    size = (WIDTH, HEIGHT)
    image = Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint16)) if mode == "I;16" else Image.new(mode, size)
    if options.pop("turned", False):
        exif = image.getexif()
        exif[0x0112] = 6
        options["exif"] = exif
    if options.pop("animated", False):
        options |= {"save_all": True, "append_images": [Image.new(mode, size, "red")]}
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def _tiff(dtype: str, *channels: int, **options: Any) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, np.zeros((HEIGHT, WIDTH, *channels), dtype), **options)
    return out.getvalue()


_PALETTE = chunk(b"PLTE", bytes(768))
_KEY = chunk(b"tRNS", b"\0")
FILES: dict[str, Callable[[], bytes]] = {
    **{
        f"PNG colour {colour} depth {depth}{' interlaced' * interlaced}": (
            lambda colour=colour, depth=depth, interlaced=interlaced: png(
                WIDTH, HEIGHT, depth, colour, *[_PALETTE] * (colour == 3), interlaced=interlaced
            )
        )
        for colour, depth, interlaced in [
            *((0, 1, False), (0, 8, False), (0, 16, False), (0, 16, True), (2, 8, False), (2, 8, True), (2, 16, False)),
            *((3, 8, False), (3, 1, True), (4, 8, False), (4, 16, False), (6, 8, False), (6, 16, True)),
        ]
    },
    "PNG of 16-bit colours, one of them transparent": lambda: png(WIDTH, HEIGHT, 16, 2, chunk(b"tRNS", bytes(6))),
    "PNG palette with transparency": lambda: png(WIDTH, HEIGHT, 8, 3, _PALETTE, _KEY),
    "PNG grey with transparency": lambda: png(WIDTH, HEIGHT, 8, 0, chunk(b"tRNS", b"\0\0")),
    "PNG turned": lambda: _saved("RGB", "PNG", turned=True),
    "JPEG grey": lambda: _saved("L", "JPEG"),
    "JPEG RGB": lambda: _saved("RGB", "JPEG", subsampling=0),
    "JPEG CMYK": lambda: _saved("CMYK", "JPEG"),
    "JPEG progressive": lambda: _saved("RGB", "JPEG", progressive=True, subsampling=0),
    "JPEG progressive 4:2:0": lambda: _saved("RGB", "JPEG", progressive=True, subsampling=2),
    "JPEG progressive 4:2:2": lambda: _saved("RGB", "JPEG", progressive=True, subsampling=1),
    "JPEG progressive CMYK": lambda: _saved("CMYK", "JPEG", progressive=True),
    "JPEG turned": lambda: _saved("RGB", "JPEG", turned=True),
    "GIF": lambda: _saved("P", "GIF"),
    "GIF interlaced": lambda: _saved("P", "GIF", interlace=1),
    "GIF animated": lambda: _saved("P", "GIF", animated=True),
    "GIF with transparency": lambda: _saved("P", "GIF", transparency=0),
    "BMP RGB": lambda: _saved("RGB", "BMP"),
    "BMP RGBA": lambda: _saved("RGBA", "BMP"),
    "BMP grey": lambda: _saved("L", "BMP"),
    "BMP 1 bit": lambda: _saved("1", "BMP"),
    "BMP of runs": lambda: bmp_of_runs(WIDTH, HEIGHT),
    "WebP": lambda: _saved("RGB", "WebP", method=0),
    "WebP RGBA": lambda: _saved("RGBA", "WebP", method=0),
    "WebP lossless": lambda: _saved("RGBA", "WebP", lossless=True, method=0),
    "WebP animated": lambda: _saved("RGB", "WebP", animated=True, method=0),
    "WebP turned": lambda: _saved("RGB", "WebP", turned=True, method=0),
    "TIFF RGB": lambda: _tiff("uint8", 3, photometric="rgb"),
    "TIFF RGBA": lambda: _tiff("uint8", 4, photometric="rgb", extrasamples=["unassalpha"]),
    "TIFF in tiles": lambda: _tiff("uint8", 3, photometric="rgb", tile=(512, 512), compression="zlib"),
    "TIFF in planes": lambda: _saved_planes(),
    "TIFF 16 bits of grey": lambda: _tiff("uint16"),
    "TIFF 16 bits of RGB": lambda: _tiff("uint16", 3, photometric="rgb"),
    "TIFF floats": lambda: _tiff("float32"),
    "TIFF JPEG": lambda: _saved("RGB", "TIFF", compression="jpeg"),
    "TIFF LZW": lambda: _saved("CMYK", "TIFF", compression="tiff_lzw"),
    "TIFF fax": lambda: _saved("1", "TIFF", compression="group4"),
}


def _saved_planes() -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, np.zeros((3, HEIGHT, WIDTH), "uint8"), photometric="rgb", planarconfig="separate")
    return out.getvalue()


def gif_beyond_its_screen(width: int, height: int) -> bytes:
    """A screen of one pixel, and a first frame of that size, which leaves the background behind and is cut off."""
    screen = struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6)
    frame = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0)
    return b"GIF89a" + screen + b"\x21\xf9\x04\x08\0\0\0\0" + frame + b"\x02\x02\x44\x01\x00;"


def webp_of_one_colour(width: int, height: int) -> bytes:
    """A lossless WebP of 28 bytes: five codes of one symbol each."""
    bits: list[int] = []
    for value, count in ((0x2F, 8), (width - 1, 14), (height - 1, 14), (1, 1), (0, 6), *[(1, 4)] * 5):
        bits += [value >> i & 1 for i in range(count)]
    bits += [0] * (-len(bits) % 16)
    body = bytes(sum(bit << i for i, bit in enumerate(bits[at : at + 8])) for at in range(0, len(bits), 8))
    return b"RIFF" + struct.pack("<I", 12 + len(body)) + b"WEBPVP8L" + struct.pack("<I", len(body)) + body


class _Bits:
    """Bits from the lowest on, as a lossless WebP has them."""

    def __init__(self) -> None:
        self.value, self.count = 0, 0
        self.done = bytearray()

    def put(self, *fields: tuple[int, int]) -> None:
        for value, count in fields:
            self.value |= value << self.count
            self.count += count
        whole = self.count // 8
        self.done += (self.value & ((1 << 8 * whole) - 1)).to_bytes(whole, "little")
        self.value, self.count = self.value >> 8 * whole, self.count % 8


def webp_of_many_codes(side: int) -> bytes:
    """A lossless WebP of one colour with a set of prefix codes for each four by four pixels. Source: RFC 9649, 3."""
    bits, groups = _Bits(), (side // 4) ** 2
    single = (1, 4)  # a code of the symbol 0
    # 256 symbols of eight bits each: the lengths' own code has but the length 8.
    bytewise = [(0, 1), (8, 4), *[(0, 3)] * 11, (1, 3), (1, 1), (3, 3), (254, 8)]
    bits.put((0x2F, 8), (side - 1, 14), (side - 1, 14), (1, 1), (0, 3))
    bits.put((0, 2), (1, 1), (0, 3), (0, 1))  # no transform, no cache; an image of groups, 4 x 4, without a cache
    bits.put(*bytewise, *bytewise, single, single, single)
    for group in range(groups):
        bits.put(*((int(f"{byte:08b}"[::-1], 2), 8) for byte in (group & 255, group >> 8)))
    for _ in range(groups):
        bits.put(*[single] * 5)
    body = bytes(bits.done) + bytes((bits.value,))
    body += b"\0" * (len(body) % 2)
    return b"RIFF" + struct.pack("<I", 12 + len(body)) + b"WEBPVP8L" + struct.pack("<I", len(body)) + body


def jpeg_of_one_scan_of_three(width: int, height: int) -> bytes:
    """A sequential JPEG of three components that ends after the scan of its first."""
    small = io.BytesIO()
    Image.new("RGB", (16, 16)).save(small, "JPEG", subsampling=0)
    data = small.getvalue()
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    head = data[: frame + 5] + struct.pack(">HH", height, width) + data[frame + 9 : scan]
    return head + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" + bytes(50) + b"\xff\xd9"


def jpeg_with_a_profile(segments: int) -> bytes:
    """A small JPEG behind segments of a colour profile, of 64 KiB each."""
    small = io.BytesIO()
    Image.new("RGB", (16, 16)).save(small, "JPEG")
    data = small.getvalue()
    parts = (b"ICC_PROFILE\0" + bytes((i + 1, segments)) + bytes(65519) for i in range(segments))
    return data[:2] + b"".join(b"\xff\xe2\xff\xff" + part for part in parts) + data[2:]


def png_with_texts(count: int) -> bytes:
    """A small PNG with texts of a mebibyte that are Unicode for their last letter."""
    text = zlib.compress(("a" * (2**20 - 4) + "\N{GRINNING FACE}").encode())
    return png(4, 4, 8, 2, *(chunk(b"iTXt", b"k%d\0\1\0\0\0" % i + text) for i in range(count)))


def tiff_of_strips(count: int) -> bytes:
    """A TIFF of one column, each row a strip."""
    tags = [(256, 1), (257, count), (258, 8), (259, 1), (262, 1), (273, count), (277, 1), (278, 1)]
    start = 8 + 2 + 12 * len(tags) + 4
    values = b"".join(struct.pack("<HHII", t, 4, count if t == 273 else 1, start if t == 273 else v) for t, v in tags)
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + values + bytes(4)
    return head + struct.pack(f"<{count}I", *range(8, 8 + count))


HOSTILE: dict[str, Callable[[], bytes]] = {
    "GIF beyond its screen": lambda: gif_beyond_its_screen(5000, 5000),
    "WebP of 28 bytes": lambda: webp_of_one_colour(2000, 2000),
    "WebP of many codes": lambda: webp_of_many_codes(512),
    "JPEG of one scan of three": lambda: jpeg_of_one_scan_of_three(2500, 2500),
    "JPEG with a profile": lambda: jpeg_with_a_profile(200),
    "PNG with texts": lambda: png_with_texts(20),
    "TIFF of strips": lambda: tiff_of_strips(60_000),
}
"""Files whose pixels, or first bytes, say little of what they take."""
