"""The entropy models of `transform/4`: how often each level's values are 0, 1, 2 … steps."""

from __future__ import annotations

import numpy as np

from isthmus.arrays import Array
from isthmus.codecs.levels import LEVELS, MAGNITUDE_SUM, TOP, UNIT_LEVEL, ZERO_BITS, Models
from isthmus.codecs.steps import in_eighths, size_of
from isthmus.codecs.table import EXPECTED_MAGNITUDE, GAINS, OCTAVE, ZERO_DEVIATION, levels_of

_PRIOR = 200
"""Laplacian values added at each level, so that none is without."""


def learn_models(values: Array, deviations: Array, sample: Array, steps: tuple[int, int]) -> Models:
    """The models of values in units, given their stored deviations and the number of the sample that each is from.

    All steps share them: values meet a level's model by what their deviation is in steps.
    """
    counts = np.zeros((LEVELS, TOP + 1))
    size = np.abs(values).astype(np.float64)
    relative = size * np.exp2((ZERO_DEVIATION - deviations) / OCTAVE)
    samples = int(sample.max()) + 1
    for step in range(steps[1], steps[0] + 1, 3):
        # The gain as the coder estimates it: from what matters at this step.
        part = deviations >= ZERO_DEVIATION + in_eighths(step) - OCTAVE
        if not part.any():
            part[:] = True
        count = np.bincount(sample[part], minlength=samples)
        mean = np.bincount(sample[part], relative[part], samples) / np.maximum(count, 1) / EXPECTED_MAGNITUDE
        gain = np.clip(np.round(OCTAVE * np.log2(np.maximum(mean, 1e-9))), *GAINS).astype(np.int64)
        level = levels_of(deviations, step, np.where(count > 0, gain, 0)[sample])
        _count(counts, level, size / size_of(step))
    spread = -np.log1p(-(np.arange(_PRIOR) + 0.5) / _PRIOR) / np.sqrt(2)
    for each in range(LEVELS):
        _count(counts, np.full(_PRIOR, each), spread * 2.0 ** ((each - UNIT_LEVEL) / 2))
    share = (counts + 0.1) / (counts + 0.1).sum(axis=1, keepdims=True)
    return Models(
        zero=np.clip(np.round(2**ZERO_BITS * share[:, 0]), 1, 2**ZERO_BITS - 1).astype(np.uint16),
        magnitudes=np.stack([_frequencies(row[1:]) for row in share]),
    )


def _count(counts: Array, level: Array, magnitude: Array) -> None:
    """Add values, in steps, to the counts of their level; those above all levels have no model of their own."""
    modelled = level < LEVELS
    whole = np.minimum(np.rint(magnitude[modelled]), TOP).astype(np.int64)
    counts += np.bincount(level[modelled] * (TOP + 1) + whole, minlength=counts.size).reshape(counts.shape)


def _frequencies(share: Array) -> Array:
    """Shares as uint16 that sum to MAGNITUDE_SUM, each at least 1."""
    free = MAGNITUDE_SUM - share.size
    exact = share / share.sum() * free
    whole = np.floor(exact).astype(np.int64)
    whole[np.argsort(whole - exact, kind="stable")[: free - int(whole.sum())]] += 1
    return np.asarray((whole + 1).astype(np.uint16))
