"""Encode and decode the same tensors by isthmus.wire.frame and by other means; prints one JSON document.

Run by bench/frame.py, in the environment of requirements-frame.txt.
"""

from __future__ import annotations

import io
import json
import pickle
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgpack  # type: ignore[import-not-found]
import msgpack_numpy  # type: ignore[import-not-found]
import numpy as np
import pyarrow as pa  # type: ignore[import-not-found]
import safetensors.numpy
from harness import interleave

from isthmus.arrays import Array
from isthmus.wire import frame

Tensors = Mapping[str, Array]
SIZES = (4_096, 65_536, 1_000_000, 16_000_000)
COUNTS = (1, 50)
MEMCPY = "memcpy"


@dataclass(frozen=True)
class Format:
    """A serialisation format."""

    encode: Callable[[Tensors], Any]
    decode: Callable[[Any], Tensors]


def _isthmus_encode(tensors: Tensors) -> bytes:
    return frame.encode(frame.Frame(tensors, "sha256:" + "0" * 64, "..65", "0" * 36))


def _isthmus_decode(data: bytes) -> Tensors:
    return frame.decode(data, max_bytes=2**30).tensors


def _out_of_band_encode(tensors: Tensors) -> bytes:
    """A single message: the pickle and each buffer, with their lengths in front."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(dict(tensors), protocol=5, buffer_callback=buffers.append)
    parts = [memoryview(head), *(buffer.raw() for buffer in buffers)]
    sizes = b"".join(len(part).to_bytes(8, "little") for part in parts)
    return b"".join((len(parts).to_bytes(8, "little"), sizes, *parts))


def _out_of_band_decode(data: bytes) -> Tensors:
    view = memoryview(data)
    count = int.from_bytes(view[:8], "little")
    at = 8 + 8 * count
    parts = []
    for i in range(count):
        size = int.from_bytes(view[8 + 8 * i : 16 + 8 * i], "little")
        parts.append(view[at : at + size])
        at += size
    tensors: Tensors = pickle.loads(parts[0], buffers=parts[1:])  # noqa: S301
    return tensors


def _npy_encode(tensors: Tensors) -> bytes:
    out = io.BytesIO()
    for array in tensors.values():
        np.save(out, array, allow_pickle=False)
    return out.getvalue()


def _npy_decode(data: bytes) -> Tensors:
    file, arrays = io.BytesIO(data), dict[str, Array]()
    while file.tell() < len(data):
        arrays[f"{len(arrays):02}"] = np.load(file, allow_pickle=False)
    return arrays


def _npz_encode(tensors: Tensors) -> bytes:
    out = io.BytesIO()
    np.savez(out, allow_pickle=False, **tensors)
    return out.getvalue()


def _npz_decode(data: bytes) -> Tensors:
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _arrow_encode(tensors: Tensors) -> Any:
    """A sequence of Arrow's tensor messages, without names."""
    sink = pa.BufferOutputStream()
    for array in tensors.values():
        pa.ipc.write_tensor(pa.Tensor.from_numpy(array), sink)
    return sink.getvalue()


def _arrow_decode(data: Any) -> Tensors:
    source, arrays = pa.BufferReader(data), dict[str, Array]()
    while source.tell() < source.size():
        arrays[f"{len(arrays):02}"] = pa.ipc.read_tensor(source).to_numpy()
    return arrays


FORMATS: Mapping[str, Format] = {
    "isthmus.wire.frame": Format(_isthmus_encode, _isthmus_decode),
    "pickle 5": Format(lambda t: pickle.dumps(dict(t), protocol=5), pickle.loads),
    "pickle 5, out of band": Format(_out_of_band_encode, _out_of_band_decode),
    "numpy.save": Format(_npy_encode, _npy_decode),
    "numpy.savez": Format(_npz_encode, _npz_decode),
    "safetensors": Format(lambda t: safetensors.numpy.save(dict(t)), safetensors.numpy.load),
    "msgpack-numpy": Format(
        lambda t: msgpack.packb(t, default=msgpack_numpy.encode),
        lambda data: msgpack.unpackb(data, object_hook=msgpack_numpy.decode, max_bin_len=2**30),
    ),
    "Arrow IPC": Format(_arrow_encode, _arrow_decode),
}


def rows_for(size: int, count: int, turns: int) -> list[dict[str, Any]]:
    """A row for each format: `count` tensors of `size` bytes in all."""
    rng = np.random.default_rng(0)
    tensors = {f"tensor_{i:02}": rng.standard_normal(size // 4 // count, np.float32) for i in range(count)}
    # A single tensor is copied from the same memory: its place in the caches makes a third of the time.
    source = (tensors["tensor_00"] if count == 1 else np.concatenate(list(tensors.values()))).data.cast("B")
    encoded = {name: each.encode(tensors) for name, each in FORMATS.items()}
    for name, each in FORMATS.items():
        back = [array for _, array in sorted(each.decode(encoded[name]).items())]
        assert all(np.array_equal(a, b) for a, b in zip(tensors.values(), back, strict=True)), name
    calls: dict[str, Callable[[], object]] = {MEMCPY: lambda: bytes(source)}
    for name, each in FORMATS.items():
        calls[f"encode {name}"] = partial(each.encode, tensors)
        calls[f"decode {name}"] = partial(each.decode, encoded[name])
    times = interleave(calls, turns=turns, batch=True)
    return [
        {
            "format": name,
            "tensors": count,
            "bytes": size,
            "added_bytes": len(encoded[name]) - size // 4 // count * 4 * count,
            "encode_us": times[f"encode {name}"].p50 * 1e6,
            "encode_over_memcpy": times[f"encode {name}"].over(times[MEMCPY]),
            "decode_us": times[f"decode {name}"].p50 * 1e6,
            "decode_copies": not _shares(each.decode(encoded[name]), encoded[name]),
            "memcpy_us": times[MEMCPY].p50 * 1e6,
        }
        for name, each in FORMATS.items()
    ]


def decode_growth(turns: int) -> float:
    """Ratio of the times to decode a tensor of the largest and of the smallest size."""
    frames = {
        str(size): _isthmus_encode({"tensor": np.zeros(size // 4, np.float32)}) for size in (min(SIZES), max(SIZES))
    }
    times = interleave({size: partial(_isthmus_decode, data) for size, data in frames.items()}, turns=turns, batch=True)
    return times[str(max(SIZES))].over(times[str(min(SIZES))])


def in_parts(turns: int) -> list[dict[str, Any]]:
    """Encoding as a hop does: the header, and the tensor's own memory without a copy."""
    rows = []
    for size in SIZES:
        tensor = np.random.default_rng(0).standard_normal(size // 4, np.float32)
        message = frame.Frame({"tensor": tensor}, "sha256:" + "0" * 64, "..65", "0" * 36)
        source = tensor.data.cast("B")
        calls: dict[str, Callable[[], object]] = {
            MEMCPY: lambda source=source: bytes(source),  # type: ignore[misc]
            "parts": partial(frame.encode_parts, message),
        }
        times = interleave(calls, turns=turns, batch=True)
        over = times["parts"].over(times[MEMCPY])
        rows.append({"bytes": size, "encode_parts_us": times["parts"].p50 * 1e6, "over_memcpy": over})
    return rows


def _shares(tensors: Tensors, data: Any) -> bool:
    whole = np.frombuffer(data, np.uint8)
    return all(np.shares_memory(array, whole) for array in tensors.values())


if __name__ == "__main__":
    turns = int(sys.argv[1])
    rows = [row for count in COUNTS for size in SIZES for row in rows_for(size, count, turns)]
    json.dump({"rows": rows, "decode_growth": decode_growth(4 * turns), "in_parts": in_parts(turns)}, sys.stdout)
