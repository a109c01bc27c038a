"""Quantiser steps, and the entropy models of quantised values by their level.

A *step* is a whole number; thirteen steps are a factor of three. The *level* of a value is its expected deviation in
units of the step, on a logarithmic scale: level l expects 2 ** ((l - UNIT_LEVEL) / 2) steps.

The coder processes magnitudes in groups of two or four to a byte, and runs of 32 zeros by one flag, to touch few
symbols. Grouping costs no bits: a magnitude beyond the range of its group is completed by a conditional model. Signs
are plain bits. All models consist of integers, so every machine builds the same ones.
Source: docs/reference/codecs.md, "transform/4".
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from isthmus.arrays import Array
from isthmus.codecs.transform.ans import SymbolModel

STEP_FACTOR, STEPS_PER_FACTOR = 3, 13

# Deviations and gains are whole eighths of an octave: the coder's decisions depend on integers alone.
OCTAVE = 8

# The stored deviation that represents 1; one more is an eighth of an octave more.
ZERO_DEVIATION = 128

LEVELS = 17
UNIT_LEVEL = 12
# Every two levels from LEVELS on leave one more plain bit to each value: at most twelve.
MAX_LEVEL = LEVELS - 1 + 2 * 12

# Magnitudes from here on share one symbol; their excess follows in 24 plain bits.
ESCAPE = 20

ZERO_BITS = 16
MAGNITUDE_SUM = 4096
FLAGS_PER_BYTE = 8
MAX_DEAD_ZONE = 0.75
# The Lagrangian of rate against distortion: the price of a bit, in squares of a step.
_BIT_PRICE = 0.06


def step_size(step: int) -> float:
    """The width of a quantiser step, in units of the table's components."""
    return float(STEP_FACTOR ** (step / STEPS_PER_FACTOR))


def step_in_eighths(step: int) -> int:
    """A step's size in eighths of an octave above one unit, rounded: 3^(1/13) is 2^(0.975/8)."""
    return (39 * step + 20) // 40


def step_of_quality(quality: float, steps: tuple[int, int]) -> int:
    """The step of a quality from 0 (the coarsest of `steps`) to 1 (the finest).

    Raises:
        ValueError: the quality is outside of that range.
    """
    if not 0 <= quality <= 1:
        raise ValueError(f"a quality is a number from 0 to 1, not {quality}")
    coarsest, finest = steps
    # Halves always round upwards, so that qualities a factor of three apart are whole steps apart.
    return math.floor(round(coarsest + (finest - coarsest) * quality, 6) + 0.5)


def levels_of(deviations: Array, step: int, gain: int | Array) -> Array:
    """The levels of values with these stored deviations, at a step and a gain in eighths of an octave."""
    eighths = np.asarray(deviations - ZERO_DEVIATION - step_in_eighths(step) + gain, np.int64)
    return np.asarray(np.clip((eighths + 4 * UNIT_LEVEL + 2) >> 2, 0, MAX_LEVEL))


@dataclass(frozen=True, eq=False)
class EntropyModels:
    """The entropy models of all levels.

    Shapes: `zero` uint16 (LEVELS,), the frequency of 0 out of 65,536. `magnitudes` uint16 (LEVELS, ESCAPE), the
    frequencies of the magnitudes 1 … ESCAPE out of 4,096; ESCAPE covers all from there on. Every frequency is positive.
    """

    zero: Array
    magnitudes: Array
    _levels: dict[tuple[int, Grouping], LevelModels] = field(default_factory=dict, init=False, repr=False)
    _excess: dict[tuple[int, int], SymbolModel] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for array, shape in ((self.zero, (LEVELS,)), (self.magnitudes, (LEVELS, ESCAPE))):
            if array.dtype != np.uint16 or array.shape != shape or int(array.min()) < 1:
                raise ValueError(f"an entropy model is uint16{list(shape)}, without zeros")
        if (self.magnitudes.sum(axis=1, dtype=np.int64) != MAGNITUDE_SUM).any():
            raise ValueError(f"the frequencies of a level's magnitudes sum to {MAGNITUDE_SUM}")

    @cached_property
    def dead_zones(self) -> Array:
        """Half the width of the quantiser's dead zone at each level, in steps: float32 (LEVELS + 1,).

        Within the zone, the squared error of a zero costs less than the bits of a 1. Above all levels, zeros save no
        bits, and the zone is half a step. Source: docs/reference/codecs.md, "Rows".
        """
        zero = self.zero / 2**ZERO_BITS
        one = (1 - zero) * self.magnitudes[:, 0] / (2 * MAGNITUDE_SUM)
        zones = np.clip(0.5 + _BIT_PRICE / 2 * np.log2(zero / one), 0.5, MAX_DEAD_ZONE)
        return np.append(zones, 0.5).astype(np.float32)

    def grouping(self, level: int, short: bool) -> Grouping:
        """The grouping of a level's values; `short` tensors have no flags: their code would not pay off."""
        return self._groupings[short][level]

    @cached_property
    def _groupings(self) -> tuple[list[Grouping], list[Grouping]]:
        groupings = [next(g for share, g in _GROUPINGS if zero < share * 2**ZERO_BITS) for zero in self.zero.tolist()]
        return groupings, [replace(grouping, flagged=False) for grouping in groupings]

    def level(self, level: int, grouping: Grouping) -> LevelModels:
        """The coder's models of one level's values in this grouping, computed on first use."""
        if (models := self._levels.get((level, grouping))) is None:
            groups, flags = grouping.models(int(self.zero[level]), self.magnitudes[level].tolist())
            models = LevelModels(grouping, groups, flags, self.excess(level, grouping.limit))
            self._levels[level, grouping] = models
        return models

    def excess(self, level: int, limit: int) -> SymbolModel:
        """The model of the excess of magnitudes from `limit` on, computed on first use."""
        if (model := self._excess.get((level, limit))) is None:
            model = self._excess[level, limit] = SymbolModel.of(self.magnitudes[level, limit - 1 :].tolist())
        return model


@dataclass(frozen=True)
class Grouping:
    """`size` magnitudes, two or four, each clipped to `limit`, share one byte, the first in its lowest bits.

    With `flagged`, a byte of flags precedes eight groups and marks the nonzero ones; only these follow.
    """

    size: int
    flagged: bool

    @property
    def bits(self) -> int:
        """Bits of one magnitude."""
        return 8 // self.size

    @property
    def limit(self) -> int:
        return int((1 << self.bits) - 1)

    def symbols(self, magnitudes: Array) -> Array:
        """The bytes of clipped magnitudes, uint8 (n,); overwrites its argument."""
        # A group's values are the bytes of one integer, the first the lowest.
        groups = magnitudes.view(f"<u{self.size}")
        shift = 8 - self.bits
        groups |= groups >> groups.dtype.type(shift)
        if self.size == 4:
            groups |= groups >> groups.dtype.type(2 * shift)
        return groups.astype(np.uint8)  # truncation takes the lowest byte

    @cached_property
    def values(self) -> Array:
        """The inverse of `symbols`, by byte: `size` magnitudes, int8, viewed as one unsigned integer."""
        digits = np.arange(256)[:, None] >> self.bits * np.arange(self.size) & self.limit
        return digits.astype(np.int8).view(f"u{self.size}").reshape(-1)

    def models(self, zero: int, magnitudes: list[int]) -> tuple[SymbolModel, SymbolModel]:
        """The models of groups and of flag bytes, from a level's frequencies; see `EntropyModels`."""
        scale, nonzero = 2**ZERO_BITS, 2**ZERO_BITS - zero
        # Weights of one clipped magnitude, out of scale * MAGNITUDE_SUM. Python's integers keep the products exact.
        clipped = (*magnitudes[: self.limit - 1], sum(magnitudes[self.limit - 1 :]))
        single = [zero * MAGNITUDE_SUM, *(m * nonzero for m in clipped)]
        weights = [1]
        for _ in range(self.size):
            weights = [a * b for b in single for a in weights]
        if self.flagged:
            weights[0] = 0
        none = zero**self.size
        some = scale**self.size - none
        flags = [some ** n.bit_count() * none ** (FLAGS_PER_BYTE - n.bit_count()) for n in range(2**FLAGS_PER_BYTE)]
        return SymbolModel.of(weights), SymbolModel.of(flags)


# By the largest share of zeros: clipping is rare in each, and flags are fewer symbols than the saved zeros.
_GROUPINGS = (
    (0.30, Grouping(2, False)),
    (0.82, Grouping(4, False)),
    (1.00, Grouping(4, True)),
)


@dataclass(frozen=True, eq=False)
class LevelModels:
    """One level's grouping and the models of its symbols: groups, flag bytes, and excess over the group's limit."""

    grouping: Grouping
    groups: SymbolModel
    flags: SymbolModel
    excess: SymbolModel
