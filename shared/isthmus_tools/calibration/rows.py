"""Learn the tables of `transform/4` for rows (tokens, vectors, states): Gaussian clusters, a weighted KLT or none.

Source: docs/reference/codecs.md, "Rows"; mixture coding after Chou, Lookabaugh and Gray, "Entropy-Constrained Vector
Quantization", IEEE Trans. ASSP 37 (1989): each row joins the cluster of its fewest bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from isthmus.arrays import Array
from isthmus.codecs.transform.levels import OCTAVE, step_size
from isthmus.codecs.transform.rows import Clusters, RowLayout, RowTable
from isthmus.errors import CalibrationError
from isthmus_tools.calibration.fisher import Sensitivity, channel_metric, whitened_basis
from isthmus_tools.calibration.layouts import by_channel, root_scale, row_layout
from isthmus_tools.calibration.transforms import MAX_MODEL_VALUES, learn_models, quantised_deviations

# 64 MB in float64, a few times over while clusters are learned.
_MAX_VALUES = 2**23
_ITERATIONS = 8
# Half a unit, since the encoder assigns clusters at this step at every quality.
_CLUSTER_STEP = -8
# Pseudo-counts: rows of average variance, and of average sensitivity, added to each cluster.
_PRIOR_ROWS, _PRIOR_SENSITIVITY = 8.0, 2.0
# Two octaves: clusters of next to no sensitivity still get steps that their rows survive.
_MAX_WEIGHT = 16
# Index of the cluster with the mean and variance of all rows, for rows unlike every other cluster.
_BACKGROUND = 0


@dataclass(frozen=True)
class RowModel:
    """Parameters of a table of rows: number of clusters, and the KLT or none.

    `ridge` is the share of the channels' variances added to the covariance before the KLT.
    """

    clusters: int
    rotated: bool
    ridge: float = 0.0


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of samples, float64 (rows, C), and the index of each row's sample."""

    layout: RowLayout
    values: Array
    sample: Array

    @property
    def samples(self) -> int:
        return int(self.sample[-1]) + 1

    def first(self, samples: int) -> Rows:
        """The rows of the first samples."""
        stop = int(np.searchsorted(self.sample, samples))
        return Rows(self.layout, self.values[:stop], self.sample[:stop])

    @classmethod
    def of(cls, samples: Iterable[Array], layout: RowLayout | None = None) -> Rows:
        """All rows of the samples, or a random part of each within `_MAX_VALUES` values.

        Raises:
            CalibrationError: there are no samples, or samples differ in channels or hold other than finite floats.
        """
        parts: list[Array] = []
        rng = np.random.default_rng(0)
        size = 0
        for array in samples:
            layout = layout or row_layout(array)
            rows = by_channel(array, layout)[0]
            parts.append(rows)
            size += rows.size
            if size > _MAX_VALUES:
                parts = [r[np.sort(rng.permutation(len(r))[: math.ceil(len(r) / 2)])] for r in parts]
                size = sum(r.size for r in parts)
        if layout is None:
            raise CalibrationError("there are no samples to learn from")
        indices = np.repeat(np.arange(len(parts)), [len(r) for r in parts])
        return cls(layout, np.concatenate(parts).astype(np.float64), indices)


def learn_rows(rows: Rows, model: RowModel, sensitivity: Sensitivity | None, steps: tuple[int, int]) -> RowTable:
    """Learn the table of `rows` with the model's clusters and rotation; `steps` are the coarsest and the finest."""
    values, channels, count = rows.values, rows.layout.channels, model.clusters
    centre = values.mean(axis=0) if model.rotated else np.median(values, axis=0)
    centred = values - centre
    energy = float(np.mean(np.square(centred)))
    unit = root_scale(energy)
    metric = channel_metric(sensitivity, channels)
    synthesis = _synthesis(centred, metric, model, energy)
    cluster = _clusters(centred @ np.linalg.inv(synthesis).T / unit, count)
    if model.rotated and count > 1:
        # Once more within clusters: the first KLT is of the spread between them.
        means = _means(centred, cluster, count)
        synthesis = _synthesis(centred - means[cluster], metric, model, energy)
        cluster = _clusters(centred @ np.linalg.inv(synthesis).T / unit, count)
    means = (_means if model.rotated else _medians)(centred, cluster, count)
    means[_BACKGROUND] = 0
    # Analysis inverts the stored, rounded matrix, as the decoder applies that.
    stored = synthesis.astype(np.float16)
    analysis = np.linalg.inv(stored.astype(np.float64)).T / unit
    weights = _step_weights(rows, cluster, count, sensitivity)
    factors = np.exp2(weights / OCTAVE)
    rotated = centred @ analysis
    components = (rotated - (means @ analysis)[cluster]) * factors[cluster, None]
    variance = _variances(components, cluster, count)
    variance[_BACKGROUND] = np.square(rotated * factors[_BACKGROUND]).mean(axis=0)
    deviations = quantised_deviations(variance)
    at = np.random.default_rng(0).permutation(len(values))[: max(1, MAX_MODEL_VALUES // channels)]
    models = learn_models(
        components[at].reshape(-1),
        deviations[cluster[at]].reshape(-1).astype(np.int64),
        np.repeat(rows.sample[at], channels),
        steps,
    )
    return RowTable(
        layout=rows.layout,
        means=(means + centre).astype(np.float32),
        weights=weights.astype(np.int8),
        scale=unit,
        synthesis=stored if model.rotated else np.ascontiguousarray(np.diag(stored)),
        deviations=deviations,
        steps=steps,
        models=models,
    )


def _synthesis(centred: Array, metric: Array, model: RowModel, energy: float) -> Array:
    channels = len(metric)
    if not model.rotated:
        return np.diag(1 / np.sqrt(np.diag(metric)))
    covariance = centred.T @ centred / len(centred)
    covariance += model.ridge * np.diag(np.diag(covariance)) + 1e-6 * energy * np.eye(channels)
    return whitened_basis(covariance, metric)


def _clusters(components: Array, count: int) -> Array:
    """Cluster of each row, uint16 (rows,): k-means with each cluster's variances (hard EM of a Gaussian mixture).

    Source: Lloyd, "Least Squares Quantization in PCM", IEEE Trans. Inf. Theory 28 (1982).
    """
    components = components.astype(np.float32)
    if count == 1:
        return np.zeros(len(components), np.uint16)
    centres = components[_seeds(components, count - 1)]
    variance = components.var(axis=0)
    spread = np.broadcast_to(variance, centres.shape)
    for _ in range(_ITERATIONS):
        clusters = Clusters.of(centres, spread).likeliest(components)
        centres = _means(components, clusters, count - 1)
        spread = _variances(components - centres[clusters], clusters, count - 1)
    # The background cluster comes last: otherwise its rows would never form a cluster of their own.
    centres, spread = (
        np.insert(a, _BACKGROUND, b, axis=0) for a, b in ((centres, components.mean(axis=0)), (spread, variance))
    )
    return Clusters.of(centres, spread).likeliest(components)


def _seeds(components: Array, count: int) -> list[int]:
    """Indices of rows far from one another, each drawn by its squared distance from the earlier seeds.

    Source: Arthur and Vassilvitskii, "k-means++: The Advantages of Careful Seeding", SODA 2007.
    """
    rng = np.random.default_rng(0)
    # Distances in deviations: otherwise a channel of large values decides alone.
    relative = components / (components.std(axis=0) + np.float32(step_size(_CLUSTER_STEP)))
    squares = np.square(relative).sum(axis=1)

    def distance_from(row: int) -> Array:
        return np.asarray(np.maximum(squares + squares[row] - 2 * (relative @ relative[row]), 0))

    seeds = [int(rng.integers(len(components)))]
    distance = distance_from(seeds[0])
    while len(seeds) < count:
        shares = distance.astype(np.float64)
        total = float(shares.sum())
        seeds.append(int(rng.choice(len(shares), p=shares / total)) if total > 0 else 0)
        distance = np.minimum(distance, distance_from(seeds[-1]))
    return seeds


def _step_weights(rows: Rows, clusters: Array, count: int, sensitivity: Sensitivity | None) -> Array:
    """How much finer each cluster's steps are, in eighths of an octave, so that noise costs the same in all rows."""
    cost = np.full(len(clusters), np.nan)
    for index, places in enumerate(sensitivity.places if sensitivity else ()):
        in_sample = np.flatnonzero(rows.sample == index)
        # Samples thinned out to fit memory no longer say where in the sequence a row was.
        if len(in_sample) == len(places):
            cost[in_sample] = places
    probed = np.isfinite(cost)
    members, sums = _sums(cost[probed][:, None], clusters[probed], count)
    mean = (sums[:, 0] + _PRIOR_SENSITIVITY) / (members + _PRIOR_SENSITIVITY)
    return np.asarray(np.clip(np.round(OCTAVE / 2 * np.log2(np.maximum(mean, 1e-3))), -_MAX_WEIGHT, _MAX_WEIGHT), int)


def _sums(values: Array, clusters: Array, count: int) -> tuple[Array, Array]:
    """Rows in each cluster (count,), and their sums (count, C)."""
    members = np.bincount(clusters, minlength=count)
    sums = np.zeros((count, values.shape[1]), values.dtype)
    if len(values):
        starts = np.concatenate([[0], np.cumsum(members)[:-1]])[members > 0]
        sums[members > 0] = np.add.reduceat(values[clusters.argsort(kind="stable")], starts, axis=0)
    return members, sums


def _means(values: Array, clusters: Array, count: int) -> Array:
    """Mean of each cluster, (count, C); of all rows for an empty cluster."""
    members, sums = _sums(values, clusters, count)
    counts = members[:, None].astype(values.dtype)
    return np.asarray(np.where(counts > 0, sums / np.maximum(counts, 1), values.mean(axis=0)))


def _medians(values: Array, clusters: Array, count: int) -> Array:
    members = (clusters == k for k in range(count))
    return np.stack([np.median(values[own] if own.any() else values, axis=0) for own in members])


def _variances(values: Array, clusters: Array, count: int) -> Array:
    """Mean square of each cluster, (count, C), shrunk towards that of all rows by `_PRIOR_ROWS`."""
    squares = np.square(values)
    members, sums = _sums(squares, clusters, count)
    counts = members[:, None].astype(values.dtype)
    return np.asarray((sums + _PRIOR_ROWS * squares.mean(axis=0)) / (counts + _PRIOR_ROWS))
