"""`transform/4` of tensors without planes: token sequences, vectors, states. Each row of channels has a cluster.

A tensor is rows of channels: one row a token, or a single row. The encoder assigns each row to a cluster, writes its
index in a few plain bits, and codes the difference from the cluster's mean. Each cluster has its own deviations, so a
nearly constant token costs next to nothing. Source: docs/reference/codecs.md, "Rows".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from isthmus.arrays import Array
from isthmus.codecs.transform.levels import OCTAVE, ZERO_DEVIATION, EntropyModels, step_size
from isthmus.codecs.transform.planes import MAX_CHANNELS
from isthmus.codecs.transform.sorting import Sorting
from isthmus.codecs.transform.table import PlaneTable, check, check_numbers, common_arrays, common_parts

CLUSTER_COUNTS = tuple(2**bits for bits in range(13))
"""The possible numbers of clusters: an index takes up to twelve bits."""
MAX_CLUSTER_NUMBERS = 2**20
"""Bound on clusters times channels: a table takes 13 bytes of memory for each."""

# Components compared first, and the nearest clusters by these. Comparing 2,048 clusters takes 0.6 ms for 31 rows of 384
# channels, where all likelihoods take 2.3 ms; the payloads are equal within a percent.
_LEADING, _NEAREST = 64, 8
# Numbers compared at once.
_CHUNK = 2**20
# The variance of rounding at half a unit, the step assumed so that a row has the same cluster at every step.
_NOISE = step_size(-8) ** 2 / 12

# States and vectors repeat their clusters, so the sortings of a few rows are cached, some 3 MB in all.
_MAX_CACHED_ROWS, _MAX_CACHED_VALUES, _MAX_SORTINGS = 16, 2**17, 64

_NAMES = ("rows", "means", "weights", "scale", "synthesis", "deviations", "thirteenths", "zero", "magnitudes")


@dataclass(frozen=True)
class RowLayout:
    """A tensor's number of axes, and the axes that make up a row, with their sizes; the others count the rows."""

    rank: int
    axes: tuple[int, ...]
    axis_sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= 4 or not self.axes or len(self.axes) != len(self.axis_sizes):
            raise ValueError(f"no rows lie on axes {self.axes} of {self.rank}")
        if list(self.axes) != sorted(set(self.axes)) or not 0 <= self.axes[0] <= self.axes[-1] < self.rank:
            raise ValueError(f"no rows lie on axes {self.axes} of {self.rank}")
        if min(self.axis_sizes) < 1 or not math.prod(self.axis_sizes) <= MAX_CHANNELS:
            raise ValueError(f"rows of {self.axis_sizes} values; at most {MAX_CHANNELS}")

    @property
    def channels(self) -> int:
        return math.prod(self.axis_sizes)

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
        """(1, channels, rows, 1) of a tensor of that shape, the order of `planes.Layout.sizes`.

        Raises:
            ValueError: another number of axes, or rows of another size.
        """
        if len(shape) != self.rank:
            raise ValueError(f"a tensor of {len(shape)} axes; the table was learned for {self.rank}")
        if tuple(shape[a] for a in self.axes) != self.axis_sizes:
            raise ValueError(f"a tensor of {list(shape)} channels; the table has rows of {list(self.axis_sizes)}")
        return 1, self.channels, math.prod(shape) // self.channels, 1

    def forward(self, array: Array) -> Array:
        """`array` as (1, rows, channels), a view if possible."""
        _, channels, rows, _ = self.sizes(array.shape)
        ends = range(self.rank - len(self.axes), self.rank)
        return np.moveaxis(array, self.axes, ends).reshape(1, rows, channels)

    def backward(self, planes: Array, shape: tuple[int, ...]) -> Array:
        """The inverse of `forward`."""
        row_axes = [size for axis, size in enumerate(shape) if axis not in self.axes]
        ends = range(self.rank - len(self.axes), self.rank)
        return np.moveaxis(planes.reshape(*row_axes, *self.axis_sizes), ends, self.axes)


@dataclass(frozen=True, eq=False)
class Clusters:
    """Gaussian clusters of rows of components, (K, C): their centres and reciprocal variances.

    Variances include the noise of rounding; `log_variance` (K,) is the sum of their logarithms. The search compares the
    components `leading` first, in units of the variance within clusters: there a cluster's distance from a row is
    `constant - components @ linear`, up to a term that all clusters share.
    """

    centres: Array
    weight: Array
    log_variance: Array
    leading: Array
    linear: Array
    constant: Array

    @classmethod
    def of(cls, centres: Array, variance: Array) -> Clusters:
        """Clusters of these centres and variances."""
        centres, variance = (np.ascontiguousarray(a, np.float32) for a in (centres, variance + _NOISE))
        within = variance.mean(axis=0)
        leading = np.sort(np.argsort(-centres.var(axis=0) / within, kind="stable")[:_LEADING])
        nearby, weight = centres[:, leading], 1 / within[leading]
        return cls(
            centres,
            weight=1 / variance,
            log_variance=np.log(variance).sum(axis=1),
            leading=leading,
            linear=np.ascontiguousarray(2 * (nearby * weight).T),
            constant=(np.square(nearby) * weight).sum(axis=1),
        )

    def likeliest(self, components: Array) -> Array:
        """The cluster of maximum likelihood, among the nearest, of each row, float32 (rows, C): uint16 (rows,)."""
        clusters, channels = self.centres.shape
        if clusters == 1:
            return np.zeros(len(components), np.uint16)
        count = max(1, _CHUNK // max(clusters, _NEAREST * channels))
        parts = [components[at : at + count] for at in range(0, len(components), count)]
        return np.concatenate([np.zeros(0, np.uint16), *map(self._likeliest, parts)])

    def _likeliest(self, components: Array) -> Array:
        near = self._nearest(components[:, self.leading])
        off = self.centres[near]
        off -= components[:, None]
        np.square(off, out=off)
        costs = np.einsum("rkc,rkc->rk", off, self.weight[near])
        costs += self.log_variance[near]
        return np.asarray(near[np.arange(len(near)), costs.argmin(axis=1)], np.uint16)

    def _nearest(self, leading: Array) -> Array:
        """The nearest few clusters of each row, (rows, few)."""
        if len(self.centres) <= _NEAREST:
            return np.broadcast_to(np.arange(len(self.centres)), (len(leading), len(self.centres)))
        distances = leading @ self.linear
        np.subtract(self.constant, distances, out=distances)
        # A few searches for the minimum take half the time of a partition.
        rows, nearest = np.arange(len(leading)), np.empty((len(leading), _NEAREST), np.intp)
        for i in range(_NEAREST):
            nearest[:, i] = closest = distances.argmin(axis=1)
            distances[rows, closest] = np.inf
        return nearest


@dataclass(frozen=True, eq=False)
class RowTable:
    """The learned table of rows of C channels in K clusters.

    Shapes: `means` float32 (K, C), of channels. `weights` int8 (K,), how much finer the steps of a cluster's rows are
    than the tensor's, in eighths of an octave. `synthesis` float16 (C, C), or (C,) where components are scaled
    channels; times `scale` it maps components to channels. `deviations` uint8 (K, C) of the components, weighted; see
    ZERO_DEVIATION. `steps` are the coarsest and the finest.
    """

    layout: RowLayout
    means: Array
    weights: Array
    scale: float
    synthesis: Array
    deviations: Array
    steps: tuple[int, int]
    models: EntropyModels
    _sortings: dict[bytes, Sorting] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check every bound.

        Raises:
            ValueError: names the part that is out of bounds.
        """
        channels, clusters = self.channels, len(self.means)
        if clusters not in CLUSTER_COUNTS or clusters * channels > MAX_CLUSTER_NUMBERS:
            raise ValueError(f"a table of {clusters} clusters of {channels} channels")
        check("means", self.means, np.float32, (clusters, channels))
        check("weights", self.weights, np.int8, (clusters,))
        check("synthesis", self.synthesis, np.float16, (channels,) * min(self.synthesis.ndim, 2))
        check("deviations", self.deviations, np.uint8, (clusters, channels))
        check_numbers((self.means, self.synthesis), self.scale, self.steps)

    @property
    def channels(self) -> int:
        return self.layout.channels

    @property
    def bits(self) -> int:
        """Bits of a row's cluster."""
        return (len(self.means) - 1).bit_length()

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays of `to_arrays`."""
        return sum(a.nbytes for a in self.to_arrays().values())

    @cached_property
    def analysis_matrix(self) -> Array:
        """float32, of `synthesis`'s shape: maps channels to components.

        Raises:
            ValueError: a rotation has no inverse.
        """
        scaled = self.synthesis.astype(np.float64) * self.scale
        try:
            if scaled.ndim == 1 and not scaled.all():
                raise np.linalg.LinAlgError("a factor of zero")
            inverse = 1 / scaled if scaled.ndim == 1 else np.linalg.inv(scaled)
        except np.linalg.LinAlgError as e:
            raise ValueError(f"a table's rotation has no inverse: {e}") from e
        return np.asarray(inverse, np.float32)

    @cached_property
    def synthesis_matrix(self) -> Array:
        """float32, of `synthesis`'s shape: maps components in units to channels."""
        return self.synthesis.astype(np.float32) * np.float32(self.scale)

    @property
    def centres(self) -> Array:
        """The clusters' means as components, (K, C)."""
        return self.clusters.centres

    @cached_property
    def factors(self) -> Array:
        """The weights of a row's components, float32 (K, 1)."""
        return np.exp2(self.weights.astype(np.float32) / OCTAVE)[:, None]

    def sorting(self, clusters: Array) -> Sorting:
        """The sorting of the components of rows of these clusters, uint16; cached for few rows."""
        key = clusters.tobytes()
        if (sorting := self._sortings.get(key)) is None:
            sorting = Sorting.of(self.deviations[clusters].reshape(-1), self.models)
            if len(clusters) <= _MAX_CACHED_ROWS:
                if len(self._sortings) >= min(max(_MAX_CACHED_VALUES // sorting.count, 1), _MAX_SORTINGS):
                    self._sortings.clear()
                self._sortings[key] = sorting
        return sorting

    @cached_property
    def clusters(self) -> Clusters:
        """The clusters of components, without the weights: a row's importance says nothing about its likelihood."""
        spread = np.exp2((self.deviations.astype(np.float32) - ZERO_DEVIATION) / OCTAVE) / self.factors
        return Clusters.of(transform_rows(self.analysis_matrix, self.means), np.square(spread))

    def to_arrays(self) -> dict[str, Array]:
        """This table as named arrays, for storage."""
        axes = zip(self.layout.axes, self.layout.axis_sizes, strict=True)
        return {
            "rows": np.array([self.layout.rank, *(n for pair in axes for n in pair)], np.int32),
            "means": self.means,
            "weights": self.weights,
            **common_arrays(self.scale, self.synthesis, self.deviations, self.steps, self.models),
        }

    @staticmethod
    def from_arrays(arrays: Mapping[str, Array]) -> RowTable:
        """The inverse of `to_arrays`.

        Raises:
            ValueError: an array is missing, unknown, of another dtype or shape, or out of bounds.
        """
        if arrays.keys() != set(_NAMES):
            raise ValueError(f"a table of rows has exactly the arrays {', '.join(_NAMES)}")
        rows = arrays["rows"]
        if rows.dtype != np.int32 or rows.ndim != 1 or rows.size not in (3, 5, 7, 9):
            raise ValueError("a table's rows are axes and their sizes, in int32")
        if arrays["means"].ndim != 2 or arrays["synthesis"].ndim not in (1, 2):
            raise ValueError("a table's means have two axes, its synthesis one or two")
        rank, *pairs = rows.tolist()
        layout = RowLayout(rank, tuple(pairs[::2]), tuple(pairs[1::2]))
        return RowTable(layout, arrays["means"], arrays["weights"], **common_parts(arrays))


def read_table(arrays: Mapping[str, Array]) -> PlaneTable | RowTable:
    """Read a table of either kind from its `to_arrays`.

    Raises:
        ValueError: the arrays are those of neither.
    """
    return RowTable.from_arrays(arrays) if "rows" in arrays else PlaneTable.from_arrays(arrays)


def transform_rows(matrix: Array, rows: Array) -> Array:
    """`matrix` (C, C), or a diagonal (C,), times each row."""
    return rows * matrix if matrix.ndim == 1 else np.asarray(rows @ matrix.T)


def encode_clusters(clusters: Array, bits: int) -> bytes:
    """Cluster indices of `bits` bits each, the first in the highest bits of the first byte."""
    return np.packbits((clusters[:, None] >> np.arange(bits)[::-1]) & 1).tobytes()


def decode_clusters(data: memoryview, count: int, bits: int) -> Array:
    """The inverse of `encode_clusters`, uint16 (count,).

    Raises:
        ValueError: too few bytes, or the padding after the last index is not zero.
    """
    if len(data) < -(-count * bits // 8):
        raise ValueError("the payload ends within the rows' clusters")
    digits = np.unpackbits(np.frombuffer(data, np.uint8))
    if digits[count * bits :].any():
        raise ValueError("the bits after the last row's cluster are not zero")
    clusters = np.zeros(count, np.uint16)
    for digit in digits[: count * bits].reshape(count, bits).T:
        clusters <<= np.uint16(1)
        clusters |= digit
    return clusters
