"""Feature maps after a ReLU: which values are zero, a bit each, and the others.

At quality 1 every value comes back bit for bit; below it the others are rounded to a uniform step.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from isthmus.arrays import Array
from isthmus.codecs import Encoding, NotEncodable
from isthmus.codecs.affine import check_step, lossy_float
from isthmus.codecs.lossless import LOSSLESS, pack_bits, unpack_bits
from isthmus.codecs.payload import MAX_SECTION, Reader, bytes_of, count_of, restore, shrink

_HEADER = struct.Struct("<BfII")
"""The form of the values, their step, how many there are, and the length of the section of bits."""
_EXACT, _UNSIGNED, _SIGNED = range(3)
_PIECE = 2**16
"""Values that are put in their places at once."""
_PLACE_BYTES = 8 + 8 + 8
"""A place, and a code on its way to a value: as float32, and as the product, of up to four bytes, and as its dtype."""
_CODES = {_UNSIGNED: np.dtype(np.uint8), _SIGNED: np.dtype(np.int8)}


class Sparse:
    """See `Codec`; takes floats, and for a quality below 1 all of them but float64.

    Below quality 1, the largest magnitude is 2**(8 * quality) steps, at least 1 and at most 255, or 127 where there
    are negative values; what is less than half a step from zero becomes zero, and zero stays zero.
    """

    calibrated = False

    def encode(self, array: Array, encoding: Encoding) -> bytes:
        """The header, the bits' section, and the values: as `lossless/3` has them, or a section of codes.

        Raises:
            NotEncodable: no float; below quality 1 also float64, NaN, infinity, or values too small to be scaled.
        """
        if array.dtype.kind not in "fV" or array.nbytes > MAX_SECTION:
            raise NotEncodable(f"{array.nbytes} bytes of {array.dtype.name}")
        if not array.size:
            return b""
        flat = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1)
        if encoding.quality >= 1:
            there = flat.view(f"<u{flat.itemsize}") != 0  # -0.0 is not zero here
            # A mask as the index takes twice as long, a check of the places as long again.
            kept = flat.take(np.flatnonzero(there), mode="clip")
            form, step, values = _EXACT, 0.0, LOSSLESS.encode(kept)
        else:
            codes, step = _quantised(flat, encoding.quality)
            there = codes != 0
            kept = codes.take(np.flatnonzero(there), mode="clip")
            form = _SIGNED if codes.dtype == np.int8 else _UNSIGNED
            values = bytes(shrink(bytes_of(kept), "numbers"))
        bits = shrink(pack_bits(there), "structure")
        return b"".join([_HEADER.pack(form, step, kept.size, len(bits)), bits, values])

    def working_bytes(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
        """See `Codec`: a flag for each value, those that are not zero, and the places of one piece."""
        return count_of(shape) * (1 + max(dtype.itemsize, 4)) + min(count_of(shape), _PIECE) * _PLACE_BYTES

    def decode(self, payload: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...], table: object = None) -> Array:
        """The array; codes become values by one float32 product each, the same on every machine.

        Raises:
            ValueError: the payload is not one of that dtype and shape.
        """
        reader, count = Reader(payload), count_of(shape)
        if dtype.kind not in "fV":
            raise ValueError(f"{dtype.name} does not travel as zeros and others")
        if not count:
            reader.end()
            return np.empty(shape, dtype)
        form, step, kept, length = reader.fields(_HEADER)
        there = unpack_bits(restore(reader.take(length), -(-count // 8)), count)
        if kept != (places := int(np.count_nonzero(there))):
            raise ValueError(f"{kept} values for {places} places")
        if form == _EXACT and step == 0:
            values = LOSSLESS.decode(reader.rest(), dtype, (kept,))
        elif form in _CODES and lossy_float(dtype) and np.isfinite(step) and step > 0:
            values = np.frombuffer(restore(reader.rest(), kept), _CODES[form])
        else:
            raise ValueError(f"no values of form {form}, step {step} in {dtype.name}")
        return _placed(values, there, np.float32(step), dtype).reshape(shape)


def _placed(values: Array, there: Array, step: np.float32, dtype: np.dtype[Any]) -> Array:
    """Values of `dtype`, or codes that count steps, where `there` is true, among zeros; in pieces, since a place takes
    eight bytes."""
    array, at = np.zeros(there.size, dtype), 0
    for start in range(0, there.size, _PIECE):
        places = np.flatnonzero(there[start : start + _PIECE])
        some = values[at : at + places.size]
        at += places.size
        if some.dtype != dtype:
            with np.errstate(over="ignore"):
                some = (some.astype(np.float32) * step).astype(dtype, copy=False)
        array[start : start + _PIECE][places] = some
    return array


def _quantised(flat: Array, quality: float) -> tuple[Array, float]:
    """The codes of `flat`, and the step that they count."""
    if not lossy_float(flat.dtype):
        raise NotEncodable(f"{flat.dtype.name} is kept as it is or not at all")
    values = flat.astype(np.float32, copy=False)
    with np.errstate(invalid="ignore"):
        least, most = float(values.min()), float(values.max())
    largest = max(most, -least)
    if not np.isfinite(largest) or np.isnan(least):
        raise NotEncodable("NaN or infinity")
    kind = np.dtype(np.int8 if least < 0 else np.uint8)
    levels = min(max(1, round(2 ** (8 * max(0.0, quality)))), np.iinfo(kind).max)
    step = np.float32(largest / levels) if largest else np.float32(1)
    check_step(float(step), largest + float(step), flat.dtype)
    return np.rint(values / step).astype(kind), float(step)


SPARSE = Sparse()
