"""The entropy models of values by their *level*: level l expects a deviation of 2 ** ((l - UNIT_LEVEL) / 2) steps.

Values are coded in groups, so that the coder touches few symbols: one for two or four values, and one for 32 zeros.
That costs no bits: what a group's symbol leaves open is coded after it, by the conditional model. All models are made
of integers.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

LEVELS = 17
UNIT_LEVEL = 12
TOP = 20
"""Magnitudes from here on are one symbol; what they exceed it by follows in 24 plain bits."""

ZERO_BITS = 16
MAGNITUDE_SUM = 4096
FLAGS = 8


@dataclass(frozen=True, eq=False)
class Models:
    """The entropy models of all levels.

    `zero` uint16 (LEVELS,): how often of 65,536 a value is 0, at least 1. `magnitudes` uint16 (LEVELS, TOP): how often
    of 4,096 another one has magnitude 1 … TOP, each at least 1; TOP stands for all from there on.
    """

    zero: Array
    magnitudes: Array
    _made: dict[tuple[int, bool], Level] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for array, shape in ((self.zero, (LEVELS,)), (self.magnitudes, (LEVELS, TOP))):
            if array.dtype != np.uint16 or array.shape != shape or int(array.min()) < 1:
                raise ValueError(f"an entropy model is uint16{list(shape)}, without zeros")
        if (self.magnitudes.sum(axis=1, dtype=np.int64) != MAGNITUDE_SUM).any():
            raise ValueError(f"the frequencies of a level's magnitudes sum to {MAGNITUDE_SUM}")

    def level(self, level: int, short: bool) -> Level:
        """The coder's models of one level, made on first use."""
        found = self._made.get((level, short))
        if found is None:
            found = Level.make(int(self.zero[level]), self.magnitudes[level].tolist(), short)
            self._made[level, short] = found
        return found


@dataclass(frozen=True)
class Grouping:
    """`size` values, each clipped to ± `most`, are one symbol.

    With `flagged`, eight groups first share a symbol that says which of them are not all zero; only those follow.
    """

    size: int
    most: int
    flagged: bool

    @property
    def middle(self) -> int:
        """The symbol of zeros."""
        return int((2 * self.most + 1) ** self.size) // 2

    @cached_property
    def weights(self) -> Array:
        """What the values of a group count in its symbol, float32; exact, since symbols are small."""
        return np.array([(2 * self.most + 1) ** i for i in reversed(range(self.size))], np.float32)

    @cached_property
    def values(self) -> Array:
        """What each symbol stands for: `size` int8, seen as one unsigned integer."""
        digits = range(-self.most, self.most + 1)
        each = np.array(list(itertools.product(digits, repeat=self.size)), np.int8)
        return each.view(f"u{self.size}").reshape(-1)


# From the share of zeros: where clipping is rare, and symbols are not more than their models are worth making.
_GROUPINGS = (
    (0.30, Grouping(2, 7, False)),
    (0.60, Grouping(4, 3, False)),
    (0.95, Grouping(4, 2, False)),
    (1.00, Grouping(4, 1, True)),
)
_UNFLAGGED = Grouping(4, 1, False)


@dataclass(frozen=True, eq=False)
class Level:
    """One level's grouping, and what models its symbols: groups, which of them are not zero, and excess over `most`."""

    grouping: Grouping
    groups: Any
    flags: Any
    excess: Any

    @classmethod
    def make(cls, zero: int, magnitudes: list[int], short: bool) -> Level:
        grouping = next(g for share, g in _GROUPINGS if zero < share * 2**ZERO_BITS or share == 1)
        if short and grouping.flagged:
            grouping = _UNFLAGGED
        scale, other = 2**ZERO_BITS, 2**ZERO_BITS - zero
        # Weights out of scale * 2 * MAGNITUDE_SUM for one clipped value, exact as Python's integers are.
        most = grouping.most
        half = [m * other for m in (*magnitudes[: most - 1], sum(magnitudes[most - 1 :]))]
        one = [*reversed(half), zero * 2 * MAGNITUDE_SUM, *half]
        weights = [1]
        for _ in range(grouping.size):
            weights = [a * b for a in weights for b in one]
        flags = None
        if grouping.flagged:
            del weights[len(weights) // 2]
            none = zero**grouping.size
            some = scale**grouping.size - none
            flags = _categorical([some ** n.bit_count() * none ** (FLAGS - n.bit_count()) for n in range(2**FLAGS)])
        return cls(grouping, _categorical(weights), flags, _categorical(magnitudes[most - 1 :]))


def _categorical(weights: list[int]) -> Any:
    """A model of exactly these frequencies, scaled by a power of two so that every partial sum is exact in float64."""
    import constriction

    shift = max(0, sum(weights).bit_length() - 48)
    counts = np.array([max(w >> shift, 1) for w in weights], np.float64)
    return constriction.stream.model.Categorical(counts, perfect=False, lazy=False)
