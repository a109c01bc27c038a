"""How long packing and unpacking take on one thread, of 100,000 real values."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import numpy as np
from codec_models import real
from measure import Call, interleave
from report import Report, Row, at_least, at_most

from isthmus.arrays import Array
from isthmus.artifacts.choice import LOSSLESS_ID, SPARSE_ID, TRANSFORM_ID
from isthmus.artifacts.segment_id import SegmentId
from isthmus.codecs import EncodedTensor, Encoding, encode_tensor, find_codec
from isthmus.codecs.payload import restore, shrink
from isthmus.runtime.ort_runner import OrtRunner
from isthmus.wire.frame import DTYPES
from isthmus_tools.calibration.transforms import learn_planes
from isthmus_tools.graph import build

VALUES = 100_000
CUT, COLUMNS = "15", 74
"""24 maps of 56 × 56, after 20% of EfficientNet-Lite0's work; two photos' beside one another, cut to 74 columns, are
99,456 values: what costs the same for few as for many counts once, as it does for 100,000."""
CODECS = ("half/1", "bfloat16/1", LOSSLESS_ID, "int8/1", "int4/1", SPARSE_ID, TRANSFORM_ID)
QUALITY = 0.7
ZSTD, INT8_HEAD = "zstd alone, int8/1's codes", 8


def add_speed(report: Report, folder: Path) -> None:
    """A table of times, and the goals for them."""
    maps = _activations(folder)
    table = learn_planes(maps)
    one = np.ascontiguousarray(np.concatenate(maps[:2], axis=3)[..., :COLUMNS])
    rows: list[Row] = []
    calls: dict[str, Call] = {}
    encodings = {
        codec: Encoding(codec, 1.0 if codec == SPARSE_ID else QUALITY, table if find_codec(codec).calibrated else None)
        for codec in CODECS
    }
    sizes: dict[str, int] = {}
    for codec, how in encodings.items():
        encoded = encode_tensor(one, how)
        if not isinstance(encoded, EncodedTensor):
            continue
        sizes[codec] = encoded.nbytes
        calls[f"{codec} pack"] = partial(encode_tensor, one, how)
        calls[f"{codec} unpack"] = partial(
            find_codec(codec).decode, memoryview(encoded.payload), DTYPES[encoded.dtype], encoded.shape, how.table
        )
    # What zstd takes of int8/1's time: Huffman's codes, for there is hardly a repeat to look for.
    codes = restore(memoryview(find_codec("int8/1").encode(one, encodings["int8/1"]))[INT8_HEAD:], one.size)
    section = shrink(codes, "numbers")
    calls |= {
        f"{ZSTD} pack": partial(shrink, codes, "numbers"),
        f"{ZSTD} unpack": partial(restore, memoryview(section), one.size),
    }
    sizes[ZSTD] = len(section)
    found = interleave(calls, turns=15 if report.quick else 60, block=3, batch=True, clock=time.thread_time)
    ms = {name: samples.p50 * 1000 * VALUES / one.size for name, samples in found.items()}
    raw = 4 * VALUES
    for codec, size in sizes.items():
        both = ms[f"{codec} pack"] + ms[f"{codec} unpack"]
        row: dict[str, str | float | int | bool | None] = {
            "codec": codec,
            "bits_per_value": 8 * size / one.size,
            "pack_ms": ms[f"{codec} pack"],
            "unpack_ms": ms[f"{codec} unpack"],
            "both_ms": both,
            "pack_GB/s": raw / ms[f"{codec} pack"] / 1e6,
            "unpack_GB/s": raw / ms[f"{codec} unpack"] / 1e6,
        }
        rows.append(row)
    title = f"times for 100,000 float32 values, one thread: {one.size:,} of EfficientNet-Lite0's at cut {CUT}, scaled"
    report.add(title, rows)
    for codec, limit in ((TRANSFORM_ID, 3.0), ("int8/1", 0.3)):
        both = ms[f"{codec} pack"] + ms[f"{codec} unpack"]
        report.goals.append(at_most(f"ms to pack and unpack 100,000 values, {codec}", both, limit, "ms"))
    slower = max(ms[f"{LOSSLESS_ID} pack"], ms[f"{LOSSLESS_ID} unpack"])
    report.goals.append(at_least(f"GB/s of {LOSSLESS_ID}, the slower of both ways", raw / slower / 1e6, 1.0, "GB/s"))


def _activations(folder: Path) -> list[Array]:
    entry = real.REAL["efficientnet-lite0"]
    bundle, files = build(entry.path(), "speed", folder / "speed", partitions=[[CUT]])
    head = bundle.segment(SegmentId(stop=CUT))
    runner = OrtRunner(files[head.graph.digest], head, providers=("CPUExecutionProvider",), threads=1)
    return [next(iter(runner.run(arrays).values())) for arrays in entry.inputs()]
