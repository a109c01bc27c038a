"""`lossless/3`: every bit is preserved; bytes of the same significance are compressed together.

A float's exponents compress, its mantissas hardly ever: mantissas are compressed only if a sample repeats. A tensor
with at most two distinct values (a mask) becomes the values and a bit for each position.
Source: Hershcovitch et al., "ZipNN: Lossless Compression for AI Models", 2024; docs/reference/codecs.md, "lossless/3".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from isthmus.arrays import Array
from isthmus.codecs import Encoding, NotEncodable
from isthmus.codecs.payload import MAX_SECTION, PayloadReader, bytes_of, count_of, restore, shrink

_LENGTH = struct.Struct("<I")
# In place of a number of bytes: two neighbouring integers, a bit each.
_ONE_BIT = 15
# Up to so many flags take a single byte anyway, so a constant has no shorter form.
_FLAGS_PER_BYTE = 8
# Of 64 random bytes, some 57 are distinct. With fewer than 40, a section shrinks by about a third.
_SAMPLES, _MIN_DISTINCT = 64, 40


class Lossless:
    """See `Codec`; for every dtype of frames."""

    calibrated = False

    def encode(self, array: Array, encoding: Encoding | None = None) -> bytes:
        """The payload, by kind of dtype: booleans, floats, integers.

        Raises:
            NotEncodable: more than 4 GiB.
        """
        if array.nbytes > MAX_SECTION:
            raise NotEncodable(f"{array.nbytes} bytes are more than sections can hold")
        if not array.size:
            return b""
        little = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1)
        bits = little.view(f"<u{little.itemsize}")
        if array.dtype.kind == "b":
            return _encode_flags(little)
        if _is_float(array.dtype):
            return _encode_two_values(bits) or _joined(list(_encode_floats(bits))[::-1])
        return _encode_integers(bits, int(little.min()), array.dtype.kind == "i")

    def working_bytes(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
        """See `Codec`: two sections of two bytes a value."""
        return 4 * count_of(shape)

    def decode(self, payload: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...], table: object = None) -> Array:
        """The array, in new memory.

        Raises:
            ValueError: the payload is malformed, or has another dtype or shape.
        """
        count, size = count_of(shape), dtype.itemsize
        if not count:
            PayloadReader(payload).end()
            return np.empty(shape, dtype)
        if dtype.kind == "b":
            return _decode_flags(payload, count).reshape(shape)
        if _is_float(dtype):
            if (values := _decode_two_values(payload, count, np.dtype(f"<u{size}"))) is not None:
                return values.view(dtype).reshape(shape)
            *words, low, high = _sections(payload, size // 2 + 1)
            bits = _decode_top_words(high, low, count).astype(f"<u{size}", copy=False)
            for word in reversed(words):
                bits <<= bits.dtype.type(16)
                bits |= np.frombuffer(restore(word, 2 * count), "<u2")
            return bits.view(dtype).reshape(shape)
        array = np.empty(shape, dtype)
        minimum, width, rest = _decode_head(payload, dtype)
        values = array.reshape(-1).view(f"<u{size}")
        if width == _ONE_BIT:
            values[:] = _decode_flags(rest, count)
        else:
            values[:] = 0
            planes = values.view(np.uint8).reshape(-1, size)
            for i, plane in enumerate(_sections(rest, width)):
                planes[:, i] = np.frombuffer(restore(plane, count), np.uint8)
        values += values.dtype.type(minimum % 256**size)
        return array


def encode_bits(flags: Array) -> memoryview:
    """Booleans, eight to a byte, the first in the highest bit, padded with zeros."""
    return bytes_of(np.packbits(flags))


def decode_bits(data: bytes | memoryview, count: int) -> Array:
    """The inverse of `encode_bits`, bool (count,).

    Raises:
        ValueError: the padding is not zero.
    """
    octets = np.frombuffer(data, np.uint8)
    if count % 8 and int(octets[-1]) & (0xFF >> count % 8):
        raise ValueError("the bits after the last value are not zero")
    return np.unpackbits(octets, count=count).view(np.bool_)


def _encode_flags(flags: Array) -> bytes:
    """One byte, 0 or 1, for more than eight equal booleans; else a section of bits."""
    if flags.size > _FLAGS_PER_BYTE and (same := bool(flags[0])) == bool(flags.min()) == bool(flags.max()):
        return bytes((same,))
    return bytes(shrink(encode_bits(flags), "structure"))


def _decode_flags(payload: memoryview, count: int) -> Array:
    """The inverse of `_encode_flags`, bool (count,).

    Raises:
        ValueError: the payload is malformed, or has another number of flags.
    """
    if count > _FLAGS_PER_BYTE and len(payload) == 1:
        if payload[0] > 1:
            raise ValueError(f"a byte of {payload[0]} for booleans that are all alike")
        return np.full(count, payload[0], np.bool_)
    return decode_bits(restore(payload, -(-count // 8)), count)


def _encode_two_values(bits: Array) -> bytes:
    """Bits of floats: a constant as itself; two values as a length of zero, both, and flags. Empty for more values."""
    if len(set(bits[:: -(-bits.size // _SAMPLES)].tolist())) > 2:
        return b""
    low, high = bits.min(), bits.max()
    if low == high:
        return bytes(low.tobytes())
    flags = bits == high
    if not (flags | (bits == low)).all():
        return b""
    return b"".join([_LENGTH.pack(0), low.tobytes(), high.tobytes(), _encode_flags(flags)])


def _decode_two_values(payload: memoryview, count: int, dtype: np.dtype[Any]) -> Array | None:
    """The inverse of `_encode_two_values`; None where the payload starts with the length of a section, never 0.

    Raises:
        ValueError: the payload is malformed, or has another number of values.
    """
    if len(payload) == dtype.itemsize:
        return np.repeat(np.frombuffer(payload, dtype), count)
    reader = PayloadReader(payload)
    if reader.fields(_LENGTH)[0]:
        return None
    first, second = np.frombuffer(reader.take(2 * dtype.itemsize), dtype).reshape(2, 1)
    # Unsigned, so the arithmetic wraps around; numpy.where takes seven times as long.
    values = _decode_flags(reader.rest(), count).astype(dtype)
    values *= second - first
    values += first
    return values


def _encode_integers(values: Array, minimum: int, signed: bool) -> bytes:
    """Integers, viewed as unsigned: their minimum, the width of the offsets from the minimum, the offsets by byte."""
    offsets = values - values.dtype.type(minimum % 256**values.itemsize)
    bits = int(offsets.max()).bit_length()
    if bits == 1:
        width, rest = _ONE_BIT, _encode_flags(offsets)
    else:
        width = -(-bits // 8)
        planes = np.ascontiguousarray(offsets.view(np.uint8).reshape(-1, offsets.itemsize).T)
        rest = _joined([shrink(plane.data, "structure") for plane in planes[:width]])
    length = -(-((minimum if minimum >= 0 else ~minimum).bit_length() + (signed and minimum != 0)) // 8)
    return b"".join([bytes((length << 4 | width,)), minimum.to_bytes(length, "little", signed=signed), rest])


def _decode_head(payload: memoryview, dtype: np.dtype[Any]) -> tuple[int, int, memoryview]:
    """The minimum of integers, the number of bytes of the offsets or _ONE_BIT, and the rest of the payload.

    Raises:
        ValueError: the head is malformed.
    """
    length, width = divmod(payload[0], 16) if len(payload) else (0, _ONE_BIT + 1)
    if length > dtype.itemsize or dtype.itemsize < width != _ONE_BIT or len(payload) <= length:
        raise ValueError("integers begin with the lengths of the least of them and of what the others are more, and it")
    minimum = int.from_bytes(payload[1 : 1 + length], "little", signed=dtype.kind == "i")
    return minimum, width, payload[1 + length :]


def _joined(sections: list[bytes | memoryview]) -> bytes:
    """The lengths of all sections but the last, and the sections."""
    return b"".join([*(_LENGTH.pack(len(s)) for s in sections[:-1]), *sections])


def _encode_floats(bits: Array) -> Iterator[bytes | memoryview]:
    """The sections of floats, the last section first."""
    words = bits.itemsize // 2
    # The cast truncates in a vector instruction; a strided copy takes twice as long.
    top = np.empty(bits.shape, "<u2")
    np.right_shift(bits, bits.dtype.type(16 * (words - 1)), out=top, casting="unsafe")
    low = top.astype(np.uint8)
    low += low
    low |= (top > np.uint16(0x7FFF)).view(np.uint8)
    top >>= np.uint16(7)
    yield shrink(top.astype(np.uint8).data, "numbers")
    section, repeats = _shrink_if_repeating(low)
    yield section
    for i in range(words - 2, -1, -1):
        word = (bits >> bits.dtype.type(16 * i) if i else bits).astype("<u2").view(np.uint8)
        # If these bits do not repeat, bits of less significance do not either.
        section, repeats = _shrink_if_repeating(word) if repeats else (word.data, False)
        yield section


def _shrink_if_repeating(section: Array) -> tuple[bytes | memoryview, bool]:
    """`section`, compressed if a sample repeats, and whether a sample repeats."""
    step = -(-section.size // _SAMPLES) | 1  # odd, to sample both bytes of words
    if len(set(section[::step].tobytes())) >= _MIN_DISTINCT:
        return section.data, False
    return shrink(section.data, "numbers"), True


def _sections(payload: memoryview, count: int) -> list[memoryview]:
    """Split a payload into `count` sections, without decompression."""
    reader = PayloadReader(payload)
    if not count:
        reader.end()
        return []
    lengths = [reader.fields(_LENGTH)[0] for _ in range(count - 1)]
    return [*map(reader.take, lengths), reader.rest()]


def _decode_top_words(high: memoryview, low: memoryview, count: int) -> Array:
    """The top 16 bits of floats, uint16 (count,), from the sections of the exponents and of the bits below."""
    top = np.frombuffer(restore(high, count), np.uint8).astype("<u2")
    top <<= np.uint16(8)
    top |= np.frombuffer(restore(low, count), np.uint8)
    sign = top << np.uint16(15)
    top >>= np.uint16(1)
    top |= sign
    return top


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "fV"  # bfloat16 has kind V, as every dtype from outside of numpy


LOSSLESS = Lossless()
