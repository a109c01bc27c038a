"""`int8/1`, `int4/1` and `int8-token/1`: uniform quantisation, `(code + offset) * step`; zero is preserved exactly.

int8 has a single step for the tensor: its codes compress better than with a step for each channel (13% fewer bytes
at the same predictions, on EfficientNet-Lite0). At 4 bits the error matters more, and each channel has a step. Hidden
states of tokens have a few channels of a hundred times the others' size: int8-token stores these exactly, and has a
step for each token. Source: docs/reference/codecs.md, "int8/1".
"""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np

from isthmus.arrays import Array
from isthmus.codecs import Encoding, NotEncodable
from isthmus.codecs.payload import MAX_SECTION, PayloadReader, bytes_of, count_of, restore, shrink

# float32 cannot resolve a narrow range far from zero, so the step grows with the offset.
MAX_OFFSET = 2**21
# The least normal float32; products with subnormal steps would lose precision.
_MIN_STEP = 2.0**-126
_MAX_FLOAT = {2: 65504.0, 4: (2 - 2**-23) * 2.0**127}
_MAX_BFLOAT16 = (2 - 2**-7) * 2.0**127
# Added to a float32 of up to 2**22, the sum has the nearest integer in the lowest bits.
_ROUND = np.float32(1.5 * 2**23)
_SCALE = struct.Struct("<fi")
_SCALES = np.dtype([("step", "<f4"), ("offset", "<i4")])
_LENGTH = struct.Struct("<I")
_FLOAT32_BYTES = 4
# A channel's step and offset during decoding: the section's bytes three times, transposed, and as numbers.
_CHANNEL_BYTES = 6 * _SCALES.itemsize
# The largest magnitudes of a row, stored exactly. SmolLM2 has four channels that need it; of 12 a generation gains
# nothing: docs/reference/codecs.md, "int8-token/1".
OUTLIERS = 6
# A row's step, and of each outlier the channel and the value.
_STEP, _CHANNEL, _OUTLIER = np.dtype("<f4"), np.dtype("<u2"), np.dtype("<f4")
_MAX_WIDTH = 2**16
# Of a row during decoding: the step; outliers in the tensor's dtype, their channels again, and numpy's indices.
_ROW_BYTES, _OUTLIER_BYTES = 16, 40


class Int8:
    """See `Codec`; for float32, float16 and bfloat16."""

    calibrated = False

    def encode(self, array: Array, encoding: Encoding | None = None) -> bytes:
        """The step, the offset, and the section of codes.

        Raises:
            NotEncodable: another dtype; NaN or infinity; values too large or too small for a step in float32.
        """
        if not _takes(array):
            return b""
        values = np.ascontiguousarray(array, np.float32).reshape(-1)
        low, high = float(values.min()), float(values.max())
        magnitude = max(high, -low)
        if not math.isfinite(high - low):
            raise NotEncodable("NaN or infinity")
        # A constant is its own step: the code is 1 or -1.
        width = max((high - low) / 254, magnitude / (MAX_OFFSET / 2)) if high > low else magnitude or 1.0
        step = np.float32(width) if width < 2.0**127 else np.float32(0)
        check_step(float(step), magnitude + (float(step) if high > low else 0.0), array.dtype)
        offset = math.floor(low / float(step))
        coded = values * (np.float32(1) / step)
        coded += _ROUND - np.float32(offset)
        codes = coded.view("<u4").astype(np.uint8)
        return b"".join([_SCALE.pack(step, offset), shrink(codes.data, "numbers")])

    def working_bytes(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
        """See `Codec`: codes, and float32 values where the tensor has another dtype."""
        return count_of(shape) * (1 + _FLOAT32_BYTES * (dtype.itemsize != _FLOAT32_BYTES))

    def decode(self, payload: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...], table: object = None) -> Array:
        """The values: an exact float32 sum and a float32 product, rounded once; equal on every machine.

        Raises:
            ValueError: the payload is malformed, or has another dtype or shape.
        """
        reader, count = PayloadReader(payload), _count(dtype, shape)
        if not count:
            reader.end()
            return np.empty(shape, dtype)
        step, offset = reader.fields(_SCALE)
        if not 0 < step < math.inf or abs(offset) > MAX_OFFSET:
            raise ValueError(f"step {step} is not positive, or offset {offset} exceeds {MAX_OFFSET}")
        values = np.frombuffer(restore(reader.rest(), count), np.uint8).astype(np.float32)
        return _scaled(values, np.float32(offset), np.float32(step), dtype).reshape(shape)


class Int4:
    """See `Codec`; for float32, float16 and bfloat16, with a step for each channel.

    Shapes: channels are axis 1 of four axes or more (N, C, …), axis 2 of three (B, T, D); a tensor of fewer axes is one
    channel.
    """

    calibrated = False

    def encode(self, array: Array, encoding: Encoding | None = None) -> bytes:
        """The length of the section of scales, that section, and the section of pairs of codes.

        Raises:
            NotEncodable: as `Int8.encode`.
        """
        if not _takes(array):
            return b""
        values = np.ascontiguousarray(array, np.float32).reshape(_by_channel(array.shape))
        scales = _scales_of(values, array.dtype)
        coded = values * (np.float32(1) / scales["step"])[:, None]
        coded += (_ROUND - scales["offset"].astype(np.float32))[:, None]
        codes = _paired(coded.view("<u4").astype(np.uint8).reshape(-1))
        # Transposed, so that zero bytes and exponents of steps are neighbours, and compress.
        transposed = np.ascontiguousarray(scales.view(np.uint8).reshape(-1, scales.itemsize).T)
        head = shrink(bytes_of(transposed), "structure")
        return b"".join([_LENGTH.pack(len(head)), head, shrink(codes.data, "numbers")])

    def working_bytes(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
        """See `Codec`: pairs, codes, float32 values where the tensor has another dtype, and the channels' scales."""
        return (
            count_of(shape) * (2 + _FLOAT32_BYTES * (dtype.itemsize != _FLOAT32_BYTES))
            + _by_channel(shape)[1] * _CHANNEL_BYTES
        )

    def decode(self, payload: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...], table: object = None) -> Array:
        """The values, by the arithmetic of `Int8.decode`.

        Raises:
            ValueError: the payload is malformed, or has another dtype or shape.
        """
        reader, count = PayloadReader(payload), _count(dtype, shape)
        if not count:
            reader.end()
            return np.empty(shape, dtype)
        by_channel = _by_channel(shape)
        (length,) = reader.fields(_LENGTH)
        head = np.frombuffer(restore(reader.take(length), by_channel[1] * _SCALES.itemsize), np.uint8)
        scales = np.ascontiguousarray(head.reshape(_SCALES.itemsize, -1).T).view(_SCALES)[:, 0]
        step, offset = scales["step"], scales["offset"].astype(np.int64)
        if not (np.isfinite(step).all() and step.min() > 0 and np.abs(offset).max() <= MAX_OFFSET):
            raise ValueError(f"a step is not positive, or an offset exceeds {MAX_OFFSET}")
        pairs = np.frombuffer(restore(reader.rest(), -(-count // 2)), np.uint8)
        values = _unpaired(pairs, count).astype(np.float32).reshape(by_channel)
        return _scaled(values, offset.astype(np.float32)[:, None], step[:, None], dtype).reshape(shape)


class Int8Token:
    """See `Codec`; for float32, float16 and bfloat16, with a step for each row and the row's outliers exactly.

    Rows lie on the last axis: the hidden state of a token. A row decodes to the same values alone and beside others,
    so that a generation does not depend on how its tokens were grouped into steps.
    """

    calibrated = False

    def encode(self, array: Array, encoding: Encoding | None = None) -> bytes:
        """The steps, the channels of the outliers, the outliers, and the section of codes.

        Raises:
            NotEncodable: another dtype; NaN or infinity; values too large for a step in float32; rows of more than
                65,536 values.
        """
        if not _takes(array):
            return b""
        rows, width, outliers = _row_sizes(array.shape)
        if width > _MAX_WIDTH:
            raise NotEncodable(f"rows of {width} values")
        values = np.array(array, np.float32, order="C").reshape(rows, width)
        sizes = np.abs(values)
        if not math.isfinite(float(sizes.max())):
            raise NotEncodable("NaN or infinity")
        channels = np.sort(np.argpartition(sizes, width - outliers, axis=1)[:, width - outliers :], axis=1)
        exact = np.take_along_axis(values, channels, axis=1)
        for each in (values, sizes):
            np.put_along_axis(each, channels, 0, axis=1)
        # Rows of smaller values become zeros, whatever is beside: refusing would depend on the other rows.
        steps = np.maximum(sizes.max(axis=1) / np.float32(127), np.float32(_MIN_STEP))
        check_step(_MIN_STEP, 127 * float(steps.max()), array.dtype)
        values /= steps[:, None]
        values += _ROUND
        codes = values.view("<u4").astype(np.uint8)
        parts = (steps.astype(_STEP), channels.astype(_CHANNEL), exact.astype(_OUTLIER))
        return b"".join([*(part.tobytes() for part in parts), shrink(bytes_of(codes), "numbers")])

    def working_bytes(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
        """See `Codec`: codes, float32 values where the tensor has another dtype, steps and outliers."""
        rows, width, outliers = _row_sizes(shape)
        values = width * (1 + _FLOAT32_BYTES * (dtype.itemsize != _FLOAT32_BYTES))
        return rows * (values + _ROW_BYTES + outliers * _OUTLIER_BYTES)

    def decode(self, payload: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...], table: object = None) -> Array:
        """The values, each by one float32 product; equal on every machine.

        Raises:
            ValueError: the payload is malformed, or has another dtype or shape.
        """
        reader, count = PayloadReader(payload), _count(dtype, shape)
        if not count:
            reader.end()
            return np.empty(shape, dtype)
        rows, width, outliers = _row_sizes(shape)
        steps = np.frombuffer(reader.take(rows * _STEP.itemsize), _STEP)
        channels: Array = np.frombuffer(reader.take(rows * outliers * _CHANNEL.itemsize), _CHANNEL)
        channels = channels.reshape(rows, outliers).astype(np.intp)
        exact = np.frombuffer(reader.take(rows * outliers * _OUTLIER.itemsize), _OUTLIER).reshape(rows, outliers)
        # NaN is not in the range either.
        if not _MIN_STEP <= float(steps.min()) <= float(steps.max()) < math.inf:
            raise ValueError("a step is not positive or not finite")
        if int(channels.max()) >= width or (np.diff(channels, axis=1) <= 0).any():
            raise ValueError(f"outliers of channels that are not in order, or not below {width}")
        values = np.frombuffer(restore(reader.rest(), count), np.int8).astype(np.float32).reshape(rows, width)
        with np.errstate(all="ignore"):
            values *= steps[:, None]
            result = values.astype(dtype, copy=False)
            np.put_along_axis(result, channels, exact.astype(dtype), axis=1)
        return result.reshape(shape)


def lossy_float(dtype: np.dtype[Any]) -> bool:
    """Whether lossy codecs accept this dtype: float32, float16 or bfloat16; float64 is chosen for its precision."""
    return dtype.kind in "fV" and dtype.itemsize <= 4


def _takes(array: Array) -> bool:
    """Whether the array has values.

    Raises:
        NotEncodable: its dtype or size is unsupported.
    """
    if not lossy_float(array.dtype) or array.nbytes > MAX_SECTION:
        raise NotEncodable(f"{array.nbytes} bytes of {array.dtype.name}")
    return array.size > 0


def _count(dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    if not lossy_float(dtype):
        raise ValueError(f"{dtype.name} does not travel as codes")
    return count_of(shape)


def check_step(min_step: float, max_value: float, dtype: np.dtype[Any]) -> None:
    """Check that the least step and the largest decoded magnitude are representable.

    Raises:
        NotEncodable: the step is too small for float32, or the value too large for `dtype`.
    """
    # bfloat16 has kind V, as every dtype from outside of numpy.
    if min_step < _MIN_STEP or max_value > (_MAX_FLOAT[dtype.itemsize] if dtype.kind == "f" else _MAX_BFLOAT16):
        raise NotEncodable("values too small or too large for a step in float32")


def _scaled(values: Array, offset: Any, step: Any, dtype: np.dtype[Any]) -> Array:
    with np.errstate(over="ignore"):
        values += offset
        values *= step
        return values.astype(dtype, copy=False)


def _by_channel(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """A shape as (before, channels, after)."""
    if len(shape) < 3:
        return 1, 1, count_of(shape)
    axis = 2 if len(shape) == 3 else 1
    return count_of(shape[:axis]), shape[axis], count_of(shape[axis + 1 :])


def _scales_of(values: Array, dtype: np.dtype[Any]) -> Array:
    """The step and offset of each channel of values (before, channels, after)."""
    # In float64, since the difference of two float32 may overflow.
    low, high = (f(axis=(0, 2)).astype(np.float64) for f in (values.min, values.max))
    magnitude = np.maximum(high, -low)
    if not math.isfinite(magnitude.max()):
        raise NotEncodable("NaN or infinity")
    width = high - low
    wide = width > 0
    # Rounded up to two bytes, since many channels have few values each; the two zero bytes compress away.
    step = np.maximum(width / 14, magnitude / (MAX_OFFSET / 2)).astype("<f4")
    bits = step.view("<u4")
    bits += np.uint32(0xFFFF)
    bits &= np.uint32(0xFFFF0000)
    if not wide.all():
        # A constant is its own step: the code is 1 or -1.
        step = np.where(wide, step, np.where(magnitude > 0, magnitude, 1.0)).astype("<f4")
    check_step(float(step.min()), float((magnitude + wide * step).max()), dtype)
    scales = np.empty(len(step), _SCALES)
    scales["step"], scales["offset"] = step, np.floor(low / step.astype(np.float64))
    return scales


def _row_sizes(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The rows of a shape, the values of a row, and the outliers among these."""
    width = shape[-1] if shape else 1
    return count_of(shape[:-1]), width, min(OUTLIERS, width)


def _paired(codes: Array) -> Array:
    """Two codes of 4 bits to a byte, the first in the lower half; an odd number is padded with zero."""
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
INT8_TOKEN = Int8Token()
