"""What `transform/4` has learned of one tensor, and its form as named arrays."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock

import numpy as np

from isthmus.arrays import Array
from isthmus.codecs import entropy
from isthmus.codecs.entropy import MAX_LEVEL, Plan, Run
from isthmus.codecs.levels import LEVELS, UNIT_LEVEL, Models
from isthmus.codecs.planes import CELLS, Layout, PlaneTransform, plane_transform
from isthmus.codecs.steps import in_eighths
from isthmus.codecs.stored import check, check_numbers, common_arrays, common_parts

MAX_CHANNELS = 4096
MAX_BANDS = 16
OCTAVE = 8
"""Deviations and gains are whole eighths of an octave: what the coder does depends on integers alone."""

ZERO_DEVIATION = 128
"""The stored deviation that stands for 1; one more is an eighth of an octave more."""

GAINS = (-96, 24)
"""How far one tensor's magnitude may lie from what was learned, in eighths of an octave: a 4,096th to eight times."""

EXPECTED_MAGNITUDE = 0.7
"""Of a value in units of its deviation, on average: a Laplacian's is 0.71. Gains are relative to it."""

TOGETHER, MANY = 4, 512
"""In planes of so many coefficients, four neighbours in the transform's order have one deviation, their mean."""

_SAMPLED = 2**12
"""Values whose mean magnitude is that of all, within a fiftieth; gains are told to a tenth."""

_MAX_PLANS, _PLANS_BYTES = 64, 8 * 2**20
"""Plans that a sorting keeps, and what they take, one of them excepted."""
_PLAN_VALUE_BYTES, _PLAN_BYTES = 2 + 16, 2**11
"""What a plan takes at most: for each value its limits, and where its plain bits lie; and the runs themselves."""

_GRID_BYTES = 256 * 2**20
"""Of the grids of all tables, with the plans that each may keep: those of the sizes asked for last. Who sends frames
says of which sizes, and a grid with its plans takes some 9 MB for 150,000 values."""

_NAMES = ("layout", "mean", "edges", "scale", "synthesis", "deviations", "thirteenths", "zero", "magnitudes")


@dataclass(frozen=True, eq=False)
class Sorting:
    """What coding coefficients of known deviations needs: where each goes.

    `order` sorts them all by deviation, `together` neighbours at a time, and `place` undoes it; `deviations` and `ends`
    are the distinct ones and where their runs end, `counts` how long these are, `per_unit` the deviations' reciprocals.
    """

    together: int

    order: Array
    place: Array
    deviations: Array
    ends: Array
    counts: Array
    per_unit: Array
    models: Models
    _plans: dict[int, Plan] = field(default_factory=dict, init=False, repr=False)
    _samples: dict[int, tuple[slice | Array, Array]] = field(default_factory=dict, init=False, repr=False)
    _runs: dict[int, list[Run]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, stored: Array, models: Models) -> Sorting:
        """That of coefficients of these stored deviations, uint8 (n,)."""
        return cls(1, *_sorted(stored), models)

    @property
    def count(self) -> int:
        """Of coefficients."""
        return int(self.ends[-1])

    def sort(self, values: Array, out: Array) -> Array:
        """float32 (n,), sorted, in `out`."""
        return _taken(values, self.order, self.together, out)

    def unsort(self, values: Array, out: Array) -> Array:
        """The inverse of `sort`."""
        return _taken(values, self.place, self.together, out)

    def sampled(self, least: int) -> tuple[slice | Array, Array]:
        """Which sorted values, from the one of `deviations` on, tell a magnitude, and the reciprocals of theirs."""
        found = self._samples.get(least)
        if found is None:
            start = int(self.ends[least] - self.counts[least])
            per_unit = np.repeat(self.per_unit[least:], self.counts[least:])
            if per_unit.size <= 2 * _SAMPLED:
                found = slice(start, None), per_unit
            else:
                # One of each of as many parts: steps of one length would always find the same channels.
                parts = np.arange(_SAMPLED) + np.random.default_rng(0).random(_SAMPLED)
                at = (parts * (per_unit.size / _SAMPLED)).astype(np.intp)
                found = start + at, per_unit[at]
            self._samples[least] = found
        return found

    def plan(self, step: int, gain: int) -> Plan:
        """How the sorted coefficients are coded at that step and gain."""
        key = in_eighths(step) - gain
        found = self._plans.get(key)
        if found is None:
            found = Plan.of(self.runs(step, gain), self.models)
            plans = list(self._plans.values())
            if len(plans) >= _MAX_PLANS or sum(map(_plan_bytes, [*plans, found])) > _PLANS_BYTES:
                self._plans.clear()
            self._plans[key] = found
        return found

    @property
    def nbytes(self) -> int:
        """What it takes in memory, with as many plans as it may keep."""
        plan = self.count * _PLAN_VALUE_BYTES + _PLAN_BYTES
        return self.order.nbytes + self.place.nbytes + max(plan, min(_MAX_PLANS * plan, _PLANS_BYTES))

    def dead_zones(self, step: int, gain: int) -> Array:
        """How far from zero sorted coefficients may be, in steps, to be sent as zero, float32 (n,)."""
        levels, starts, stops = zip(*self.runs(step, gain), strict=True)
        zones = self.models.dead_zones[np.minimum(levels, LEVELS)]
        return np.repeat(zones, np.subtract(stops, starts))

    def runs(self, step: int, gain: int) -> list[Run]:
        """The runs of one level each at that step and gain."""
        key = in_eighths(step) - gain
        found = self._runs.get(key)
        if found is None:
            found = self._runs[key] = self._found_runs(step, gain)
        return found

    def _found_runs(self, step: int, gain: int) -> list[Run]:
        levels = levels_of(self.deviations, step, gain).tolist()
        unit, found, start = entropy.unit(self.count), [], 0
        for level, after, end in zip(levels, [*levels[1:], None], self.ends.tolist(), strict=True):
            if after == level:
                continue
            stop = end if after is None else end // unit * unit
            if start < stop:
                found.append((level, start, stop))
                start = stop
        return found


@dataclass(frozen=True, eq=False)
class Grid(Sorting):
    """A sorting of the coefficients of a tensor of one size, computed once.

    `shape` is that of the coefficients, (batch, channels, height * width), which lie in the transform's order. A
    plane's mean is the first of them; `mean` is what is expected there, float32 (channels,).
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
        """See `Sorting.nbytes`; a transform's matrix is the plane's size squared."""
        return super().nbytes + (0 if self.transform.whole is None else self.transform.whole.nbytes)


class GridCache:
    """Grids of all tables by the table's number and the tensor's shape, those that were asked for last."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = Lock()
        self._grids: OrderedDict[tuple[int, tuple[int, ...]], Grid] = OrderedDict()
        self._bytes = 0

    @property
    def nbytes(self) -> int:
        """What they may take in memory."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._grids)

    def find(self, table: int, shape: tuple[int, ...]) -> Grid | None:
        """The grid of that table and shape, if it is there."""
        with self._lock:
            if (found := self._grids.get((table, shape))) is not None:
                self._grids.move_to_end((table, shape))
            return found

    def keep(self, table: int, shape: tuple[int, ...], grid: Grid) -> None:
        """Keep a grid that is not there yet, and let go of those that were asked for longest ago; one stays."""
        with self._lock:
            self._grids[table, shape] = grid
            self._bytes += grid.nbytes
            while len(self._grids) > 1 and self._bytes > self._max_bytes:
                self._bytes -= self._grids.popitem(last=False)[1].nbytes


GRIDS = GridCache(_GRID_BYTES)
_NUMBERS = itertools.count()


@dataclass(frozen=True, eq=False)
class Table:
    """A tensor's means, rotations, deviations and entropy models.

    `mean` float32 (C,). `edges` float64 (bands - 1,): see `plane_transform`. `synthesis` float16 (bands, C, C), times
    `scale`, gives channels from components; noise of one unit in any component does the same damage at the output.
    `deviations` uint8 (C, cells): see ZERO_DEVIATION. `steps` are the coarsest and the finest; see `steps.size_of`.
    """

    layout: Layout
    mean: Array
    edges: tuple[float, ...]
    scale: float
    synthesis: Array
    deviations: Array
    steps: tuple[int, int]
    models: Models
    _number: int = field(default_factory=_NUMBERS.__next__, init=False, repr=False)
    _lock: Lock = field(default_factory=Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check every bound.

        Raises:
            ValueError: names the part that does not fit.
        """
        channels, bands = self.channels, len(self.edges) + 1
        if not 1 <= channels <= MAX_CHANNELS or bands > MAX_BANDS:
            raise ValueError(f"a table of {channels} channels and {bands} bands")
        check("mean", self.mean, np.float32, (channels,))
        check("synthesis", self.synthesis, np.float16, (bands, channels, channels))
        check("deviations", self.deviations, np.uint8, (channels, cells(self.layout)))
        check_numbers((self.mean, self.synthesis), self.scale, self.steps)
        edges = np.asarray(self.edges, np.float64)
        if not np.isfinite(edges).all() or (np.diff(edges) <= 0).any() or (edges < 0).any():
            raise ValueError("the edges of bands are not finite and rising")

    @property
    def channels(self) -> int:
        return int(self.mean.size)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that `to_arrays` gives."""
        return sum(a.nbytes for a in self.to_arrays().values())

    @cached_property
    def synthesis_at_work(self) -> Array:
        """float32 (bands, C, C): what multiplies components in units."""
        return self.synthesis.astype(np.float32) * np.float32(self.scale)

    @cached_property
    def analysis_at_work(self) -> Array:
        """float32 (bands, C, C): the inverse of `synthesis_at_work`.

        Raises:
            ValueError: a rotation has no inverse.
        """
        try:
            inverse = np.linalg.inv(self.synthesis.astype(np.float64) * self.scale)
        except np.linalg.LinAlgError as e:
            raise ValueError(f"a table's rotation has no inverse: {e}") from e
        return inverse.astype(np.float32)

    def grid(self, shape: tuple[int, ...]) -> Grid | None:
        """Where the coefficients of a tensor of that shape go, cached in GRIDS; None where it has none.

        Raises:
            ValueError: it is none that the table was learned for.
        """
        if (found := GRIDS.find(self._number, shape)) is not None:
            return found
        batch, channels, height, width = self.layout.sizes(shape)
        if channels != self.channels:
            raise ValueError(f"a tensor of {channels} channels; the table has {self.channels}")
        if not batch * channels * height * width:
            return None
        with self._lock:  # one thread makes it, the others wait
            if (found := GRIDS.find(self._number, shape)) is None:
                found = self._grid(batch, height, width)
                GRIDS.keep(self._number, shape, found)
        return found

    def to_arrays(self) -> dict[str, Array]:
        """This table as named arrays, to be stored."""
        return {
            "layout": np.array([self.layout.rank, self.layout.channel_axis], np.int32),
            "mean": self.mean,
            "edges": np.array(self.edges, np.float64),
            **common_arrays(self.scale, self.synthesis, self.deviations, self.steps, self.models),
        }

    @staticmethod
    def from_arrays(arrays: Mapping[str, Array]) -> Table:
        """Read what `to_arrays` gave.

        Raises:
            ValueError: an array is missing, unknown, of another dtype or shape, or out of bounds.
        """
        if arrays.keys() != set(_NAMES):
            raise ValueError(f"a table has exactly the arrays {', '.join(_NAMES)}")
        check("layout", arrays["layout"], np.int32, (2,))
        if arrays["edges"].dtype != np.float64 or arrays["edges"].ndim != 1 or arrays["mean"].ndim != 1:
            raise ValueError("a table's edges are float64, and they and its mean have one axis")
        common = common_parts(arrays)
        rank, channel_axis = arrays["layout"].tolist()
        return Table(
            layout=Layout(rank, channel_axis), mean=arrays["mean"], edges=tuple(arrays["edges"].tolist()), **common
        )

    def _grid(self, batch: int, height: int, width: int) -> Grid:
        transform = plane_transform(height, width, self.edges)
        deviations = self.deviations[:, cell_numbers(transform, self.layout)]  # (channels, height * width)
        together = TOGETHER if height * width >= MANY and height * width % TOGETHER == 0 else 1
        if together > 1:
            sums = deviations.reshape(self.channels, -1, together).sum(axis=2, dtype=np.int64)
            deviations = ((sums + together // 2) // together).astype(np.uint8)
        # Among equals all channels of a place lie together: where one is far from zero, others are.
        shape = (batch, deviations.shape[1], self.channels)
        stored = np.broadcast_to(deviations.T, shape).reshape(-1)
        lies = _positions(stored.size).reshape(batch, self.channels, -1).transpose(0, 2, 1).reshape(-1)
        mean = self.mean * np.float32(math.sqrt(height * width))
        return Grid(
            together,
            *_sorted(stored, together, lies),
            self.models,
            (batch, self.channels, height * width),
            transform,
            mean,
        )


def levels_of(deviations: Array, step: int, gain: int | Array) -> Array:
    """The levels of values of these stored deviations, at a step, and a gain in eighths of an octave."""
    eighths = np.asarray(deviations - ZERO_DEVIATION - in_eighths(step) + gain, np.int64)
    return np.asarray(np.clip((eighths + 4 * UNIT_LEVEL + 2) >> 2, 0, MAX_LEVEL))


def cell_numbers(transform: PlaneTransform, layout: Layout) -> Array:
    """Each coefficient's cell, 0 to `cells(layout)` - 1; a plane of one axis is the transform's height."""
    return np.asarray(transform.cells // CELLS ** (2 - len(layout.plane_axes)))


def cells(layout: Layout) -> int:
    """How many cells a layout's plane has."""
    return int(CELLS ** len(layout.plane_axes))


def _plan_bytes(plan: Plan) -> int:
    found = _PLAN_BYTES + 2 * plan.limits.nbytes
    if (plain := plan.plain) is not None:
        found += plain.shift.nbytes + plain.half.nbytes
        found += plain.where.nbytes if isinstance(plain.where, np.ndarray) else 0
    return found


def _taken(values: Array, where: Array, together: int, out: Array) -> Array:
    # An index costs as much for 16 bytes as for four, and to wrap it around less than to clip it.
    dtype = np.dtype(np.complex128) if together == TOGETHER else values.dtype
    values.view(dtype).take(where, mode="wrap", out=out.view(dtype))
    return out


def _positions(count: int) -> Array:
    """0 to `count` - 1 in half of the memory that indices take, where that holds them."""
    return np.arange(count, dtype=np.int32 if count < 2**31 else np.intp)


def _sorted(
    stored: Array, together: int = 1, lies: Array | None = None
) -> tuple[Array, Array, Array, Array, Array, Array]:
    """A sorting's arrays, of coefficients of these deviations, uint8 (n,), one for each `together` of them.

    `lies` says where each is, if not in this order.
    """
    order = np.argsort(stored, kind="stable")
    if lies is not None:
        order = lies[order].astype(np.intp, copy=False)
    counts = np.bincount(stored, minlength=256) * together
    distinct = np.flatnonzero(counts)
    place = np.empty_like(order)
    place[order] = _positions(order.size)
    units = np.exp2((ZERO_DEVIATION - distinct.astype(np.float32)) / OCTAVE).astype(np.float32)
    return order, place, distinct, np.cumsum(counts[distinct]), counts[distinct], units
