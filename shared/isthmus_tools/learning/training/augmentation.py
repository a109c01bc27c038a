"""Random changes of training samples: shifts and mirror images, drawn for each sample and epoch by itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from isthmus.arrays import Array
from isthmus_tools.learning.training.config import FitTable


def augmented(inputs: Array, rows: Array, options: FitTable, seed: Sequence[int]) -> Array:
    """The inputs (count, channels, …) of the samples `rows`, changed as the options say; a new array.

    A sample's draw depends on `seed` and its row alone, so that it is the same in every process.
    """
    changed = np.array(inputs, np.float32)
    if not options.shift and not options.mirror:
        return changed
    for i, row in enumerate(rows.tolist()):
        # The 1 keeps these draws apart from the order of the epoch.
        rng = np.random.default_rng([*seed, 1, row])
        # Not along the channels.
        for axis in range(1, changed.ndim - 1):
            amount = int(rng.integers(-options.shift, options.shift + 1))
            changed[i] = _shifted(changed[i], amount, axis)
        if options.mirror and rng.random() < 0.5:
            changed[i] = changed[i, ..., ::-1]
    return changed


def _shifted(sample: Array, amount: int, axis: int) -> Array:
    """The sample moved along an axis: a series wraps around, and a photo repeats its edge."""
    if sample.ndim == 2:
        return np.roll(sample, amount, axis)
    index = np.clip(np.arange(sample.shape[axis]) - amount, 0, sample.shape[axis] - 1)
    moved: Array = np.take(sample, index, axis)
    return moved
