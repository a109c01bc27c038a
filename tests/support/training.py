"""Training on scikit-learn's digits with a tiny network: the data, and a run in a process of its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from isthmus_tools.learning.training.config import FitTable
from isthmus_tools.learning.training.samples import PreparedData, Samples, Statistics


def digits(train: int = 512, validation: int = 128, test: int = 128) -> PreparedData:
    """Rows of pixels, 0 to 16, in parts; a test without scikit-learn is skipped."""
    loaded = pytest.importorskip("sklearn.datasets").load_digits()
    pixels, labels = loaded.data.astype(np.float32), loaded.target.astype(np.int64)
    parts, start = {}, 0
    for name, count in (("train", train), ("validation", validation), ("test", test)):
        rows = slice(start, start + count)
        parts[name] = Samples(pixels[rows], labels[rows], tuple(f"digit-{i}" for i in range(start, start + count)))
        start += count
    deviation = parts["train"].inputs.std(0)
    scale = np.where(deviation > 0, 1 / np.maximum(deviation, 1e-6), 0).astype(np.float32)
    statistics = Statistics(parts["train"].inputs.mean(0), scale)
    return PreparedData(parts, tuple("0123456789"), statistics, "features")


FAST = FitTable(epochs=4, batch=32, rate=1e-2, patience=0)


def skewed_nodes(data: PreparedData, share: float, seed: int = 0) -> list[PreparedData]:
    """The training part over four nodes: `share` of the samples are with the node that owns their digit.

    The nodes own three, three, two and two digits; the other samples are anywhere.
    """
    owner = np.array([0, 0, 0, 1, 1, 1, 2, 2, 3, 3])[data.train.labels]
    draw = np.random.default_rng(seed)
    node = np.where(draw.random(len(owner)) < share, owner, draw.integers(4, size=len(owner)))
    parts = [{**data.parts, "train": data.train.rows(np.flatnonzero(node == i))} for i in range(4)]
    return [replace(data, parts=each) for each in parts]
