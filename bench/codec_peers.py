"""Peers of the codecs: float16, int8 and int4 with a general compressor, and uniform steps at ideal entropy."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from backports import zstd

from isthmus.arrays import Array
from isthmus_tools.calibration.scoring import Transmission

Compressor = Callable[[bytes], bytes]
# Steps of a histogram on either side of zero; larger values share the last step.
SYMBOLS = 4096


def zlib_6(data: bytes) -> bytes:
    """zlib at its default level."""
    return zlib.compress(data, 6)


def zstd_3(data: bytes) -> bytes:
    """zstd at its default level."""
    return zstd.compress(data, level=3)


class Half:
    """float16 without compression."""

    name = "float16 (peer)"

    def send(self, tensors: Mapping[str, Array]) -> Transmission:
        """See `Sender.send`."""
        start = time.thread_time()
        arrived = {n: a.astype(np.float16) if a.dtype == np.float32 else a for n, a in tensors.items()}
        encoded = time.thread_time()
        back = {n: a.astype(tensors[n].dtype) for n, a in arrived.items()}
        size = sum(a.nbytes for a in arrived.values())
        return Transmission(back, size, encoded - start, time.thread_time() - encoded)


class Affine:
    """Affine quantisation to `bits` over each tensor's range, then a general compressor."""

    def __init__(self, name: str, bits: int, compress: Compressor) -> None:
        self.name, self._bits, self._compress = name, bits, compress

    def send(self, tensors: Mapping[str, Array]) -> Transmission:
        """See `Sender.send`."""
        arrived, size, encode_s = dict(tensors), 0, 0.0
        for name, array in tensors.items():
            start = time.thread_time()
            if array.dtype != np.float32:
                size += len(self._compress(array.tobytes()))
                continue
            low, high = float(array.min()), float(array.max())
            step = (high - low) / (2**self._bits - 1) or 1.0
            whole = np.rint((array - low) / step).astype(np.uint8)
            data: Array = whole.ravel()
            if self._bits == 4:
                even = data if data.size % 2 == 0 else np.append(data, np.uint8(0))
                data = even[::2] << 4 | even[1::2]
            size += len(self._compress(data.tobytes())) + 8
            encode_s += time.thread_time() - start
            arrived[name] = (whole * np.float32(step) + np.float32(low)).astype(np.float32)
        return Transmission(arrived, size, encode_s)


class Ideal:
    """A uniform step, and an ideal entropy coder as a bound for real coders.

    Each channel costs the entropy of its own histogram over the scored inputs, and the histogram is free. `step` is a
    share of the root mean square over the calibrating inputs.
    """

    def __init__(self, step: float, scales: Mapping[str, float]) -> None:
        self.name = f"uniform, ideal entropy @{step:g}"
        self._steps = {name: step * scale or 1.0 for name, scale in scales.items()}
        self._counts: dict[str, np.ndarray] = {}
        self._exact = self._inputs = 0

    def send(self, tensors: Mapping[str, Array]) -> Transmission:
        """See `Sender.send`; `mean_bytes` gives the bytes after the last input."""
        arrived = dict(tensors)
        self._inputs += 1
        for name, array in tensors.items():
            if name not in self._steps:
                self._exact += len(zlib_6(array.tobytes()))
                continue
            step = np.float32(self._steps[name])
            whole = np.rint(array / step)
            arrived[name] = (whole * step).astype(array.dtype)
            self._count(name, by_channel(whole))
        return Transmission(arrived, 0)

    def mean_bytes(self) -> float:
        """Mean bytes of an input."""
        bits = 0.0
        for counts in self._counts.values():
            total = counts.sum(axis=1, keepdims=True)
            with np.errstate(divide="ignore", invalid="ignore"):
                bits -= float(np.nansum(counts * np.log2(counts / total)))
        return (bits / 8 + self._exact) / self._inputs

    def _count(self, name: str, rows: np.ndarray) -> None:
        channels, width = len(rows), 2 * SYMBOLS + 1
        symbols = np.clip(rows, -SYMBOLS, SYMBOLS).astype(np.int64) + SYMBOLS
        index = (symbols + np.arange(channels)[:, None] * width).ravel()
        counts = np.bincount(index, minlength=channels * width).reshape(channels, width)
        self._counts[name] = self._counts.get(name, 0) + counts


def by_channel(array: Array) -> Array:
    """(channels, values): of maps (batch, channels, height, width) the second axis, of tokens and vectors the last."""
    axis = 1 if array.ndim == 4 else array.ndim - 1
    return np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)


def scales(samples: Iterable[Mapping[str, Array]]) -> dict[str, float]:
    """The root mean square of each float tensor over inputs."""
    squares: dict[str, list[float]] = {}
    for tensors in samples:
        for name, array in tensors.items():
            if array.dtype == np.float32:
                squares.setdefault(name, []).append(float(np.mean(np.square(array, dtype=np.float64))))
    return {name: float(np.sqrt(np.mean(means))) for name, means in squares.items()}
