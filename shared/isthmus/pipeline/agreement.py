"""Agreement of two predictions: the rule of fidelity documents, and the check of the router's guard."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from isthmus.arrays import Array
from isthmus.artifacts.agreement import TOP1, Measure

_MIN_PROBABILITY = 1e-12


def agrees(measure: Measure, expected: Mapping[str, Array], got: Mapping[str, Array]) -> bool:
    """Whether `got` is the same answer as `expected`; shapes that differ are not."""
    if measure.kind == TOP1:
        one, other = expected[measure.output], got[measure.output]
        return one.shape == other.shape and bool(np.array_equal(classes(one), classes(other)))
    return output_error(measure, expected, got) <= measure.tolerance


def output_error(measure: Measure, expected: Mapping[str, Array], got: Mapping[str, Array]) -> float:
    """The largest error of any output that this measure looks at; infinite where shapes differ or NaN appeared.

    Whole numbers and bools have no error but 0 and infinity.
    """
    names = [measure.output] if measure.kind == TOP1 else list(expected)
    return max((_error(expected[n], got[n], measure.scales.get(n, 0.0)) for n in names), default=0.0)


def margin(measure: Measure, outputs: Mapping[str, Array]) -> float:
    """How clear an answer is, in nats: see `margin_of`; infinite where answers are no classes."""
    return margin_of(outputs[measure.output]) if measure.kind == TOP1 else math.inf


def margin_of(scores: Array) -> float:
    """By how much the likeliest class leads, in nats of log-probability: the least lead of any row.

    `scores` are log-odds, or probabilities where they sum to one. 0 where it is not known, of NaN or two infinities;
    infinite of a single class.
    """
    rows = np.atleast_1d(_rows(scores)).astype(np.float64)
    if rows.shape[-1] < 2 or not rows.size:
        return math.inf
    rows = rows.reshape(-1, rows.shape[-1])
    top = np.partition(rows, -2, axis=-1)[:, -2:]
    if are_probabilities(rows):
        top = np.log(np.maximum(top, _MIN_PROBABILITY))
    with np.errstate(invalid="ignore"):  # of two infinite scores neither leads
        lead = float((top[:, 1] - top[:, 0]).min())
    return 0.0 if math.isnan(lead) else lead


def are_probabilities(scores: Array) -> bool:
    """Whether every row is a softmax's output already: not negative, and sums to one within a hundredth."""
    return bool(scores.min(initial=0) >= 0 and np.allclose(scores.sum(axis=-1), 1, atol=1e-2))


def classes(scores: Array) -> Array:
    """The likeliest class of each row; (batch, classes, 1, 1) counts as (batch, classes)."""
    return np.asarray(_rows(scores).argmax(axis=-1))


def root_mean_square(array: Array) -> float:
    """Of all values, in float64; 0 of none."""
    return float(np.sqrt(np.mean(np.square(array, dtype=np.float64)))) if array.size else 0.0


def _rows(scores: Array) -> Array:
    while scores.ndim > 2 and scores.shape[-1] == 1:
        scores = scores[..., 0]
    return scores


def _error(expected: Array, got: Array, scale: float) -> float:
    if expected.shape != got.shape:
        return float("inf")
    if np.issubdtype(expected.dtype, np.integer) or expected.dtype == np.bool_:
        return 0.0 if np.array_equal(expected, got) else float("inf")
    finite = np.isfinite(expected)
    if not np.array_equal(expected[~finite], got[~finite], equal_nan=True):
        return float("inf")
    one, other = expected[finite].astype(np.float64), got[finite].astype(np.float64)
    if not np.isfinite(other).all():
        return float("inf")
    off = root_mean_square(one - other)
    return off / max(root_mean_square(one), scale) if off else 0.0
