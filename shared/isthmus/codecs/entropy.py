"""Whole numbers to bytes and back: asymmetric numeral systems, and Huffman codes where there are many large ones.

Values come sorted into runs of one level each; see `levels`. The coder is `constriction`'s stack (Duda 2013, arXiv
1311.2540). It is bijective: a changed payload hardly ever empties it again, unless it is one of other plain bits, and a
shortened one does not give the mark that lies at its bottom. Long runs of several bits a value are zstd sections with a
checksum: Huffman codes take a third to a sixth of the time, and up to 2% more bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, TypeAlias

import numpy as np

from isthmus.codecs.levels import FLAGS, LEVELS, TOP, Grouping, Level, Models
from isthmus.codecs.payload import Reader, restore, shrink

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

SECTION_LEVELS = (15, 22)
"""Of runs that become sections: from a deviation of three steps on Huffman codes are good, up to 32 a byte will do."""
SECTION_FROM = 3072
"""Values; a section's own code takes some 60 bytes."""
_WIDEST = 127
_CENTRE = np.uint8(64)
_LENGTH = struct.Struct("<I")


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
    """How `count` values are coded: which runs are sections, which are grouped alike, which of these have plain bits.

    `bounds` and `excess` are all runs' bounds, and the models of what clipped values exceed their bound by: None where
    that follows in plain bits at once. `most` is each run's bound.
    """

    count: int
    padded: int
    sections: list[tuple[int, int]]
    stretches: list[_Stretch]
    plain: list[tuple[int, int, int]]
    bounds: Array
    most: Array
    excess: list[Any]

    @cached_property
    def limits(self) -> Array:
        """Where each value is clipped, float32 (padded,)."""
        return np.repeat(self.most.astype(np.float32), np.diff(self.bounds))

    @cached_property
    def bytes_of_limits(self) -> Array:
        """`limits` as int8."""
        return self.limits.astype(np.int8)

    @classmethod
    def of(cls, runs: Sequence[Run], models: Models) -> Plan:
        """The plan for values sorted into `runs`."""
        count = runs[-1][2]
        padded = count + -count % unit(count)
        sections: list[tuple[int, int]] = []
        stretches: list[_Stretch] = []
        plain: list[tuple[int, int, int]] = []
        ends, most = [0], []
        excess: list[Any] = []
        for at, start, stop in runs:
            end = padded if stop == count else stop
            ends.append(end)
            if SECTION_LEVELS[0] <= at <= SECTION_LEVELS[1] and end - start >= SECTION_FROM:
                sections.append((start, end))
                most.append(_WIDEST)
                excess.append(None)
                continue
            # Two levels are a factor of two: without that many low bits, a value is of a level that has a model.
            bits = max(0, -(-(at - LEVELS + 1) // 2))
            if bits:
                plain.append((bits, start, stop))
            level = models.level(at - 2 * bits, count < _SHORT)
            most.append(level.grouping.most)
            excess.append(level.excess)
            if stretches and stretches[-1].stop == start and stretches[-1].grouping is level.grouping:
                stretches[-1].levels.append(level)
                stretches[-1].bounds.append(end)
            else:
                stretches.append(_Stretch(level.grouping, [level], [start, end]))
        return cls(count, padded, sections, stretches, plain, np.array(ends), np.array(most), excess)


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
    far = np.flatnonzero(np.abs(whole) >= plan.limits)
    edge, most = whole[far], plan.limits[far]
    whole[far] = np.copysign(most, edge)
    for stretch in plan.stretches:
        _split(whole[stretch.start : stretch.stop], stretch, parts)
    excess = (np.abs(edge) - most).astype(np.int32)
    room = _room(most)
    _cut(np.minimum(excess, room), np.searchsorted(far, plan.bounds).tolist(), plan.excess, parts)
    if (overflow := (excess - room)[excess >= room]).size:
        parts += [(overflow >> 12, _uniform(4096)), (overflow & 4095, _uniform(4096))]
    coder = _coder()
    coder.encode_reverse(np.array([_MARK], np.int32), _uniform(_MARK_SIZE))
    for symbols, model in reversed(parts):
        if symbols.size:
            coder.encode_reverse(symbols, model)
    data: bytes = coder.get_compressed().astype("<u4", copy=False).tobytes()
    sections = [_section(whole[start:stop]) for start, stop in plan.sections]
    return b"".join([*(_LENGTH.pack(len(s)) for s in sections), *sections, data.rstrip(b"\0")])


def decode(data: memoryview, plan: Plan) -> Array:
    """The values that `encode` took; allocates no more than they and the data ask for.

    Raises:
        ValueError: the data are not such values' bytes.
    """
    reader = Reader(data)
    lengths = [reader.fields(_LENGTH)[0] for _ in plan.sections]
    sections = [reader.take(length) for length in lengths]
    data = reader.rest()
    if not len(data) or data[-1] == 0:
        raise ValueError("coded values do not end in a zero byte")
    coder = _coder(np.frombuffer(bytes(data) + bytes(-len(data) % 4), "<u4").astype(np.uint32, copy=False))
    low = [coder.decode(_uniform(1 << bits), stop - start) for bits, start, stop in plan.plain]
    short = np.zeros(plan.padded, np.int8)
    for (start, stop), section in zip(plan.sections, sections, strict=True):
        run = short[start:stop].view(np.uint8)
        np.subtract(np.frombuffer(restore(section, stop - start), np.uint8), _CENTRE, out=run)
    for stretch in plan.stretches:
        _join(coder, short[stretch.start : stretch.stop], stretch)
    if short[plan.count :].any():
        raise ValueError("the padding of coded values is not zero")
    values = short.astype(np.float32)
    far = np.flatnonzero(np.abs(short) == plan.bytes_of_limits)
    edge = values[far]
    most = np.abs(edge)
    excess = _take(coder, np.searchsorted(far, plan.bounds).tolist(), plan.excess)
    if (top := np.flatnonzero(excess == _room(most))).size:
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


def _section(clipped: Array) -> bytes | memoryview:
    """A run's values, a byte each; those near zero beside one another, which makes the code's description shorter."""
    return shrink((clipped.astype(np.int8).view(np.uint8) + _CENTRE).data, "checked")


def _room(most: Array) -> Array:
    """How much a value may exceed its bound before plain bits follow, int32."""
    return np.asarray(np.maximum(TOP - most, 0).astype(np.int32))


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
        grouping.values.take(_take(coder, bounds, [level.groups for level in stretch.levels]), mode="clip", out=groups)


def _cut(symbols: Array, bounds: list[int], models: list[Any], parts: list[tuple[Array, Any]]) -> None:
    runs = zip(bounds, bounds[1:], models, strict=False)
    parts += [(symbols[a:b], model) for a, b, model in runs if a < b and model is not None]


def _take(coder: Any, bounds: list[int], models: list[Any]) -> Array:
    """Symbols of runs, each of its own model; zeros where there is none."""
    found = [
        np.zeros(b - a, np.int32) if model is None else coder.decode(model, b - a)
        for a, b, model in zip(bounds, bounds[1:], models, strict=False)
        if a < b
    ]
    if len(found) == 1:
        return np.asarray(found[0])
    return np.concatenate(found) if found else np.zeros(0, np.int32)


@lru_cache(maxsize=32)
def _uniform(size: int) -> Any:
    import constriction

    return constriction.stream.model.Uniform(size)


def _coder(words: Array | None = None) -> Any:
    import constriction

    coder = constriction.stream.stack.AnsCoder
    return coder() if words is None else coder(words)
