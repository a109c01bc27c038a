"""isthmus.processing.image: real photos, every mode, and what is no image."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import sklearn.datasets
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import ImageMalformed, IsthmusError, MediaUnsupported, ModelError, RequestTooLarge, ShapeMismatch
from isthmus.processing.image import as_jpeg, preprocess
from isthmus.processing.image_decoding import MAX_SCANS, decode
from isthmus.processing.image_spec import has_canvas, validate_spec
from isthmus.processing.media import ACCEPTED, looks_like_image

PHOTOS = Path(skimage.data.__file__).parent
CHINA = Path(sklearn.datasets.__file__).parent / "images" / "china.jpg"
MAX = 10**6
INPUT = TensorSpec("input", "float32", ("batch", 3, 224, 224))
SPEC: dict[str, Any] = {
    "kind": "image",
    "input": "input",
    "steps": [
        {"op": "resize", "short_side": 256, "interpolation": "bicubic"},
        {"op": "center_crop", "size": [224, 224]},
        {"op": "normalize", "mean": [127, 127, 127], "std": [128, 128, 128]},
        {"op": "layout", "to": "NCHW"},
    ],
    "dtype": "float32",
}
PIXELS: dict[str, Any] = {
    "kind": "image",
    "input": "input",
    "steps": [{"op": "layout", "to": "NHWC"}],
    "dtype": "uint8",
}


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def pixels(data: bytes, max_pixels: int = MAX) -> np.ndarray:
    return np.asarray(decode(data, max_pixels=max_pixels))


def gradient(height: int = 40, width: int = 60) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack([x * 255 // (width - 1), y * 255 // (height - 1), 128 + 0 * x], axis=-1)
    return Image.fromarray(rgb.astype(np.uint8))


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 2, body: bytes = b"") -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    data = png_chunk(b"IDAT", zlib.compress(body)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + data


@pytest.mark.parametrize("name", ["chelsea.png", "coffee.png", "astronaut.png", "rocket.jpg", "camera.png", "china"])
def test_a_photo_becomes_the_same_input_as_by_hand(name: str) -> None:
    path = CHINA if name == "china" else PHOTOS / name
    array = preprocess(path.read_bytes(), SPEC, input=INPUT, max_pixels=MAX)
    image = Image.open(path).convert("RGB")
    short = min(image.size)
    image = image.resize((256 * image.width // short, 256 * image.height // short), Image.Resampling.BICUBIC)
    top, left = round((image.height - 224) / 2), round((image.width - 224) / 2)
    by_hand = np.asarray(image)[top : top + 224, left : left + 224].transpose(2, 0, 1)
    np.testing.assert_array_equal(array[0], (by_hand.astype(np.float32) - 127) / 128)
    assert array.flags.c_contiguous
    assert array.dtype == np.float32
    assert array.shape == (1, 3, 224, 224)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WebP"])
def test_lossless_formats_decode_to_the_same_pixels(format: str) -> None:
    data = saved(gradient(), format, **({"lossless": True} if format == "WebP" else {}))
    np.testing.assert_array_equal(pixels(data), np.asarray(gradient()))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF"])
def test_the_first_bytes_name_the_media_type(format: str) -> None:
    assert looks_like_image(saved(gradient(), format)) == f"image/{format.lower()}"
    assert f"image/{format.lower()}" in ACCEPTED


def test_other_bytes_name_no_media_type() -> None:
    for data in (b"", b"BM", b"BMW is a car maker in Bavaria", b"RIFF1234WAVE", b"{}", b"\xff\xd8"):
        assert looks_like_image(data) is None


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WebP"])
def test_an_image_is_turned_upright_by_its_exif(orientation: int, format: str) -> None:
    upright = Image.fromarray(np.kron([[255, 0, 64], [128, 200, 32]], np.ones((16, 16))).astype(np.uint8)).convert(
        "RGB"
    )
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(turns[orientation]) if orientation in turns else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = pixels(saved(stored, format, exif=exif, **({"quality": 95} if format == "JPEG" else {})))
    assert got.shape == (32, 48, 3)
    assert np.abs(got.astype(int) - np.asarray(upright)).max() <= 12


def test_what_is_transparent_lies_over_white() -> None:
    rgba = Image.new("RGBA", (2, 1))
    rgba.putpixel((0, 0), (0, 0, 0, 0))
    rgba.putpixel((1, 0), (255, 0, 0, 128))
    for data in (saved(rgba, "PNG"), saved(rgba, "WebP", lossless=True, exact=True), saved(rgba, "TIFF")):
        assert pixels(data).tolist() == [[[255, 255, 255], [255, 127, 127]]]
    grey = Image.new("LA", (2, 1), (0, 0))
    grey.putpixel((1, 0), (40, 255))
    assert pixels(saved(grey, "PNG")).tolist() == [[[255] * 3, [40] * 3]]


def test_a_transparent_palette_entry_lies_over_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((1, 0), 1)
    for data in (saved(image, "PNG", transparency=0), saved(image, "GIF", transparency=0)):
        assert pixels(data).tolist() == [[[255] * 3, [10, 20, 30]]]
    assert pixels(saved(image, "PNG", transparency=b"\x00\x80")).tolist() == [[[255] * 3, [132, 137, 142]]]
    assert pixels(saved(image, "PNG")).tolist() == [[[0] * 3, [10, 20, 30]]]


def test_a_transparent_colour_key_lies_over_white() -> None:
    rgb = Image.new("RGB", (2, 1), (1, 2, 3))
    rgb.putpixel((1, 0), (4, 5, 6))
    assert pixels(saved(rgb, "PNG", transparency=(1, 2, 3))).tolist() == [[[255] * 3, [4, 5, 6]]]
    grey = Image.new("L", (2, 1), 7)
    grey.putpixel((1, 0), 8)
    assert pixels(saved(grey, "PNG", transparency=7)).tolist() == [[[255] * 3, [8] * 3]]
    bits = Image.new("1", (2, 1), 0)
    bits.putpixel((1, 0), 1)
    assert pixels(saved(bits, "PNG")).tolist() == [[[0] * 3, [255] * 3]]
    key = png_chunk(b"tRNS", struct.pack(">HHH", 0x0102, 0x0304, 0x0506))
    wide = png(2, 1, key, depth=16, body=struct.pack(">xHHHHHH", 0x0102, 0x0304, 0x0506, 0xFF00, 0x8000, 0x10FF))
    assert pixels(wide).tolist() == [[[255] * 3, [255, 128, 16]]]


def test_a_transparent_colour_of_sixteen_bits_is_compared_in_all_of_them() -> None:
    key = png_chunk(b"tRNS", struct.pack(">HHH", 0, 0x0100, 0))
    row = struct.pack(">xHHHHHHHHH", 0, 0x0100, 0, 1, 0x0100, 0, 0, 0x0100, 255)
    assert pixels(png(3, 1, key, depth=16, body=row)).tolist() == [[[255] * 3, [0, 1, 0], [0, 1, 0]]]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(("kind", "stored"), [("assocalpha", 100), ("unassalpha", 200)])
def test_colours_of_a_tiff_that_alpha_was_applied_to_are_restored(kind: Any, stored: int, dtype: type) -> None:
    unit = np.iinfo(dtype).max // 255
    out = io.BytesIO()
    rgba = np.array([[[stored, 0, 0, 128], [0, 0, 0, 0]]]) * unit
    tifffile.imwrite(out, rgba.astype(dtype), photometric="rgb", extrasamples=[kind])
    got = pixels(out.getvalue()).astype(int)
    assert np.abs(got[0] - [[227, 127, 127], [255, 255, 255]]).max() <= 1
    if dtype == np.uint8:
        out = io.BytesIO()
        grey = np.array([[[stored, 128], [0, 0]]], dtype)
        tifffile.imwrite(out, grey, photometric="minisblack", extrasamples=[kind])
        assert np.abs(pixels(out.getvalue()).astype(int)[0, :, 0] - [227, 255]).max() <= 1


@pytest.mark.parametrize(
    ("depth", "row", "key", "expected"),
    [
        (1, [0b01010000], 1, [0, 255, 0, 255]),
        (2, [0b00011011], 1, [0, 255, 170, 255]),
        (2, [0b00011011], 0xFFFC | 2, [0, 85, 255, 255]),
        (4, [0x01, 0x8F], 8, [0, 17, 255, 255]),
        (8, [0, 1, 200, 255], 200, [0, 1, 255, 255]),
        (8, [0, 1, 200, 254], 0x1200 | 200, [0, 1, 255, 254]),
        (16, [0, 0, 1, 0, 2, 5, 250, 0], 0x0205, [0, 1, 255, 249]),
    ],
)
def test_a_transparent_grey_of_any_depth_lies_over_white(
    depth: int, row: list[int], key: int, expected: list[int]
) -> None:
    data = png(4, 1, png_chunk(b"tRNS", struct.pack(">H", key)), depth=depth, colour=0, body=bytes([0, *row]))
    assert pixels(data)[0, :, 0].tolist() == expected


def bmp32(masks: tuple[int, int, int, int] | None, colours: list[tuple[int, int, int, int]]) -> bytes:
    """One row of 32-bit pixels, blue first; without masks a plain BITMAPINFOHEADER."""
    size, compression = (40, 0) if masks is None else (56, 3)
    info = struct.pack("<IiiHHIIiiII", size, len(colours), 1, 1, 32, compression, 0, 0, 0, 0, 0)
    head = info + (struct.pack("<4I", *masks) if masks is not None else b"")
    body = b"".join(bytes((b, g, r, a)) for r, g, b, a in colours)
    return b"BM" + struct.pack("<IHHI", 14 + len(head) + len(body), 0, 0, 14 + len(head)) + head + body


BGRA = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)


@pytest.mark.parametrize(
    ("masks", "alphas", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), [(200, 100, 50), (1, 2, 3)]),
        ((0, 0, 0, 0), (255, 0), [(200, 100, 50), (1, 2, 3)]),
        ((0xFF0000, 0xFF00, 0xFF, 0), (0, 255), [(200, 100, 50), (1, 2, 3)]),
        (BGRA, (0, 0), [(200, 100, 50), (1, 2, 3)]),
        (BGRA, (255, 0), [(200, 100, 50), (255, 255, 255)]),
        (None, (0, 0), [(200, 100, 50), (1, 2, 3)]),
    ],
)
def test_a_bmp_without_alpha_is_opaque(
    masks: tuple[int, int, int, int] | None, alphas: tuple[int, int], expected: list[tuple[int, int, int]]
) -> None:
    data = bmp32(masks, [(200, 100, 50, alphas[0]), (1, 2, 3, alphas[1])])
    assert pixels(data)[0].tolist() == [list(colour) for colour in expected]


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    values = np.array([[0, 256, 257, 32768, 65535]], np.uint16)
    want = [0, 1, 1, 128, 255]
    for data in (saved(Image.fromarray(values), "PNG"), saved(Image.fromarray(values), "TIFF")):
        assert pixels(data)[0, :, 0].tolist() == want
    big_endian = Image.frombytes("I;16B", (5, 1), values.astype(">u2").tobytes())
    assert pixels(saved(big_endian, "TIFF"))[0, :, 1].tolist() == want
    key = png_chunk(b"tRNS", struct.pack(">H", 256))
    keyed = png(5, 1, key, depth=16, colour=0, body=b"\0" + values.astype(">u2").tobytes())
    assert pixels(keyed)[0, :, 0].tolist() == [0, 255, 1, 128, 255]


def test_white_is_zero_in_a_sixteen_bit_tiff() -> None:
    image = Image.fromarray(np.array([[0, 65535]], np.uint16))
    assert pixels(saved(image, "TIFF", tiffinfo={262: 0}))[0, :, 0].tolist() == [255, 0]


def test_floats_from_zero_to_one_are_scaled_and_others_refused() -> None:
    image = Image.fromarray(np.array([[0, 0.5, 1]], np.float32))
    assert pixels(saved(image, "TIFF"))[0, :, 2].tolist() == [0, 128, 255]
    for bad in (-1.0, 1.5, float("nan")):
        with pytest.raises(MediaUnsupported, match="no stated range") as e:
            pixels(saved(Image.fromarray(np.array([[0, bad]], np.float32)), "TIFF"))
        assert e.value.facts["got"] == "F"
    with pytest.raises(MediaUnsupported):
        pixels(saved(Image.fromarray(np.array([[0, 2**20]], np.int32)), "TIFF"))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB"])
def test_every_mode_becomes_rgb_of_about_the_same_colours(mode: str) -> None:
    want = np.asarray(gradient().convert("L").convert("RGB") if mode in ("1", "L") else gradient()).astype(int)
    data = saved(gradient().convert(mode), "TIFF")
    got = pixels(data).astype(int)
    assert got.shape == want.shape
    assert abs(got.mean() - want.mean()) < (4 if mode != "LAB" else 40)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK", "YCbCr"])
def test_every_jpeg_mode_decodes(mode: str) -> None:
    want = np.asarray(gradient().convert("L").convert("RGB") if mode == "L" else gradient()).astype(int)
    got = pixels(saved(gradient().convert(mode), "JPEG", quality=95)).astype(int)
    assert np.abs(got - want).mean() < 3


def test_a_ycck_jpeg_decodes() -> None:
    # Adobe's transform 2 on four components; the samples are only relabelled, so the colours are not the gradient's.
    data = saved(gradient().convert("CMYK"), "JPEG", quality=95)
    at = data.find(b"Adobe")
    ycck = data if at < 0 else data[: at + 11] + b"\x02" + data[at + 12 :]
    assert pixels(ycck).shape == (40, 60, 3)


def test_the_first_picture_of_many_is_taken() -> None:
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    for format in ("GIF", "TIFF", "PNG", "WebP", "MPO"):
        options: dict[str, Any] = {"lossless": True} if format == "WebP" else {}
        got = pixels(saved(red, format, save_all=True, append_images=[blue], **options))
        assert np.abs(got.reshape(-1, 3).astype(int) - [255, 0, 0]).max() <= 1
    assert pixels((PHOTOS / "no_time_for_that_tiny.gif").read_bytes()).ndim == 3
    assert pixels((PHOTOS / "multipage.tif").read_bytes()).shape == (15, 10, 3)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF"])
def test_one_pixel_is_an_image(format: str) -> None:
    array = preprocess(saved(Image.new("RGB", (1, 1), "white"), format), SPEC, input=INPUT, max_pixels=MAX)
    np.testing.assert_allclose(array, 1, atol=0.02)


@pytest.mark.parametrize("name", ["chelsea.png", "rocket.jpg", "no_time_for_that_tiny.gif", "multipage_rgb.tif"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_truncated_image_is_malformed(name: str, share: float) -> None:
    data = (PHOTOS / name).read_bytes()
    # A GIF's first frame may be whole although its later ones are not.
    share = share / 10 if name.endswith("gif") else share
    with pytest.raises(ImageMalformed) as e:
        pixels(data[: int(len(data) * share)])
    assert e.value.facts["media"].startswith("image/")
    assert e.value.facts["reason"]


@pytest.mark.parametrize(
    ("data", "looks"),
    [
        (b"%PDF-1.7 ...", "PDF"),
        (b'{"image": "..."}', "JSON"),
        (b"  [1, 2]", "JSON"),
        (b"hello", "text"),
        (b"\x00\x00\x00\x20ftypavif", "AVIF, HEIC or a film"),
        (b"<svg xmlns=''/>", "SVG"),
        (b"%!PS-Adobe-3.0 EPSF", "PostScript"),
        (b"/9j/4AAQSkZJRg", "a JPEG in base64"),
        (b"data:image/png;base64,iVBO", "a data: URL"),
        (b"R0lGODlhAQABAIAAAP", "a GIF in base64"),
        (b"image=%89PNG", "a form in the URL's encoding"),
        (b"--boundary\r\n\r\n", "a form (multipart/form-data) that is not one"),
        (b"\x89PNG\x1a", "a PNG whose line breaks were changed, as curl -d does"),
        (b"\x00\x01\x02\x03", "unknown binary data"),
    ],
)
def test_what_is_no_image_is_unsupported_and_described(data: bytes, looks: str) -> None:
    with pytest.raises(MediaUnsupported) as e:
        pixels(data)
    assert e.value.facts["looks_like"] == looks
    assert e.value.facts["accepted"] == ACCEPTED


def test_an_empty_body_is_malformed() -> None:
    with pytest.raises(ImageMalformed, match="empty"):
        pixels(b"")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF"])
def test_more_pixels_than_the_limit_are_refused_with_it(format: str) -> None:
    data = saved(gradient(), format)
    assert pixels(data, 2400).shape == (40, 60, 3)
    with pytest.raises(RequestTooLarge) as e:
        pixels(data, 2399)
    assert e.value.facts == {"limit": 2399, "pixels": 2400}


def test_a_bomb_is_refused_by_its_header() -> None:
    gif = b"GIF89a" + struct.pack("<HH", 13000, 13000) + saved(gradient(), "GIF")[10:]
    bmp = bytearray(saved(gradient(), "BMP"))
    bmp[18:26] = struct.pack("<ii", 30000, 30000)
    webp = bytearray(saved(Image.new("RGBA", (60, 40), (1, 2, 3, 99)), "WebP"))
    assert webp[12:16] == b"VP8X"
    webp[24:30] = b"\xff\x3f\x00\xff\x3f\x00"
    for data in (png(2**30, 2**30), png(20_000, 20_000), gif, bytes(bmp), bytes(webp)):
        with pytest.raises(RequestTooLarge) as e:
            pixels(data)
        assert e.value.facts["limit"] == MAX


def test_a_tiff_whose_tile_is_a_bomb_is_refused() -> None:
    out = io.BytesIO()
    tifffile.imwrite(out, np.zeros((16, 16, 3), np.uint8), tile=(4096, 4096), compression="zlib", photometric="rgb")
    with pytest.raises(RequestTooLarge) as e:
        pixels(out.getvalue())
    assert e.value.facts == {"limit": MAX, "pixels": 4096 * 4096}
    assert pixels(out.getvalue(), 4096 * 4096).shape == (16, 16, 3)


def test_a_png_whose_text_is_a_bomb_is_refused() -> None:
    bomb = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(50_000_000), 9))
    with pytest.raises(ImageMalformed) as e:
        pixels(png(1, 1, bomb, body=b"\0\0\0\0"))
    assert "too large" in e.value.facts["reason"]
    many = [png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1_000_000), 9))] * 80
    with pytest.raises(RequestTooLarge, match="compressed texts"):
        pixels(png(1, 1, *many, body=b"\0\0\0\0"))


def test_a_jpeg_of_too_many_scans_is_refused() -> None:
    data = saved(gradient(), "JPEG", progressive=True)
    assert pixels(data).shape == (40, 60, 3)
    last = data.rindex(b"\xff\xda")
    with pytest.raises(RequestTooLarge) as e:
        pixels(data[:last] + data[last:-2] * (MAX_SCANS + 1) + data[-2:])
    assert e.value.facts["limit"] == MAX_SCANS


def test_an_image_that_would_be_resized_beyond_the_limit_is_refused() -> None:
    with pytest.raises(RequestTooLarge):
        preprocess(saved(Image.new("RGB", (20_000, 1)), "PNG"), SPEC, input=INPUT, max_pixels=MAX)


def test_oddities_that_pillow_warns_about_pass_without_a_warning() -> None:
    actl = png_chunk(b"acTL", struct.pack(">II", 0, 0))
    assert pixels(png(1, 1, actl, body=b"\0\1\2\3")).tolist() == [[[1, 2, 3]]]
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0\x12\x01\x03\0\x01\0\0\0"
    assert pixels(saved(gradient(), "JPEG", exif=exif)).shape == (40, 60, 3)


def test_a_small_image_is_padded_with_black_to_the_crop() -> None:
    spec = PIXELS | {"steps": [{"op": "center_crop", "size": [4, 3]}, {"op": "layout", "to": "NHWC"}]}
    array = preprocess(
        saved(Image.new("RGB", (1, 2), "white"), "PNG"),
        spec,
        input=TensorSpec("input", "uint8", (1, 4, 3, 3)),
        max_pixels=MAX,
    )
    assert array[0, :, :, 0].tolist() == [[0, 0, 0], [0, 255, 0], [0, 255, 0], [0, 0, 0]]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_dtype_and_layout_are_as_the_spec_says(dtype: str, layout: str) -> None:
    steps = [
        {"op": "resize", "size": [8, 12], "interpolation": "nearest"},
        {"op": "normalize", "mean": [0, 0.5, 1], "std": [1, 2, 4.0]},
        {"op": "layout", "to": layout},
    ]
    shape = (1, 3, 8, 12) if layout == "NCHW" else (1, 8, 12, 3)
    data = saved(Image.new("RGB", (5, 5), (10, 20, 30)), "PNG")
    array = preprocess(
        data,
        SPEC | {"steps": steps, "dtype": dtype},
        input=TensorSpec("input", dtype, shape),
        max_pixels=MAX,
    )
    assert (array.dtype.name, array.shape, array.flags.c_contiguous) == (dtype, shape, True)
    channels = array[0, :, 0, 0] if layout == "NCHW" else array[0, 0, 0]
    np.testing.assert_allclose(channels.astype(np.float64), [10, 9.75, 7.25], rtol=0.01)


@pytest.mark.parametrize(
    "input",
    [
        TensorSpec("other", "float32", (1, 3, 224, 224)),
        TensorSpec("input", "float16", (1, 3, 224, 224)),
        TensorSpec("input", "float32", (1, 224, 224, 3)),
        TensorSpec("input", "float32", (3, 224, 224)),
        TensorSpec("input", "float32", (8, 3, 224, 224)),
    ],
)
def test_an_array_that_the_model_does_not_take_is_a_mismatch(input: TensorSpec) -> None:
    with pytest.raises(ShapeMismatch) as e:
        preprocess(saved(gradient(), "PNG"), SPEC, input=input, max_pixels=MAX)
    assert e.value.facts["got"] == "input: float32 [1, 3, 224, 224]"
    assert e.value.facts["expected"].startswith(input.name)


def without(step: int, key: str) -> dict[str, Any]:
    steps = [dict(s) for s in SPEC["steps"]]
    del steps[step][key]
    return SPEC | {"steps": steps}


def with_step(at: int, **changes: Any) -> dict[str, Any]:
    steps = [dict(s) for s in SPEC["steps"]]
    steps[at] |= changes
    return SPEC | {"steps": steps}


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({}, "lacks dtype, input, kind, steps"),
        (SPEC | {"kind": "audio"}, "'audio'"),
        (SPEC | {"extra": 1}, "unknown keys: extra"),
        (SPEC | {"dtype": "int4"}, "'int4'"),
        (SPEC | {"dtype": "uint8"}, "normalizes into uint8"),
        (SPEC | {"steps": "resize"}, "not a list"),
        (SPEC | {"steps": SPEC["steps"][::-1]}, "in the order"),
        (SPEC | {"steps": SPEC["steps"][:1] * 2 + SPEC["steps"][1:]}, "at most once"),
        (SPEC | {"steps": SPEC["steps"][:-1]}, "no layout"),
        (with_step(0, op="blur"), "'blur'"),
        (with_step(0, op=["resize"]), "resize"),
        (with_step(0, interpolation="cubic"), "'cubic'"),
        (with_step(0, short_side=0), "short_side is 0"),
        (with_step(0, short_side=True), "short_side is True"),
        (with_step(0, size=[8, 8]), "unknown keys: short_side"),
        (with_step(1, size=[8]), "height, width"),
        (with_step(2, mean=[1, 2]), "three numbers"),
        (with_step(2, std=[1, 0, 1]), "zero"),
        (with_step(2, std=[1, float("inf"), 1]), "three numbers"),
        (with_step(3, to="CHWN"), "'CHWN'"),
        (without(0, "short_side"), "lacks short_side"),
        (without(1, "size"), "lacks size"),
        (without(2, "std"), "lacks std"),
        (without(3, "to"), "lacks to"),
        (without(0, "op"), "step is None"),
    ],
)
def test_a_spec_that_cannot_be_carried_out_is_refused(spec: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        validate_spec(spec)


def test_good_specs_are_accepted() -> None:
    validate_spec(SPEC)
    validate_spec(PIXELS)


SEEDS = [saved(gradient(9, 7), f) for f in ("JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF")] + [
    saved(gradient(9, 7), "TIFF", compression="tiff_deflate"),
    saved(gradient(9, 7), "JPEG", progressive=True),
]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
    st.floats(0, 1),
)
def test_a_mutated_image_decodes_or_is_refused(seed: bytes, flips: list[tuple[float, int]], share: float) -> None:
    data = bytearray(seed)
    for at, value in flips:
        data[int(at * len(data))] = value
    try:
        image = decode(bytes(data[: int(len(data) * share) + 1]), max_pixels=10_000)
    except IsthmusError:
        return
    assert image.mode == "RGB"
    assert image.width * image.height <= 10_000


def spec_of(*steps: dict[str, Any]) -> dict[str, Any]:
    layout = {"op": "layout", "to": "NCHW"}
    return {"kind": "image", "input": "input", "steps": [*steps, layout], "dtype": "float32"}


def resize(**size: Any) -> dict[str, Any]:
    return {"op": "resize", "interpolation": "bilinear", **size}


def crop(*size: int) -> dict[str, Any]:
    return {"op": "center_crop", "size": list(size)}


@pytest.mark.parametrize(
    ("steps", "canvas"),
    [
        ([resize(short_side=96), crop(80, 80)], (96, 96)),
        ([resize(short_side=97), crop(80, 64)], (97, 97)),
        ([resize(short_side=96), crop(80, 112)], (112, 96)),
        ([resize(short_side=96), crop(112, 80)], (96, 112)),
        ([resize(size=[96, 128])], (128, 96)),
        ([resize(size=[96, 128]), crop(65, 80)], (128, 96)),
        ([crop(60, 80)], (80, 60)),
    ],
)
def test_a_jpeg_of_what_the_model_takes_is_cropped_where_the_photo_is(
    steps: list[dict[str, Any]], canvas: tuple[int, int]
) -> None:
    # Grey squares on a slope: one pixel beside is far more than the compression changes.
    y, x = np.mgrid[:200, :300]
    grey = np.where((y // 16 + x // 16) % 2, 40 + x // 3, 250 - y // 2).astype(np.uint8)
    photo = saved(Image.fromarray(np.stack([grey] * 3, axis=-1)), "PNG", icc_profile=b"profile" * 100)
    spec = spec_of(*steps)
    assert has_canvas(spec)
    compressed = as_jpeg(photo, spec, 95, max_pixels=MAX)
    assert Image.open(io.BytesIO(compressed)).size == canvas
    assert b"profile" not in compressed
    tensor = TensorSpec("input", "float32", (1, 3, "h", "w"))
    expected, found = (preprocess(d, spec, input=tensor, max_pixels=MAX) for d in (photo, compressed))
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() < 2


def test_a_crop_that_the_resized_sides_may_cut_has_no_jpeg() -> None:
    assert not has_canvas(spec_of(resize(short_side=64), crop(80, 80)))
    assert not has_canvas(spec_of(resize(size=[64, 100]), crop(80, 80)))


def test_a_lower_quality_takes_fewer_bytes_and_bad_photos_are_refused_as_ever() -> None:
    sizes = [len(as_jpeg(CHINA.read_bytes(), SPEC, quality, max_pixels=MAX)) for quality in (50, 85, 95)]
    assert sizes == sorted(set(sizes))
    with pytest.raises(ImageMalformed):
        as_jpeg(CHINA.read_bytes()[:200], SPEC, 85, max_pixels=MAX)
    with pytest.raises(RequestTooLarge):
        as_jpeg(CHINA.read_bytes(), SPEC, 85, max_pixels=1000)
