"""The entropy coder of quantised coefficients: integers to bytes and back, along a coding plan.

Values come sorted into runs of one level each; see `levels` and `plan`. Magnitudes are symbols of `ans`; signs and low
bits beyond the models' reach are its plain bits. Long runs travel as bytes, in a zstd section with a checksum.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from isthmus.arrays import Array
from isthmus.codecs.payload import PayloadReader, restore, shrink
from isthmus.codecs.transform.ans import Decoder, Encoder, PlainBits, bits_of
from isthmus.codecs.transform.levels import ESCAPE
from isthmus.codecs.transform.plan import PAIRS, SINGLE, ByteForm, ByteRun, CodingPlan, PlainRuns, Stretch, run_unit

# Magnitudes of this size or more cannot be coded.
MAX_MAGNITUDE = 2**23

_MAX_BYTE = 127
# How much a value may exceed its clipping limit before plain bits follow.
_MODELLED_EXCESS = np.maximum(ESCAPE - np.arange(_MAX_BYTE + 1, dtype=np.int32), 0)
_NO_POSITIONS = np.zeros(0, np.intp)
# Bits of either half of an escaped excess, less than 2^24.
_ESCAPE_HALF_BITS = 12
_LENGTH = struct.Struct("<I")
# Small magnitudes become adjacent symbols: the description of the Huffman code is shorter.
_CENTRE = np.uint8(64)
# The three bytes of the largest magnitudes start here; a fourth byte has no value.
_EDGE, _EDGES = np.uint8(64 + SINGLE.limit), 3
# The two values of each byte of a pair, viewed as one integer.
_PAIR_VALUES = (np.stack(np.divmod(np.arange(81), 9), axis=1) - 4).astype(np.int8).view(np.uint16).reshape(-1)


def encode(values: Array, plan: CodingPlan) -> bytes:
    """Encode integers below MAX_MAGNITUDE, float32 (plan.count,)."""
    whole = padded_buffer(plan.count)
    whole[: plan.count] = values
    return encode_in_place(whole, plan)


def padded_buffer(count: int) -> Array:
    """A buffer of `count` values for `encode_in_place`: float32 (plan.padded,), zero from `count` on."""
    whole = np.empty(count + -count % run_unit(count), np.float32)
    whole[count:] = 0
    return whole


def encode_in_place(whole: Array, plan: CodingPlan) -> bytes:
    """Encode the values in a `padded_buffer`; overwrites the buffer."""
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
    # The range of the values takes half of the time of clipping, and few tensors need clipping.
    lowest, highest = float(whole.min()), float(whole.max())
    if lowest == highest == 0 and not plain:
        return b""
    in_range = -_MAX_BYTE < lowest <= highest < _MAX_BYTE
    clipped = (whole if in_range else np.clip(whole, -_MAX_BYTE, _MAX_BYTE)).astype(np.int8)
    narrow = [_clip(clipped, plan, start, stop) for start, stop in plan.narrow]
    wide = [] if in_range else [a + (np.abs(clipped[a:b]) == _MAX_BYTE).nonzero()[0] for a, b in plan.wide]
    far = _sorted_positions(narrow, wide)
    signs = [_encode_groups(clipped[stretch.start : stretch.stop], stretch, coder) for stretch in plan.stretches]
    limits = plan.limits[far]
    excess = np.abs(whole[far]).astype(np.int32)
    excess -= limits
    modelled = _MODELLED_EXCESS[limits]
    coder.add(np.minimum(excess, modelled).astype(np.uint8), far.searchsorted(plan.bounds).tolist(), plan.excess)
    excess -= modelled
    escaped = excess[excess >= 0]
    halves = [bits_of(part, _ESCAPE_HALF_BITS) for part in np.divmod(escaped, 2**_ESCAPE_HALF_BITS)]
    coded = coder.finish(np.concatenate([*signs, *halves, *low]))
    if not plan.byte_runs:
        return coded
    symbols = np.concatenate([_byte_symbols(clipped[run.start : run.stop], run.form) for run in plan.byte_runs])
    section = shrink(symbols.data, "checked", [code for run in plan.byte_runs for code in run.codes])
    return b"".join([_LENGTH.pack(len(section)), section, coded])


def decode(data: memoryview, plan: CodingPlan) -> Array:
    """The values that `encode` took; allocates in proportion to values and data.

    Raises:
        ValueError: the data do not encode values of this plan.
    """
    if not len(data) and not plan.plain:
        return np.zeros(plan.count, np.float32)
    reader = PayloadReader(data)
    section = reader.take(reader.fields(_LENGTH)[0]) if plan.byte_runs else None
    coder = Decoder(reader.rest())
    short = np.zeros(plan.padded, np.int8)
    wide = [] if section is None else _decode_bytes(section, plan.byte_runs, short)
    for stretch in plan.stretches:
        _decode_groups(coder, short[stretch.start : stretch.stop], stretch)
    if plan.padded > plan.count and short[plan.count :].any():
        raise ValueError("the padding of coded values is not zero")
    narrow = [a + (np.abs(short[a:b]) == plan.limits[a:b]).nonzero()[0] for a, b in plan.narrow]
    far = _sorted_positions(narrow, wide)
    limits = plan.limits[far]
    excess = coder.take(far.searchsorted(plan.bounds).tolist(), plan.excess).astype(np.int32)
    escaped = (excess == _MODELLED_EXCESS[limits]).nonzero()[0]
    grouped = [short[stretch.start : stretch.stop] for stretch in plan.stretches]
    signs, plain = sum(np.count_nonzero(part) for part in grouped), plan.plain
    bits = coder.finish(signs + 2 * _ESCAPE_HALF_BITS * escaped.size + (plain.bits if plain else 0))
    for part in grouped:
        _apply_signs(part, bits)
    rest = bits.numbers(escaped.size, _ESCAPE_HALF_BITS) << _ESCAPE_HALF_BITS
    rest |= bits.numbers(escaped.size, _ESCAPE_HALF_BITS)
    if rest.size and int(rest.max()) > MAX_MAGNITUDE:
        raise ValueError("a coded value is too large")
    excess[escaped] += rest
    excess += limits
    values = short[: plan.count].astype(np.float32)
    values[far] = np.copysign(excess, short[far])
    if plain:
        _restore_low_bits(values, bits, plain)
    return values


def _decode_bytes(section: memoryview, runs: Sequence[ByteRun], out: Array) -> list[Array]:
    """Decode the values of these runs into `out`, int8; returns the positions of the largest magnitudes, sorted.

    Raises:
        ValueError: the section has another size, or a byte that represents no value.
    """
    symbols = np.frombuffer(restore(section, sum(run.size for run in runs)), np.uint8)
    edges: list[Array] = []
    at = 0
    for start, stop, form, codes in runs:
        part = symbols[at : at + sum(codes)]
        at += part.size
        if form is SINGLE:
            np.subtract(part, _CENTRE, out=out[start:stop].view(np.uint8))
            if int((part - _EDGE).min()) < _EDGES:
                if int(out[start:stop].min()) < -SINGLE.limit:
                    raise ValueError("a byte of 255 values has another one")
                edges.append(start + (np.abs(out[start:stop]) == SINGLE.limit).nonzero()[0])
        else:
            if int(part.max()) >= _PAIR_VALUES.size:
                raise ValueError(f"a byte of {_PAIR_VALUES.size} symbols has another one")
            _PAIR_VALUES.take(part, mode="clip", out=out[start:stop].view(_PAIR_VALUES.dtype))
    return edges


def _byte_symbols(clipped: Array, form: ByteForm) -> Array:
    if form is SINGLE:
        return np.asarray(clipped.view(np.uint8) + _CENTRE)
    pairs = (clipped + PAIRS.limit).view(np.uint8).reshape(-1, 2)
    return pairs[:, 0] * np.uint8(9) + pairs[:, 1]


def _apply_signs(magnitudes: Array, bits: PlainBits) -> None:
    where = magnitudes.nonzero()[0]
    negative = where[bits.take(where.size).view(np.bool_)]
    magnitudes[negative] = -magnitudes[negative]


def _restore_low_bits(values: Array, bits: PlainBits, plain: PlainRuns) -> None:
    runs = zip(pairwise(plain.bounds), plain.widths, strict=True)
    low = [bits.numbers(stop - start, width) for (start, stop), width in runs]
    high = values[plain.where].astype(np.int32)
    high <<= plain.shift
    high += np.concatenate(low)
    high -= plain.half
    values[plain.where] = high


def _clip(clipped: Array, plan: CodingPlan, start: int, stop: int) -> Array:
    """Clip these values to their limits; returns the positions of values at or beyond the limits."""
    values, limits = clipped[start:stop], plan.limits[start:stop]
    far = (np.abs(values) >= limits).nonzero()[0]
    np.minimum(values, limits, out=values)
    np.maximum(values, plan.lower_limits[start:stop], out=values)
    far += start
    return far


def _sorted_positions(narrow: list[Array], wide: list[Array]) -> Array:
    positions = np.concatenate([_NO_POSITIONS, *narrow, *wide])
    # The narrow parts alone are in order already.
    return np.sort(positions) if any(part.size for part in wide) else positions


def _encode_groups(clipped: Array, stretch: Stretch, coder: Encoder) -> Array:
    """Encode the groups of a stretch; returns the signs of its nonzero values: uint8, 1 where negative."""
    grouping = stretch.grouping
    bounds, models = stretch.groups
    signs = clipped[clipped != 0] < 0
    symbols = grouping.symbols(np.abs(clipped))
    if grouping.flagged:
        nonzero = symbols != 0
        coder.add(np.packbits(nonzero, bitorder="little"), *stretch.flags)
        where = nonzero.nonzero()[0]
        bounds = where.searchsorted(bounds).tolist()
        symbols = symbols[where]
    coder.add(symbols, bounds, models)
    return np.asarray(signs.view(np.uint8))


def _decode_groups(coder: Decoder, short: Array, stretch: Stretch) -> None:
    """Decode the magnitudes of a stretch into `short`, zero before."""
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
