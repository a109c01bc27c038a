"""Which axis of an activation holds its channels."""

from __future__ import annotations

from typing import Any

import numpy as np

from isthmus.codecs.planes import Layout
from isthmus.errors import CalibrationError

Array = np.ndarray[Any, np.dtype[Any]]


def layout_of(array: Array) -> Layout:
    """The layout of tensors such as `array`, the batch on the first of two axes or more.

    The channels are where neighbours are least alike: (batch, channels, height, width) or with the channels last,
    (batch, tokens, width) or (batch, channels, time). Where that does not tell, maps have them second, sequences last.

    Raises:
        CalibrationError: no axis, or more than four.
    """
    if not 1 <= array.ndim <= 4:
        raise CalibrationError(f"a tensor of {array.ndim} axes cannot be learned", shape=list(array.shape))
    if array.ndim <= 2:
        return Layout(array.ndim, array.ndim - 1)
    first, last = 1, array.ndim - 1
    usual = first if array.ndim == 4 else last
    other = last if usual == first else first
    return Layout(array.ndim, other if _roughness(array, other) > 1.2 * _roughness(array, usual) else usual)


def _roughness(array: Array, axis: int) -> float:
    """Mean square of the difference of neighbours along an axis, relative to the variance."""
    if array.size == 0 or array.shape[axis] < 2:
        return 0.0
    values = array.astype(np.float64)
    return float(np.mean(np.diff(values, axis=axis) ** 2) / max(float(values.var()), 1e-30))
