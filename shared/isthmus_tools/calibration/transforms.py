"""Learn the tables of `transform/4` for feature maps: a weighted KLT in each DCT band, and its entropy models.

Source: docs/reference/codecs.md, "transform/4".
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from isthmus.arrays import Array
from isthmus.codecs.transform.codec import EXPECTED_MAGNITUDE, GAINS
from isthmus.codecs.transform.levels import (
    ESCAPE,
    LEVELS,
    MAGNITUDE_SUM,
    OCTAVE,
    UNIT_LEVEL,
    ZERO_BITS,
    ZERO_DEVIATION,
    EntropyModels,
    levels_of,
    step_in_eighths,
    step_size,
)
from isthmus.codecs.transform.planes import Layout, PlaneTransform, edges_for, plane_transform
from isthmus.codecs.transform.table import PlaneTable, cell_count, coefficient_cells
from isthmus.errors import CalibrationError
from isthmus_tools.calibration.fisher import Sensitivity, band_weights, channel_metric, whitened_basis
from isthmus_tools.calibration.layouts import by_channel, plane_layout, root_scale

STEPS = (24, -41)
"""Coarsest and finest quantiser step, 7.6 units to a 32nd, a factor of 3^5; a unit is a coefficient's RMS."""
MAX_MODEL_VALUES = 400_000
"""Coefficients from which entropy models are learned: further values change no frequency by a step."""

# Of float16 rotations in a table: functions fetch tables at their start.
_MAX_ROTATION_BYTES = 2**20
_MAX_BANDS = 8
# Weight of the pooled covariance in each band's own, in samples per channel: low bands have few coefficients.
_PRIOR_SAMPLES = 0.5
# Laplacian values added at each level, so that no symbol is without a frequency.
_PRIOR_VALUES = 200
# Keeps covariances regular, and quantised deviations finite, where channels are constant.
_MIN_VARIANCE = 1e-6, 1e-9


def learn_planes(
    samples: Iterable[Array], *, sensitivity: Sensitivity | None = None, layout: Layout | None = None
) -> PlaneTable:
    """Learn a table from `samples` of a boundary tensor, read twice, on demand.

    Without `sensitivity` errors in all directions count alike. `layout` is the sensitivity's, or detected from the
    first sample. Memory: a few copies of the bands' covariances in float64, and MAX_MODEL_VALUES values.

    Raises:
        CalibrationError: there are no samples, or samples differ in channels, hold other than finite floats, or cannot
            be read twice.
    """
    if layout is None and sensitivity is not None and isinstance(sensitivity.layout, Layout):
        layout = sensitivity.layout
    moments = _Moments.of(samples, layout)
    rotations, unit = moments.rotations(sensitivity)
    synthesis = (rotations / unit).astype(np.float16)
    # Analysis inverts the stored, rounded matrix, as the decoder applies that.
    components = _Components.of(samples, moments, synthesis.astype(np.float64) * unit)
    deviations = components.deviations()
    return PlaneTable(
        layout=moments.layout,
        mean=moments.mean.astype(np.float32),
        edges=moments.edges,
        scale=unit,
        synthesis=synthesis,
        deviations=deviations,
        steps=STEPS,
        models=learn_models(*components.model_values(deviations), STEPS),
    )


def quantised_deviations(variance: Array) -> Array:
    """Standard deviations as tables store them: uint8, in eighths of an octave around ZERO_DEVIATION."""
    octaves = OCTAVE * np.log2(np.sqrt(np.maximum(variance, _MIN_VARIANCE[1])))
    return np.asarray(np.clip(np.round(octaves) + ZERO_DEVIATION, 0, 255).astype(np.uint8))


def learn_models(values: Array, deviations: Array, sample: Array, steps: tuple[int, int]) -> EntropyModels:
    """Entropy models, shared by all quantiser steps: symbol frequencies by the level, a deviation in steps.

    Shapes: `values` in units, their stored `deviations` and the index of their `sample`, each (count,).
    """
    counts = np.zeros((LEVELS, ESCAPE + 1))
    size = np.abs(values).astype(np.float64)
    relative = size * np.exp2((ZERO_DEVIATION - deviations) / OCTAVE)
    samples = int(sample.max()) + 1
    for step in range(steps[1], steps[0] + 1, 3):
        # The gain as the encoder estimates it: from values that are not far below the step.
        part = deviations >= ZERO_DEVIATION + step_in_eighths(step) - OCTAVE
        if not part.any():
            part[:] = True
        count = np.bincount(sample[part], minlength=samples)
        mean = np.bincount(sample[part], relative[part], samples) / np.maximum(count, 1) / EXPECTED_MAGNITUDE
        gain = np.clip(np.round(OCTAVE * np.log2(np.maximum(mean, 1e-9))), *GAINS).astype(np.int64)
        level = levels_of(deviations, step, np.where(count > 0, gain, 0)[sample])
        _count(counts, level, size / step_size(step))
    laplacian = -np.log1p(-(np.arange(_PRIOR_VALUES) + 0.5) / _PRIOR_VALUES) / np.sqrt(2)
    for each in range(LEVELS):
        _count(counts, np.full(_PRIOR_VALUES, each), laplacian * 2.0 ** ((each - UNIT_LEVEL) / 2))
    share = (counts + 0.1) / (counts + 0.1).sum(axis=1, keepdims=True)
    return EntropyModels(
        zero=np.clip(np.round(2**ZERO_BITS * share[:, 0]), 1, 2**ZERO_BITS - 1).astype(np.uint16),
        magnitudes=np.stack([_frequencies(row[1:]) for row in share]),
    )


@dataclass
class _Moments:
    """First pass: means, and the channels' second moments in each band."""

    layout: Layout
    edges: tuple[float, ...]
    size: tuple[int, int]
    samples: int = 0
    total: Any = 0.0
    values: int = 0
    products: Any = 0.0
    counts: Any = 0.0
    dc_mixed: Any = 0.0
    dc_weight: float = 0.0

    @classmethod
    def of(cls, samples: Iterable[Array], layout: Layout | None) -> _Moments:
        moments: _Moments | None = None
        channels = 0
        for array in samples:
            layout = layout or plane_layout(array)
            planes, height, width = _planes(array, layout)
            if moments is None:
                channels = planes.shape[2]
                bands = min(_MAX_BANDS, max(1, _MAX_ROTATION_BYTES // (2 * channels**2)))
                moments = cls(layout, edges_for(height, width, bands), (height, width))
            if planes.shape[2] != channels:
                raise CalibrationError(f"samples have {channels} and {planes.shape[2]} channels", channels=channels)
            moments.add(planes, height, width)
        if moments is None:
            raise CalibrationError("there are no samples to learn from")
        return moments

    def add(self, planes: Array, height: int, width: int) -> None:
        n, hw, c = planes.shape
        transform = plane_transform(height, width, self.edges)
        coefficients = transform.forward(planes).astype(np.float64)
        products = np.zeros((len(self.edges) + 1, c, c))
        for band, (start, stop) in enumerate(itertools.pairwise(transform.starts)):
            block = coefficients[:, start:stop].reshape(-1, c)
            products[band] = block.T @ block
        self.samples += 1
        self.products = self.products + products
        self.counts = self.counts + n * np.diff(transform.starts)
        self.total = self.total + planes.sum(axis=(0, 1), dtype=np.float64)
        self.values += n * hw
        self.dc_mixed = self.dc_mixed + math.sqrt(hw) * coefficients[:, 0].sum(axis=0)
        self.dc_weight += n * hw

    @property
    def mean(self) -> Array:
        return np.asarray(self.total / self.values)

    def rotations(self, sensitivity: Sensitivity | None) -> tuple[Array, float]:
        """Synthesis matrices (bands, C, C) from units, and the unit: a coefficient's root mean square."""
        mean, c = self.mean, self.total.size
        products = self.products.copy()
        # Means are known after the pass only; they sit in the DC coefficients of the first band.
        cross = np.outer(self.dc_mixed, mean)
        products[0] += self.dc_weight * np.outer(mean, mean) - cross - cross.T
        pooled = products.sum(axis=0) / self.counts.sum()
        energy = float(np.trace(pooled)) / c
        unit = root_scale(energy)
        metric, weights = channel_metric(sensitivity, c), band_weights(sensitivity, self.edges, self.size)
        bases = np.empty((len(self.counts), c, c))
        prior = _PRIOR_SAMPLES * c
        for band, (product, count) in enumerate(zip(products, self.counts, strict=True)):
            level = np.trace(product) / max(count, 1) / max(np.trace(pooled), 1e-30)
            covariance = (product + prior * level * pooled) / (count + prior)
            bases[band] = whitened_basis(covariance + _MIN_VARIANCE[0] * energy * np.eye(c), metric * weights[band])
        return bases * unit, unit


@dataclass
class _Components:
    """Second pass: each component's energy in each cell of the plane, and some of the values."""

    layout: Layout
    energy: Array
    counts: Array
    rng: np.random.Generator
    values: list[Array] = field(default_factory=list)
    cells: list[Array] = field(default_factory=list)

    @classmethod
    def of(cls, samples: Iterable[Array], moments: _Moments, synthesis: Array) -> _Components:
        c, count = moments.total.size, cell_count(moments.layout)
        components = cls(moments.layout, np.zeros((c, count)), np.zeros(count), np.random.default_rng(0))
        analysis = np.linalg.inv(synthesis).astype(np.float32)
        mean = moments.mean.astype(np.float32)
        share = max(1, MAX_MODEL_VALUES // moments.samples)
        for array in samples:
            planes, height, width = _planes(array, moments.layout)
            components.add(planes, plane_transform(height, width, moments.edges), analysis, mean, share)
        if not components.values:
            raise CalibrationError("the samples can be read only once", hint="give a list, or what iterates anew")
        return components

    def add(self, planes: Array, transform: PlaneTransform, analysis: Array, mean: Array, share: int) -> None:
        n, hw, c = planes.shape
        coefficients = np.array(transform.forward(planes))
        coefficients[:, 0] -= mean * np.float32(math.sqrt(hw))
        count, cell = self.counts.size, coefficient_cells(transform, self.layout)
        for rotation, (start, stop) in zip(analysis, itertools.pairwise(transform.starts), strict=True):
            coefficients[:, start:stop] = np.matmul(coefficients[:, start:stop], rotation.T)
        squares = np.square(coefficients, dtype=np.float64).sum(axis=0)  # (places, channels)
        for k in np.unique(cell):
            self.energy[:, k] += squares[cell == k].sum(axis=0)
        self.counts += n * np.bincount(cell, minlength=count)
        at = self.rng.integers(0, n * c * hw, min(share, n * c * hw))
        self.values.append(coefficients.reshape(-1)[at])
        self.cells.append(at % c * count + cell[at // c % hw])

    def deviations(self) -> Array:
        """uint8 (C, cells); a cell without coefficients takes its component's mean variance."""
        mean = self.energy.sum(axis=1) / self.counts.sum()
        variance = np.where(self.counts > 0, self.energy / np.maximum(self.counts, 1), mean[:, None])
        return quantised_deviations(variance)

    def model_values(self, deviations: Array) -> tuple[Array, Array, Array]:
        """Sampled values, their stored deviations, and the index of each value's sample."""
        stored = deviations.reshape(-1)[np.concatenate(self.cells)].astype(np.int64)
        lengths = [v.size for v in self.values]
        return np.concatenate(self.values), stored, np.repeat(np.arange(len(lengths)), lengths)


def _planes(array: Array, layout: Layout) -> tuple[Array, int, int]:
    planes = by_channel(array, layout)
    _, _, height, width = layout.sizes(array.shape)
    return planes, height, width


def _count(counts: Array, level: Array, magnitude: Array) -> None:
    """Add magnitudes in steps to the counts of their level; values above all levels need no model."""
    modelled = level < LEVELS
    whole = np.minimum(np.rint(magnitude[modelled]), ESCAPE).astype(np.int64)
    counts += np.bincount(level[modelled] * (ESCAPE + 1) + whole, minlength=counts.size).reshape(counts.shape)


def _frequencies(share: Array) -> Array:
    """Shares as uint16 that sum to MAGNITUDE_SUM, each at least 1, by largest remainders."""
    free = MAGNITUDE_SUM - share.size
    exact = share / share.sum() * free
    whole = np.floor(exact).astype(np.int64)
    whole[np.argsort(whole - exact, kind="stable")[: free - int(whole.sum())]] += 1
    return np.asarray((whole + 1).astype(np.uint16))
