"""Integers to bytes and back by asymmetric numeral systems, with models made of integers only.

Values come sorted into runs of one *level* each: level l expects a deviation of 2 ** ((l - 24) / 4) steps. Rare values
are coded in groups, so that the coder touches few symbols: in a run of zeros about one for 32 values. No grouping costs
bits: what a group's symbol leaves open is coded after it by the conditional model.

The coder is `constriction`'s stack (arXiv 1311.2540). It is bijective: a changed payload hardly ever empties it again,
and truncation shows in the mark that lies at its bottom.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Run: TypeAlias = tuple[int, int, int]
"""A level, and where its run starts and stops. Levels from LEVELS up add one plain bit for every four."""

LEVELS = 33
TOP = 20
"""Magnitudes from here on are one symbol; what they exceed it by follows in 24 plain bits."""

MAX_LEVEL = LEVELS - 1 + 4 * 12
"""The highest level: twelve plain bits."""

LARGEST = 2**23
"""Magnitudes of this size or more cannot be coded."""

ZERO_BITS = 16
MAGNITUDE_SUM = 4096
_FLAGS = 8
_MARK = 0xA5C
_MARK_SIZE = 4096


@dataclass(frozen=True, eq=False)
class Models:
    """The entropy models of all levels.

    `zero` uint16 (LEVELS,): how often of 65,536 a value is 0, at least 1. `magnitudes` uint16 (LEVELS, TOP): how often of
    4,096 another one has magnitude 1 … TOP, each at least 1; TOP stands for all from there on.
    """

    zero: Array
    magnitudes: Array
    _made: dict[int, _Level] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for array, shape in ((self.zero, (LEVELS,)), (self.magnitudes, (LEVELS, TOP))):
            if array.dtype != np.uint16 or array.shape != shape or int(array.min()) < 1:
                raise ValueError(f"an entropy model is uint16{list(shape)}, without zeros")
        if (self.magnitudes.sum(axis=1, dtype=np.int64) != MAGNITUDE_SUM).any():
            raise ValueError(f"the frequencies of a level's magnitudes sum to {MAGNITUDE_SUM}")

    def level(self, level: int) -> _Level:
        """The coder's models of one level, made on first use."""
        if level not in self._made:
            self._made[level] = _Level.make(int(self.zero[level]), self.magnitudes[level].tolist())
        return self._made[level]


@dataclass(frozen=True, eq=False)
class _Level:
    """How one level's values are grouped and what models the symbols.

    A group of `size` values, each clipped to ± `most`, is one symbol; `values` lists what each symbol stands for. With
    `flags`, eight groups first share a symbol that says which of them are not all zero, and only those follow.
    """

    size: int
    most: int
    groups: Any
    values: Array
    flags: Any
    excess: Any

    @classmethod
    def make(cls, zero: int, magnitudes: list[int]) -> _Level:
        size, most, flagged = _grouping(zero)
        scale, other = 2**ZERO_BITS, 2**ZERO_BITS - zero
        # Weights out of scale * 2 * MAGNITUDE_SUM for one clipped value, exact as Python's integers are.
        tail = sum(magnitudes[most - 1 :])
        half = [*(m * other for m in magnitudes[: most - 1]), tail * other]
        one = [*reversed(half), zero * 2 * MAGNITUDE_SUM, *half]
        weights = [1]
        for _ in range(size):
            weights = [a * b for a in weights for b in one]
        values = np.array(list(itertools.product(range(-most, most + 1), repeat=size)), np.int32)
        flags = None
        if flagged:
            middle = len(weights) // 2
            del weights[middle]
            values = np.delete(values, middle, axis=0)
            none, some = zero**size, scale**size - zero**size
            flags = _categorical([some ** n.bit_count() * none ** (_FLAGS - n.bit_count()) for n in range(2**_FLAGS)])
        return cls(size, most, _categorical(weights), values, flags, _excess(magnitudes, most))


def encode(values: Array, runs: Sequence[Run], models: Models) -> bytes:
    """The bytes of `values`, int32 of magnitudes below LARGEST, sorted into `runs`."""
    parts: list[tuple[Array, Any]] = []
    overflow: list[Array] = []
    for at, start, stop in runs:
        run, bits = values[start:stop], _plain_bits(at)
        if bits:
            run = run + (1 << (bits - 1))
            parts.append((run & ((1 << bits) - 1), _uniform(1 << bits)))
            run = run >> bits
        _split(run, models.level(min(at, LEVELS - 1)), parts, overflow)
    if overflow:
        beyond = np.concatenate(overflow)
        parts += [(beyond >> 12, _uniform(4096)), (beyond & 4095, _uniform(4096))]
    coder = _coder()
    coder.encode_reverse(np.array([_MARK], np.int32), _uniform(_MARK_SIZE))
    for symbols, model in reversed(parts):
        if symbols.size:
            coder.encode_reverse(np.ascontiguousarray(symbols, np.int32), model)
    data: bytes = coder.get_compressed().astype("<u4").tobytes()
    return data.rstrip(b"\0")


def decode(data: memoryview, runs: Sequence[Run], models: Models) -> Array:
    """The int32 values that `encode` took, for the same runs; allocates no more than they and the data ask for.

    Raises:
        ValueError: the data are not such values' bytes.
    """
    if not len(data) or data[-1] == 0:
        raise ValueError("coded values do not end in a zero byte")
    coder = _coder(np.frombuffer(bytes(data) + bytes(-len(data) % 4), "<u4").astype(np.uint32))
    values = np.empty(runs[-1][2] if runs else 0, np.int32)
    tops: list[Array] = []
    for at, start, stop in runs:
        bits = _plain_bits(at)
        low = coder.decode(_uniform(1 << bits), stop - start) if bits else None
        run = _join(coder, models.level(min(at, LEVELS - 1)), stop - start)
        if (top := np.flatnonzero(np.abs(run) == TOP)).size:
            tops.append(top + start)
        values[start:stop] = run
        if low is not None:
            values[start:stop] = low  # completed below, once what exceeds TOP is known
            values[start:stop] += (run << bits) - (1 << (bits - 1))
    if tops:
        _overflow(coder, values, np.concatenate(tops), runs)
    if int(coder.decode(_uniform(_MARK_SIZE), 1)[0]) != _MARK or not coder.is_empty():
        raise ValueError("coded values do not end where they should")
    return values


def _grouping(zero: int) -> tuple[int, int, bool]:
    share = zero / 2**ZERO_BITS
    if share < 0.35:
        return 1, TOP, False
    if share < 0.85:
        return 2, 3, False
    return 4, 1, share >= 0.95


def _split(run: Array, level: _Level, parts: list[tuple[Array, Any]], overflow: list[Array]) -> None:
    magnitude = np.abs(run)
    clipped = np.clip(run, -level.most, level.most)
    if level.size > 1:
        block = level.size * (_FLAGS if level.flags is not None else 1)
        if missing := -run.size % block:
            clipped = np.concatenate((clipped, np.zeros(missing, np.int32)))
        base = 2 * level.most + 1
        digits = (clipped + level.most).reshape(-1, level.size)
        symbols = digits[:, 0]
        for i in range(1, level.size):
            symbols = symbols * base + digits[:, i]
        if level.flags is not None:
            middle = base**level.size // 2
            some = symbols != middle
            parts.append((np.packbits(some, bitorder="little"), level.flags))
            symbols = symbols[some]
            symbols = symbols - (symbols > middle)
        parts.append((symbols, level.groups))
    else:
        parts.append((clipped + level.most, level.groups))
    if level.most < TOP:
        excess = magnitude[magnitude >= level.most] - level.most
        parts.append((np.minimum(excess, TOP - level.most), level.excess))
        excess = excess[excess >= TOP - level.most] - (TOP - level.most)
    else:
        excess = magnitude[magnitude >= TOP] - TOP
    if excess.size:
        overflow.append(excess)


def _join(coder: Any, level: _Level, count: int) -> Array:
    if level.flags is not None:
        flags = coder.decode(level.flags, -(-count // (level.size * _FLAGS)))
        some = np.flatnonzero(np.unpackbits(flags.astype(np.uint8), bitorder="little"))
        groups = np.zeros((flags.size * _FLAGS, level.size), np.int32)
        if some.size:
            groups[some] = level.values[coder.decode(level.groups, some.size)]
    else:
        groups = level.values[coder.decode(level.groups, -(-count // level.size))]
    if groups.reshape(-1)[count:].any():
        raise ValueError("the padding of a run is not zero")
    run = groups.reshape(-1)[:count]
    if level.most < TOP and (far := np.flatnonzero(np.abs(run) == level.most)).size:
        run[far] += np.sign(run[far]) * coder.decode(level.excess, far.size)
    return run


def _overflow(coder: Any, values: Array, where: Array, runs: Sequence[Run]) -> None:
    high, low = coder.decode(_uniform(4096), where.size), coder.decode(_uniform(4096), where.size)
    beyond = (high << 12) | low
    starts = np.array([start for _, start, _ in runs])
    bits = np.array([_plain_bits(at) for at, _, _ in runs])[np.searchsorted(starts, where, side="right") - 1]
    found = values[where].astype(np.int64)
    found += np.sign(found) * (beyond.astype(np.int64) << bits)
    if (np.abs(found) >= 2 * LARGEST).any():
        raise ValueError("a coded value is too large")
    values[where] = found


def _plain_bits(level: int) -> int:
    return max(0, -(-(level - LEVELS + 1) // 4))


def _excess(magnitudes: list[int], most: int) -> Any:
    return _categorical(magnitudes[most - 1 :]) if most < TOP else None


def _categorical(weights: list[int]) -> Any:
    """A model of exactly these frequencies, scaled by a power of two so that every partial sum is exact in float64."""
    import constriction

    shift = max(0, sum(weights).bit_length() - 48)
    counts = np.array([max(w >> shift, 1) for w in weights], np.float64)
    return constriction.stream.model.Categorical(counts, perfect=False, lazy=False)


@lru_cache(maxsize=32)
def _uniform(size: int) -> Any:
    import constriction

    return constriction.stream.model.Uniform(size)


def _coder(words: Array | None = None) -> Any:
    import constriction

    coder = constriction.stream.stack.AnsCoder
    return coder() if words is None else coder(words)
