"""Whole numbers to bytes and back: asymmetric numeral systems, and Huffman codes where there are many of one level.

Values come sorted into runs of one level each; see `levels`. The coder is `constriction`'s stack (Duda 2013, arXiv
1311.2540). It is bijective: a changed payload hardly ever empties it again, unless it is one of other plain bits, and a
shortened one does not give the mark that lies at its bottom. Long runs travel as bytes, in a section with a
checksum; see `bytewise`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from isthmus.codecs import bytewise
from isthmus.codecs.bytewise import Run as Run
from isthmus.codecs.levels import TOP, uniform
from isthmus.codecs.payload import Reader
from isthmus.codecs.runs import MAX_LEVEL as MAX_LEVEL
from isthmus.codecs.runs import Plan as Plan
from isthmus.codecs.runs import Stretch
from isthmus.codecs.runs import unit as unit

Array = np.ndarray[Any, np.dtype[Any]]
LARGEST = 2**23
"""Magnitudes of this size or more cannot be coded."""

_MARK = 0xA5C
_MARK_SIZE = 4096
_THE_MARK = np.array([_MARK], np.int32)

_BYTE = 127
_ROOM = np.maximum(TOP - np.arange(_BYTE + 1, dtype=np.int32), 0)
"""How much a value may exceed its limit before plain bits follow."""
_NONE = np.zeros(0, np.intp)
_LENGTH = struct.Struct("<I")


def encode(values: Array, plan: Plan) -> bytes:
    """The bytes of whole numbers below LARGEST, float32 (plan.count,)."""
    whole = room(plan.count)
    whole[: plan.count] = values
    return encode_in_place(whole, plan)


def room(count: int) -> Array:
    """Where to put `count` values for `encode_in_place`: float32 (plan.padded,), of which the last are zero."""
    whole = np.empty(count + -count % unit(count), np.float32)
    whole[count:] = 0
    return whole


def encode_in_place(whole: Array, plan: Plan) -> bytes:
    """What `encode` gives, for values in a `room`; it is overwritten."""
    parts: list[tuple[Array, Any]] = []
    if plain := plan.plain:
        run = whole[plain.where].astype(np.int32)
        run += plain.half
        high = run >> plain.shift
        whole[plain.where] = high
        run -= high << plain.shift
        _cut(run, plain.bounds, plain.models, parts)
    # Finding out whether to clip takes half of the time of clipping.
    least, most = float(whole.min()), float(whole.max())
    if least == most == 0 and not plain:
        return b""
    within = -_BYTE < least <= most < _BYTE
    clipped = (whole if within else np.clip(whole, -_BYTE, _BYTE)).astype(np.int8)
    found = [_clip(clipped, plan, start, stop) for start, stop in plan.narrow]
    edges = [] if within else [a + (np.abs(clipped[a:b]) == _BYTE).nonzero()[0] for a, b in plan.wide]
    far = _sorted(found, edges)
    for stretch in plan.stretches:
        _split(clipped[stretch.start : stretch.stop], stretch, parts)
    limits = plan.limits[far]
    excess = np.abs(whole[far]).astype(np.int32)
    excess -= limits
    room = _ROOM[limits]
    _cut(np.minimum(excess, room), far.searchsorted(plan.bounds).tolist(), plan.excess, parts)
    excess -= room
    if (overflow := excess[excess >= 0]).size:
        parts += [(overflow >> 12, uniform(4096)), (overflow & 4095, uniform(4096))]
    coded = written(parts)
    if not plan.bytewise:
        return coded
    section = bytewise.write(clipped, plan.bytewise)
    return b"".join([_LENGTH.pack(len(section)), section, coded])


def decode(data: memoryview, plan: Plan) -> Array:
    """The values that `encode` took; allocates no more than they and the data ask for.

    Raises:
        ValueError: the data are not such values' bytes.
    """
    if not len(data) and not plan.plain:
        return np.zeros(plan.count, np.float32)
    reader = Reader(data)
    section = reader.take(reader.fields(_LENGTH)[0]) if plan.bytewise else None
    coder = opened(reader.rest())
    low = _take(coder, plan.plain.bounds, plan.plain.models) if plan.plain else None
    short = np.zeros(plan.padded, np.int8)
    edges = [] if section is None else [bytewise.read(section, plan.bytewise, short)]
    for stretch in plan.stretches:
        _join(coder, short[stretch.start : stretch.stop], stretch)
    if plan.padded > plan.count and short[plan.count :].any():
        raise ValueError("the padding of coded values is not zero")
    values = short[: plan.count].astype(np.float32)
    found = [start + (np.abs(short[start:stop]) == plan.limits[start:stop]).nonzero()[0] for start, stop in plan.narrow]
    far = _sorted(found, edges)
    edge, most = short[far], plan.limits[far]
    excess = _take(coder, far.searchsorted(plan.bounds).tolist(), plan.excess)
    if (top := (excess == _ROOM[most]).nonzero()[0]).size:
        beyond = (coder.decode(uniform(4096), top.size) << 12) | coder.decode(uniform(4096), top.size)
        if int(beyond.max()) > LARGEST:
            raise ValueError("a coded value is too large")
        excess[top] += beyond
    excess += most
    values[far] = np.copysign(excess, edge)
    close(coder)
    if low is not None and (plain := plan.plain):
        high = values[plain.where].astype(np.int32)
        high <<= plain.shift
        high += low
        high -= plain.half
        values[plain.where] = high
    return values


def _clip(clipped: Array, plan: Plan, start: int, stop: int) -> Array:
    """Clip those values to their limits; which of them lie there, or lay beyond."""
    values, limits = clipped[start:stop], plan.limits[start:stop]
    far = (np.abs(values) >= limits).nonzero()[0]
    np.minimum(values, limits, out=values)
    np.maximum(values, plan.least[start:stop], out=values)
    far += start
    return far


def _sorted(found: list[Array], edges: list[Array]) -> Array:
    """All of them, of which those found are in order already."""
    together = np.concatenate([_NONE, *found, *edges])
    return np.sort(together) if any(each.size for each in edges) else together


def written(parts: Sequence[tuple[Array, Any]]) -> bytes:
    """The coder's bytes of runs of symbols, int32, each with its model."""
    coder = _coder()
    coder.encode_reverse(_THE_MARK, uniform(_MARK_SIZE))
    for symbols, model in reversed(parts):
        coder.encode_reverse(symbols, model)
    data: bytes = coder.get_compressed().astype("<u4", copy=False).tobytes()
    return data.rstrip(b"\0")


def opened(data: memoryview) -> Any:
    """A coder that decodes what `written` gave, run by run; `close` it after the last.

    Raises:
        ValueError: nothing was written that way.
    """
    if not len(data) or data[-1] == 0:
        raise ValueError("coded values do not end in a zero byte")
    return _coder(np.frombuffer(bytes(data) + bytes(-len(data) % 4), "<u4").astype(np.uint32, copy=False))


def close(coder: Any) -> None:
    """Nothing but the mark may be left.

    Raises:
        ValueError: something is, or it is another mark.
    """
    if int(coder.decode(uniform(_MARK_SIZE), 1)[0]) != _MARK or not coder.is_empty():
        raise ValueError("coded values do not end where they should")


def _split(clipped: Array, stretch: Stretch, parts: list[tuple[Array, Any]]) -> None:
    """Add the symbols of a stretch's groups to `parts`."""
    grouping = stretch.grouping
    bounds, models = stretch.groups
    if grouping.flagged:
        groups = clipped.view(grouping.values.dtype)
        some = groups != 0
        _cut(np.packbits(some, bitorder="little").astype(np.int32), *stretch.flags, parts)
        where = some.nonzero()[0]
        bounds = where.searchsorted(bounds).tolist()
        clipped = groups[where].view(np.int8)
    symbols = grouping.symbols(clipped).astype(np.int32)
    if grouping.flagged:
        symbols -= symbols > grouping.middle
    _cut(symbols, bounds, models, parts)


def _join(coder: Any, short: Array, stretch: Stretch) -> None:
    """Decode a stretch's groups into `short`, where zeros are."""
    grouping = stretch.grouping
    bounds, models = stretch.groups
    groups = short.view(grouping.values.dtype)
    if grouping.flagged:
        flags = _take(coder, *stretch.flags)
        where = np.unpackbits(flags.astype(np.uint8), bitorder="little").nonzero()[0]
        bounds = where.searchsorted(bounds).tolist()
        symbols = _take(coder, bounds, models)
        symbols += symbols >= grouping.middle
        groups[where] = grouping.values[symbols]
    else:
        grouping.values.take(_take(coder, bounds, models), mode="clip", out=groups)


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


def _coder(words: Array | None = None) -> Any:
    import constriction

    coder = constriction.stream.stack.AnsCoder
    return coder() if words is None else coder(words)
