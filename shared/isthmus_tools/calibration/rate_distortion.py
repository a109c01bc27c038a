"""Choose a tensor's table (planes, or rows in some number of clusters) by its rate at fixed distortion.

Candidates are learned on most samples and compared on the rest by bytes at equal distortion of the prediction, an
operational rate-distortion curve. Source: Ortega and Ramchandran, "Rate-Distortion Methods for Image and Video
Compression", IEEE Signal Process. Mag. 15 (1998); docs/explanation/calibration.md, "Rate at fixed distortion".
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from isthmus.arrays import Array
from isthmus.artifacts.choice import TRANSFORM_ID
from isthmus.codecs import Encoding, NotEncodable
from isthmus.codecs.transform.codec import TRANSFORM
from isthmus.codecs.transform.planes import Layout
from isthmus.codecs.transform.rows import CLUSTER_COUNTS, MAX_CLUSTER_NUMBERS, RowTable
from isthmus.codecs.transform.table import PlaneTable
from isthmus_tools.calibration.fisher import Sensitivity, channel_metric
from isthmus_tools.calibration.layouts import row_layout
from isthmus_tools.calibration.rows import RowModel, Rows, learn_rows
from isthmus_tools.calibration.transforms import STEPS, learn_planes

_SMALL_COUNTS = (4, 16, 64)
# Tried in order while each beats the count before: learning many clusters takes seconds.
_LARGE_COUNTS = tuple(k for k in CLUSTER_COUNTS if k > 64)
_MIN_ROWS_PER_CLUSTER = 2
# Between rows and clusters, in an iteration: a second or two.
_MAX_DISTANCES = 2**27
# Share of the bytes that doubling the clusters must save: the table doubles, too.
_MIN_GAIN = 0.001
# A ridge helps where samples are few and their plain rotation would not fit other inputs.
_RIDGES = (0.0, 0.3)
# The last of so many samples are held out as a block: neighbours in a stream are alike, so random samples would leak.
_HELD_OUT = 4
# Every candidate codes all held-out samples at every quality.
_MAX_HELD_OUT = 32
_QUALITIES = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85)
# Squares of relative errors of 10%, 5% and 2%; of classes, twice the divergence.
_DISTORTIONS = (0.01, 0.0025, 0.0004)
# Of `_QUALITIES`: distortions outside their range would compare extrapolated rates.
_COMPARED = slice(1, 5)
# Beyond, learning a candidate takes minutes.
_MAX_CHANNELS = 1024


def learn_table(samples: Iterable[Array], sensitivity: Sensitivity) -> PlaneTable | RowTable:
    """Learn the table of a boundary tensor; `samples` are read several times, on demand.

    Maps (four axes) keep their planes. Other tensors become rows, in the number of clusters and with the rotation that
    take the fewest bytes; sequences keep their planes where planes take fewer still.

    Raises:
        CalibrationError: as `learn_planes`.
    """
    first = next(iter(samples), None)
    if first is None or first.ndim > 3:
        return learn_planes(samples, sensitivity=sensitivity)
    layout = row_layout(first, sensitivity.layout)
    rows = Rows.of(samples, layout)
    if rows.samples < 2 * _HELD_OUT or layout.channels > _MAX_CHANNELS:
        return learn_rows(rows, RowModel(1, True), sensitivity, STEPS)
    training = _FirstSamples(samples, rows.samples * (_HELD_OUT - 1) // _HELD_OUT)
    held_out = list(itertools.islice(training.rest(), _MAX_HELD_OUT))
    # The distortion knows channels only: rows coded coarser for their place would count as worse.
    by_channel = replace(sensitivity, places=())
    rate = _RateAtDistortion(
        held_out, channel_metric(sensitivity, layout.channels), _unit_distortion(sensitivity, held_out)
    )
    model, row_rate = _best_row_model(rows.first(training.count), by_channel, rate)
    # Sequences alone have planes with neighbours to decorrelate.
    if isinstance(sensitivity.layout, Layout) and layout.sizes(first.shape)[2] > 1:
        flat = replace(by_channel, rings=np.ones_like(sensitivity.rings))
        if rate.of(learn_planes(training, sensitivity=flat)) < row_rate:
            return learn_planes(samples, sensitivity=sensitivity)
    return learn_rows(rows, model, sensitivity, STEPS)


def _best_row_model(rows: Rows, sensitivity: Sensitivity, rate: _RateAtDistortion) -> tuple[RowModel, float]:
    """The row model of the lowest rate and that rate: by ridge, then by clusters, then by rotation again."""
    rates: dict[RowModel, float] = {}

    def best(*models: RowModel) -> RowModel:
        for model in models:
            if model not in rates:
                table = learn_rows(rows, model, sensitivity, STEPS)
                rates[model] = rate.of(table) + _MIN_GAIN * math.log2(model.clusters)
        return min(rates, key=rates.__getitem__)

    count, channels = rows.values.shape
    limit = min(count // _MIN_ROWS_PER_CLUSTER, MAX_CLUSTER_NUMBERS // channels, _MAX_DISTANCES // count)
    ridge = best(*(RowModel(1, True, ridge) for ridge in _RIDGES)).ridge
    best(RowModel(1, False), *(RowModel(k, True, ridge) for k in _SMALL_COUNTS if k <= limit))
    for k in _LARGE_COUNTS:
        if k > limit or best().clusters < k // 2:
            break
        best(RowModel(k, True, ridge))
    clusters = best().clusters
    model = best(RowModel(clusters, False), *(RowModel(clusters, True, ridge) for ridge in _RIDGES))
    return model, rates[model]


@dataclass(frozen=True)
class _FirstSamples:
    """The first `count` samples, and the rest."""

    samples: Iterable[Array]
    count: int

    def __iter__(self) -> Iterator[Array]:
        return itertools.islice(self.samples, self.count)

    def rest(self) -> Iterator[Array]:
        return itertools.islice(self.samples, self.count, None)


@dataclass
class _RateAtDistortion:
    """Log-bytes of tables at fixed distortion of the prediction, interpolated over qualities.

    `metric` (C, C) has a mean eigenvalue of 1, `unit` is the distortion by unit noise in a channel. `distortions` are
    logarithms, bounded by the first table's range.
    """

    held_out: Sequence[Array]
    metric: Array
    unit: float
    distortions: Array | None = None

    def of(self, table: PlaneTable | RowTable) -> float:
        """The table's log-bytes, averaged over the distortions."""
        points = [self._point(table, quality) for quality in _QUALITIES]
        if self.distortions is None:
            reached = [distortion for distortion, _ in points[_COMPARED]]
            self.distortions = np.clip(np.log(_DISTORTIONS), min(reached), max(reached))
        distortions, sizes = np.array(sorted(points)).T
        return float(np.interp(self.distortions, distortions, sizes).mean())

    def _point(self, table: PlaneTable | RowTable, quality: float) -> tuple[float, float]:
        """Logarithms of the distortion per sample and of the bytes of all samples."""
        size, distortion = 0, 0.0
        for array in self.held_out:
            try:
                payload = TRANSFORM.encode(array, Encoding(TRANSFORM_ID, quality, table))
            except NotEncodable:
                size += array.nbytes
                continue
            size += len(payload)
            decoded = TRANSFORM.decode(memoryview(payload), array.dtype, array.shape, table)
            error = table.layout.forward(decoded.astype(np.float64) - array).reshape(-1, len(self.metric))
            distortion += float(((error @ self.metric) * error).sum())
        return math.log(max(distortion / len(self.held_out), 1e-30)) + math.log(self.unit), math.log(size)


def _unit_distortion(sensitivity: Sensitivity, samples: Sequence[Array]) -> float:
    """Distortion by unit noise in a channel; relative to the tensor's own energy where the tail ignores the noise."""
    if sensitivity.mean > 0:
        return sensitivity.mean
    energy = sum(float(np.square(a, dtype=np.float64).sum()) for a in samples) / len(samples)
    return 1 / max(energy, 1e-30)
