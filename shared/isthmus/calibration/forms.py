"""Which form of table a tensor is given: what takes the fewest bytes for the same harm, on samples held out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from isthmus.calibration.harm import harm_of
from isthmus.calibration.layout import row_layout_of
from isthmus.calibration.learn import STEPS, learn
from isthmus.calibration.rows import Form, Rows, learn_rows
from isthmus.calibration.sensitivity import Sensitivity
from isthmus.codecs import TRANSFORM_ID, NotPackable, Packing
from isthmus.codecs.classes import CLASSES, MOST_NUMBERS
from isthmus.codecs.planes import Layout
from isthmus.codecs.rows import RowTable
from isthmus.codecs.table import Table
from isthmus.codecs.transform import TRANSFORM

Array = np.ndarray[Any, np.dtype[Any]]

_FEW, _MANY = (4, 16, 64), tuple(k for k in CLASSES if k > 64)
"""Numbers of classes to try: of many, each as long as the one before was better."""
_ROWS_PER_CLASS = 2
_LEANINGS = (0.0, 0.3)
"""Of the covariance on its diagonal: a rotation that fits few inputs need not fit others."""
_HELD_OUT = 4
"""One sample in so many, the last ones: neighbours of a stream are alike."""
_TRIED = 32
_QUALITIES = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85)
_DAMAGES = (0.01, 0.0025, 0.0004)
"""Forms are compared where the answer's relative error is 10%, 5% and 2%, or its divergence half of these squares."""
_MOST_CHANNELS = 1024
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
    if rows.count < 2 * _HELD_OUT or layout.channels > _MOST_CHANNELS:
        return learn_rows(rows, Form(1, True), sensitivity, STEPS)
    part = _Part(samples, rows.count * (_HELD_OUT - 1) // _HELD_OUT)
    held_out = list(itertools.islice(part.rest(), _TRIED))
    # Without what is known of places, whose noise would count as harm.
    plain = replace(sensitivity, places=())
    harm = _damage_of(sensitivity, rows)
    learning = rows.first(part.count)

    def cost(form: Form) -> float:
        return _cost(learn_rows(learning, form, plain, STEPS), held_out, harm)

    most = min(len(learning.values) // _ROWS_PER_CLASS, MOST_NUMBERS // layout.channels)
    costs = {form: cost(form) for form in (Form(1, True, leaning) for leaning in _LEANINGS)}
    leaning = min(costs, key=costs.__getitem__).leaning
    costs |= {form: cost(form) for form in (Form(k, True, leaning) for k in _FEW if k <= most)}
    for k in _MANY:
        if k > most or min(costs, key=costs.__getitem__).classes < k // 2:
            break
        costs[Form(k, True, leaning)] = cost(Form(k, True, leaning))
    classes = min(costs, key=costs.__getitem__).classes
    others = {Form(classes, False), *(Form(classes, True, leaning) for leaning in _LEANINGS)} - costs.keys()
    costs |= {form: cost(form) for form in others}
    best = min(costs, key=costs.__getitem__)
    # Sequences alone have planes that a transform could make use of.
    if planar and layout.sizes(first.shape)[2] > 1:
        in_planes = learn(part, sensitivity=replace(plain, rings=np.ones_like(plain.rings)))
        if _cost(in_planes, held_out, harm) < costs[best]:
            return learn(samples, sensitivity=sensitivity)
    return learn_rows(rows, best, sensitivity, STEPS)


@dataclass(frozen=True)
class _Part:
    """The first samples of several, and the rest."""

    samples: Iterable[Array]
    count: int

    def __iter__(self) -> Iterator[Array]:
        return itertools.islice(self.samples, self.count)

    def rest(self) -> Iterator[Array]:
        return itertools.islice(self.samples, self.count, None)


def _cost(table: Table | RowTable, held_out: list[Array], harm: Array) -> float:
    """The logarithm of the bytes that it takes, on average over `_DAMAGES`."""
    sizes, damages = [], []
    for quality in _QUALITIES:
        size, damage = 0, 0.0
        for array in held_out:
            try:
                payload = TRANSFORM.encode(array, Packing(TRANSFORM_ID, quality, table))
            except NotPackable:
                size += array.nbytes
                continue
            size += len(payload)
            found = TRANSFORM.decode(memoryview(payload), array.dtype, array.shape, table)
            error = table.layout.forward(found.astype(np.float64) - array).reshape(-1, len(harm))
            damage += float(((error @ harm) * error).sum())
        sizes.append(np.log(size))
        damages.append(np.log(max(damage / len(held_out), 1e-30)))
    order = np.argsort(damages)
    return float(np.interp(np.log(_DAMAGES), np.array(damages)[order], np.array(sizes)[order]).mean())


def _damage_of(sensitivity: Sensitivity, rows: Rows) -> Array:
    """What an error in each pair of channels does to the answer, (C, C); where nothing does, its share of a sample."""
    mean = float(np.trace(sensitivity.channels)) / rows.layout.channels
    energy = float(np.square(rows.values).sum()) / rows.count
    return harm_of(sensitivity, rows.layout.channels) * (mean or 1 / max(energy, 1e-30))
