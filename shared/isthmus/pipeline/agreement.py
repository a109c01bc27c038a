"""Agreement of two predictions: the rule of fidelity documents, and the check of the router's guard."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from isthmus.arrays import Array
from isthmus.artifacts.fidelity import TOP1, Measure

# Softmax in float32 underflows to 0, whose logarithm would make every margin infinite.
_MIN_PROBABILITY = 1e-12


def agrees(measure: Measure, expected: Mapping[str, Array], actual: Mapping[str, Array]) -> bool:
    """Whether `actual` is the same prediction as `expected`; different shapes are not."""
    if measure.kind == TOP1:
        first, second = expected[measure.output], actual[measure.output]
        return first.shape == second.shape and bool(np.array_equal(classes(first), classes(second)))
    return output_error(measure, expected, actual) <= measure.tolerance


def output_error(measure: Measure, expected: Mapping[str, Array], actual: Mapping[str, Array]) -> float:
    """The largest relative error of the outputs that the measure compares; infinite where shapes differ or NaN appears.

    For integers and bools the error is 0 or infinity; beside zeros alone it is absolute.
    """
    names = [measure.output] if measure.kind == TOP1 else list(expected)
    return max((_error(expected[n], actual[n], measure.scales.get(n, 0.0)) for n in names), default=0.0)


def margin(measure: Measure, outputs: Mapping[str, Array]) -> float:
    """The prediction's margin, in nats: see `margin_of`; infinite where outputs are no classes."""
    return margin_of(outputs[measure.output]) if measure.kind == TOP1 else math.inf


def margin_of(scores: Array) -> float:
    """The top-1 margin: the likeliest class's lead in nats of log-probability, the smallest over the rows.

    `scores` are log-odds, or probabilities where they sum to one. 0 where NaN or two infinities leave it undefined;
    infinite of a single class.
    """
    rows = np.atleast_1d(_rows(scores)).astype(np.float64)
    if rows.shape[-1] < 2 or not rows.size:
        return math.inf
    rows = rows.reshape(-1, rows.shape[-1])
    top = np.partition(rows, -2, axis=-1)[:, -2:]
    if are_probabilities(rows):
        top = np.log(np.maximum(top, _MIN_PROBABILITY))
    with np.errstate(invalid="ignore"):  # the difference of two infinite scores is NaN
        lead = float((top[:, 1] - top[:, 0]).min())
    return 0.0 if math.isnan(lead) else lead


def are_probabilities(scores: Array) -> bool:
    """Whether every row is a softmax's output already: not negative, and sums to 1 within a hundredth."""
    return bool(scores.min(initial=0) >= 0 and np.allclose(scores.sum(axis=-1), 1, atol=1e-2))


def classes(scores: Array) -> Array:
    """The likeliest class of each row; (batch, classes, 1, 1) counts as (batch, classes)."""
    return np.asarray(_rows(scores).argmax(axis=-1))


def root_mean_square(array: Array) -> float:
    """Root mean square of all values, in float64; 0 for an empty array."""
    return float(np.sqrt(np.mean(np.square(array, dtype=np.float64)))) if array.size else 0.0


def _rows(scores: Array) -> Array:
    while scores.ndim > 2 and scores.shape[-1] == 1:
        scores = scores[..., 0]
    return scores


def _error(expected: Array, actual: Array, scale: float) -> float:
    if expected.shape != actual.shape:
        return float("inf")
    if np.issubdtype(expected.dtype, np.integer) or expected.dtype == np.bool_:
        return 0.0 if np.array_equal(expected, actual) else float("inf")
    finite = np.isfinite(expected)
    if not np.array_equal(expected[~finite], actual[~finite], equal_nan=True):
        return float("inf")
    reference, values = expected[finite].astype(np.float64), actual[finite].astype(np.float64)
    if not np.isfinite(values).all():
        return float("inf")
    error = root_mean_square(reference - values)
    # Zeros alone, as of a detector that finds nothing, have no size to relate to: the error stands as it is.
    return error / (max(root_mean_square(reference), scale) or 1.0)
