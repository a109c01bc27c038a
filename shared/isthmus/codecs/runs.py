"""How coefficients sorted into runs of one level each are coded: as sections, in groups, with plain low bits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from isthmus.codecs import sections
from isthmus.codecs.levels import FLAGS, LEVELS, Grouping, Level, Models, uniform
from isthmus.codecs.sections import Run, Section

Array = np.ndarray[Any, np.dtype[Any]]

MAX_LEVEL = LEVELS - 1 + 2 * 12
"""Every two levels from LEVELS on leave one more plain bit to each value: at most twelve."""

_SHORT = 2048


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
    def groups(self) -> tuple[list[int], list[Any]]:
        """Where each run's groups start and stop, and their models."""
        return self._per(self.grouping.size), [level.groups for level in self.levels]

    @cached_property
    def flags(self) -> tuple[list[int], list[Any]]:
        """The same of the symbols that say which groups are not zero."""
        return self._per(self.grouping.size * FLAGS), [level.flags for level in self.levels]

    def _per(self, values: int) -> list[int]:
        return [(b - self.start) // values for b in self.bounds]


@dataclass(frozen=True, eq=False)
class Plain:
    """The values that leave low bits plain: where they are, how many bits (int32), and half of what these can count.

    `bounds` are their runs' among them, `models` the coder's models of the bits.
    """

    where: Array
    shift: Array
    half: Array
    bounds: list[int]
    models: list[Any]

    @classmethod
    def of(cls, runs: list[tuple[int, int, int]]) -> Plain | None:
        """Of runs (bits, start, stop); None if there is none."""
        if not runs:
            return None
        lengths = [stop - start for _, start, stop in runs]
        shift = np.repeat(np.array([bits for bits, _, _ in runs], np.int32), lengths)
        where = np.concatenate([np.arange(start, stop) for _, start, stop in runs])
        half = (1 << shift) >> 1
        return cls(where, shift, half, [0, *itertools.accumulate(lengths)], [uniform(1 << bits) for bits, _, _ in runs])


@dataclass(frozen=True, eq=False)
class Plan:
    """How `count` values are coded: which runs are sections, which are grouped alike, which of these have plain bits.

    `bounds` and `excess` are all runs' bounds, and the models of what clipped values exceed their limit by: None where
    that follows in plain bits at once. `limits` is where each value is clipped, int8 (padded,).
    """

    count: int
    padded: int
    sections: list[Section]
    stretches: list[Stretch]
    plain: Plain | None
    bounds: Array
    limits: Array
    excess: list[Any]

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
        in_bytes = sections.choose(runs, models)
        grouping_of = {level: g for a, b, g in in_bytes for level, start, _ in runs if a <= start < b}
        stretches: list[Stretch] = []
        plain: list[tuple[int, int, int]] = []
        most: list[int] = []
        excess: list[Any] = []
        for at, start, stop in runs:
            if grouping := grouping_of.get(at):
                most.append(grouping.most)
                excess.append(None if grouping is sections.SINGLE else models.excess(at, grouping.most))
                continue
            # Two levels are a factor of two: without that many low bits, a value is of a level that has a model.
            bits = max(0, -(-(at - LEVELS + 1) // 2))
            if bits:
                plain.append((bits, start, min(stop, count)))
            level = models.level(at - 2 * bits, count < _SHORT)
            most.append(level.grouping.most)
            excess.append(level.excess)
            if stretches and stretches[-1].stop == start and stretches[-1].grouping == level.grouping:
                stretches[-1].levels.append(level)
                stretches[-1].bounds.append(stop)
            else:
                stretches.append(Stretch(level.grouping, [level], [start, stop]))
        bounds = np.array([0, *(stop for _, _, stop in runs)])
        limits = np.repeat(np.array(most, np.int8), np.diff(bounds))
        return cls(count, padded, in_bytes, stretches, Plain.of(plain), bounds, limits, excess)


def unit(count: int) -> int:
    """What runs of `count` values in all start at multiples of."""
    return 4 if count < _SHORT else 4 * FLAGS
