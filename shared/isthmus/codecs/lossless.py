"""Every array exactly as it was, bit for bit: bytes of like meaning together, each group compressed alone.

A float's exponents are worth compressing, its mantissas hardly ever: those are tried only where a sample repeats.
Source: Hershcovitch et al., "ZipNN: Lossless Compression for AI Models", 2024; docs/codecs.md, `lossless/2`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from isthmus.codecs import Array, NotPackable, Packing
from isthmus.codecs.payload import LONGEST_SECTION, Reader, bytes_of, count_of, restore, shrink

_LENGTH = struct.Struct("<I")
_ONE_BIT = 15
"""Instead of a number of bytes: values are two neighbouring integers."""
_SAMPLED, _FEW = 64, 40
"""Of 64 bytes drawn from all 256 values at random, some 57 differ; below 40, a section shrinks by a third or so."""


class Lossless:
    """See `Codec`; takes every dtype that frames carry."""

    calibrated = False

    def encode(self, array: Array, packing: Packing | None = None) -> bytes:
        """The lengths of `array`'s sections, and the sections.

        Raises:
            NotPackable: more than 4 GiB.
        """
        if array.nbytes > LONGEST_SECTION:
            raise NotPackable(f"{array.nbytes} bytes are more than sections can hold")
        if not array.size:
            return b""
        little = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1)
        if array.dtype.kind == "b":
            sections = [shrink(pack_bits(little), "structure")]
        elif _is_float(array.dtype):
            sections = list(_of_floats(little.view(f"<u{little.itemsize}")))[::-1]
        else:
            return _of_integers(little.view(f"<u{little.itemsize}"), int(little.min()), array.dtype.kind == "i")
        return _joined(sections)

    def decode(self, payload: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...], table: object = None) -> Array:
        """The array, in memory of its own.

        Raises:
            ValueError: the payload is not one of that dtype and shape.
        """
        count, size = count_of(shape), dtype.itemsize
        if not count:
            Reader(payload).end()
            return np.empty(shape, dtype)
        if dtype.kind == "b":
            (packed,) = _sections(payload, [-(-count // 8)])
            return unpack_bits(packed, count).reshape(shape)
        if _is_float(dtype):
            *words, low, high = _sections(payload, [2 * count] * (size // 2 - 1) + [count] * 2)
            top = np.frombuffer(high, np.uint8).astype("<u2")
            top <<= np.uint16(8)
            top |= np.frombuffer(low, np.uint8)
            sign = top << np.uint16(15)
            top >>= np.uint16(1)
            top |= sign
            bits = top.astype(f"<u{size}", copy=False)
            for word in reversed(words):
                bits <<= bits.dtype.type(16)
                bits |= np.frombuffer(word, "<u2")
            return bits.view(dtype).reshape(shape)
        array = np.empty(shape, dtype)
        least, width, rest = _head(payload, dtype)
        values = array.reshape(-1).view(f"<u{size}")
        if width == _ONE_BIT:
            values[:] = unpack_bits(_sections(rest, [-(-count // 8)])[0], count)
        else:
            values[:] = 0
            planes = values.view(np.uint8).reshape(-1, size)
            for i, plane in enumerate(_sections(rest, [count] * width)):
                planes[:, i] = np.frombuffer(plane, np.uint8)
        values += values.dtype.type(least % 256**size)
        return array


def pack_bits(flags: Array) -> memoryview:
    """Booleans, eight to a byte, the first in the highest bit, zeros at the end."""
    return bytes_of(np.packbits(flags))


def unpack_bits(data: bytes | memoryview, count: int) -> Array:
    """`count` booleans of what `pack_bits` gave.

    Raises:
        ValueError: what follows the last one is not zero.
    """
    packed = np.frombuffer(data, np.uint8)
    if count % 8 and int(packed[-1]) & (0xFF >> count % 8):
        raise ValueError("the bits after the last value are not zero")
    return np.unpackbits(packed, count=count).view(np.bool_)


def _of_integers(values: Array, least: int, signed: bool) -> bytes:
    """Integers, as unsigned ones: the least, how many bytes hold what each is more, and sections of these."""
    more = values - values.dtype.type(least % 256**values.itemsize)
    bits = int(more.max()).bit_length()
    if bits == 1:
        width, sections = _ONE_BIT, [shrink(pack_bits(more), "structure")]
    else:
        width = -(-bits // 8)
        planes = np.ascontiguousarray(more.view(np.uint8).reshape(-1, more.itemsize).T)
        sections = [shrink(plane.data, "structure") for plane in planes[:width]]
    length = -(-((least if least >= 0 else ~least).bit_length() + (signed and least != 0)) // 8)
    return bytes((length << 4 | width,)) + b"".join(
        [least.to_bytes(length, "little", signed=signed), _joined(sections)]
    )


def _head(payload: memoryview, dtype: np.dtype[Any]) -> tuple[int, int, memoryview]:
    """The least of integers, how many bytes hold what each is more than it or _ONE_BIT, and what follows.

    Raises:
        ValueError: the payload does not begin so.
    """
    length, width = divmod(payload[0], 16) if len(payload) else (0, _ONE_BIT + 1)
    if length > dtype.itemsize or dtype.itemsize < width != _ONE_BIT or len(payload) <= length:
        raise ValueError("integers begin with the lengths of the least of them and of what the others are more, and it")
    least = int.from_bytes(payload[1 : 1 + length], "little", signed=dtype.kind == "i")
    return least, width, payload[1 + length :]


def _joined(sections: list[bytes | memoryview]) -> bytes:
    return b"".join([*(_LENGTH.pack(len(s)) for s in sections), *sections])


def _of_floats(bits: Array) -> Iterator[bytes | memoryview]:
    """The sections of floats, the last one first."""
    words = bits.itemsize // 2
    # Casting drops the higher bits, in a vector instruction, where strided copies take twice as long.
    top = np.empty(bits.shape, "<u2")
    np.right_shift(bits, bits.dtype.type(16 * (words - 1)), out=top, casting="unsafe")
    low = top.astype(np.uint8)
    low += low
    low |= (top > np.uint16(0x7FFF)).view(np.uint8)
    top >>= np.uint16(7)
    yield shrink(top.astype(np.uint8).data, "numbers")
    section, more = _if_it_repeats(low)
    yield section
    for i in range(words - 2, -1, -1):
        word = (bits >> bits.dtype.type(16 * i) if i else bits).astype("<u2").view(np.uint8)
        # Below bits that do not repeat, none do.
        section, more = _if_it_repeats(word) if more else (word.data, False)
        yield section


def _if_it_repeats(section: Array) -> tuple[bytes | memoryview, bool]:
    """`section` compressed if a sample of it repeats itself, and whether it does."""
    step = -(-section.size // _SAMPLED) | 1  # odd: both bytes of a word are among them
    if len(set(section[::step].tobytes())) >= _FEW:
        return section.data, False
    return shrink(section.data, "numbers"), True


def _sections(payload: memoryview, sizes: list[int]) -> list[bytes | memoryview]:
    """The sections of those sizes, all that there is."""
    reader = Reader(payload)
    lengths = [reader.fields(_LENGTH)[0] for _ in sizes]
    found = [restore(reader.take(length), size) for length, size in zip(lengths, sizes, strict=True)]
    reader.end()
    return found


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "fV"  # numpy does not know bfloat16, and calls it V


LOSSLESS = Lossless()
