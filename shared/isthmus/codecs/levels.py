"""The entropy models of values by their *level*: level l expects a deviation of 2 ** ((l - UNIT_LEVEL) / 2) steps.

Magnitudes are coded in groups, so that the coder touches few symbols: a byte for two or four values, and one for 32
zeros. That costs no bits: what a group's symbol leaves open is coded after it, by the conditional model. Signs are
plain bits. All models are made of integers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from isthmus.arrays import Array
from isthmus.codecs.ans import Model

LEVELS = 17
UNIT_LEVEL = 12
TOP = 20
"""Magnitudes from here on are one symbol; what they exceed it by follows in 24 plain bits."""

ZERO_BITS = 16
MAGNITUDE_SUM = 4096
FLAGS = 8
MAX_DEAD_ZONE = 0.75
_BIT = 0.06
"""What a bit is worth, in squares of a step."""


@dataclass(frozen=True, eq=False)
class Models:
    """The entropy models of all levels.

    `zero` uint16 (LEVELS,): how often of 65,536 a value is 0, at least 1. `magnitudes` uint16 (LEVELS, TOP): how often
    of 4,096 another one has magnitude 1 … TOP, each at least 1; TOP stands for all from there on.
    """

    zero: Array
    magnitudes: Array
    _made: dict[tuple[int, Grouping], Level] = field(default_factory=dict, init=False, repr=False)
    _excess: dict[tuple[int, int], Model] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for array, shape in ((self.zero, (LEVELS,)), (self.magnitudes, (LEVELS, TOP))):
            if array.dtype != np.uint16 or array.shape != shape or int(array.min()) < 1:
                raise ValueError(f"an entropy model is uint16{list(shape)}, without zeros")
        if (self.magnitudes.sum(axis=1, dtype=np.int64) != MAGNITUDE_SUM).any():
            raise ValueError(f"the frequencies of a level's magnitudes sum to {MAGNITUDE_SUM}")

    @cached_property
    def dead_zones(self) -> Array:
        """How far from zero a value of each level may be, in steps, to be sent as zero: float32 (LEVELS + 1,).

        Where its error then costs less than the bits of a one; half a step above all levels, where no bits are saved.
        Source: docs/codecs.md, "Rows".
        """
        zero = self.zero / 2**ZERO_BITS
        one = (1 - zero) * self.magnitudes[:, 0] / (2 * MAGNITUDE_SUM)
        zones = np.clip(0.5 + _BIT / 2 * np.log2(zero / one), 0.5, MAX_DEAD_ZONE)
        return np.append(zones, 0.5).astype(np.float32)

    def grouping(self, level: int, short: bool) -> Grouping:
        """How values of a level are best grouped."""
        return self._groupings[short][level]

    @cached_property
    def _groupings(self) -> tuple[list[Grouping], list[Grouping]]:
        """Of each level, of tensors that are not short and of such that are."""
        found = [next(g for share, g in _GROUPINGS if zero < share * 2**ZERO_BITS) for zero in self.zero.tolist()]
        return found, [replace(grouping, flagged=False) for grouping in found]

    def level(self, level: int, grouping: Grouping) -> Level:
        """The coder's models of one level's values so grouped, made on first use."""
        found = self._made.get((level, grouping))
        if found is None:
            groups, flags = grouping.models(int(self.zero[level]), self.magnitudes[level].tolist())
            found = self._made[level, grouping] = Level(grouping, groups, flags, self.excess(level, grouping.most))
        return found

    def excess(self, level: int, most: int) -> Model:
        """The coder's model of what magnitudes of `most` and more exceed it by, made on first use."""
        found = self._excess.get((level, most))
        if found is None:
            found = self._excess[level, most] = Model.of(self.magnitudes[level, most - 1 :].tolist())
        return found


@dataclass(frozen=True)
class Grouping:
    """`size` magnitudes, two or four, each clipped to `most`, are one byte, the first in its lowest bits.

    With `flagged`, eight groups first share a byte that says which of them are not all zero; only those follow.
    """

    size: int
    flagged: bool

    @property
    def bits(self) -> int:
        """Of one magnitude."""
        return 8 // self.size

    @property
    def most(self) -> int:
        return int((1 << self.bits) - 1)

    def symbols(self, magnitudes: Array) -> Array:
        """The bytes of clipped magnitudes, uint8 (n,), which are overwritten."""
        # A group's values are the bytes of one integer, the first the lowest.
        groups = magnitudes.view(f"<u{self.size}")
        shift = 8 - self.bits
        groups |= groups >> groups.dtype.type(shift)
        if self.size == 4:
            groups |= groups >> groups.dtype.type(2 * shift)
        return groups.astype(np.uint8)  # the lowest byte

    @cached_property
    def values(self) -> Array:
        """What each byte stands for: `size` magnitudes, int8, seen as one unsigned integer."""
        digits = np.arange(256)[:, None] >> self.bits * np.arange(self.size) & self.most
        return digits.astype(np.int8).view(f"u{self.size}").reshape(-1)

    def models(self, zero: int, magnitudes: list[int]) -> tuple[Model, Model]:
        """The coder's models of groups, and of which of eight are not zero, for these frequencies; see `Models`."""
        scale, other = 2**ZERO_BITS, 2**ZERO_BITS - zero
        # Weights out of scale * MAGNITUDE_SUM for one clipped magnitude, exact as Python's integers are.
        clipped = (*magnitudes[: self.most - 1], sum(magnitudes[self.most - 1 :]))
        one = [zero * MAGNITUDE_SUM, *(m * other for m in clipped)]
        weights = [1]
        for _ in range(self.size):
            weights = [a * b for b in one for a in weights]
        if self.flagged:
            weights[0] = 0
        none = zero**self.size
        some = scale**self.size - none
        flags = [some ** n.bit_count() * none ** (FLAGS - n.bit_count()) for n in range(2**FLAGS)]
        return Model.of(weights), Model.of(flags)


# From the share of zeros: where clipping is rare, and flags are fewer symbols than they spare.
_GROUPINGS = (
    (0.30, Grouping(2, False)),
    (0.82, Grouping(4, False)),
    (1.00, Grouping(4, True)),
)


@dataclass(frozen=True, eq=False)
class Level:
    """One level's grouping, and what models its symbols: groups, which of them are not zero, and excess over `most`."""

    grouping: Grouping
    groups: Model
    flags: Model
    excess: Model
