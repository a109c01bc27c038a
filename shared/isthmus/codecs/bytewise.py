"""Long runs as bytes: Huffman codes take a tenth of the coder's time, and some 2% more bytes.

A byte is a value, or two small ones: every symbol's code has at least a bit. Together they are one section, in which
each of them has a code of its own. docs/codecs.md, `transform/4`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from isthmus.arrays import Array
from isthmus.codecs.levels import ZERO_BITS, Models
from isthmus.codecs.payload import restore, shrink

Run: TypeAlias = tuple[int, int, int]
"""A level, and where its run starts and stops: at multiples of `entropy.unit`, but for the last. Levels rise."""


class Form(NamedTuple):
    """A byte holds `size` values, one or two, each clipped to ± `most`."""

    size: int
    most: int


class Bytewise(NamedTuple):
    """Where runs start and stop whose values travel as bytes, and in which form.

    `codes` are how many bytes have one code: those of one run, or of two neighbouring levels'.
    """

    start: int
    stop: int
    form: Form
    codes: list[int]

    @property
    def size(self) -> int:
        """Of bytes."""
        return sum(self.codes)


SINGLE = Form(1, 127)
SINGLE_LEVELS = (15, 22)
"""From a deviation of three steps on a value's own Huffman code is good; up to 32 steps a byte will do."""
PAIRS = Form(2, 4)
_PAIRS = (np.stack(np.divmod(np.arange(81), 9), axis=1) - 4).astype(np.int8).view(np.uint16).reshape(-1)
"""The values of each byte of a pair, seen as one integer."""
_CENTRE = np.uint8(64)
_EDGE, _EDGES = np.uint8(64 + SINGLE.most), 3
"""Where the largest magnitudes' bytes begin, and how many there are."""

# Values; a code's description takes some 60 to 80 bytes. Pairs by the share of zeros.
SINGLE_FROM, SINGLE_FROM_IF_SMALL = 1024, 3072
PAIRS_FROM = ((0.42, 2048), (0.68, 4096))

TOGETHER = 2**15
"""Values; below, two levels' mixture costs no more than another code would."""
SMALL = 2**14
"""Values; tensors of fewer have neither pairs nor two levels with one code: they would cost more than 1% there."""


def choose(runs: Sequence[Run], models: Models) -> list[Bytewise]:
    """Which runs of these, or two neighbouring levels' at a time, travel as bytes."""
    found: list[Bytewise] = []
    large = runs[-1][2] >= SMALL
    forms = [_form(level, models, large) for level, _, _ in runs]
    at = 0
    while at < len(runs):
        (level, start, stop), (form, least) = runs[at], forms[at]
        at += 1
        if form is None:
            continue
        both = large and at < len(runs) and runs[at][:2] == (level + 1, stop) and forms[at] == forms[at - 1]
        if both and runs[at][2] - start < TOGETHER:
            stop, at = runs[at][2], at + 1
        if stop - start < least:
            continue
        codes = [(stop - start) // form.size]
        if found and found[-1].stop == start and found[-1].form == form:
            start, codes = found[-1].start, found.pop().codes + codes
        found.append(Bytewise(start, stop, form, codes))
    return found


def _form(level: int, models: Models, large: bool) -> tuple[Form | None, int]:
    """How a byte holds values of a level, and the shortest run of them that travels so."""
    if SINGLE_LEVELS[0] <= level <= SINGLE_LEVELS[1]:
        return SINGLE, SINGLE_FROM if large else SINGLE_FROM_IF_SMALL
    if level > SINGLE_LEVELS[1] or not large:
        return None, 0
    zero = int(models.zero[level])
    return next(((PAIRS, least) for share, least in PAIRS_FROM if zero < share * 2**ZERO_BITS), (None, 0))


def write(clipped: Array, chosen: Sequence[Bytewise]) -> bytes | memoryview:
    """The section of those runs' clipped values, int8."""
    symbols = np.concatenate([_symbols(clipped[each.start : each.stop], each.form) for each in chosen])
    return shrink(symbols.data, "checked", [code for each in chosen for code in each.codes])


def read(section: memoryview, chosen: Sequence[Bytewise], out: Array) -> Array:
    """Put the values of those runs into `out`, int8; which of them, sorted, are the largest that a byte has.

    Raises:
        ValueError: it is not of as many, or has a symbol that there is not.
    """
    symbols = np.frombuffer(restore(section, sum(each.size for each in chosen)), np.uint8)
    edges: list[Array] = []
    at = 0
    for start, stop, form, codes in chosen:
        some = symbols[at : at + sum(codes)]
        at += some.size
        if form is SINGLE:
            np.subtract(some, _CENTRE, out=out[start:stop].view(np.uint8))
            if int((some - _EDGE).min()) < _EDGES:
                if int(out[start:stop].min()) < -SINGLE.most:
                    raise ValueError("a byte of 255 values has another one")
                edges.append(start + (np.abs(out[start:stop]) == SINGLE.most).nonzero()[0])
        else:
            if int(some.max()) >= _PAIRS.size:
                raise ValueError(f"a byte of {_PAIRS.size} symbols has another one")
            _PAIRS.take(some, mode="clip", out=out[start:stop].view(_PAIRS.dtype))
    return np.concatenate(edges) if edges else np.zeros(0, np.intp)


def _symbols(clipped: Array, form: Form) -> Array:
    if form is SINGLE:
        # Those near zero lie beside one another, which makes the code's description shorter.
        return np.asarray(clipped.view(np.uint8) + _CENTRE)
    pairs = (clipped + PAIRS.most).view(np.uint8).reshape(-1, 2)
    return pairs[:, 0] * np.uint8(9) + pairs[:, 1]
