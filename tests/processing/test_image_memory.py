"""What decoding pictures takes: estimates that hold, a budget that pictures share, and files of too many parts."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import threading
import tracemalloc
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
from PIL import Image

from isthmus.admission import Slots
from isthmus.artifacts.tensors import TensorSpec
from isthmus.context import Deadline
from isthmus.errors import Overloaded, RequestTooLarge
from isthmus.processing.image import preprocess
from isthmus.processing.image_budget import ImageMemory
from isthmus.processing.image_decoding import decode
from isthmus.processing.image_memory import (
    MAX_BLOCKS,
    MAX_CHUNKS,
    MAX_MARKERS,
    MAX_RUNS_BYTES,
    MAX_TABLES_BYTES,
    MAX_TEXTS,
    MAX_TIFF_STRIPS,
    MAX_TIFF_VALUES,
)
from support.bundles import photo
from support.bundles import photos as photos
from support.image_files import (
    FILES,
    HOSTILE,
    SPEC,
    chunk,
    gif_beyond_its_screen,
    jpeg_of_one_scan_of_three,
    jpeg_with_a_profile,
    png_with_texts,
    tiff_of_strips,
    webp_of_one_colour,
)
from support.paths import ROOT
from support.patience import LONG_S, until
from support.routers import chain as chain
from support.routers import local_router

PNG_START = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
GIF_START = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0)
INPUT = TensorSpec("x", "float32", (1, 3, 64, 64))
EMPTY = chunk(b"IDAT", b"")


def bmp_of_runs(length: int) -> bytes:
    """A BMP of 8-bit pixels in runs of one."""
    header = struct.pack("<IiiHHIIiiII", 40, 2000, 2000, 1, 8, 1, length, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + length, 0, 0, 1078) + header + bytes(1024) + b"\x01\x05" * (length // 2)


def peaks_of(names: Iterable[str]) -> list[dict[str, Any]]:
    """The reserved and the measured memory of these files, decoded in a process without other pictures."""
    tests = ROOT / "tests"
    done = subprocess.run(
        [sys.executable, tests / "support" / "image_peaks.py", *names],
        env={**os.environ, "PYTHONPATH": str(tests)},
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
def test_no_picture_takes_more_than_it_holds_of_the_budget() -> None:
    found = peaks_of(FILES)
    assert {f["name"] for f in found} == set(FILES)
    for way in ("exact", "reduced", "whole"):
        for f in found:
            if way in f and not f[way]["error"]:
                # Six of the megabytes that every picture holds beside its pixels are room for others' noise.
                assert f[way]["rose"] < f[way]["held"] - 6e6, (f["name"], way, f[way])
                if f["name"] not in ("WebP RGBA", "WebP lossless"):  # whose tables of codes may take any amount
                    assert f[way]["held"] < 12.6e6 + 27 * 2000 * 1600 + 40 * 2000 * 1600 * (way == "whole"), f["name"]
    assert not [f["name"] for f in found if f["exact"]["error"]]
    refused = {f["name"] for f in found if f["reduced"]["error"]}
    assert all(name.startswith("WebP") or name == "JPEG progressive CMYK" for name in refused), refused


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
def test_no_file_takes_more_than_it_holds_whatever_its_first_bytes_say() -> None:
    found = peaks_of(HOSTILE)
    assert {f["name"] for f in found} == set(HOSTILE)
    for f in found:
        assert 0 < f["rose"] < f["held"] - 6e6, f
        assert f["held"] < 8 * f["rose"] + 20e6, f


def test_a_lossless_webp_waits_until_it_is_alone_and_is_not_refused() -> None:
    out = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)
    Image.fromarray(noise).save(out, "WebP", lossless=True, method=0)

    class Seen(ImageMemory):
        asked = 0

        def taken(self, count: int) -> Any:
            self.asked = count
            return super().taken(count)

    memory = Seen(60_000_000)
    assert preprocess(out.getvalue(), SPEC, input=INPUT, max_pixels=10**6, memory=memory).shape == (1, 3, 64, 64)
    assert memory.asked == memory.limit


@pytest.mark.parametrize(
    "data",
    [
        gif_beyond_its_screen(9000, 9000),
        webp_of_one_colour(8000, 8000),
        jpeg_of_one_scan_of_three(8000, 8000),
        png_with_texts(64),
        jpeg_with_a_profile(250),
    ],
    ids=["GIF", "WebP", "JPEG", "PNG", "profile"],
)
def test_a_file_that_takes_too_much_is_refused_before_it_is_opened_or_decoded(data: bytes) -> None:
    memory = ImageMemory(45_000_000)
    with pytest.raises(RequestTooLarge) as e:
        preprocess(data, SPEC, input=INPUT, max_pixels=64_000_000, memory=memory)
    assert e.value.facts["limit"] in (64_000_000, 45_000_000)
    assert memory.held == 0


def test_an_opened_file_that_waits_keeps_none_of_its_texts() -> None:
    class Counting(ImageMemory):
        asked = 0

        def taken(self, count: int) -> Any:
            self.asked += 1
            return super().taken(count)

    memory = Counting(60_000_000)
    given: dict[str, Any] = {"input": INPUT, "max_pixels": 10**4, "memory": memory}
    waiting = threading.Thread(target=preprocess, args=(png_with_texts(2), SPEC), kwargs=given)
    tracemalloc.start()
    try:
        with memory.taken(48_000_000):  # room for opening, none for decoding
            waiting.start()
            assert until(lambda: memory.asked == 3 and memory.waiting == 1)
            # Other threads' allocations pass; a text that the waiting call keeps would stay.
            assert until(lambda: tracemalloc.get_traced_memory()[0] < 3e6)
    finally:
        tracemalloc.stop()
        waiting.join(LONG_S)
    assert memory.held == 0


@pytest.mark.parametrize(
    ("format", "mode"),
    [("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "L"), ("PNG", "I;16"), ("JPEG", "RGB"), ("JPEG", "CMYK")],
)
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_reduced_picture_is_nearly_the_same_input(format: str, mode: str, orientation: int) -> None:
    image = Image.fromarray(skimage.data.astronaut()).resize((1500, 1100), Image.Resampling.BICUBIC)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    image.save(out, format, exif=exif)
    exact = preprocess(out.getvalue(), SPEC, input=INPUT, max_pixels=10**7)
    small = ImageMemory(26_000_000)
    reduced = preprocess(out.getvalue(), SPEC, input=INPUT, max_pixels=10**7, memory=small)
    assert small.held == 0
    differ = np.abs(exact - reduced)
    assert differ.max() > 0, "it was reduced"
    assert differ.mean() < 1
    assert differ.max() < 16


@pytest.mark.parametrize(
    "data",
    [
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 64_000_000, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b""),
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 100, 0, 0, 54, 40, 1, 64_000_000, 1, 24, 0, 0, 0, 0, 0, 0),
        b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0),
        b"RIFF" + struct.pack("<I", 50) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + b"\xff\xff\x00\xff\xff\x00",
    ],
    ids=["PNG", "BMP", "GIF", "WebP"],
)
def test_a_header_that_announces_more_than_there_is_memory_is_refused_at_once(data: bytes) -> None:
    with pytest.raises(RequestTooLarge) as e:
        decode(data, max_pixels=2**33)
    assert e.value.facts["bytes"] > e.value.facts["limit"]
    with pytest.raises(RequestTooLarge):
        preprocess(data, SPEC, input=INPUT, max_pixels=64_000_000)


@pytest.mark.parametrize(
    ("data", "limit"),
    [
        (b"\xff\xd8" + b"\xff\xe5\x00\x02" * (MAX_MARKERS + 1) + b"\xff\xd9", MAX_MARKERS),
        (b"\x89PNG\r\n\x1a\n" + chunk(b"vpAg", b"") * (MAX_CHUNKS + 1), MAX_CHUNKS),
        (b"II*\0\x08\0\0\0" + struct.pack("<HHHII", 1, 320, 4, MAX_TIFF_VALUES + 1, 26), MAX_TIFF_VALUES),
        (b"MM\0+\0\x08\0\0" + struct.pack(">QQHHQQ", 16, 1, 320, 16, MAX_TIFF_VALUES + 1, 99), MAX_TIFF_VALUES),
        (tiff_of_strips(MAX_TIFF_STRIPS + 1), MAX_TIFF_STRIPS),
        # What Pillow reads in Python: as many of these as fit into a body took a function minutes.
        (PNG_START + chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(2**20))) * (MAX_TEXTS + 1), MAX_TEXTS),
        (b"\xff\xd8" + (b"\xff\xdb\xff\xff" + bytes(65533)) * 33, MAX_TABLES_BYTES),
        (b"\xff\xd8" + (b"\xff\xe1\xff\xffExif\0\0" + bytes(65527)) * 33, MAX_TABLES_BYTES),
        (b"\xff\xd8" + (b"\xff\xed\xff\xff" + bytes(65533)) * 33, MAX_TABLES_BYTES),
        (GIF_START + bytes(MAX_BLOCKS + 20), MAX_BLOCKS),
        (GIF_START + b"\x21\xfe\x01a\0" * MAX_BLOCKS, MAX_BLOCKS),
        (bmp_of_runs(MAX_RUNS_BYTES), MAX_RUNS_BYTES),
    ],
    ids=[
        "JPEG",
        "PNG",
        "TIFF",
        "BigTIFF",
        "strips",
        "profiles",
        "tables",
        "Exif",
        "Photoshop",
        "stray",
        "blocks",
        "runs",
    ],
)
def test_a_file_of_too_many_parts_is_refused_before_they_are_read(data: bytes, limit: int) -> None:
    with pytest.raises(RequestTooLarge, match="more than") as e:
        decode(data, max_pixels=10**6)
    assert e.value.facts["limit"] == limit


def test_a_tiff_of_many_jpeg_strips_is_read() -> None:
    out = io.BytesIO()
    Image.new("RGB", (16, 16 * 300), "red").save(out, "TIFF", compression="jpeg", tiffinfo={278: 16})
    assert decode(out.getvalue(), max_pixels=10**6).size == (16, 4800)


def test_pictures_wait_for_each_other_in_their_order() -> None:
    memory, order = ImageMemory(100), list[str]()
    first_waits, let_go = threading.Event(), threading.Event()

    def take(name: str, count: int) -> None:
        with memory.taken(count):
            order.append(name)

    def hold() -> None:
        with memory.taken(60):
            first_waits.set()
            let_go.wait(LONG_S)

    holder = threading.Thread(target=hold)
    holder.start()
    assert first_waits.wait(LONG_S)
    large = threading.Thread(target=take, args=("large", 80))
    large.start()
    assert until(lambda: memory.waiting == 1)
    small = threading.Thread(target=take, args=("small", 10))
    small.start()
    assert until(lambda: memory.waiting == 2)
    assert order == [], "the small one would fit, and does not pass the large one by"
    let_go.set()
    for thread in (holder, large, small):
        thread.join(LONG_S)
    assert order == ["large", "small"]
    assert memory.held == 0


def test_a_picture_waits_for_half_of_what_its_deadline_leaves() -> None:
    memory, slots = ImageMemory(100), Slots(4)
    with memory.taken(100), slots.admitted(Deadline.after(0.2)), pytest.raises(Overloaded) as e, memory.taken(1):
        pass
    assert e.value.facts["retry_after_s"] == 1
    assert (e.value.facts["limit"], e.value.facts["bytes"]) == (100, 1)
    with memory.taken(100):
        assert memory.held == 100


def test_a_picture_that_fails_gives_its_memory_back() -> None:
    memory = ImageMemory()
    with pytest.raises(Exception, match="cannot be decoded"):
        decode(photo(size=(40, 40))[:-30], max_pixels=10**6, memory=memory)
    assert memory.held == 0


def test_a_router_refuses_what_its_memory_does_not_hold(photos: Any, chain: Any, tmp_path: Path) -> None:
    client = local_router(photos, tmp_path, image_memory_bytes=1000)
    answer = client.post("/", data=photo())
    assert (answer.status_code, answer.json["type"]) == (413, "RequestTooLarge")
    assert answer.json["facts"]["limit"] == 1000
