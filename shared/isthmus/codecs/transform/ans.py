"""Interleaved range asymmetric numeral systems (rANS) over bytes, with static models, in integers alone.

A coder has one lane, or a power of two lanes from MIN_LANES on. Symbol i of a sequence belongs to lane i modulo the
number of lanes, so numpy codes one symbol of every lane at once. Fixed initial states would waste some 28 bits a lane;
the lanes start from the caller's plain bits instead, such as signs, and the decoder returns these after the last
symbol. Lanes cost next to nothing as long as there are enough plain bits.
Source: Duda 2013, arXiv 1311.2540; Giesen 2014, arXiv 1402.3392 (interleaving). Format: docs/reference/codecs.md,
"The coder".
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

# The sum of a model's frequencies; states lie between this and its square.
SCALE = 2**16
# Below the minimum, Python's integers are faster than numpy's arrays; above the maximum, nothing gets faster.
MIN_LANES, MAX_LANES_LOG = 64, 12
# More lanes would end in steps that are mostly empty.
MIN_SYMBOLS_PER_LANE = 8
# The average length of a state in the form of `_bits_of_states`.
_STATE_BITS = 28
# Numbers decoded at once: each takes up to 28 bytes meanwhile.
_NUMBERS = 2**12
_HEAD = struct.Struct("<H")
_CHECK_BITS = 12
_LOW, _SHIFT = np.uint32(SCALE - 1), np.uint32(16)
_PLACES = np.arange(32)
_NIBBLE = np.array([8, 4, 2, 1], np.uint8)


@dataclass(frozen=True, eq=False)
class SymbolModel:
    """The frequencies of at most 256 symbols, uint32 (n,); their sum is SCALE; a frequency of 0 never occurs."""

    frequencies: Array

    @classmethod
    def of(cls, weights: Sequence[int]) -> SymbolModel:
        """Frequencies in proportion to weights: integers from 0 on, not all 0.

        Each symbol of positive weight gets 1; the rest is divided by rounding the cumulative weights down.
        """
        total, rest = sum(weights), SCALE - sum(w > 0 for w in weights)
        bounds, below, occurring = [0], 0, 0
        for weight in weights:
            below, occurring = below + weight, occurring + (weight > 0)
            bounds.append(below * rest // total + occurring)
        return cls(np.diff(np.array(bounds, np.uint32)))

    @cached_property
    def lists(self) -> tuple[list[int], list[int], list[int]]:
        """The frequencies, and the start and end of each symbol's slots."""
        ends = self.frequencies.cumsum(dtype=np.uint32)
        return self.frequencies.tolist(), (ends - self.frequencies).tolist(), ends.tolist()


# The model of a single symbol, 0, in no bits.
CERTAIN = SymbolModel.of([1])


@dataclass(frozen=True, eq=False)
class Codebook:
    """The models of consecutive runs of symbols."""

    models: Sequence[SymbolModel]

    @cached_property
    def stacked(self) -> tuple[Array, Array, Array, Array]:
        """All frequencies, the start and end of their slots, one model above the other, and the models' offsets."""
        frequencies = np.concatenate([model.frequencies for model in self.models])
        ends = frequencies.cumsum(dtype=np.uint32)
        bounds = np.cumsum([0, *(model.frequencies.size for model in self.models)], dtype=np.int32)
        return frequencies, ends - frequencies, ends, bounds[:-1]


class Encoder:
    """Collects sequences of symbols, in the order of their decoding."""

    def __init__(self) -> None:
        self._sequences: list[tuple[Array, Sequence[int], Codebook]] = []

    def add(self, symbols: Array, bounds: Sequence[int], codebook: Codebook) -> None:
        """Add symbols, uint8 (n,): from each of `bounds` to the next, one model of the codebook applies."""
        if symbols.size:
            self._sequences.append((symbols, bounds, codebook))

    def finish(self, plain: Array) -> bytes:
        """Encode all symbols, and plain bits, uint8 (m,), each 0 or 1."""
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
        """log2 of the number of lanes: no more than plain bits can initialise and symbols can fill."""
        count = sum(symbols.size for symbols, _, _ in self._sequences)
        lanes = min(plain // _STATE_BITS, count // MIN_SYMBOLS_PER_LANE, 1 << MAX_LANES_LOG)
        return lanes.bit_length() - 1 if lanes >= MIN_LANES else 0


class Decoder:
    """Decodes the sequences of symbols of an encoder, then its plain bits.

    Raises:
        ValueError: the data are malformed, or fail their checksum.
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
        # A state takes 20 to 35 bits.
        head_bits = np.unpackbits(np.frombuffer(data[: -(-35 * lanes // 8)], np.uint8))
        self._states, used = _states_of(head_bits, lanes)
        if used > head_bits.size:
            raise ValueError("coded values end within their states")
        if head_bits[used : used + -used % 8].any():
            raise ValueError("the bits after the states of coded values are not zero")
        self._rest, self._at = data[-(-used // 8) :], 0
        self._words = np.frombuffer(self._rest[: len(self._rest) // 2 * 2], "<u2")

    def take(self, bounds: Sequence[int], codebook: Codebook) -> Array:
        """Decode the next sequence, uint8 (n,), with the bounds and codebook of `Encoder.add`.

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
        """The `count` plain bits after the last symbol.

        Raises:
            ValueError: the data hold more or fewer plain bits.
        """
        return PlainBits(_bits_of_states(self._states), self._rest[2 * self._at :], count)


class PlainBits:
    """A reader of plain bits: first the states' bits, in bytes, then the bits at the end of the data, eight a byte.

    Raises:
        ValueError: the number of bits is not `count`, or the last byte's padding is not zero.
    """

    def __init__(self, state_bits: Array, rest: memoryview, count: int) -> None:
        missing = max(count - state_bits.size, 0)
        if len(rest) != -(-missing // 8):
            raise ValueError("coded values do not end where they should")
        if state_bits[count:].any() or (missing % 8 and rest[-1] & (0xFF >> missing % 8)):
            raise ValueError("the bits after the last coded value are not zero")
        self._state_bits, self._rest, self._at = state_bits, rest, 0

    def take(self, count: int) -> Array:
        """The next bits, uint8 (count,), each 0 or 1."""
        head = self._state_bits[self._at : self._at + count]
        first = self._at + head.size - self._state_bits.size
        self._at += count
        if head.size == count:
            return head
        last = first + count - head.size
        bits = np.unpackbits(np.frombuffer(self._rest[first // 8 : -(-last // 8)], np.uint8))
        bits = bits[first % 8 : first % 8 + last - first]
        return np.concatenate([head, bits]) if head.size else bits

    def numbers(self, count: int, width: int) -> Array:
        """The next numbers of `width` bits, at most 12, int32 (count,)."""
        numbers = np.empty(count, np.int32)
        for start in range(0, count, _NUMBERS):
            part = numbers[start : start + _NUMBERS]
            part[:] = of_bits(self.take(part.size * width), width)
        return numbers


def bits_of(values: Array, width: int) -> Array:
    """The `width` low bits of integers below 2^16, the highest first: uint8 (n * width,), each 0 or 1."""
    size = 8 if width <= 8 else 16
    bits = np.unpackbits(values.astype(f">u{size // 8}").view(np.uint8))
    return bits.reshape(-1, size)[:, size - width :].reshape(-1)


def of_bits(bits: Array, width: int) -> Array:
    """The inverse of `bits_of`, int32 (n,)."""
    size = 8 if width <= 8 else 16
    places = np.zeros((bits.size // width, size), np.uint8)
    places[:, size - width :] = bits.reshape(-1, width)
    return np.packbits(places).view(f">u{size // 8}").astype(np.int32)


def _check(data: bytes | memoryview, lanes_log: int) -> int:
    return zlib.crc32(data, lanes_log) & (1 << _CHECK_BITS) - 1


def _bits_of_states(states: Array) -> Array:
    """States as bits, uint8, each 0 or 1: their lengths, less 17, in 4 bits each, then the bits below the highest ones.

    States are distributed evenly over lengths, and within a length: the code is close to their entropy.
    """
    lengths = np.frexp(states.astype(np.float64))[1] - 17
    bits = np.unpackbits(states.astype(">u4").view(np.uint8)).reshape(-1, 32)
    return np.concatenate([bits_of(lengths, 4), bits[_PLACES[-1] - _PLACES < lengths[:, None] + 16]])


def _states_of(bits: Array, lanes: int) -> tuple[Array, int]:
    """The inverse of `_bits_of_states`, and the number of bits consumed; missing bits count as zero."""
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
    """Encode a sequence from its last symbol backwards, as ANS requires: the decoder pops states."""
    frequencies, starts, _, offsets = codebook.stacked
    lengths = np.diff(bounds)
    at = symbols + np.repeat(offsets, lengths)
    frequencies, starts = frequencies.take(at), starts.take(at) & _LOW
    lanes = states.size
    for first in range((symbols.size - 1) // lanes * lanes, -1, -lanes):
        frequency = frequencies[first : first + lanes]
        active = states[: frequency.size]
        full = ((active >> _SHIFT) >= frequency).nonzero()[0]
        word = active.take(full)
        words.append(word.astype("<u2"))
        active[full] = word >> _SHIFT
        quotient, remainder = np.divmod(active, frequency)
        quotient <<= _SHIFT
        quotient += remainder
        np.add(quotient, starts[first : first + lanes], out=active)


def _pull(states: Array, bounds: Sequence[int], codebook: Codebook, words: Array, used: int) -> tuple[Array, int]:
    """Decode a sequence; returns its symbols and the number of words used so far.

    Raises:
        IndexError: the words end before the sequence does.
    """
    frequencies, starts, ends, offsets = codebook.stacked
    lengths = np.diff(bounds)
    above = np.repeat(np.arange(offsets.size, dtype=np.uint32) << _SHIFT, lengths)
    symbols = np.empty(above.size, np.int32)
    lanes = states.size
    for first in range(0, above.size, lanes):
        slots = above[first : first + lanes]
        active = states[: slots.size]
        slots |= active & _LOW
        at = ends.searchsorted(slots, "right")
        symbols[first : first + lanes] = at
        slots -= starts.take(at)
        active >>= _SHIFT
        active *= frequencies.take(at)
        active += slots
        empty = (active < SCALE).nonzero()[0]
        word = words[used : used + empty.size]
        if word.size < empty.size:
            raise IndexError(used)
        used += empty.size
        active[empty] = active.take(empty) << _SHIFT | word
    symbols -= np.repeat(offsets, lengths)
    return symbols.astype(np.uint8), used


def _push_one(states: Array, symbols: Array, bounds: Sequence[int], codebook: Codebook, words: list[Array]) -> None:
    """`_push` of a single lane."""
    state = int(states[0])
    coded: list[int] = []
    for (start, stop), model in reversed(list(zip(pairwise(bounds), codebook.models, strict=True))):
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
    """`_pull` of a single lane."""
    state = int(states[0])
    symbols = bytearray()
    following = iter(words[used : used + bounds[-1]].tolist())
    for (start, stop), model in zip(pairwise(bounds), codebook.models, strict=True):
        frequencies, starts, ends = model.lists
        for _ in range(stop - start):
            slot = state & 0xFFFF
            symbol = bisect_right(ends, slot)
            symbols.append(symbol)
            state = frequencies[symbol] * (state >> 16) + slot - starts[symbol]
            if state < SCALE:
                word = next(following, None)
                if word is None:
                    raise IndexError(used)
                used += 1
                state = state << 16 | word
    states[0] = state
    return np.frombuffer(bytes(symbols), np.uint8), used
