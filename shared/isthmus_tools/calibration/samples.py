"""Samples of a tensor as tables of either form are learned from them: checked, laid out, and their unit."""

from __future__ import annotations

import math

import numpy as np

from isthmus.arrays import Array
from isthmus.codecs.planes import Layout
from isthmus.codecs.row_layout import RowLayout
from isthmus.codecs.table import MAX_CHANNELS
from isthmus.errors import CalibrationError


def laid_out(array: Array, layout: Layout | RowLayout) -> Array:
    """A sample as `layout` has it: float32 (batch, places, channels).

    Raises:
        CalibrationError: not floats, not finite, empty, or not of that layout.
    """
    if array.dtype.kind in "iub":
        raise CalibrationError(f"a tensor of {array.dtype} is not for a transform", dtype=str(array.dtype))
    try:
        _, channels, _, _ = layout.sizes(array.shape)
    except ValueError as e:
        raise CalibrationError(f"a sample cannot be learned: {e}", shape=list(array.shape)) from e
    if not array.size or channels > MAX_CHANNELS:
        raise CalibrationError(f"a sample of shape {list(array.shape)} cannot be learned", shape=list(array.shape))
    found = np.ascontiguousarray(layout.forward(array), np.float32)
    if not np.isfinite(found).all():
        raise CalibrationError("a sample holds NaN or infinity", shape=list(array.shape))
    return found


def unit_of(energy: float) -> float:
    """The root of a mean square, as float32 has it; 1 where there is next to nothing.

    Raises:
        CalibrationError: the samples are too large.
    """
    if not energy < 1e30:
        raise CalibrationError("the samples are too large to be learned", energy=energy)
    return float(np.float32(math.sqrt(energy))) if energy > 1e-20 else 1.0
