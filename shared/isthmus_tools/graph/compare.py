"""How much two predictions differ."""

from __future__ import annotations

from typing import Any

import numpy as np


def magnitude(array: np.ndarray[Any, Any]) -> float:
    """The largest finite magnitude."""
    values = np.abs(np.asarray(array, np.float64))
    return float(values[np.isfinite(values)].max(initial=0))


def difference(expected: np.ndarray[Any, Any], got: np.ndarray[Any, Any], scale: float | None = None) -> float:
    """The largest difference relative to `scale`, by default the magnitude of `expected`; infinite where shapes differ,
    or where other values than the same ones are not finite."""
    if expected.shape != got.shape:
        return float("inf")
    one, other = (np.asarray(x, np.float64) for x in (expected, got))
    finite = np.isfinite(one) & np.isfinite(other)
    if not np.array_equal(one[~finite], other[~finite], equal_nan=True):
        return float("inf")
    unit = (magnitude(expected) if scale is None else scale) or 1.0
    return float(np.abs(one[finite] - other[finite]).max(initial=0)) / unit
