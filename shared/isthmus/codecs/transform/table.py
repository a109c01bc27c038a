"""The learned table of a tensor with planes, and the named arrays in which tables are stored."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np
from cachetools import LRUCache

from isthmus.arrays import Array
from isthmus.codecs.transform.levels import EntropyModels
from isthmus.codecs.transform.planes import CELLS, MAX_CHANNELS, Layout, PlaneTransform, plane_transform
from isthmus.codecs.transform.sorting import GROUPED, MIN_GROUPED_PLANE, Grid, arange, sort_deviations

MAX_BANDS = 16

# Of all tables together, with the plans that each grid may cache. The sender of a frame chooses the sizes of its
# tensors, and a grid of 150,000 values takes some 9 MB.
_MAX_GRIDS_BYTES = 256 * 2**20

_NAMES = ("layout", "mean", "edges", "scale", "synthesis", "deviations", "thirteenths", "zero", "magnitudes")


def grid_cache(max_bytes: int) -> LRUCache[tuple[int, tuple[int, ...]], Grid]:
    """A cache of grids by the table's number and the tensor's shape, bounded by their memory."""
    return LRUCache(max_bytes, getsizeof=lambda grid: grid.nbytes)


GRIDS, _GRIDS_LOCK = grid_cache(_MAX_GRIDS_BYTES), Lock()
_NUMBERS = itertools.count()


@dataclass(frozen=True, eq=False)
class PlaneTable:
    """A tensor's means, rotations, deviations and entropy models.

    Shapes: `mean` float32 (C,). `edges` float64 (bands - 1,), see `plane_transform`. `synthesis` float16
    (bands, C, C); times `scale` it maps components to channels, and noise of one unit in any component costs the same
    output divergence. `deviations` uint8 (C, cells), see ZERO_DEVIATION. `steps` are the coarsest and the finest.
    """

    layout: Layout
    mean: Array
    edges: tuple[float, ...]
    scale: float
    synthesis: Array
    deviations: Array
    steps: tuple[int, int]
    models: EntropyModels
    _number: int = field(default_factory=_NUMBERS.__next__, init=False, repr=False)
    _lock: Lock = field(default_factory=Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check every bound.

        Raises:
            ValueError: names the part that is out of bounds.
        """
        channels, bands = self.channels, len(self.edges) + 1
        if not 1 <= channels <= MAX_CHANNELS or bands > MAX_BANDS:
            raise ValueError(f"a table of {channels} channels and {bands} bands")
        check("mean", self.mean, np.float32, (channels,))
        check("synthesis", self.synthesis, np.float16, (bands, channels, channels))
        check("deviations", self.deviations, np.uint8, (channels, cell_count(self.layout)))
        check_numbers((self.mean, self.synthesis), self.scale, self.steps)
        edges = np.asarray(self.edges, np.float64)
        if not np.isfinite(edges).all() or (np.diff(edges) <= 0).any() or (edges < 0).any():
            raise ValueError("the edges of bands are not finite and rising")

    @property
    def channels(self) -> int:
        return int(self.mean.size)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays of `to_arrays`."""
        return sum(a.nbytes for a in self.to_arrays().values())

    @cached_property
    def synthesis_matrix(self) -> Array:
        """float32 (bands, C, C): maps components in units to channels."""
        return self.synthesis.astype(np.float32) * np.float32(self.scale)

    @cached_property
    def analysis_matrix(self) -> Array:
        """float32 (bands, C, C): the inverse of `synthesis_matrix`.

        Raises:
            ValueError: a rotation has no inverse.
        """
        try:
            inverse = np.linalg.inv(self.synthesis.astype(np.float64) * self.scale)
        except np.linalg.LinAlgError as e:
            raise ValueError(f"a table's rotation has no inverse: {e}") from e
        return inverse.astype(np.float32)

    def grid(self, shape: tuple[int, ...]) -> Grid | None:
        """The grid of a tensor of that shape, cached in GRIDS; None for an empty tensor.

        Raises:
            ValueError: the table is of another kind of tensor.
        """
        key = (self._number, shape)
        with _GRIDS_LOCK:
            if (grid := GRIDS.get(key)) is not None:
                return grid
        batch, channels, height, width = self.layout.sizes(shape)
        if channels != self.channels:
            raise ValueError(f"a tensor of {channels} channels; the table has {self.channels}")
        if not batch * channels * height * width:
            return None
        with self._lock:  # one thread computes the grid, the others wait
            with _GRIDS_LOCK:
                if (grid := GRIDS.get(key)) is not None:
                    return grid
            grid = self._grid(batch, height, width)
            with _GRIDS_LOCK, contextlib.suppress(ValueError):  # one grid may be larger than the cache
                GRIDS[key] = grid
        return grid

    def to_arrays(self) -> dict[str, Array]:
        """This table as named arrays, for storage."""
        return {
            "layout": np.array([self.layout.rank, self.layout.channel_axis], np.int32),
            "mean": self.mean,
            "edges": np.array(self.edges, np.float64),
            **common_arrays(self.scale, self.synthesis, self.deviations, self.steps, self.models),
        }

    @staticmethod
    def from_arrays(arrays: Mapping[str, Array]) -> PlaneTable:
        """The inverse of `to_arrays`.

        Raises:
            ValueError: an array is missing, unknown, of another dtype or shape, or out of bounds.
        """
        if arrays.keys() != set(_NAMES):
            raise ValueError(f"a table has exactly the arrays {', '.join(_NAMES)}")
        check("layout", arrays["layout"], np.int32, (2,))
        if arrays["edges"].dtype != np.float64 or arrays["edges"].ndim != 1 or arrays["mean"].ndim != 1:
            raise ValueError("a table's edges are float64, and they and its mean have one axis")
        rank, channel_axis = arrays["layout"].tolist()
        edges = tuple(arrays["edges"].tolist())
        return PlaneTable(Layout(rank, channel_axis), arrays["mean"], edges, **common_parts(arrays))

    def _grid(self, batch: int, height: int, width: int) -> Grid:
        transform = plane_transform(height, width, self.edges)
        deviations = self.deviations[:, coefficient_cells(transform, self.layout)]  # (channels, height * width)
        grouped = GROUPED if height * width >= MIN_GROUPED_PLANE and height * width % GROUPED == 0 else 1
        if grouped > 1:
            sums = deviations.reshape(self.channels, -1, grouped).sum(axis=2, dtype=np.int64)
            deviations = ((sums + grouped // 2) // grouped).astype(np.uint8)
        # Among equal deviations, all channels of a place are neighbours: far from zero, channels go together.
        shape = (batch, deviations.shape[1], self.channels)
        stored = np.broadcast_to(deviations.T, shape).reshape(-1)
        positions = arange(stored.size).reshape(batch, self.channels, -1).transpose(0, 2, 1).reshape(-1)
        mean = self.mean * np.float32(math.sqrt(height * width))
        coefficients = (batch, self.channels, height * width)
        return Grid(grouped, *sort_deviations(stored, grouped, positions), self.models, coefficients, transform, mean)


def coefficient_cells(transform: PlaneTransform, layout: Layout) -> Array:
    """Each coefficient's cell, 0 to `cell_count(layout)` - 1; a plane of one axis is the transform's height."""
    return np.asarray(transform.cells // CELLS ** (2 - len(layout.plane_axes)))


def cell_count(layout: Layout) -> int:
    """The number of cells of a layout's plane."""
    return int(CELLS ** len(layout.plane_axes))


def common_arrays(
    scale: float, synthesis: Array, deviations: Array, steps: tuple[int, int], models: EntropyModels
) -> dict[str, Array]:
    """The named arrays that both kinds of table have."""
    return {
        "scale": np.array([scale], np.float32),
        "synthesis": synthesis,
        "deviations": deviations,
        "thirteenths": np.array(steps, np.int32),
        "zero": models.zero,
        "magnitudes": models.magnitudes,
    }


def common_parts(arrays: Mapping[str, Array]) -> dict[str, Any]:
    """The inverse of `common_arrays`, by its parameters' names.

    Raises:
        ValueError: an array has another dtype or shape.
    """
    check("thirteenths", arrays["thirteenths"], np.int32, (2,))
    check("scale", arrays["scale"], np.float32, (1,))
    coarsest, finest = arrays["thirteenths"].tolist()
    return {
        "scale": float(arrays["scale"][0]),
        "synthesis": arrays["synthesis"],
        "deviations": arrays["deviations"],
        "steps": (coarsest, finest),
        "models": EntropyModels(arrays["zero"], arrays["magnitudes"]),
    }


def check(name: str, array: Array, dtype: type[np.generic], shape: tuple[int, ...]) -> None:
    """Check an array of a table.

    Raises:
        ValueError: another dtype or shape.
    """
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(f"a table's {name} is {array.dtype}{list(array.shape)}, not {np.dtype(dtype)}{list(shape)}")


def check_numbers(arrays: Iterable[Array], scale: float, steps: tuple[int, int]) -> None:
    """Check the numbers of either kind of table.

    Raises:
        ValueError: a number is not finite, or out of range.
    """
    if not all(np.isfinite(a).all() for a in arrays):
        raise ValueError("a table holds finite numbers")
    # float32 has no finer steps, and no larger products, at either end.
    if not 1e-30 < scale < 1e30:
        raise ValueError(f"a table's scale is {scale}")
    coarsest, finest = steps
    # A payload states its step in one signed byte.
    if not -128 < finest <= coarsest <= 127:
        raise ValueError(f"steps from {coarsest} to {finest}")
