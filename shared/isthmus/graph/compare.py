"""How much two predictions differ."""

from __future__ import annotations

from typing import Any

import numpy as np


def difference(expected: np.ndarray[Any, Any], got: np.ndarray[Any, Any]) -> float:
    """The largest difference relative to the largest magnitude of `expected`; infinite where shapes or NaNs differ."""
    if expected.shape != got.shape:
        return float("inf")
    one, other = (np.asarray(x, np.float64) for x in (expected, got))
    finite = np.isfinite(one) & np.isfinite(other)
    if not np.array_equal(one[~finite], other[~finite], equal_nan=True):
        return float("inf")
    scale = float(np.abs(one[finite]).max(initial=0)) or 1.0
    return float(np.abs(one[finite] - other[finite]).max(initial=0)) / scale
