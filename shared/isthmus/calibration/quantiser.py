"""Thresholds, reconstruction and entropy models of each level: entropy-constrained scalar quantisation.

Source: Chou, Lookabaugh and Gray 1989, iterated on calibration's own values at every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from isthmus.codecs.entropy import LEVELS, MAGNITUDE_SUM, TOP, ZERO_BITS, Models
from isthmus.codecs.table import EXPECTED_MAGNITUDE, GAINS, OCTAVE, ZERO_DEVIATION

Array = np.ndarray[Any, np.dtype[Any]]

_PRICE = 2 * np.log(2) / 12
"""Squared steps that a bit is worth: what a bit buys where steps are fine."""
_ROUNDS = 5
_PRIOR = 200


@dataclass(frozen=True, eq=False)
class Quantiser:
    """See `Table`: the fields of the same names."""

    models: Models
    thresholds: Array
    offsets: Array


def design(values: Array, deviations: Array, sample: Array, steps: tuple[int, int]) -> Quantiser:
    """The quantiser of values in units, with their stored deviations and the sample that each is from.

    All steps share it: values meet a level's models by what their deviation is in steps.
    """
    level, magnitude = _met(values, deviations, sample, steps)
    zero = np.full(LEVELS, 0.6)
    rounding = np.full(LEVELS, 0.4)
    centre = np.tile([1.0, 2.0], (LEVELS, 1))
    for _ in range(_ROUNDS):
        whole = np.floor(magnitude + rounding[level]).astype(np.int64) * (magnitude >= zero[level])
        capped = np.minimum(whole, TOP)
        counts = np.bincount(level * (TOP + 1) + capped, minlength=LEVELS * (TOP + 1)).reshape(LEVELS, TOP + 1)
        sums = np.bincount(level * (TOP + 1) + capped, magnitude - whole, LEVELS * (TOP + 1)).reshape(counts.shape)
        share = (counts + 0.1) / (counts + 0.1).sum(axis=1, keepdims=True)
        bits = -np.log2(share)
        bits[:, 1:] += 1
        found = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 20)
        centre = np.stack([1 + found[:, 1], 2 + found[:, 2]], axis=1)
        zero = centre[:, 0] / 2 + _PRICE * (bits[:, 1] - bits[:, 0]) / (2 * centre[:, 0])
        gap = np.maximum(centre[:, 1] - centre[:, 0], 0.5)
        rounding = 2 - centre.mean(axis=1) - _PRICE * (bits[:, 2] - bits[:, 1]) / (2 * gap)
        zero = np.round(128 * np.clip(zero, 0.4, 1.5)) / 128
        rounding = np.round(128 * np.clip(rounding, 0.1, 0.5)) / 128
    far = np.divide(sums[:, 3:].sum(axis=1), counts[:, 3:].sum(axis=1), out=np.zeros(LEVELS), where=counts[:, 3] > 20)
    offsets = np.stack([found[:, 1], found[:, 2], far], axis=1)
    return Quantiser(
        models=Models(
            zero=np.clip(np.round(2**ZERO_BITS * share[:, 0]), 1, 2**ZERO_BITS - 1).astype(np.uint16),
            magnitudes=np.stack([_frequencies(row[1:]) for row in share]),
        ),
        thresholds=np.round(128 * np.stack([zero, rounding], axis=1)).astype(np.uint8),
        offsets=np.clip(np.round(128 * offsets), -127, 127).astype(np.int8),
    )


def _met(values: Array, deviations: Array, sample: Array, steps: tuple[int, int]) -> tuple[Array, Array]:
    """The levels at which the values are coded at every fourth step, and their magnitudes in steps; and a prior."""
    levels, magnitudes = [], []
    size = np.abs(values).astype(np.float64)
    relative = size * np.exp2((ZERO_DEVIATION - deviations) / OCTAVE)
    for step in range(steps[1], steps[0] + 1, 4):
        # As the coder estimates it, from what matters at this step.
        part = deviations >= ZERO_DEVIATION + step - OCTAVE
        if not part.any():
            part[:] = True
        total, count = np.bincount(sample[part], relative[part]), np.bincount(sample[part])
        mean = np.divide(total, count * EXPECTED_MAGNITUDE, out=np.ones(total.size), where=count > 0)
        gain = np.clip(np.round(OCTAVE * np.log2(np.maximum(mean, 1e-9))), *GAINS).astype(np.int64)
        gain = np.append(gain, np.zeros(int(sample.max()) + 1 - gain.size, np.int64))
        level = np.maximum((deviations - ZERO_DEVIATION - step + gain[sample] + 48) >> 1, 0)
        coded = level < LEVELS
        levels.append(level[coded])
        magnitudes.append(size[coded] * 2.0 ** (-step / OCTAVE))
    # Laplacian quantiles, so that no level is without values.
    spread = -np.log1p(-(np.arange(_PRIOR) + 0.5) / _PRIOR) / np.sqrt(2)
    for level in range(LEVELS):
        levels.append(np.full(_PRIOR, level))
        magnitudes.append(spread * 2.0 ** ((level - 24) / 4))
    return np.concatenate(levels), np.concatenate(magnitudes)


def _frequencies(share: Array) -> Array:
    """Shares as uint16 that sum to MAGNITUDE_SUM, each at least 1."""
    free = MAGNITUDE_SUM - share.size
    exact = share / share.sum() * free
    whole = np.floor(exact).astype(np.int64)
    whole[np.argsort(whole - exact, kind="stable")[: free - int(whole.sum())]] += 1
    return (whole + 1).astype(np.uint16)
