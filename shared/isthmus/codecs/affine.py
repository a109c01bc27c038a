"""Uniform quantisation to 8 or 4 bits a value: `(code + offset) * step`, which gives zero back as zero.

int8 has one step for the whole tensor: its codes compress, which a step for each channel undoes (13% more bytes at the
same answers, on EfficientNet-Lite0). At 4 bits the error shows, and each channel has its own. docs/codecs.md, `int8/1`.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np

from isthmus.arrays import Array
from isthmus.codecs import Encoding, NotEncodable
from isthmus.codecs.payload import MAX_SECTION, Reader, bytes_of, count_of, restore, shrink

MAX_OFFSET = 2**21
"""Of values far from zero for their width, the step is larger than the width asks for: float32 has no finer ones."""
_TINY = 2.0**-126
_LARGEST = {2: 65504.0, 4: (2 - 2**-23) * 2.0**127}
_MAX_BFLOAT16 = (2 - 2**-7) * 2.0**127
_ROUND = np.float32(1.5 * 2**23)
"""Added to a float32 of up to 2**22, it leaves the nearest whole number in the lowest bits."""
_SCALE = struct.Struct("<fi")
_SCALES = np.dtype([("step", "<f4"), ("offset", "<i4")])
_LENGTH = struct.Struct("<I")
_FLOAT32_BYTES = 4
_CHANNEL_BYTES = 6 * _SCALES.itemsize
"""What a channel's step and offset take on their way: the section's bytes three times, turned, and as numbers."""


class Int8:
    """See `Codec`; takes float32, float16 and bfloat16."""

    calibrated = False

    def encode(self, array: Array, encoding: Encoding | None = None) -> bytes:
        """The step, the offset, and the section of codes.

        Raises:
            NotEncodable: another dtype; NaN or infinity; values too large or too small for a step in float32.
        """
        if not _takes(array):
            return b""
        values = np.ascontiguousarray(array, np.float32).reshape(-1)
        least, most = float(values.min()), float(values.max())
        largest = max(most, -least)
        if not math.isfinite(most - least):
            raise NotEncodable("NaN or infinity")
        wanted = max((most - least) / 254, largest / (MAX_OFFSET / 2)) if most > least else largest or 1.0
        step = np.float32(wanted) if wanted < 2.0**127 else np.float32(0)
        check_step(float(step), largest + (float(step) if most > least else 0.0), array.dtype)
        offset = math.floor(least / float(step))
        coded = values * (np.float32(1) / step)
        coded += _ROUND - np.float32(offset)
        codes = coded.view("<u4").astype(np.uint8)
        return b"".join([_SCALE.pack(step, offset), shrink(codes.data, "numbers")])

    def working_bytes(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
        """See `Codec`: codes, and values in float32 where the tensor has another dtype."""
        return count_of(shape) * (1 + _FLOAT32_BYTES * (dtype.itemsize != _FLOAT32_BYTES))

    def decode(self, payload: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...], table: object = None) -> Array:
        """The values: a float32 sum, exact, and a float32 product, rounded once; the same on every machine.

        Raises:
            ValueError: the payload is not one of that dtype and shape.
        """
        reader, count = Reader(payload), _count(dtype, shape)
        if not count:
            reader.end()
            return np.empty(shape, dtype)
        step, offset = reader.fields(_SCALE)
        if not 0 < step < math.inf or abs(offset) > MAX_OFFSET:
            raise ValueError(f"step {step} is not positive, or offset {offset} exceeds {MAX_OFFSET}")
        values = np.frombuffer(restore(reader.rest(), count), np.uint8).astype(np.float32)
        return _scaled(values, np.float32(offset), np.float32(step), dtype).reshape(shape)


class Int4:
    """See `Codec`; takes float32, float16 and bfloat16, with a step for each channel.

    Channels are axis 1 of what has four dimensions or more (N, C, …), axis 2 of what has three (B, T, D); whatever has
    fewer is one channel.
    """

    calibrated = False

    def encode(self, array: Array, encoding: Encoding | None = None) -> bytes:
        """The length of the scales' section, that section, and the section of pairs of codes.

        Raises:
            NotEncodable: as `Int8.encode`.
        """
        if not _takes(array):
            return b""
        values = np.ascontiguousarray(array, np.float32).reshape(_parted(array.shape))
        scales = _scales_of(values, array.dtype)
        coded = values * (np.float32(1) / scales["step"])[:, None]
        coded += (_ROUND - scales["offset"].astype(np.float32))[:, None]
        codes = _paired(coded.view("<u4").astype(np.uint8).reshape(-1))
        # Bytes of like meaning beside one another: those of a step that are zero, or an exponent, compress.
        turned = np.ascontiguousarray(scales.view(np.uint8).reshape(-1, scales.itemsize).T)
        head = shrink(bytes_of(turned), "structure")
        return b"".join([_LENGTH.pack(len(head)), head, shrink(codes.data, "numbers")])

    def working_bytes(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
        """See `Codec`: pairs, codes, values in float32 where the tensor has another dtype, and the channels' scales."""
        return (
            count_of(shape) * (2 + _FLOAT32_BYTES * (dtype.itemsize != _FLOAT32_BYTES))
            + _parted(shape)[1] * _CHANNEL_BYTES
        )

    def decode(self, payload: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...], table: object = None) -> Array:
        """The values, as `Int8.decode` computes them.

        Raises:
            ValueError: the payload is not one of that dtype and shape.
        """
        reader, count = Reader(payload), _count(dtype, shape)
        if not count:
            reader.end()
            return np.empty(shape, dtype)
        parted = _parted(shape)
        (length,) = reader.fields(_LENGTH)
        head = np.frombuffer(restore(reader.take(length), parted[1] * _SCALES.itemsize), np.uint8)
        scales = np.ascontiguousarray(head.reshape(_SCALES.itemsize, -1).T).view(_SCALES)[:, 0]
        step, offset = scales["step"], scales["offset"].astype(np.int64)
        if not (np.isfinite(step).all() and step.min() > 0 and np.abs(offset).max() <= MAX_OFFSET):
            raise ValueError(f"a step is not positive, or an offset exceeds {MAX_OFFSET}")
        pairs = np.frombuffer(restore(reader.rest(), -(-count // 2)), np.uint8)
        values = _unpaired(pairs, count).astype(np.float32).reshape(parted)
        return _scaled(values, offset.astype(np.float32)[:, None], step[:, None], dtype).reshape(shape)


def lossy_float(dtype: np.dtype[Any]) -> bool:
    """Whether lossy codecs take it: float32, float16, bfloat16. Who computes in float64 wants its bits."""
    return dtype.kind in "fV" and dtype.itemsize <= 4


def _takes(array: Array) -> bool:
    """Whether there is something to pack.

    Raises:
        NotEncodable: it is not for these codecs.
    """
    if not lossy_float(array.dtype) or array.nbytes > MAX_SECTION:
        raise NotEncodable(f"{array.nbytes} bytes of {array.dtype.name}")
    return array.size > 0


def _count(dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    if not lossy_float(dtype):
        raise ValueError(f"{dtype.name} does not travel as codes")
    return count_of(shape)


def check_step(smallest: float, largest: float, dtype: np.dtype[Any]) -> None:
    """Whether the smallest of all steps, and the largest value that may come back, can be.

    Raises:
        NotEncodable: the step is too small for float32, or the value too large for `dtype`.
    """
    # numpy knows no bfloat16 and calls it V; it takes 10 µs to say a dtype's name.
    if smallest < _TINY or largest > (_LARGEST[dtype.itemsize] if dtype.kind == "f" else _MAX_BFLOAT16):
        raise NotEncodable("values too small or too large for a step in float32")


def _scaled(values: Array, offset: Any, step: Any, dtype: np.dtype[Any]) -> Array:
    with np.errstate(over="ignore"):
        values += offset
        values *= step
        return values.astype(dtype, copy=False)


def _parted(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(before, channels, after) of a shape."""
    if len(shape) < 3:
        return 1, 1, count_of(shape)
    axis = 2 if len(shape) == 3 else 1
    return count_of(shape[:axis]), shape[axis], count_of(shape[axis + 1 :])


def _scales_of(values: Array, dtype: np.dtype[Any]) -> Array:
    """A step and an offset for each channel of values (before, channels, after)."""
    # In float64: the width of a float32's range need not be a float32.
    least, most = (f(axis=(0, 2)).astype(np.float64) for f in (values.min, values.max))
    largest = np.maximum(most, -least)
    if not math.isfinite(largest.max()):
        raise NotEncodable("NaN or infinity")
    width = most - least
    wide = width > 0
    # Rounded up to two bytes, for many channels have few values each; the other two compress away.
    step = np.maximum(width / 14, largest / (MAX_OFFSET / 2)).astype("<f4")
    bits = step.view("<u4")
    bits += np.uint32(0xFFFF)
    bits &= np.uint32(0xFFFF0000)
    if not wide.all():
        # A constant is its own step: one of them, or minus one.
        step = np.where(wide, step, np.where(largest > 0, largest, 1.0)).astype("<f4")
    check_step(float(step.min()), float((largest + wide * step).max()), dtype)
    scales = np.empty(len(step), _SCALES)
    scales["step"], scales["offset"] = step, np.floor(least / step.astype(np.float64))
    return scales


def _paired(codes: Array) -> Array:
    """Two codes of 4 bits to a byte, the first in the lower half; an odd count ends in zero."""
    if codes.size % 2:
        codes = np.append(codes, np.uint8(0))
    pairs = codes.view("<u2")
    pairs |= pairs >> np.uint16(4)
    return pairs.astype(np.uint8)


def _unpaired(pairs: Array, count: int) -> Array:
    if count % 2 and int(pairs[-1]) >> 4:
        raise ValueError("the half byte after the last value is not zero")
    codes = pairs.astype("<u2")
    codes |= codes << np.uint16(4)
    codes &= np.uint16(0x0F0F)
    return codes.view(np.uint8)[:count]


INT8 = Int8()
INT4 = Int4()
