"""Where a tensor's channels and planes lie, and the plane transform: a DCT-II along every axis but batch and channels.

Frequencies are relative, u / size, so that one table serves maps of any height and width. Coefficients that a table
treats alike share a *band* (one rotation of the channels) and a *cell* (one deviation per component).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from isthmus.arrays import Array

MAX_AXIS = 1024
"""The longest plane axis that is transformed; its matrix takes 4 MiB."""

CELL_EDGES = (0.0, 1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)
"""Relative frequencies that part the cells of one axis; the first cell is the mean alone."""

CELLS = len(CELL_EDGES) + 1
_MAX_WHOLE = 64


@dataclass(frozen=True)
class Layout:
    """A tensor's number of axes, and which of them holds the channels.

    Of two axes or more the first is the batch, unless it is the channels'. The rest, at most two, are the plane.
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
        """The axes that are transformed, in order."""
        first = 0 if self.rank == 1 or self.channel_axis == 0 else 1
        return tuple(a for a in range(first, self.rank) if a != self.channel_axis)

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
        """(batch, channels, height, width) of a tensor of that shape.

        Raises:
            ValueError: another number of axes, or a plane too long to be transformed.
        """
        return _sizes(self, shape)

    def forward(self, array: Array) -> Array:
        """`array` as (batch, height * width, channels), a view where that can be."""
        return self.maps(array).transpose(0, 2, 1)

    def backward(self, planes: Array, shape: tuple[int, ...]) -> Array:
        """The inverse of `forward`."""
        return self.unmapped(planes.transpose(0, 2, 1), shape)

    def maps(self, array: Array) -> Array:
        """`array` as (batch, channels, height * width), a view where that can be."""
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


@lru_cache(maxsize=256)
def _sizes(layout: Layout, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    if len(shape) != layout.rank:
        raise ValueError(f"a tensor of {len(shape)} axes; the table was learned for {layout.rank}")
    plane = [shape[a] for a in layout.plane_axes] + [1, 1]
    if max(plane) > MAX_AXIS:
        raise ValueError(f"a plane axis of {max(plane)}; at most {MAX_AXIS}")
    batch = 1 if layout.rank == 1 or layout.channel_axis == 0 else shape[0]
    return batch, shape[layout.channel_axis], plane[0], plane[1]


@lru_cache(maxsize=16)
def dct(n: int) -> Array:
    """The orthonormal DCT-II of length n, rows are frequencies; float32 (n, n)."""
    matrix = np.empty((n, n), np.float32)
    # Row by row: cosines in float64, and what they are of, would take six times as much memory.
    for k in range(n):
        row = np.cos(np.pi * (np.arange(n) + 0.5) * k / n) * math.sqrt(2 / n)
        matrix[k] = row / math.sqrt(2) if k == 0 else row
    return matrix


@dataclass(frozen=True, eq=False)
class PlaneTransform:
    """The DCT of planes of one size, with the coefficients ordered by band, and within it by cell.

    `order` are positions in the row-major plane, `place` its inverse; `starts` (bands + 1) bound each band's run in
    that order; `cells` give each coefficient's cell, in that order. Small planes and those of one axis have the whole
    transform as a matrix.
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
        """Each band that has coefficients, and where these are in (batch, channels, height * width)."""
        runs = enumerate(zip(self.starts, self.starts[1:], strict=False))
        return [(band, (slice(None), slice(None), slice(a, b))) for band, (a, b) in runs if a < b]

    def forward(self, planes: Array) -> Array:
        """Coefficients by band (batch, height * width, channels), of planes so shaped; in their own memory."""
        maps = np.ascontiguousarray(planes.transpose(0, 2, 1))
        return self.channels_forward(maps, np.empty_like(maps), np.empty_like(maps)).transpose(0, 2, 1)

    def backward(self, coefficients: Array) -> Array:
        """The inverse of `forward`."""
        maps = np.array(coefficients.transpose(0, 2, 1), order="C")
        return self.channels_backward(maps, np.empty_like(maps)).transpose(0, 2, 1)

    def channels_forward(self, maps: Array, out: Array, spare: Array) -> Array:
        """What `forward` gives, as (batch, channels, height * width) in `out`, of maps so shaped.

        `spare` is as large and is overwritten: a tensor takes two arrays of its size on its way, whatever the steps.
        """
        if self.whole is not None:
            return np.asarray(np.matmul(maps, self.whole.T, out=out))
        rows = np.matmul(maps.reshape(-1, self.width), dct(self.width).T, out=out.reshape(-1, self.width))
        shape = (-1, self.height, self.width)
        np.matmul(dct(self.height), rows.reshape(shape), out=spare.reshape(shape))
        return np.asarray(spare.take(self.order, axis=2, mode="wrap", out=out))

    def channels_backward(self, coefficients: Array, spare: Array) -> Array:
        """The inverse of `channels_forward`, in either array's memory; both are overwritten."""
        if self.whole is not None:
            return np.asarray(np.matmul(coefficients, self.whole, out=spare))
        coefficients.take(self.place, axis=2, mode="wrap", out=spare)
        shape = (-1, self.height, self.width)
        columns = np.matmul(dct(self.height).T, spare.reshape(shape), out=coefficients.reshape(shape))
        np.matmul(columns.reshape(-1, self.width), dct(self.width), out=spare.reshape(-1, self.width))
        return spare


def plane_transform(height: int, width: int, edges: tuple[float, ...]) -> PlaneTransform:
    """The transform of planes of that size, whose bands are parted at the relative radial frequencies `edges`."""
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


def edges_for(height: int, width: int, most: int) -> tuple[float, ...]:
    """Relative frequencies that part a plane into at most `most` bands, the mean alone in the first."""
    longest = max(height, width)
    if longest == 1 or most < 2:
        return ()
    low, high = 1.2 / longest, 0.65
    between = np.geomspace(low, high, most - 2).tolist() if most > 2 and low < high else []
    return (0.0, *between)


def _cell(frequencies: Array) -> Array:
    return np.asarray(np.searchsorted(np.asarray(CELL_EDGES), frequencies, side="left"))
