"""`sparse/2`, for feature maps after a ReLU: a bit mask of the nonzero values, and these values.

At quality 1 every bit is preserved; below, the nonzero values are quantised to a uniform step.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from isthmus.arrays import Array
from isthmus.codecs import Encoding, NotEncodable
from isthmus.codecs.affine import check_step, lossy_float
from isthmus.codecs.lossless import LOSSLESS, decode_bits, encode_bits
from isthmus.codecs.payload import MAX_SECTION, PayloadReader, bytes_of, count_of, restore, shrink

# The form of the values, their step, their number, and the length of the section of bits.
_HEADER = struct.Struct("<BfII")
_EXACT, _UNSIGNED, _SIGNED = range(3)
# Positions take eight bytes each, so values are scattered in chunks.
_CHUNK = 2**16
# For each value of a chunk: its position, and its code as float32, as a product, and in the tensor's dtype.
_CHUNK_VALUE_BYTES = 8 + 8 + 8
_CODES = {_UNSIGNED: np.dtype(np.uint8), _SIGNED: np.dtype(np.int8)}


class Sparse:
    """See `Codec`; for floats, below quality 1 of at most 32 bits.

    Below quality 1, the largest magnitude is 2**(8 * quality) steps, at least 1 and at most 255, or 127 with negative
    values; magnitudes below half a step become zero, and zero stays zero.
    """

    calibrated = False

    def encode(self, array: Array, encoding: Encoding) -> bytes:
        """The header, the section of the mask, and the values: a `lossless/3` payload, or a section of codes.

        Raises:
            NotEncodable: no float; below quality 1 also float64, NaN, infinity, or values too small for a step.
        """
        if array.dtype.kind not in "fV" or array.nbytes > MAX_SECTION:
            raise NotEncodable(f"{array.nbytes} bytes of {array.dtype.name}")
        if not array.size:
            return b""
        flat = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1)
        if encoding.quality >= 1:
            mask = flat.view(f"<u{flat.itemsize}") != 0  # on bits, to preserve -0.0
            # Indexing by the mask takes twice as long, and checking the positions as long again.
            nonzero = flat.take(np.flatnonzero(mask), mode="clip")
            form, step, values = _EXACT, 0.0, LOSSLESS.encode(nonzero)
        else:
            codes, step = _quantised(flat, encoding.quality)
            mask = codes != 0
            nonzero = codes.take(np.flatnonzero(mask), mode="clip")
            form = _SIGNED if codes.dtype == np.int8 else _UNSIGNED
            values = bytes(shrink(bytes_of(nonzero), "numbers"))
        bits = shrink(encode_bits(mask), "structure")
        return b"".join([_HEADER.pack(form, step, nonzero.size, len(bits)), bits, values])

    def working_bytes(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
        """See `Codec`: a flag for each value, the nonzero values, and the positions of one chunk."""
        return count_of(shape) * (1 + max(dtype.itemsize, 4)) + min(count_of(shape), _CHUNK) * _CHUNK_VALUE_BYTES

    def decode(self, payload: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...], table: object = None) -> Array:
        """The array; each code becomes a value by one float32 product, equal on every machine.

        Raises:
            ValueError: the payload is malformed, or has another dtype or shape.
        """
        reader, count = PayloadReader(payload), count_of(shape)
        if dtype.kind not in "fV":
            raise ValueError(f"{dtype.name} does not travel as zeros and others")
        if not count:
            reader.end()
            return np.empty(shape, dtype)
        form, step, stated, length = reader.fields(_HEADER)
        mask = decode_bits(restore(reader.take(length), -(-count // 8)), count)
        if stated != (nonzero := int(np.count_nonzero(mask))):
            raise ValueError(f"{stated} values for {nonzero} places")
        if form == _EXACT and step == 0:
            values = LOSSLESS.decode(reader.rest(), dtype, (nonzero,))
        elif form in _CODES and lossy_float(dtype) and np.isfinite(step) and step > 0:
            values = np.frombuffer(restore(reader.rest(), nonzero), _CODES[form])
        else:
            raise ValueError(f"no values of form {form}, step {step} in {dtype.name}")
        return _scatter(values, mask, np.float32(step), dtype).reshape(shape)


def _scatter(values: Array, mask: Array, step: np.float32, dtype: np.dtype[Any]) -> Array:
    """Zeros, with values of `dtype`, or codes in units of `step`, where `mask` is true."""
    array, at = np.zeros(mask.size, dtype), 0
    for start in range(0, mask.size, _CHUNK):
        positions = np.flatnonzero(mask[start : start + _CHUNK])
        part = values[at : at + positions.size]
        at += positions.size
        if part.dtype != dtype:
            with np.errstate(over="ignore"):
                part = (part.astype(np.float32) * step).astype(dtype, copy=False)
        array[start : start + _CHUNK][positions] = part
    return array


def _quantised(flat: Array, quality: float) -> tuple[Array, float]:
    """The codes of `flat`, and their step."""
    if not lossy_float(flat.dtype):
        raise NotEncodable(f"{flat.dtype.name} is encoded exactly or not at all")
    values = flat.astype(np.float32, copy=False)
    with np.errstate(invalid="ignore"):
        low, high = float(values.min()), float(values.max())
    magnitude = max(high, -low)
    if not np.isfinite(magnitude) or np.isnan(low):
        raise NotEncodable("NaN or infinity")
    kind = np.dtype(np.int8 if low < 0 else np.uint8)
    levels = min(max(1, round(2 ** (8 * max(0.0, quality)))), np.iinfo(kind).max)
    step = np.float32(magnitude / levels) if magnitude else np.float32(1)
    check_step(float(step), magnitude + float(step), flat.dtype)
    return np.rint(values / step).astype(kind), float(step)


SPARSE = Sparse()
