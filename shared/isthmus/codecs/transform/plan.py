"""The coding plan of sorted coefficients: runs as bytes, runs in groups, and plain low bits.

Long runs travel as bytes, a value or two small ones each, under Huffman codes: a tenth of the coder's time for some 2%
more bytes. All these runs form a zstd section, with a code for each run.
Source: docs/reference/codecs.md, "transform/4".
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeAlias

import numpy as np

from isthmus.arrays import Array
from isthmus.codecs.transform.ans import CERTAIN, Codebook
from isthmus.codecs.transform.levels import (
    FLAGS_PER_BYTE,
    LEVELS,
    MAX_LEVEL,
    ZERO_BITS,
    EntropyModels,
    Grouping,
    LevelModels,
)

Run: TypeAlias = tuple[int, int, int]
"""A level, and where its run starts and stops: at multiples of `run_unit`, but for the last. Levels rise."""


class ByteForm(NamedTuple):
    """A byte holds `size` values, one or two, each clipped to ± `limit`."""

    size: int
    limit: int


SINGLE = ByteForm(1, 127)
PAIRS = ByteForm(2, 4)

# From a deviation of three steps on, Huffman codes of single values are efficient; a byte suffices up to 32 steps.
_SINGLE_LEVELS = (15, 22)
# The shortest runs, in values: a code's description takes 60 to 80 bytes. Pairs: by the share of zeros.
_MIN_SINGLES, _MIN_SINGLES_IF_SMALL = 1024, 3072
_MIN_PAIRS = ((0.42, 2048), (0.68, 4096))
# In shorter runs, the mixture of two levels costs no more than the description of a second code.
_MIN_OWN_CODE = 2**15
# In tensors of fewer values, pairs or two levels under one code would cost more than 1% of the bytes.
_SMALL_TENSOR = 2**14
# Tensors of fewer values have runs at multiples of four, and no flags.
_SHORT_TENSOR = 2048

_PLAIN_BITS = [max(0, -(-(level - LEVELS + 1) // 2)) for level in range(MAX_LEVEL + 1)]
"""How many low bits of a value stay plain at each level."""
_MODELLED = [level - 2 * bits for level, bits in enumerate(_PLAIN_BITS)]
"""The level of the bits above the plain bits, always with a model: two levels are a factor of two."""


class ByteRun(NamedTuple):
    """Adjacent runs of values that travel as bytes, in one form.

    `codes` are the numbers of bytes under the same Huffman code: of a run, or of two neighbouring levels.
    """

    start: int
    stop: int
    form: ByteForm
    codes: list[int]

    @property
    def size(self) -> int:
        """Number of bytes."""
        return sum(self.codes)


@dataclass(frozen=True)
class Stretch:
    """Consecutive runs whose levels have the same grouping."""

    grouping: Grouping
    levels: list[LevelModels]
    bounds: list[int]

    @property
    def start(self) -> int:
        return self.bounds[0]

    @property
    def stop(self) -> int:
        return self.bounds[-1]

    @cached_property
    def groups(self) -> tuple[list[int], Codebook]:
        """The bounds of each run's groups, and their models."""
        return self._bounds_of(self.grouping.size), Codebook([level.groups for level in self.levels])

    @cached_property
    def flags(self) -> tuple[list[int], Codebook]:
        """The bounds of each run's flag bytes, and their models."""
        return self._bounds_of(self.grouping.size * FLAGS_PER_BYTE), Codebook([level.flags for level in self.levels])

    def _bounds_of(self, values: int) -> list[int]:
        return [(b - self.start) // values for b in self.bounds]


@dataclass(frozen=True, eq=False)
class PlainRuns:
    """Values with plain low bits: the positions `where`, `shift` (numbers of plain bits, int32) and `half` of 2^shift.

    Only runs of bytes lie in between. `bounds` and `widths` are the bounds and numbers of bits of their runs.
    """

    where: slice | Array
    shift: Array
    half: Array
    bounds: list[int]
    widths: list[int]

    @classmethod
    def of(cls, runs: list[tuple[int, int, int]]) -> PlainRuns | None:
        """From runs (bits, start, stop); None if there is no run."""
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
        """Plain bits of all values."""
        return int(self.shift.sum())


@dataclass(frozen=True, eq=False)
class CodingPlan:
    """How `count` values, `padded` to a whole number of groups, are coded.

    `bounds` and `excess` are the bounds of all runs and the models of their excess over the clipping limit; runs of
    single bytes have none, their excess is plain. `limits`, int8 (padded,), is the clipping limit of each value: less
    than the largest byte in the parts `narrow`, the largest byte in the parts `wide`.
    """

    count: int
    padded: int
    byte_runs: list[ByteRun]
    stretches: list[Stretch]
    plain: PlainRuns | None
    bounds: Array
    limits: Array
    excess: Codebook
    narrow: list[tuple[int, int]]
    wide: list[tuple[int, int]]

    @cached_property
    def lower_limits(self) -> Array:
        """The least clipped values, int8 (padded,)."""
        return -self.limits

    @classmethod
    def of(cls, runs: Sequence[Run], models: EntropyModels) -> CodingPlan:
        """The plan for values sorted into `runs`."""
        count = runs[-1][2]
        padded = count + -count % run_unit(count)
        runs = [*runs[:-1], (runs[-1][0], runs[-1][1], padded)]
        byte_runs = _byte_runs(runs, models)
        forms = {level: form for a, b, form, _ in byte_runs for level, start, _ in runs if a <= start < b}
        limits_of = {level: form.limit for level, form in forms.items()}
        excess_of = {
            level: CERTAIN if form is SINGLE else models.excess(level, form.limit) for level, form in forms.items()
        }
        stretches: list[Stretch] = []
        rest = [run for run in runs if run[0] not in forms]
        for grouping, adjacent in _by_grouping(rest, models, count < _SHORT_TENSOR):
            levels = [models.level(_MODELLED[level], grouping) for level, _, _ in adjacent]
            stretches.append(Stretch(grouping, levels, [adjacent[0][1], *(stop for _, _, stop in adjacent)]))
            limits_of |= {level: grouping.limit for level, _, _ in adjacent}
            excess_of |= {run[0]: each.excess for run, each in zip(adjacent, levels, strict=True)}
        plain = [(_PLAIN_BITS[at], a, min(b, count)) for at, a, b in runs if at >= LEVELS and at not in forms]
        bounds = np.array([0, *(stop for _, _, stop in runs)])
        limits = np.repeat(np.array([limits_of[level] for level, _, _ in runs], np.int8), np.diff(bounds))
        excess = Codebook([excess_of[level] for level, _, _ in runs])
        wide = [(start, stop) for start, stop, form, _ in byte_runs if form is SINGLE]
        borders = [0, *itertools.chain.from_iterable(wide), padded]
        narrow = [(a, b) for a, b in zip(borders[::2], borders[1::2], strict=True) if a < b]
        return cls(count, padded, byte_runs, stretches, PlainRuns.of(plain), bounds, limits, excess, narrow, wide)


def run_unit(count: int) -> int:
    """Runs of `count` values in all start at multiples of this number."""
    return 4 if count < _SHORT_TENSOR else 4 * FLAGS_PER_BYTE


def _byte_runs(runs: Sequence[Run], models: EntropyModels) -> list[ByteRun]:
    """The runs, or pairs of runs of neighbouring levels, that travel as bytes."""
    result: list[ByteRun] = []
    large = runs[-1][2] >= _SMALL_TENSOR
    forms = [_form(level, models, large) for level, _, _ in runs]
    at = 0
    while at < len(runs):
        (level, start, stop), (form, shortest) = runs[at], forms[at]
        at += 1
        if form is None:
            continue
        both = large and at < len(runs) and runs[at][:2] == (level + 1, stop) and forms[at] == forms[at - 1]
        if both and runs[at][2] - start < _MIN_OWN_CODE:
            stop, at = runs[at][2], at + 1
        if stop - start < shortest:
            continue
        codes = [(stop - start) // form.size]
        if result and result[-1].stop == start and result[-1].form == form:
            start, codes = result[-1].start, result.pop().codes + codes
        result.append(ByteRun(start, stop, form, codes))
    return result


def _form(level: int, models: EntropyModels, large: bool) -> tuple[ByteForm | None, int]:
    """The form of a level's values as bytes, and the length of the shortest run in this form."""
    if _SINGLE_LEVELS[0] <= level <= _SINGLE_LEVELS[1]:
        return SINGLE, _MIN_SINGLES if large else _MIN_SINGLES_IF_SMALL
    if level > _SINGLE_LEVELS[1] or not large:
        return None, 0
    zero = int(models.zero[level])
    return next(((PAIRS, shortest) for share, shortest in _MIN_PAIRS if zero < share * 2**ZERO_BITS), (None, 0))


def _by_grouping(runs: Sequence[Run], models: EntropyModels, short: bool) -> list[tuple[Grouping, list[Run]]]:
    """Split runs where the grouping changes, or where a gap lies between them."""
    parts: list[tuple[Grouping, list[Run]]] = []
    for run in runs:
        grouping = models.grouping(_MODELLED[run[0]], short)
        if parts and parts[-1][0] == grouping and parts[-1][1][-1][2] == run[1]:
            parts[-1][1].append(run)
        else:
            parts.append((grouping, [run]))
    return parts
