"""Whole numbers to bytes and back by asymmetric numeral systems.

Values come sorted into runs of one level each; see `levels`. The coder is `constriction`'s stack (Duda 2013, arXiv
1311.2540). It is bijective: a changed payload hardly ever empties it again, unless it is one of other plain bits, and a
shortened one does not give the mark that lies at its bottom.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np

from isthmus.codecs.levels import FLAGS, LEVELS, TOP, Grouping, Level, Models

Array = np.ndarray[Any, np.dtype[Any]]
Run: TypeAlias = tuple[int, int, int]
"""A level, and where its run starts and stops: at multiples of `unit`, but for the last. Levels rise."""

MAX_LEVEL = LEVELS - 1 + 2 * 12
"""Every two levels from LEVELS on leave one more plain bit to each value: at most twelve."""

LARGEST = 2**23
"""Magnitudes of this size or more cannot be coded."""

_MARK = 0xA5C
_MARK_SIZE = 4096
_SHORT = 2048


@dataclass(frozen=True)
class _Stretch:
    """Consecutive runs whose levels are grouped alike."""

    grouping: Grouping
    levels: list[Level]
    bounds: list[int]

    @property
    def start(self) -> int:
        return self.bounds[0]

    @property
    def stop(self) -> int:
        return self.bounds[-1]


@dataclass(frozen=True, eq=False)
class Plan:
    """How `count` values are coded: runs grouped alike together, and which of them have plain bits.

    `bounds` and `excess` are all runs' bounds, and the models of what clipped values exceed their bound by.
    """

    count: int
    padded: int
    stretches: list[_Stretch]
    plain: list[tuple[int, int, int]]
    bounds: Array
    excess: list[Any]

    def most(self, dtype: type[np.generic]) -> Array:
        """Where each value is clipped in its group, (padded,)."""
        most = np.array([s.grouping.most for s in self.stretches], dtype)
        return np.repeat(most, [s.stop - s.start for s in self.stretches])

    @classmethod
    def of(cls, runs: Sequence[Run], models: Models) -> Plan:
        """The plan for values sorted into `runs`."""
        count = runs[-1][2]
        padded = count + -count % unit(count)
        found: list[_Stretch] = []
        for at, start, stop in runs:
            level = models.level(min(at, LEVELS - 1), count < _SHORT)
            end = padded if stop == count else stop
            if found and found[-1].grouping is level.grouping:
                found[-1].levels.append(level)
                found[-1].bounds.append(end)
            else:
                found.append(_Stretch(level.grouping, [level], [start, end]))
        plain = [(bits, start, stop) for at, start, stop in runs if (bits := max(0, -(-(at - LEVELS + 1) // 2)))]
        bounds = np.array([0, *(b for s in found for b in s.bounds[1:])])
        return cls(count, padded, found, plain, bounds, [level.excess for s in found for level in s.levels])


def unit(count: int) -> int:
    """What runs of `count` values in all start at multiples of."""
    return 4 if count < _SHORT else 4 * FLAGS


def encode(values: Array, plan: Plan) -> bytes:
    """The bytes of whole numbers below LARGEST, float32 (plan.count,)."""
    parts: list[tuple[Array, Any]] = []
    whole = np.empty(plan.padded, np.float32)
    whole[: plan.count] = values
    whole[plan.count :] = 0
    for bits, start, stop in plan.plain:
        run = whole[start:stop].astype(np.int32) + (1 << (bits - 1))
        parts.append((run & ((1 << bits) - 1), _uniform(1 << bits)))
        whole[start:stop] = run >> bits
    most = plan.most(np.float32)
    far = np.flatnonzero(np.abs(whole) >= most)
    edge, most = whole[far], most[far]
    whole[far] = np.copysign(most, edge)
    for stretch in plan.stretches:
        _split(whole[stretch.start : stretch.stop], stretch, parts)
    excess = (np.abs(edge) - most).astype(np.int32)
    room = TOP - most.astype(np.int32)
    _cut(np.minimum(excess, room), np.searchsorted(far, plan.bounds).tolist(), plan.excess, parts)
    if (overflow := (excess - room)[excess >= room]).size:
        parts += [(overflow >> 12, _uniform(4096)), (overflow & 4095, _uniform(4096))]
    coder = _coder()
    coder.encode_reverse(np.array([_MARK], np.int32), _uniform(_MARK_SIZE))
    for symbols, model in reversed(parts):
        if symbols.size:
            coder.encode_reverse(symbols, model)
    data: bytes = coder.get_compressed().astype("<u4", copy=False).tobytes()
    return data.rstrip(b"\0")


def decode(data: memoryview, plan: Plan) -> Array:
    """The values that `encode` took; allocates no more than they and the data ask for.

    Raises:
        ValueError: the data are not such values' bytes.
    """
    if not len(data) or data[-1] == 0:
        raise ValueError("coded values do not end in a zero byte")
    coder = _coder(np.frombuffer(bytes(data) + bytes(-len(data) % 4), "<u4").astype(np.uint32, copy=False))
    low = [coder.decode(_uniform(1 << bits), stop - start) for bits, start, stop in plan.plain]
    short = np.zeros(plan.padded, np.int8)
    for stretch in plan.stretches:
        _join(coder, short[stretch.start : stretch.stop], stretch)
    if short[plan.count :].any():
        raise ValueError("the padding of coded values is not zero")
    values = short.astype(np.float32)
    far = np.flatnonzero(np.abs(short) == plan.most(np.int8))
    excess = _take(coder, np.searchsorted(far, plan.bounds).tolist(), plan.excess)
    edge = values[far]
    if (top := np.flatnonzero(excess + np.abs(edge) == TOP)).size:
        beyond = (coder.decode(_uniform(4096), top.size) << 12) | coder.decode(_uniform(4096), top.size)
        if int(beyond.max()) > LARGEST:
            raise ValueError("a coded value is too large")
        excess[top] += beyond
    values[far] = edge + np.sign(edge) * excess
    if int(coder.decode(_uniform(_MARK_SIZE), 1)[0]) != _MARK or not coder.is_empty():
        raise ValueError("coded values do not end where they should")
    for (bits, start, stop), rest in zip(plan.plain, low, strict=True):
        values[start:stop] = values[start:stop] * (1 << bits) + (rest - (1 << (bits - 1)))
    return values[: plan.count]


def _split(clipped: Array, stretch: _Stretch, parts: list[tuple[Array, Any]]) -> None:
    """Add the symbols of a stretch's groups to `parts`."""
    grouping = stretch.grouping
    symbols = (clipped.reshape(-1, grouping.size) @ grouping.weights).astype(np.int32)
    symbols += grouping.middle
    bounds = [(b - stretch.start) // grouping.size for b in stretch.bounds]
    if grouping.flagged:
        some = symbols != grouping.middle
        flags = np.packbits(some, bitorder="little").astype(np.int32)
        _cut(flags, [b // FLAGS for b in bounds], [level.flags for level in stretch.levels], parts)
        where = np.flatnonzero(some)
        bounds = np.searchsorted(where, bounds).tolist()
        symbols = symbols[where]
        symbols -= symbols > grouping.middle
    _cut(symbols, bounds, [level.groups for level in stretch.levels], parts)


def _join(coder: Any, short: Array, stretch: _Stretch) -> None:
    """Decode a stretch's groups into `short`, where zeros are."""
    grouping = stretch.grouping
    bounds = [(b - stretch.start) // grouping.size for b in stretch.bounds]
    groups = short.view(grouping.values.dtype)
    if grouping.flagged:
        flags = _take(coder, [b // FLAGS for b in bounds], [level.flags for level in stretch.levels])
        where = np.flatnonzero(np.unpackbits(flags.astype(np.uint8), bitorder="little"))
        bounds = np.searchsorted(where, bounds).tolist()
        symbols = _take(coder, bounds, [level.groups for level in stretch.levels])
        symbols += symbols >= grouping.middle
        groups[where] = grouping.values[symbols]
    else:
        groups[:] = grouping.values[_take(coder, bounds, [level.groups for level in stretch.levels])]


def _cut(symbols: Array, bounds: list[int], models: list[Any], parts: list[tuple[Array, Any]]) -> None:
    parts += [(symbols[a:b], model) for a, b, model in zip(bounds, bounds[1:], models, strict=False) if a < b]


def _take(coder: Any, bounds: list[int], models: list[Any]) -> Array:
    found = [coder.decode(m, b - a) for a, b, m in zip(bounds, bounds[1:], models, strict=False) if a < b]
    return np.concatenate(found) if found else np.zeros(0, np.int32)


@lru_cache(maxsize=32)
def _uniform(size: int) -> Any:
    import constriction

    return constriction.stream.model.Uniform(size)


def _coder(words: Array | None = None) -> Any:
    import constriction

    coder = constriction.stream.stack.AnsCoder
    return coder() if words is None else coder(words)
