"""Long runs as sections of bytes: Huffman codes take a tenth of the coder's time, and some 2% more bytes.

A byte is a value, or two small ones: every symbol's code has at least a bit. docs/codecs.md, `transform/2`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from isthmus.codecs.levels import ZERO_BITS, Grouping, Models
from isthmus.codecs.payload import restore, shrink

Array = np.ndarray[Any, np.dtype[Any]]
Run: TypeAlias = tuple[int, int, int]
"""A level, and where its run starts and stops: at multiples of `entropy.unit`, but for the last. Levels rise."""
Section: TypeAlias = tuple[int, int, Grouping]
"""Where it starts and stops, and how its values are grouped."""

SINGLE = Grouping(1, 127, False)
SINGLE_LEVELS = (15, 22)
"""From a deviation of three steps on a value's own Huffman code is good; up to 32 steps a byte will do."""
PAIRS = Grouping(2, 4, False)
_CENTRE = np.uint8(64)

# Values; a section takes some 60 to 100 bytes for itself, most of which describe its code. Pairs by the share of zeros.
SINGLE_FROM = 3072
PAIRS_FROM = ((0.42, 8192), (0.55, 16384))

TOGETHER = 2**15
"""Values; below, two levels' mixture costs no more than another section would."""
SMALL = 2**14
"""Values; tensors of fewer have neither pairs nor two levels in a section: there they are more than 1% of the bytes."""


def choose(runs: Sequence[Run], models: Models) -> list[Section]:
    """Which runs of these, or two neighbouring levels' at a time, are sections."""
    found: list[Section] = []
    forms = [_form(level, models) for level, _, _ in runs]
    large = runs[-1][2] >= SMALL
    at = 0
    while at < len(runs):
        (level, start, stop), (grouping, least) = runs[at], forms[at]
        at += 1
        if grouping is None or not (large or grouping is SINGLE):
            continue
        both = large and at < len(runs) and runs[at][:2] == (level + 1, stop) and forms[at] == forms[at - 1]
        if both and runs[at][2] - start < TOGETHER:
            stop, at = runs[at][2], at + 1
        if stop - start >= least:
            found.append((start, stop, grouping))
    return found


def _form(level: int, models: Models) -> tuple[Grouping | None, int]:
    """How values of a level are grouped, and the shortest section of them."""
    if level > SINGLE_LEVELS[1]:
        return None, 0
    if level >= SINGLE_LEVELS[0]:
        return SINGLE, SINGLE_FROM
    zero = int(models.zero[level])
    return next(((PAIRS, least) for share, least in PAIRS_FROM if zero < share * 2**ZERO_BITS), (None, 0))


def write(clipped: Array, grouping: Grouping) -> bytes | memoryview:
    """The section of a run's clipped values, int8."""
    if grouping is SINGLE:
        # Those near zero lie beside one another, which makes the code's description shorter.
        return shrink((clipped.view(np.uint8) + _CENTRE).data, "checked")
    return shrink(grouping.symbols(clipped).astype(np.uint8).data, "checked")


def read(section: memoryview, grouping: Grouping, out: Array) -> None:
    """Put the values that a section has into `out`, int8.

    Raises:
        ValueError: it is not of as many, or has a symbol that there is not.
    """
    symbols = np.frombuffer(restore(section, out.size // grouping.size), np.uint8)
    if grouping is SINGLE:
        np.subtract(symbols, _CENTRE, out=out.view(np.uint8))
        return
    groups = grouping.values
    if int(symbols.max()) >= groups.size:
        raise ValueError(f"a section of {groups.size} symbols has another one")
    groups.take(symbols, mode="clip", out=out.view(groups.dtype))
