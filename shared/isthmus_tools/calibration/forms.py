"""Which form of table a tensor is given: what takes the fewest bytes for the same harm, on samples held out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from isthmus.arrays import Array
from isthmus.artifacts.choice import TRANSFORM_ID
from isthmus.codecs import Encoding, NotEncodable
from isthmus.codecs.classes import CLASSES, MAX_NUMBERS
from isthmus.codecs.planes import Layout
from isthmus.codecs.rows import RowTable
from isthmus.codecs.table import Table
from isthmus.codecs.transform import TRANSFORM
from isthmus_tools.calibration.harm import harm_of
from isthmus_tools.calibration.layout import row_layout_of
from isthmus_tools.calibration.learn import STEPS, learn
from isthmus_tools.calibration.rows import Form, Rows, learn_rows
from isthmus_tools.calibration.sensitivity import Sensitivity

_FEW, _MANY = (4, 16, 64), tuple(k for k in CLASSES if k > 64)
"""Numbers of classes to try: of many, each as long as the one before was better."""
_ROWS_PER_CLASS = 2
_MAX_DISTANCES = 2**27
"""Of rows from classes, in one of the rounds in which classes are learned: a second or two."""
_DOUBLING = 0.001
"""What twice as many classes must save: their table is twice as large."""
_LEANINGS = (0.0, 0.3)
"""Of the covariance on its diagonal: a rotation that fits few inputs need not fit others."""
_HELD_OUT = 4
"""One sample in so many, the last ones: neighbours of a stream are alike."""
_TRIED = 32
_QUALITIES = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85)
_DAMAGES = (0.01, 0.0025, 0.0004)
"""Forms are compared where the answer's relative error is 10%, 5% and 2%, or its divergence half of these squares."""
_WITHIN = slice(1, 5)
"""Of `_QUALITIES`, those of the first form whose damages are looked at instead of larger or smaller ones."""
_MAX_CHANNELS = 1024
"""Beyond, learning takes minutes, and nothing is tried."""


def learn_table(samples: Iterable[Array], sensitivity: Sensitivity) -> Table | RowTable:
    """The table of the tensor that `samples` are of; they are read a few times, one at a time.

    Maps keep their planes. Sequences, vectors and states become rows in as many classes as pay, rotated or not; or keep
    their planes where that takes fewer bytes.

    Raises:
        CalibrationError: as `learn`.
    """
    first = next(iter(samples), None)
    planar = isinstance(sensitivity.layout, Layout)
    if first is None or first.ndim > 3:
        return learn(samples, sensitivity=sensitivity)
    layout = row_layout_of(first, sensitivity.layout)
    rows = Rows.of(samples, layout)
    if rows.count < 2 * _HELD_OUT or layout.channels > _MAX_CHANNELS:
        return learn_rows(rows, Form(1, True), sensitivity, STEPS)
    part = _Part(samples, rows.count * (_HELD_OUT - 1) // _HELD_OUT)
    held_out = list(itertools.islice(part.rest(), _TRIED))
    # Without what is known of places, whose noise would count as harm.
    plain = replace(sensitivity, places=())
    learning = rows.first(part.count)
    plot = _Plot(held_out, harm_of(sensitivity, layout.channels), _mean_damage(sensitivity, held_out))
    costs: dict[Form, float] = {}

    def best(*forms: Form) -> Form:
        for form in forms:
            if form not in costs:
                costs[form] = plot.cost(learn_rows(learning, form, plain, STEPS)) + _DOUBLING * math.log2(form.classes)
        return min(costs, key=costs.__getitem__)

    count = len(learning.values)
    most = min(count // _ROWS_PER_CLASS, MAX_NUMBERS // layout.channels, _MAX_DISTANCES // count)
    leaning = best(*(Form(1, True, leaning) for leaning in _LEANINGS)).leaning
    best(Form(1, False), *(Form(k, True, leaning) for k in _FEW if k <= most))
    for k in _MANY:
        if k > most or best().classes < k // 2:
            break
        best(Form(k, True, leaning))
    classes = best().classes
    form = best(Form(classes, False), *(Form(classes, True, leaning) for leaning in _LEANINGS))
    # Sequences alone have planes that a transform could make use of.
    if planar and layout.sizes(first.shape)[2] > 1:
        in_planes = learn(part, sensitivity=replace(plain, rings=np.ones_like(plain.rings)))
        if plot.cost(in_planes) < costs[form]:
            return learn(samples, sensitivity=sensitivity)
    return learn_rows(rows, form, sensitivity, STEPS)


@dataclass(frozen=True)
class _Part:
    """The first samples of several, and the rest."""

    samples: Iterable[Array]
    count: int

    def __iter__(self) -> Iterator[Array]:
        return itertools.islice(self.samples, self.count)

    def rest(self) -> Iterator[Array]:
        return itertools.islice(self.samples, self.count, None)


@dataclass
class _Plot:
    """What tables cost for the same damage to the answer.

    `harm` (C, C) is how much noise harms in each direction, of mean 1, and `mean` what that mean is in the answer's
    units. `damages` are those at which bytes are compared, once there is a table that tells which can be.
    """

    held_out: Sequence[Array]
    harm: Array
    mean: float
    damages: Array | None = None

    def cost(self, table: Table | RowTable) -> float:
        """The logarithm of the bytes that a table takes, on average over the damages."""
        points = [self._point(table, quality) for quality in _QUALITIES]
        if self.damages is None:
            some = [damage for damage, _ in points[_WITHIN]]
            self.damages = np.clip(np.log(_DAMAGES), min(some), max(some))
        damages, sizes = np.array(sorted(points)).T
        return float(np.interp(self.damages, damages, sizes).mean())

    def _point(self, table: Table | RowTable, quality: float) -> tuple[float, float]:
        """The logarithms of the damage to a sample, and of all samples' bytes."""
        size, damage = 0, 0.0
        for array in self.held_out:
            try:
                payload = TRANSFORM.encode(array, Encoding(TRANSFORM_ID, quality, table))
            except NotEncodable:
                size += array.nbytes
                continue
            size += len(payload)
            found = TRANSFORM.decode(memoryview(payload), array.dtype, array.shape, table)
            error = table.layout.forward(found.astype(np.float64) - array).reshape(-1, len(self.harm))
            damage += float(((error @ self.harm) * error).sum())
        return math.log(max(damage / len(self.held_out), 1e-30)) + math.log(self.mean), math.log(size)


def _mean_damage(sensitivity: Sensitivity, samples: Sequence[Array]) -> float:
    """What noise of one in a channel does to the answer, on average; where it does nothing, to the sample itself."""
    found = float(np.trace(sensitivity.channels)) / len(sensitivity.channels)
    energy = sum(float(np.square(a, dtype=np.float64).sum()) for a in samples) / len(samples)
    return found if found > 0 else 1 / max(energy, 1e-30)
