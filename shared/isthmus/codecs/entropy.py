"""Whole numbers to bytes and back: asymmetric numeral systems, and Huffman codes where there are many of one level.

Values come sorted into runs of one level each; see `levels`. Magnitudes are symbols of `ans`; signs, and what models
say nothing of, are its plain bits. Long runs travel as bytes, in a section with a checksum; see `bytewise`.
"""

from __future__ import annotations

import struct
from itertools import pairwise

import numpy as np

from isthmus.arrays import Array
from isthmus.codecs import bytewise
from isthmus.codecs.ans import Decoder, Encoder, PlainBits, bits_of
from isthmus.codecs.bytewise import Run as Run
from isthmus.codecs.levels import TOP
from isthmus.codecs.payload import Reader
from isthmus.codecs.runs import MAX_LEVEL as MAX_LEVEL
from isthmus.codecs.runs import Plain, Stretch
from isthmus.codecs.runs import Plan as Plan
from isthmus.codecs.runs import unit as unit

LARGEST = 2**23
"""Magnitudes of this size or more cannot be coded."""

_BYTE = 127
_ROOM = np.maximum(TOP - np.arange(_BYTE + 1, dtype=np.int32), 0)
"""How much a value may exceed its limit before plain bits follow."""
_NONE = np.zeros(0, np.intp)
_HALF_OVERFLOW = 12
"""Bits; what exceeds even that room is below 2^24."""
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
    coder = Encoder()
    low: list[Array] = []
    if plain := plan.plain:
        run = whole[plain.where].astype(np.int32)
        run += plain.half
        high = run >> plain.shift
        whole[plain.where] = high
        run -= high << plain.shift
        runs = zip(pairwise(plain.bounds), plain.widths, strict=True)
        low = [bits_of(run[start:stop], width) for (start, stop), width in runs]
    # Finding out whether to clip takes half of the time of clipping.
    least, most = float(whole.min()), float(whole.max())
    if least == most == 0 and not plain:
        return b""
    within = -_BYTE < least <= most < _BYTE
    clipped = (whole if within else np.clip(whole, -_BYTE, _BYTE)).astype(np.int8)
    found = [_clip(clipped, plan, start, stop) for start, stop in plan.narrow]
    edges = [] if within else [a + (np.abs(clipped[a:b]) == _BYTE).nonzero()[0] for a, b in plan.wide]
    far = _sorted(found, edges)
    signs = [_split(clipped[stretch.start : stretch.stop], stretch, coder) for stretch in plan.stretches]
    limits = plan.limits[far]
    excess = np.abs(whole[far]).astype(np.int32)
    excess -= limits
    room = _ROOM[limits]
    coder.add(np.minimum(excess, room).astype(np.uint8), far.searchsorted(plan.bounds).tolist(), plan.excess)
    excess -= room
    overflow = excess[excess >= 0]
    more = [bits_of(part, _HALF_OVERFLOW) for part in np.divmod(overflow, 2**_HALF_OVERFLOW)]
    coded = coder.finish(np.concatenate([*signs, *more, *low]))
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
    coder = Decoder(reader.rest())
    short = np.zeros(plan.padded, np.int8)
    edges = [] if section is None else [bytewise.read(section, plan.bytewise, short)]
    for stretch in plan.stretches:
        _join(coder, short[stretch.start : stretch.stop], stretch)
    if plan.padded > plan.count and short[plan.count :].any():
        raise ValueError("the padding of coded values is not zero")
    found = [start + (np.abs(short[start:stop]) == plan.limits[start:stop]).nonzero()[0] for start, stop in plan.narrow]
    far = _sorted(found, edges)
    most = plan.limits[far]
    excess = coder.take(far.searchsorted(plan.bounds).tolist(), plan.excess).astype(np.int32)
    top = (excess == _ROOM[most]).nonzero()[0]
    grouped = [short[stretch.start : stretch.stop] for stretch in plan.stretches]
    signs, plain = sum(np.count_nonzero(part) for part in grouped), plan.plain
    bits = coder.finish(signs + 2 * _HALF_OVERFLOW * top.size + (plain.bits if plain else 0))
    for part in grouped:
        _add_signs(part, bits)
    beyond = bits.numbers(top.size, _HALF_OVERFLOW) << _HALF_OVERFLOW
    beyond |= bits.numbers(top.size, _HALF_OVERFLOW)
    if beyond.size and int(beyond.max()) > LARGEST:
        raise ValueError("a coded value is too large")
    excess[top] += beyond
    excess += most
    values = short[: plan.count].astype(np.float32)
    values[far] = np.copysign(excess, short[far])
    if plain:
        _add_low_bits(values, bits, plain)
    return values


def _add_signs(magnitudes: Array, bits: PlainBits) -> None:
    """Make those magnitudes negative that were."""
    where = magnitudes.nonzero()[0]
    negative = where[bits.take(where.size).view(np.bool_)]
    magnitudes[negative] = -magnitudes[negative]


def _add_low_bits(values: Array, bits: PlainBits, plain: Plain) -> None:
    """Put the bits that runs leave plain below their values."""
    runs = zip(pairwise(plain.bounds), plain.widths, strict=True)
    low = [bits.numbers(stop - start, width) for (start, stop), width in runs]
    high = values[plain.where].astype(np.int32)
    high <<= plain.shift
    high += np.concatenate(low)
    high -= plain.half
    values[plain.where] = high


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


def _split(clipped: Array, stretch: Stretch, coder: Encoder) -> Array:
    """Encode the groups of a stretch; returns the signs of values that are not 0: uint8, 1 where negative."""
    grouping = stretch.grouping
    bounds, models = stretch.groups
    signs = clipped[clipped != 0] < 0
    symbols = grouping.symbols(np.abs(clipped))
    if grouping.flagged:
        some = symbols != 0
        coder.add(np.packbits(some, bitorder="little"), *stretch.flags)
        where = some.nonzero()[0]
        bounds = where.searchsorted(bounds).tolist()
        symbols = symbols[where]
    coder.add(symbols, bounds, models)
    return np.asarray(signs.view(np.uint8))


def _join(coder: Decoder, short: Array, stretch: Stretch) -> None:
    """Decode the magnitudes of a stretch into `short`, where zeros are."""
    grouping = stretch.grouping
    bounds, models = stretch.groups
    groups = short.view(grouping.values.dtype)
    if grouping.flagged:
        flags = coder.take(*stretch.flags)
        where = np.unpackbits(flags, bitorder="little").nonzero()[0]
        bounds = where.searchsorted(bounds).tolist()
        groups[where] = grouping.values[coder.take(bounds, models)]
    else:
        grouping.values.take(coder.take(bounds, models), mode="clip", out=groups)
