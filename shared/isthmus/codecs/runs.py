"""How coefficients sorted into runs of one level each are coded: as bytes, in groups, with plain low bits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from isthmus.arrays import Array
from isthmus.codecs.ans import CERTAIN, Codebook
from isthmus.codecs.bytewise import SINGLE, Bytewise, Run, choose
from isthmus.codecs.levels import FLAGS, LEVELS, Grouping, Level, Models

MAX_LEVEL = LEVELS - 1 + 2 * 12
"""Every two levels from LEVELS on leave one more plain bit to each value: at most twelve."""

_SHORT = 2048


_PLAIN_BITS = [max(0, -(-(level - LEVELS + 1) // 2)) for level in range(MAX_LEVEL + 1)]
"""How many low bits values of each level leave plain."""
_MODELLED = [level - 2 * bits for level, bits in enumerate(_PLAIN_BITS)]
"""The level, one that has a model, of what is left above plain bits: two levels are a factor of two."""


@dataclass(frozen=True)
class Stretch:
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

    @cached_property
    def groups(self) -> tuple[list[int], Codebook]:
        """Where each run's groups start and stop, and their models."""
        return self._per(self.grouping.size), Codebook([level.groups for level in self.levels])

    @cached_property
    def flags(self) -> tuple[list[int], Codebook]:
        """The same of the symbols that say which groups are not zero."""
        return self._per(self.grouping.size * FLAGS), Codebook([level.flags for level in self.levels])

    def _per(self, values: int) -> list[int]:
        return [(b - self.start) // values for b in self.bounds]


@dataclass(frozen=True, eq=False)
class Plain:
    """The values that leave low bits plain: where they are, how many bits (int32), and half of what these can count.

    They lie beside one another, but for runs of bytes between them. `bounds` are their runs' among them, `widths` the
    runs' numbers of bits.
    """

    where: slice | Array
    shift: Array
    half: Array
    bounds: list[int]
    widths: list[int]

    @classmethod
    def of(cls, runs: list[tuple[int, int, int]]) -> Plain | None:
        """Of runs (bits, start, stop); None if there is none."""
        if not runs:
            return None
        lengths = [stop - start for _, start, stop in runs]
        shift = np.repeat(np.array([bits for bits, _, _ in runs], np.int32), lengths)
        where: slice | Array = slice(runs[0][1], runs[-1][2])
        if sum(lengths) < runs[-1][2] - runs[0][1]:
            where = np.concatenate([np.arange(start, stop) for _, start, stop in runs])
        half = (1 << shift) >> 1
        return cls(where, shift, half, [0, *itertools.accumulate(lengths)], [bits for bits, _, _ in runs])

    @cached_property
    def bits(self) -> int:
        """Of all values."""
        return int(self.shift.sum())


@dataclass(frozen=True, eq=False)
class Plan:
    """How `count` values are coded: which runs as bytes, which are grouped alike, which of these have plain bits.

    `bounds` and `excess` are all runs' bounds, and the models of what clipped values exceed their limit by: of nothing
    where that follows in plain bits at once. `limits` is where each value is clipped, int8 (padded,): below the largest
    that a byte has in the parts `narrow`, there in the parts `wide`.
    """

    count: int
    padded: int
    bytewise: list[Bytewise]
    stretches: list[Stretch]
    plain: Plain | None
    bounds: Array
    limits: Array
    excess: Codebook
    narrow: list[tuple[int, int]]
    wide: list[tuple[int, int]]

    @cached_property
    def least(self) -> Array:
        """What no clipped value is less than, int8 (padded,)."""
        return -self.limits

    @classmethod
    def of(cls, runs: Sequence[Run], models: Models) -> Plan:
        """The plan for values sorted into `runs`."""
        count = runs[-1][2]
        padded = count + -count % unit(count)
        runs = [*runs[:-1], (runs[-1][0], runs[-1][1], padded)]
        as_bytes = choose(runs, models)
        grouped = {level: g for a, b, g, _ in as_bytes for level, start, _ in runs if a <= start < b}
        stretches: list[Stretch] = []
        limits_of = {at: grouping.most for at, grouping in grouped.items()}
        excess_of = {at: CERTAIN if g is SINGLE else models.excess(at, g.most) for at, g in grouped.items()}
        for grouping, alike in _alike([run for run in runs if run[0] not in grouped], models, count < _SHORT):
            levels = [models.level(_MODELLED[at], grouping) for at, _, _ in alike]
            stretches.append(Stretch(grouping, levels, [alike[0][1], *(stop for _, _, stop in alike)]))
            limits_of |= {at: grouping.most for at, _, _ in alike}
            excess_of |= {at: level.excess for (at, _, _), level in zip(alike, levels, strict=True)}
        plain = [(_PLAIN_BITS[at], a, min(b, count)) for at, a, b in runs if at >= LEVELS and at not in grouped]
        bounds = np.array([0, *(stop for _, _, stop in runs)])
        limits = np.repeat(np.array([limits_of[at] for at, _, _ in runs], np.int8), np.diff(bounds))
        excess = Codebook([excess_of[at] for at, _, _ in runs])
        wide = [(start, stop) for start, stop, grouping, _ in as_bytes if grouping is SINGLE]
        borders = [0, *itertools.chain.from_iterable(wide), padded]
        narrow = [(a, b) for a, b in zip(borders[::2], borders[1::2], strict=True) if a < b]
        return cls(count, padded, as_bytes, stretches, Plain.of(plain), bounds, limits, excess, narrow, wide)


def _alike(runs: Sequence[Run], models: Models, short: bool) -> list[tuple[Grouping, list[Run]]]:
    """Runs beside one another whose values are grouped alike."""
    found: list[tuple[Grouping, list[Run]]] = []
    for run in runs:
        grouping = models.grouping(_MODELLED[run[0]], short)
        if found and found[-1][0] == grouping and found[-1][1][-1][2] == run[1]:
            found[-1][1].append(run)
        else:
            found.append((grouping, [run]))
    return found


def unit(count: int) -> int:
    """What runs of `count` values in all start at multiples of."""
    return 4 if count < _SHORT else 4 * FLAGS
