"""Interleaved range asymmetric numeral systems (rANS) over bytes, with static models, in integers alone.

A coder has one lane or a power of two of them from `MIN_LANES` on: symbol i of a sequence belongs to lane i modulo
their number, so that numpy codes as many symbols at once as there are lanes. A state's start would waste some 28 bits
for each lane; the lanes start from the caller's plain bits instead, such as signs, which come back after the last
symbol: lanes cost next to nothing as long as there are as many plain bits. Format: docs/codecs.md, "The coder".
Source: Duda 2013, arXiv 1311.2540; Giesen 2014, arXiv 1402.3392 (interleaving).
"""

from __future__ import annotations

import struct
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from isthmus.arrays import Array

SCALE = 2**16
"""What the frequencies of a model sum to; states lie between this and its square."""
MIN_LANES, MAX_LANES_LOG = 64, 12
"""Below, Python's integers are faster than numpy's arrays; above, nothing gets faster."""
SYMBOLS_PER_LANE = 8
"""At least: more lanes than that would end in steps that are mostly empty."""
_STATE_BITS = 28
"""Of a state, on average, as `_bits_of_states` writes it."""
_NUMBERS = 2**12
"""That are taken at once: each takes up to 28 bytes meanwhile."""
_HEAD = struct.Struct("<H")
_CHECK_BITS = 12
_LOW, _SHIFT = np.uint32(SCALE - 1), np.uint32(16)
_PLACES = np.arange(32)
_NIBBLE = np.array([8, 4, 2, 1], np.uint8)


@dataclass(frozen=True, eq=False)
class Model:
    """The frequencies of at most 256 symbols, uint32 (n,), of which one that is 0 never occurs; they sum to SCALE."""

    frequencies: Array

    @classmethod
    def of(cls, weights: Sequence[int]) -> Model:
        """Frequencies in proportion to weights, any whole numbers from 0 on, of which one at least is positive.

        Each symbol that may occur has 1, and the rest is divided by rounding the cumulative weights down.
        """
        total, rest = sum(weights), SCALE - sum(w > 0 for w in weights)
        bounds, below, occurring = [0], 0, 0
        for weight in weights:
            below, occurring = below + weight, occurring + (weight > 0)
            bounds.append(below * rest // total + occurring)
        return cls(np.diff(np.array(bounds, np.uint32)))

    @cached_property
    def lists(self) -> tuple[list[int], list[int], list[int]]:
        """The frequencies, where each symbol's slots start, and where they end."""
        ends = self.frequencies.cumsum(dtype=np.uint32)
        return self.frequencies.tolist(), (ends - self.frequencies).tolist(), ends.tolist()


CERTAIN = Model.of([1])
"""Of one symbol, 0, which takes no bits."""


@dataclass(frozen=True, eq=False)
class Codebook:
    """The models of consecutive runs of symbols."""

    each: Sequence[Model]

    @cached_property
    def stacked(self) -> tuple[Array, Array, Array, Array]:
        """All frequencies, where slots start and end if each model's lie above the ones before, and models' bounds."""
        frequencies = np.concatenate([model.frequencies for model in self.each])
        ends = frequencies.cumsum(dtype=np.uint32)
        bounds = np.cumsum([0, *(model.frequencies.size for model in self.each)], dtype=np.int32)
        return frequencies, ends - frequencies, ends, bounds[:-1]


class Encoder:
    """Collects runs of symbols, in the order in which a decoder takes them."""

    def __init__(self) -> None:
        self._sequences: list[tuple[Array, Sequence[int], Codebook]] = []

    def add(self, symbols: Array, bounds: Sequence[int], codebook: Codebook) -> None:
        """A sequence of symbols, uint8 (n,): those from each of `bounds` to the next have one model of the codebook."""
        if symbols.size:
            self._sequences.append((symbols, bounds, codebook))

    def finish(self, plain: Array) -> bytes:
        """The bytes of all symbols and of plain bits, uint8 (m,), each 0 or 1."""
        lanes_log = self._lanes_log(plain.size)
        states, used = _states_of(plain, 1 << lanes_log)
        words: list[Array] = []
        for symbols, bounds, codebook in reversed(self._sequences):
            (_push if lanes_log else _push_one)(states, symbols, bounds, codebook, words)
        coded = np.concatenate([np.zeros(0, "<u2"), *reversed(words)])
        rest = np.packbits(plain[used:])
        data = b"".join(part.tobytes() for part in (np.packbits(_bits_of_states(states)), coded.astype("<u2"), rest))
        return _HEAD.pack(lanes_log << _CHECK_BITS | _check(data, lanes_log)) + data

    def _lanes_log(self, plain: int) -> int:
        """As many lanes as plain bits pay for and symbols fill."""
        count = sum(symbols.size for symbols, _, _ in self._sequences)
        lanes = min(plain // _STATE_BITS, count // SYMBOLS_PER_LANE, 1 << MAX_LANES_LOG)
        return lanes.bit_length() - 1 if lanes >= MIN_LANES else 0


class Decoder:
    """Takes the sequences of symbols that an encoder was given, then its plain bits.

    Raises:
        ValueError: the data are not an encoder's, or were changed.
    """

    def __init__(self, data: memoryview) -> None:
        if len(data) < _HEAD.size:
            raise ValueError("coded values end within their head")
        head, data = _HEAD.unpack(data[: _HEAD.size])[0], data[_HEAD.size :]
        lanes_log = head >> _CHECK_BITS
        if lanes_log > MAX_LANES_LOG or 0 < lanes_log < MIN_LANES.bit_length() - 1:
            raise ValueError(f"coded values have no 2^{lanes_log} lanes")
        if head != lanes_log << _CHECK_BITS | _check(data, lanes_log):
            raise ValueError("coded values do not have the checksum that they state")
        lanes = 1 << lanes_log
        most = np.unpackbits(np.frombuffer(data[: -(-35 * lanes // 8)], np.uint8))
        self._states, used = _states_of(most, lanes)
        if used > most.size:
            raise ValueError("coded values end within their states")
        if most[used : used + -used % 8].any():
            raise ValueError("the bits after the states of coded values are not zero")
        self._rest, self._at = data[-(-used // 8) :], 0
        self._words = np.frombuffer(self._rest[: len(self._rest) // 2 * 2], "<u2")

    def take(self, bounds: Sequence[int], codebook: Codebook) -> Array:
        """The next sequence, uint8 (n,), of runs of symbols as they were added.

        Raises:
            ValueError: the data end before.
        """
        count = bounds[-1]
        if not count:
            return np.zeros(0, np.uint8)
        try:
            pull = _pull if self._states.size > 1 else _pull_one
            symbols, self._at = pull(self._states, bounds, codebook, self._words, self._at)
        except IndexError as e:
            raise ValueError("coded values end before the last symbol") from e
        return symbols

    def finish(self, count: int) -> PlainBits:
        """The plain bits, `count` of them, which follow the last symbol.

        Raises:
            ValueError: the data hold more or fewer of them.
        """
        return PlainBits(_bits_of_states(self._states), self._rest[2 * self._at :], count)


class PlainBits:
    """Plain bits, taken from the first on: those that states held, one a byte, then packed ones.

    Raises:
        ValueError: there are not `count` of them, and zeros to the end of the last byte.
    """

    def __init__(self, held: Array, packed: memoryview, count: int) -> None:
        missing = max(count - held.size, 0)
        if len(packed) != -(-missing // 8):
            raise ValueError("coded values do not end where they should")
        if held[count:].any() or (missing % 8 and packed[-1] & (0xFF >> missing % 8)):
            raise ValueError("the bits after the last coded value are not zero")
        self._held, self._packed, self._at = held, packed, 0

    def take(self, count: int) -> Array:
        """The next bits, uint8 (count,), each 0 or 1."""
        held = self._held[self._at : self._at + count]
        first = self._at + held.size - self._held.size
        self._at += count
        if held.size == count:
            return held
        last = first + count - held.size
        bits = np.unpackbits(np.frombuffer(self._packed[first // 8 : -(-last // 8)], np.uint8))
        bits = bits[first % 8 : first % 8 + last - first]
        return np.concatenate([held, bits]) if held.size else bits

    def numbers(self, count: int, width: int) -> Array:
        """The next numbers of `width` bits, at most 12, int32 (count,)."""
        found = np.empty(count, np.int32)
        for start in range(0, count, _NUMBERS):
            part = found[start : start + _NUMBERS]
            part[:] = of_bits(self.take(part.size * width), width)
        return found


def bits_of(values: Array, width: int) -> Array:
    """The `width` low bits of whole numbers below 2^16, the highest first: uint8 (n * width,), each 0 or 1."""
    size = 8 if width <= 8 else 16
    bits = np.unpackbits(values.astype(f">u{size // 8}").view(np.uint8))
    return bits.reshape(-1, size)[:, size - width :].reshape(-1)


def of_bits(bits: Array, width: int) -> Array:
    """The numbers whose bits `bits_of` gave, int32 (n,)."""
    size = 8 if width <= 8 else 16
    places = np.zeros((bits.size // width, size), np.uint8)
    places[:, size - width :] = bits.reshape(-1, width)
    return np.packbits(places).view(f">u{size // 8}").astype(np.int32)


def _check(data: bytes | memoryview, lanes_log: int) -> int:
    return zlib.crc32(data, lanes_log) & (1 << _CHECK_BITS) - 1


def _bits_of_states(states: Array) -> Array:
    """States' lengths, less 17, of 4 bits each, then each state's bits below its highest: uint8, each 0 or 1.

    States are spread evenly over lengths, and among those of one length: so these bits are about as many as they tell.
    """
    lengths = np.frexp(states.astype(np.float64))[1] - 17
    bits = np.unpackbits(states.astype(">u4").view(np.uint8)).reshape(-1, 32)
    return np.concatenate([bits_of(lengths, 4), bits[_PLACES[-1] - _PLACES < lengths[:, None] + 16]])


def _states_of(bits: Array, lanes: int) -> tuple[Array, int]:
    """The states of which `_bits_of_states` gives the first of these bits, and how many; beyond the last are zeros."""
    padded = np.zeros(max(bits.size, 35 * lanes), np.uint8)
    padded[: bits.size] = bits
    lengths = padded[: 4 * lanes].reshape(-1, 4) @ _NIBBLE
    used = 20 * lanes + int(lengths.sum())
    below = _PLACES[-1] - _PLACES < lengths[:, None] + np.uint8(16)
    places = np.zeros((lanes, 32), np.uint8)
    places[below] = padded[4 * lanes : used]
    states = np.packbits(places).view(">u4").astype(np.uint32)
    return states | (np.uint32(SCALE) << lengths.astype(np.uint32)), used


def _push(states: Array, symbols: Array, bounds: Sequence[int], codebook: Codebook, words: list[Array]) -> None:
    """Encode a sequence, from its last symbol on."""
    frequencies, starts, _, offsets = codebook.stacked
    lengths = np.diff(bounds)
    at = symbols + np.repeat(offsets, lengths)
    frequencies, starts = frequencies.take(at), starts.take(at) & _LOW
    lanes = states.size
    for first in range((symbols.size - 1) // lanes * lanes, -1, -lanes):
        frequency = frequencies[first : first + lanes]
        some = states[: frequency.size]
        full = ((some >> _SHIFT) >= frequency).nonzero()[0]
        word = some.take(full)
        words.append(word.astype("<u2"))
        some[full] = word >> _SHIFT
        quotient, remainder = np.divmod(some, frequency)
        quotient <<= _SHIFT
        quotient += remainder
        np.add(quotient, starts[first : first + lanes], out=some)


def _pull(states: Array, bounds: Sequence[int], codebook: Codebook, words: Array, used: int) -> tuple[Array, int]:
    """Decode a sequence; returns how many words are used by then.

    Raises:
        IndexError: there are not so many.
    """
    frequencies, starts, ends, offsets = codebook.stacked
    lengths = np.diff(bounds)
    above = np.repeat(np.arange(offsets.size, dtype=np.uint32) << _SHIFT, lengths)
    found = np.empty(above.size, np.int32)
    lanes = states.size
    for first in range(0, above.size, lanes):
        slots = above[first : first + lanes]
        some = states[: slots.size]
        slots |= some & _LOW
        at = ends.searchsorted(slots, "right")
        found[first : first + lanes] = at
        slots -= starts.take(at)
        some >>= _SHIFT
        some *= frequencies.take(at)
        some += slots
        empty = (some < SCALE).nonzero()[0]
        word = words[used : used + empty.size]
        if word.size < empty.size:
            raise IndexError(used)
        used += empty.size
        some[empty] = some.take(empty) << _SHIFT | word
    found -= np.repeat(offsets, lengths)
    return found.astype(np.uint8), used


def _push_one(states: Array, symbols: Array, bounds: Sequence[int], codebook: Codebook, words: list[Array]) -> None:
    """What `_push` does, of one lane."""
    state = int(states[0])
    coded: list[int] = []
    for (start, stop), model in reversed(list(zip(pairwise(bounds), codebook.each, strict=True))):
        frequencies, starts, _ = model.lists
        for symbol in symbols[start:stop][::-1].tolist():
            frequency = frequencies[symbol]
            if state >> 16 >= frequency:
                coded.append(state & 0xFFFF)
                state >>= 16
            quotient, remainder = divmod(state, frequency)
            state = (quotient << 16) + remainder + starts[symbol]
    words.append(np.array(coded[::-1], "<u2"))
    states[0] = state


def _pull_one(states: Array, bounds: Sequence[int], codebook: Codebook, words: Array, used: int) -> tuple[Array, int]:
    """What `_pull` does, of one lane."""
    state = int(states[0])
    found = bytearray()
    left = iter(words[used : used + bounds[-1]].tolist())
    for (start, stop), model in zip(pairwise(bounds), codebook.each, strict=True):
        frequencies, starts, ends = model.lists
        for _ in range(stop - start):
            slot = state & 0xFFFF
            symbol = bisect_right(ends, slot)
            found.append(symbol)
            state = frequencies[symbol] * (state >> 16) + slot - starts[symbol]
            if state < SCALE:
                word = next(left, None)
                if word is None:
                    raise IndexError(used)
                used += 1
                state = state << 16 | word
    states[0] = state
    return np.frombuffer(bytes(found), np.uint8), used
