"""Where a tensor's channels and planes lie, and the plane transform: a DCT-II along every axis but batch and channels.

Frequencies are relative, u / size, so that one table serves maps of any height and width. Coefficients that a table
treats alike share a *band* (one rotation of the channels) and a *cell* (one deviation per component).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

MAX_AXIS = 1024
"""The longest plane axis that is transformed; its matrix takes 4 MiB."""

CELL_EDGES = (0.0, 1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)
"""Relative frequencies that part the cells of one axis; the first cell is the mean alone."""

CELLS = len(CELL_EDGES) + 1
_MAX_KRON = 256


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
        if len(shape) != self.rank:
            raise ValueError(f"a tensor of {len(shape)} axes; the table was learned for {self.rank}")
        plane = [shape[a] for a in self.plane_axes] + [1, 1]
        if max(plane) > MAX_AXIS:
            raise ValueError(f"a plane axis of {max(plane)}; at most {MAX_AXIS}")
        batch = 1 if self.rank == 1 or self.channel_axis == 0 else shape[0]
        return batch, shape[self.channel_axis], plane[0], plane[1]

    def forward(self, array: Array) -> Array:
        """`array` as (batch, channels, height * width)."""
        n, c, h, w = self.sizes(array.shape)
        return np.moveaxis(array, self.channel_axis, -1 - len(self.plane_axes)).reshape(n, c, h * w)

    def backward(self, planes: Array, shape: tuple[int, ...]) -> Array:
        """The inverse of `forward`."""
        moved = list(shape)
        channels = moved.pop(self.channel_axis)
        moved.insert(self.rank - len(self.plane_axes) - 1, channels)
        return np.moveaxis(planes.reshape(moved), -1 - len(self.plane_axes), self.channel_axis)


@lru_cache(maxsize=16)
def dct(n: int) -> Array:
    """The orthonormal DCT-II of length n, rows are frequencies; float32 (n, n)."""
    k = np.arange(n)[:, None]
    matrix = np.cos(np.pi * (np.arange(n) + 0.5) * k / n) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix.astype(np.float32)


@dataclass(frozen=True, eq=False)
class PlaneTransform:
    """The DCT of planes of one size, with the coefficients ordered by band.

    `order` are positions in the row-major plane; `starts` (bands + 1) bound each band's run in that order; `cells` give
    each coefficient's cell, in that order.
    """

    height: int
    width: int
    order: Array
    starts: tuple[int, ...]
    cells: Array
    kron: Array | None

    def forward(self, planes: Array) -> Array:
        """Coefficients by band, float32 (batch, channels, height * width), of planes so shaped."""
        n, c, hw = planes.shape
        if hw == 1:
            return planes
        if self.kron is not None:
            return np.matmul(planes.reshape(n * c, hw), self.kron.T).reshape(n, c, hw)
        rows = np.matmul(planes.reshape(-1, self.width), dct(self.width).T).reshape(n * c, self.height, self.width)
        return np.take(np.matmul(dct(self.height), rows).reshape(n, c, hw), self.order, axis=2)

    def backward(self, coefficients: Array) -> Array:
        """The inverse of `forward`."""
        n, c, hw = coefficients.shape
        if hw == 1:
            return coefficients
        if self.kron is not None:
            return np.matmul(coefficients.reshape(n * c, hw), self.kron).reshape(n, c, hw)
        plane = np.empty_like(coefficients)
        plane[:, :, self.order] = coefficients
        columns = np.matmul(dct(self.height).T, plane.reshape(n * c, self.height, self.width))
        return np.matmul(columns.reshape(-1, self.width), dct(self.width)).reshape(n, c, hw)


def plane_transform(height: int, width: int, edges: tuple[float, ...]) -> PlaneTransform:
    """The transform of planes of that size, whose bands are parted at the relative radial frequencies `edges`."""
    u, v = np.arange(height) / height, np.arange(width) / width
    radius = np.sqrt(u[:, None] ** 2 + v[None] ** 2).reshape(-1)
    bands = np.searchsorted(np.asarray(edges), radius, side="left")
    order = np.argsort(bands, kind="stable")
    cells = (_cell(u)[:, None] * CELLS + _cell(v)[None]).reshape(-1)
    small = 1 < height * width <= _MAX_KRON
    return PlaneTransform(
        height=height,
        width=width,
        order=order,
        starts=tuple(np.searchsorted(bands[order], np.arange(len(edges) + 2)).tolist()),
        cells=cells[order],
        kron=np.ascontiguousarray(np.kron(dct(height), dct(width))[order]) if small else None,
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
    return np.searchsorted(np.asarray(CELL_EDGES), frequencies, side="left")
