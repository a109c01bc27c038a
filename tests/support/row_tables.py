"""Tensors that become rows, their tables in several forms, and round trips through them."""

from __future__ import annotations

import numpy as np

from isthmus.arrays import Array
from isthmus.codecs.transform.rows import RowTable
from isthmus_tools.calibration.fisher import Sensitivity
from isthmus_tools.calibration.rows import RowModel, Rows, learn_rows
from isthmus_tools.calibration.transforms import STEPS

FORMS = {
    "one class": RowModel(1, rotated=True),
    "classes": RowModel(8, rotated=True, ridge=0.3),
    "classes as they are": RowModel(8, rotated=False),
}


def sentence(rng: np.random.Generator, tokens: int = 0) -> Array:
    """Tokens of 24 channels: a first one that is always the same, words of three kinds, one channel that stands out."""
    kinds = rng.integers(0, 3, tokens or int(rng.integers(5, 20)))
    words = 3 * np.random.default_rng(1).normal(size=(3, 24))[kinds] + rng.normal(size=(len(kinds), 24))
    words[:, 5] *= 12
    words[0] = 7.5
    return words[None].astype(np.float32)


def state(rng: np.random.Generator) -> Array:
    """Of two layers, which differ in size."""
    return np.stack([rng.normal(size=(1, 12)), 20 + 9 * rng.normal(size=(1, 12))]).astype(np.float32)


def table_of(form: RowModel, sensitivity: Sensitivity | None = None) -> RowTable:
    rng = np.random.default_rng(0)
    return learn_rows(Rows.of([sentence(rng) for _ in range(40)]), form, sensitivity, STEPS)


def components(rows: Array, table: RowTable) -> Array:
    analysis = table.analysis_matrix.astype(np.float64)
    return np.asarray(rows * analysis if analysis.ndim == 1 else rows @ analysis.T)
