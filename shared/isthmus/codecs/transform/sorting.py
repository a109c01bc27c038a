"""The order in which coefficients are coded: by expected deviation, so that equal levels form runs."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from isthmus.arrays import Array
from isthmus.codecs.transform.levels import LEVELS, OCTAVE, ZERO_DEVIATION, EntropyModels, levels_of, step_in_eighths
from isthmus.codecs.transform.plan import CodingPlan, Run, run_unit
from isthmus.codecs.transform.planes import PlaneTransform

# In planes of at least so many coefficients, four neighbours in the transform's order share their mean deviation.
GROUPED, MIN_GROUPED_PLANE = 4, 512

# Their mean magnitude is that of all values within a fiftieth; gains are quantised to a tenth.
_GAIN_SAMPLES = 2**12
# Per sorting; the memory bound may be exceeded by one plan.
_MAX_PLANS, _MAX_PLANS_BYTES = 64, 8 * 2**20
# Upper bounds: for each value its limits and the position of its plain bits; and the runs themselves.
_PLAN_VALUE_BYTES, _PLAN_BYTES = 2 + 16, 2**11


@dataclass(frozen=True, eq=False)
class Sorting:
    """A permutation of coefficients by deviation, with the coding plans for it.

    `order` sorts the coefficients, `grouped` neighbours at a time, and `place` is its inverse. `deviations` are the
    distinct stored deviations, `ends` the ends of their runs, `counts` the lengths of these, and `per_unit` the
    deviations' reciprocals.
    """

    grouped: int
    order: Array
    place: Array
    deviations: Array
    ends: Array
    counts: Array
    per_unit: Array
    models: EntropyModels
    _plans: dict[int, CodingPlan] = field(default_factory=dict, init=False, repr=False)
    _samples: dict[int, tuple[slice | Array, Array]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, stored: Array, models: EntropyModels) -> Sorting:
        """The sorting of coefficients with these stored deviations, uint8 (n,)."""
        return cls(1, *sort_deviations(stored), models)

    @property
    def count(self) -> int:
        """Number of coefficients."""
        return int(self.ends[-1])

    def sort(self, values: Array, out: Array) -> Array:
        """Sort float32 (n,) into `out`."""
        return _take(values, self.order, self.grouped, out)

    def unsort(self, values: Array, out: Array) -> Array:
        """The inverse of `sort`."""
        return _take(values, self.place, self.grouped, out)

    def gain_samples(self, first: int) -> tuple[slice | Array, Array]:
        """Sorted values to estimate a gain from, those of `deviations[first:]`, and the reciprocals of theirs."""
        if (samples := self._samples.get(first)) is None:
            start = int(self.ends[first] - self.counts[first])
            per_unit = np.repeat(self.per_unit[first:], self.counts[first:])
            samples = slice(start, None), per_unit
            if per_unit.size > 2 * _GAIN_SAMPLES:
                # Jittered, one of each part: a constant stride would always sample the same channels.
                parts = np.arange(_GAIN_SAMPLES) + np.random.default_rng(0).random(_GAIN_SAMPLES)
                at = (parts * (per_unit.size / _GAIN_SAMPLES)).astype(np.intp)
                samples = start + at, per_unit[at]
            self._samples[first] = samples
        return samples

    def plan(self, step: int, gain: int) -> CodingPlan:
        """The coding plan of the sorted coefficients at that step and gain."""
        key = step_in_eighths(step) - gain
        if (plan := self._plans.get(key)) is None:
            plan = CodingPlan.of(self.runs(step, gain), self.models)
            plans = [*self._plans.values(), plan]
            if len(plans) > _MAX_PLANS or sum(map(_plan_bytes, plans)) > _MAX_PLANS_BYTES:
                self._plans.clear()
            self._plans[key] = plan
        return plan

    @property
    def nbytes(self) -> int:
        """Memory of this sorting, with as many plans as it may cache."""
        plan = self.count * _PLAN_VALUE_BYTES + _PLAN_BYTES
        return self.order.nbytes + self.place.nbytes + max(plan, min(_MAX_PLANS * plan, _MAX_PLANS_BYTES))

    def dead_zones(self, step: int) -> Array:
        """The dead zones of sorted coefficients, in steps, float32 (n,); see `EntropyModels.dead_zones`.

        At the calibrated magnitudes, whatever the tensor's gain: a row's values must not depend on the other rows.
        """
        zones = self.models.dead_zones[np.minimum(levels_of(self.deviations, step, 0), LEVELS)]
        return np.repeat(zones, self.counts)

    def runs(self, step: int, gain: int) -> list[Run]:
        """The runs of one level each at that step and gain."""
        levels = levels_of(self.deviations, step, gain).tolist()
        unit, runs, start = run_unit(self.count), [], 0
        for level, following, end in zip(levels, [*levels[1:], None], self.ends.tolist(), strict=True):
            if following == level:
                continue
            stop = end if following is None else end // unit * unit
            if start < stop:
                runs.append((level, start, stop))
                start = stop
        return runs


@dataclass(frozen=True, eq=False)
class Grid(Sorting):
    """A sorting of the transform coefficients of a tensor of one size.

    Shapes: `shape` is that of the coefficients in the transform's order, (batch, channels, height * width). The first
    one of a plane is its mean; `mean`, float32 (channels,), is the value expected there.
    """

    shape: tuple[int, int, int]
    transform: PlaneTransform
    mean: Array

    def rotate(self, rotations: Array, by_band: Array, out: Array) -> None:
        """Multiply each band's channels, float32 of `shape`, by its rotation."""
        for band, part in self.transform.bands:
            np.matmul(rotations[band], by_band[part], out=out[part])

    @property
    def nbytes(self) -> int:
        """See `Sorting.nbytes`; a transform's matrix has the plane's size squared."""
        return super().nbytes + (0 if self.transform.whole is None else self.transform.whole.nbytes)


def sort_deviations(
    stored: Array, grouped: int = 1, positions: Array | None = None
) -> tuple[Array, Array, Array, Array, Array, Array]:
    """The arrays of a `Sorting`, for coefficients with these deviations, uint8 (n,), one for each `grouped` of them.

    `positions` are the coefficients' own, where they lie in another order than `stored`.
    """
    order = np.argsort(stored, kind="stable")
    if positions is not None:
        order = positions[order].astype(np.intp, copy=False)
    counts = np.bincount(stored, minlength=256) * grouped
    distinct = np.flatnonzero(counts)
    place = np.empty_like(order)
    place[order] = arange(order.size)
    units = np.exp2((ZERO_DEVIATION - distinct.astype(np.float32)) / OCTAVE).astype(np.float32)
    return order, place, distinct, np.cumsum(counts[distinct]), counts[distinct], units


def arange(count: int) -> Array:
    """0 to `count` - 1, in int32 where that is wide enough: half of the memory of indices."""
    return np.arange(count, dtype=np.int32 if count < 2**31 else np.intp)


def _plan_bytes(plan: CodingPlan) -> int:
    size = _PLAN_BYTES + 2 * plan.limits.nbytes
    if (plain := plan.plain) is not None:
        size += plain.shift.nbytes + plain.half.nbytes
        size += plain.where.nbytes if isinstance(plain.where, np.ndarray) else 0
    return size


def _take(values: Array, where: Array, grouped: int, out: Array) -> Array:
    # An index costs as much for 16 bytes as for four, and wrapping it around costs less than clipping it.
    dtype = np.dtype(np.complex128) if grouped == GROUPED else values.dtype
    values.view(dtype).take(where, mode="wrap", out=out.view(dtype))
    return out
