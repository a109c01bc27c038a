"""The layout of channels and planes, and the plane transform: a DCT-II along all axes but batch and channels.

Frequencies are relative, u / size, so one table serves maps of any height and width. A *band* of frequencies has one
rotation of the channels, and a *cell* of frequencies one deviation for each component.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from isthmus.arrays import Array

MAX_CHANNELS = 4096
# The longest axis of a plane; its matrix takes 4 MiB.
MAX_AXIS = 1024

# Relative frequencies between the cells of one axis; the first cell is the mean alone.
CELL_EDGES = (0.0, 1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)

CELLS = len(CELL_EDGES) + 1
# Planes of up to so many values have one matrix: a product is faster than two and a permutation.
_MAX_WHOLE = 64


@dataclass(frozen=True)
class Layout:
    """A tensor's number of axes, and the axis of its channels.

    Of two axes or more the first is the batch, unless it is the channels. The rest, at most two, are the plane.
    """

    rank: int
    channel_axis: int

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= 4 or not 0 <= self.channel_axis < self.rank:
            raise ValueError(f"no layout has its channels on axis {self.channel_axis} of {self.rank}")
        if self.rank == 4 and self.channel_axis == 0:
            raise ValueError("a tensor of four axes has its batch on the first")

    @property
    def plane_axes(self) -> tuple[int, ...]:
        """The axes of the plane, in order."""
        first = 0 if self.rank == 1 or self.channel_axis == 0 else 1
        return tuple(a for a in range(first, self.rank) if a != self.channel_axis)

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
        """(batch, channels, height, width) of a tensor of that shape.

        Raises:
            ValueError: another number of axes, or an axis of the plane longer than MAX_AXIS.
        """
        if len(shape) != self.rank:
            raise ValueError(f"a tensor of {len(shape)} axes; the table was learned for {self.rank}")
        plane = [shape[a] for a in self.plane_axes] + [1, 1]
        if max(plane) > MAX_AXIS:
            raise ValueError(f"a plane axis of {max(plane)}; at most {MAX_AXIS}")
        batch = 1 if self.rank == 1 or self.channel_axis == 0 else shape[0]
        return batch, shape[self.channel_axis], plane[0], plane[1]

    def forward(self, array: Array) -> Array:
        """`array` as (batch, height * width, channels), a view if possible."""
        return self.maps(array).transpose(0, 2, 1)

    def backward(self, planes: Array, shape: tuple[int, ...]) -> Array:
        """The inverse of `forward`."""
        return self.unmapped(planes.transpose(0, 2, 1), shape)

    def maps(self, array: Array) -> Array:
        """`array` as (batch, channels, height * width), a view if possible."""
        n, c, h, w = self.sizes(array.shape)
        if self._channels_first:
            return array.reshape(n, c, h * w)
        return np.moveaxis(array, self.channel_axis, -1).reshape(n, h * w, c).transpose(0, 2, 1)

    def unmapped(self, maps: Array, shape: tuple[int, ...]) -> Array:
        """The inverse of `maps`."""
        if self._channels_first:
            return maps.reshape(shape)
        moved = [size for axis, size in enumerate(shape) if axis != self.channel_axis]
        return np.moveaxis(maps.transpose(0, 2, 1).reshape(*moved, shape[self.channel_axis]), -1, self.channel_axis)

    @cached_property
    def _channels_first(self) -> bool:
        return all(axis > self.channel_axis for axis in self.plane_axes)


@lru_cache(maxsize=16)
def dct(n: int) -> Array:
    """The orthonormal DCT-II of length n, rows are frequencies; float32 (n, n)."""
    matrix = np.empty((n, n), np.float32)
    # Row by row: all cosines in float64, with their arguments, would take six times as much memory.
    for k in range(n):
        row = np.cos(np.pi * (np.arange(n) + 0.5) * k / n) * math.sqrt(2 / n)
        matrix[k] = row / math.sqrt(2) if k == 0 else row
    return matrix


@dataclass(frozen=True, eq=False)
class PlaneTransform:
    """The DCT of planes of one size, with the coefficients ordered by band, and within a band by cell.

    `order` are positions in the row-major plane, `place` its inverse; `starts` (bands + 1) bound the run of each band
    in that order; `cells` are the coefficients' cells, in that order. Small planes and planes of one axis have the
    `whole` transform as one matrix.
    """

    height: int
    width: int
    order: Array
    place: Array
    starts: tuple[int, ...]
    cells: Array
    whole: Array | None

    @cached_property
    def bands(self) -> list[tuple[int, tuple[slice, slice, slice]]]:
        """Each band that has coefficients, and their index in (batch, channels, height * width)."""
        runs = enumerate(zip(self.starts, self.starts[1:], strict=False))
        return [(band, (slice(None), slice(None), slice(a, b))) for band, (a, b) in runs if a < b]

    def forward(self, planes: Array) -> Array:
        """Coefficients by band, from planes (batch, height * width, channels); a new array of that shape."""
        maps = np.ascontiguousarray(planes.transpose(0, 2, 1))
        return self.channels_forward(maps, np.empty_like(maps), np.empty_like(maps)).transpose(0, 2, 1)

    def backward(self, coefficients: Array) -> Array:
        """The inverse of `forward`."""
        maps = np.array(coefficients.transpose(0, 2, 1), order="C")
        return self.channels_backward(maps, np.empty_like(maps)).transpose(0, 2, 1)

    def channels_forward(self, maps: Array, out: Array, spare: Array) -> Array:
        """`forward` of maps (batch, channels, height * width) into `out`; overwrites `spare`, of the same size.

        The caller's two buffers bound the memory of the transform.
        """
        if self.whole is not None:
            return np.asarray(np.matmul(maps, self.whole.T, out=out))
        rows = np.matmul(maps.reshape(-1, self.width), dct(self.width).T, out=out.reshape(-1, self.width))
        shape = (-1, self.height, self.width)
        np.matmul(dct(self.height), rows.reshape(shape), out=spare.reshape(shape))
        return np.asarray(spare.take(self.order, axis=2, mode="wrap", out=out))

    def channels_backward(self, coefficients: Array, spare: Array) -> Array:
        """The inverse of `channels_forward`; overwrites both arrays and returns either of them."""
        if self.whole is not None:
            return np.asarray(np.matmul(coefficients, self.whole, out=spare))
        coefficients.take(self.place, axis=2, mode="wrap", out=spare)
        shape = (-1, self.height, self.width)
        columns = np.matmul(dct(self.height).T, spare.reshape(shape), out=coefficients.reshape(shape))
        np.matmul(columns.reshape(-1, self.width), dct(self.width), out=spare.reshape(-1, self.width))
        return spare


def plane_transform(height: int, width: int, edges: tuple[float, ...]) -> PlaneTransform:
    """The transform of planes of that size, with bands between the relative radial frequencies `edges`."""
    u, v = np.arange(height) / height, np.arange(width) / width
    radius = np.sqrt(u[:, None] ** 2 + v[None] ** 2).reshape(-1)
    bands = np.searchsorted(np.asarray(edges), radius, side="left")
    cells = (_cell(u)[:, None] * CELLS + _cell(v)[None]).reshape(-1)
    order = np.lexsort((cells, bands))
    small = height * width <= _MAX_WHOLE or 1 in (height, width)
    return PlaneTransform(
        height=height,
        width=width,
        order=order,
        place=np.argsort(order),
        starts=tuple(np.searchsorted(bands[order], np.arange(len(edges) + 2)).tolist()),
        cells=cells[order],
        whole=np.ascontiguousarray(np.kron(dct(height), dct(width))[order]) if small else None,
    )


def edges_for(height: int, width: int, max_bands: int) -> tuple[float, ...]:
    """Relative frequencies that divide a plane into at most `max_bands` bands; the first has the mean alone."""
    longest = max(height, width)
    if longest == 1 or max_bands < 2:
        return ()
    low, high = 1.2 / longest, 0.65
    between = np.geomspace(low, high, max_bands - 2).tolist() if max_bands > 2 and low < high else []
    return (0.0, *between)


def _cell(frequencies: Array) -> Array:
    return np.asarray(np.searchsorted(np.asarray(CELL_EDGES), frequencies, side="left"))
