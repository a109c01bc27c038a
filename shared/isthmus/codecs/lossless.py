"""Every array exactly as it was, bit for bit: bytes of like meaning together, each group compressed alone.

A float's exponents are worth compressing, its mantissas hardly ever: those are tried only where a sample repeats. What
holds one value or two, such as a mask, is these and a bit for each place.
Source: Hershcovitch et al., "ZipNN: Lossless Compression for AI Models", 2024; docs/codecs.md, `lossless/3`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from isthmus.arrays import Array
from isthmus.codecs import Encoding, NotEncodable
from isthmus.codecs.payload import MAX_SECTION, Reader, bytes_of, count_of, restore, shrink

_LENGTH = struct.Struct("<I")
_ONE_BIT = 15
"""Instead of a number of bytes: values are two neighbouring integers."""
_IN_A_BYTE = 8
_SAMPLED, _FEW = 64, 40
"""Of 64 bytes drawn from all 256 values at random, some 57 differ; below 40, a section shrinks by a third or so."""


class Lossless:
    """See `Codec`; takes every dtype that frames carry."""

    calibrated = False

    def encode(self, array: Array, encoding: Encoding | None = None) -> bytes:
        """What docs/codecs.md says under `lossless/3`.

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
            return _of_flags(little)
        if _is_float(array.dtype):
            return _of_few(bits) or _joined(list(_of_floats(bits))[::-1])
        return _of_integers(bits, int(little.min()), array.dtype.kind == "i")

    def working_bytes(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
        """See `Codec`: two bytes of each value, while they are restored."""
        return 4 * count_of(shape)

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
            return _flags(payload, count).reshape(shape)
        if _is_float(dtype):
            if (few := _few(payload, count, np.dtype(f"<u{size}"))) is not None:
                return few.view(dtype).reshape(shape)
            *words, low, high = _sections(payload, size // 2 + 1)
            bits = _top(high, low, count).astype(f"<u{size}", copy=False)
            for word in reversed(words):
                bits <<= bits.dtype.type(16)
                bits |= np.frombuffer(restore(word, 2 * count), "<u2")
            return bits.view(dtype).reshape(shape)
        array = np.empty(shape, dtype)
        least, width, rest = _head(payload, dtype)
        values = array.reshape(-1).view(f"<u{size}")
        if width == _ONE_BIT:
            values[:] = _flags(rest, count)
        else:
            values[:] = 0
            planes = values.view(np.uint8).reshape(-1, size)
            for i, plane in enumerate(_sections(rest, width)):
                planes[:, i] = np.frombuffer(restore(plane, count), np.uint8)
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


def _of_flags(flags: Array) -> bytes:
    """Booleans: one byte, 0 or 1, where more than fit into it are all alike; or the section of their bits."""
    if flags.size > _IN_A_BYTE and (same := bool(flags[0])) == bool(flags.min()) == bool(flags.max()):
        return bytes((same,))
    return bytes(shrink(pack_bits(flags), "structure"))


def _flags(payload: memoryview, count: int) -> Array:
    """What `_of_flags` took, bool (count,).

    Raises:
        ValueError: the payload is not one of so many.
    """
    if count > _IN_A_BYTE and len(payload) == 1:
        if payload[0] > 1:
            raise ValueError(f"a byte of {payload[0]} for booleans that are all alike")
        return np.full(count, payload[0], np.bool_)
    return unpack_bits(restore(payload, -(-count // 8)), count)


def _of_few(bits: Array) -> bytes:
    """Floats' bits of one value or two: the value; or zeros for a length, both, and which one each is. Else nothing."""
    if len(set(bits[:: -(-bits.size // _SAMPLED)].tolist())) > 2:
        return b""
    least, most = bits.min(), bits.max()
    if least == most:
        return bytes(least.tobytes())
    flags = bits == most
    if not (flags | (bits == least)).all():
        return b""
    return b"".join([_LENGTH.pack(0), least.tobytes(), most.tobytes(), _of_flags(flags)])


def _few(payload: memoryview, count: int, dtype: np.dtype[Any]) -> Array | None:
    """What `_of_few` took; None where the payload is of sections: of a length, which is not 0, and more.

    Raises:
        ValueError: the payload is not one of so many.
    """
    if len(payload) == dtype.itemsize:
        return np.repeat(np.frombuffer(payload, dtype), count)
    reader = Reader(payload)
    if reader.fields(_LENGTH)[0]:
        return None
    first, second = np.frombuffer(reader.take(2 * dtype.itemsize), dtype).reshape(2, 1)
    # Unsigned arrays, which wrap around in silence; a choice by booleans takes seven times as long.
    values = _flags(reader.rest(), count).astype(dtype)
    values *= second - first
    values += first
    return values


def _of_integers(values: Array, least: int, signed: bool) -> bytes:
    """Integers, as unsigned ones: the least, how many bytes hold what each is more, and sections of these."""
    more = values - values.dtype.type(least % 256**values.itemsize)
    bits = int(more.max()).bit_length()
    if bits == 1:
        width, rest = _ONE_BIT, _of_flags(more)
    else:
        width = -(-bits // 8)
        planes = np.ascontiguousarray(more.view(np.uint8).reshape(-1, more.itemsize).T)
        rest = _joined([shrink(plane.data, "structure") for plane in planes[:width]])
    length = -(-((least if least >= 0 else ~least).bit_length() + (signed and least != 0)) // 8)
    return b"".join([bytes((length << 4 | width,)), least.to_bytes(length, "little", signed=signed), rest])


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
    """The lengths of all sections but the last, and the sections."""
    return b"".join([*(_LENGTH.pack(len(s)) for s in sections[:-1]), *sections])


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


def _sections(payload: memoryview, count: int) -> list[memoryview]:
    """So many sections, all that there is, not yet restored."""
    reader = Reader(payload)
    if not count:
        reader.end()
        return []
    lengths = [reader.fields(_LENGTH)[0] for _ in range(count - 1)]
    return [*map(reader.take, lengths), reader.rest()]


def _top(high: memoryview, low: memoryview, count: int) -> Array:
    """The top 16 bits of floats, uint16 (count,), from the sections of their exponents and of what follows these."""
    top = np.frombuffer(restore(high, count), np.uint8).astype("<u2")
    top <<= np.uint16(8)
    top |= np.frombuffer(restore(low, count), np.uint8)
    sign = top << np.uint16(15)
    top >>= np.uint16(1)
    top |= sign
    return top


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "fV"  # numpy does not know bfloat16, and calls it V


LOSSLESS = Lossless()
