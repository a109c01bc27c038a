"""Learning a table of `transform/4` from a tensor's samples, one at a time, in two passes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from isthmus.arrays import Array
from isthmus.codecs.planes import Layout, PlaneTransform, edges_for, plane_transform
from isthmus.codecs.table import OCTAVE, ZERO_DEVIATION, Table, cell_numbers, cells
from isthmus.errors import CalibrationError
from isthmus_tools.calibration.harm import band_weights, equal_harm, harm_of
from isthmus_tools.calibration.layout import layout_of
from isthmus_tools.calibration.models import learn_models
from isthmus_tools.calibration.samples import laid_out, unit_of
from isthmus_tools.calibration.sensitivity import Sensitivity

STEPS = (24, -41)
"""From 7.6 units to a 32nd of one, a factor of three to the fifth; a unit is the root mean square of a coefficient."""

_ROTATION_BYTES = 2**20
_MAX_BANDS = 8
_KEPT_VALUES = 400_000


def learn(samples: Iterable[Array], *, sensitivity: Sensitivity | None = None, layout: Layout | None = None) -> Table:
    """The table of the tensor that `samples` are of, each as it crosses; they are read twice, one at a time.

    Without `sensitivity` all errors count alike. `layout` is the sensitivity's, or is found from the first sample.
    Memory: the bands' covariances in float64, a few times over, and 400,000 values.

    Source: docs/codecs.md, "transform/4".

    Raises:
        CalibrationError: there is nothing to learn from; or the samples' channels differ, or are not finite floats.
    """
    if layout is None and sensitivity is not None and isinstance(sensitivity.layout, Layout):
        layout = sensitivity.layout
    first = _Moments.of(samples, layout)
    layout = first.layout
    rotations, unit = first.rotations(sensitivity)
    synthesis = (rotations / unit).astype(np.float16)
    second = _Components.of(samples, first, synthesis.astype(np.float64) * unit)
    deviations = second.deviations()
    return Table(
        layout=layout,
        mean=first.mean.astype(np.float32),
        edges=first.edges,
        scale=unit,
        synthesis=synthesis,
        deviations=deviations,
        steps=STEPS,
        models=learn_models(*second.kept(deviations), STEPS),
    )


@dataclass
class _Moments:
    """First pass: means, and the channels' second moments in each band."""

    layout: Layout
    edges: tuple[float, ...]
    sizes: tuple[int, int]
    seen: int = 0
    total: Any = 0.0
    values: int = 0
    products: Any = 0.0
    counts: Any = 0.0
    dc_mixed: Any = 0.0
    dc_weight: float = 0.0

    @classmethod
    def of(cls, samples: Iterable[Array], layout: Layout | None) -> _Moments:
        found: _Moments | None = None
        channels = 0
        for array in samples:
            layout = layout or layout_of(array)
            planes, height, width = _planes(array, layout)
            if found is None:
                channels = planes.shape[2]
                most = min(_MAX_BANDS, max(1, _ROTATION_BYTES // (2 * channels**2)))
                found = cls(layout, edges_for(height, width, most), (height, width))
            if planes.shape[2] != channels:
                raise CalibrationError(f"samples have {channels} and {planes.shape[2]} channels", channels=channels)
            found.add(planes, height, width)
        if found is None:
            raise CalibrationError("there are no samples to learn from")
        return found

    def add(self, planes: Array, height: int, width: int) -> None:
        n, hw, c = planes.shape
        transform = _transform(height, width, self.edges)
        coefficients = transform.forward(planes).astype(np.float64)
        products = np.zeros((len(self.edges) + 1, c, c))
        for band, (start, stop) in enumerate(itertools.pairwise(transform.starts)):
            block = coefficients[:, start:stop].reshape(-1, c)
            products[band] = block.T @ block
        self.seen += 1
        self.products = self.products + products
        self.counts = self.counts + n * np.diff(transform.starts)
        self.total = self.total + planes.sum(axis=(0, 1), dtype=np.float64)
        self.values += n * hw
        self.dc_mixed = self.dc_mixed + math.sqrt(hw) * coefficients[:, 0].sum(axis=0)
        self.dc_weight += n * hw

    @property
    def mean(self) -> Array:
        found: Array = self.total / self.values
        return found

    def rotations(self, sensitivity: Sensitivity | None) -> tuple[Array, float]:
        """Synthesis matrices (bands, C, C) from units, and the unit: a coefficient's root mean square."""
        mean, c = self.mean, self.total.size
        products = self.products.copy()
        cross = np.outer(self.dc_mixed, mean)
        products[0] += self.dc_weight * np.outer(mean, mean) - cross - cross.T
        pooled = products.sum(axis=0) / self.counts.sum()
        energy = float(np.trace(pooled)) / c
        unit = unit_of(energy)
        harm, weights = harm_of(sensitivity, c), band_weights(sensitivity, self.edges, self.sizes)
        found = np.empty((len(self.counts), c, c))
        for band, (product, count) in enumerate(zip(products, self.counts, strict=True)):
            level = np.trace(product) / max(count, 1) / max(np.trace(pooled), 1e-30)
            # With few samples a band's covariance leans on that of all bands.
            covariance = (product + 0.5 * c * level * pooled) / (count + 0.5 * c)
            found[band] = equal_harm(covariance + 1e-6 * energy * np.eye(c), harm * weights[band])
        return found * unit, unit


@dataclass
class _Components:
    """Second pass: each component's energy in each cell, and some of the values."""

    layout: Layout
    energy: Array
    counts: Array
    rng: np.random.Generator
    values: list[Array] = field(default_factory=list)
    places: list[Array] = field(default_factory=list)

    @classmethod
    def of(cls, samples: Iterable[Array], first: _Moments, synthesis: Array) -> _Components:
        c, many = first.total.size, cells(first.layout)
        found = cls(first.layout, np.zeros((c, many)), np.zeros(many), np.random.default_rng(0))
        analysis = np.linalg.inv(synthesis).astype(np.float32)
        mean = first.mean.astype(np.float32)
        share = max(1, _KEPT_VALUES // first.seen)
        for array in samples:
            planes, height, width = _planes(array, first.layout)
            found.add(planes, _transform(height, width, first.edges), analysis, mean, share)
        if not found.values:
            raise CalibrationError("the samples can be read only once", hint="give a list, or what iterates anew")
        return found

    def add(self, planes: Array, transform: PlaneTransform, analysis: Array, mean: Array, share: int) -> None:
        n, hw, c = planes.shape
        coefficients = np.array(transform.forward(planes))
        coefficients[:, 0] -= mean * np.float32(math.sqrt(hw))
        many, cell = self.counts.size, cell_numbers(transform, self.layout)
        for rotation, (start, stop) in zip(analysis, itertools.pairwise(transform.starts), strict=True):
            coefficients[:, start:stop] = np.matmul(coefficients[:, start:stop], rotation.T)
        squares = np.square(coefficients, dtype=np.float64).sum(axis=0)
        for k in np.unique(cell):
            self.energy[:, k] += squares[cell == k].sum(axis=0)
        self.counts += n * np.bincount(cell, minlength=many)
        at = self.rng.integers(0, n * c * hw, min(share, n * c * hw))
        self.values.append(coefficients.reshape(-1)[at])
        self.places.append(at % c * many + cell[at // c % hw])

    def deviations(self) -> Array:
        """uint8 (C, cells); a cell that no sample had takes its component's mean."""
        mean = self.energy.sum(axis=1) / self.counts.sum()
        known = self.energy / np.maximum(self.counts, 1)
        variance = np.where(self.counts > 0, known, mean[:, None])
        stored = np.round(OCTAVE * np.log2(np.sqrt(np.maximum(variance, 1e-9)))) + ZERO_DEVIATION
        return np.asarray(np.clip(stored, 0, 255).astype(np.uint8))

    def kept(self, deviations: Array) -> tuple[Array, Array, Array]:
        """Values, their stored deviations, and the number of the sample that each is from."""
        stored = deviations.reshape(-1)[np.concatenate(self.places)].astype(np.int64)
        return (
            np.concatenate(self.values),
            stored,
            np.repeat(np.arange(len(self.values)), [v.size for v in self.values]),
        )


@lru_cache(maxsize=8)
def _transform(height: int, width: int, edges: tuple[float, ...]) -> PlaneTransform:
    return plane_transform(height, width, edges)


def _planes(array: Array, layout: Layout) -> tuple[Array, int, int]:
    planes = laid_out(array, layout)
    _, _, height, width = layout.sizes(array.shape)
    return planes, height, width
