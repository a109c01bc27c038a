"""Channel layout of a boundary tensor, and its samples as arrays of channels: the input of every learning step."""

from __future__ import annotations

import math

import numpy as np

from isthmus.arrays import Array
from isthmus.codecs.transform.planes import MAX_CHANNELS, Layout
from isthmus.codecs.transform.rows import RowLayout
from isthmus.errors import CalibrationError

# Ratio of roughness above which the unusual axis counts as the channel axis; noise alone differs by less.
_MIN_CONTRAST = 1.2


def plane_layout(array: Array) -> Layout:
    """Detect the channel axis of tensors like `array`; the first of two axes or more is the batch.

    Channels lie where neighbours are least alike: (batch, channels, height, width) or channels last; (batch, tokens,
    width) or (batch, channels, time). Without a clear difference maps have channels second, sequences last.

    Raises:
        CalibrationError: no axis, or more than four.
    """
    if not 1 <= array.ndim <= 4:
        raise CalibrationError(f"a tensor of {array.ndim} axes cannot be learned", shape=list(array.shape))
    if array.ndim <= 2:
        return Layout(array.ndim, array.ndim - 1)
    second, last = 1, array.ndim - 1
    usual, other = (second, last) if array.ndim == 4 else (last, second)
    is_unusual = _roughness(array, other) > _MIN_CONTRAST * _roughness(array, usual)
    return Layout(array.ndim, other if is_unusual else usual)


def row_layout(array: Array, layout: Layout | RowLayout | None = None) -> RowLayout:
    """Layout of tensors like `array` as rows: all channels at one place are a row.

    Raises:
        CalibrationError: no axis, or more than four; or rows too long.
    """
    if isinstance(layout, RowLayout):
        return layout
    if layout is None and (state := state_layout(array)) is not None:
        return state
    axis = (layout or plane_layout(array)).channel_axis
    try:
        return RowLayout(array.ndim, (axis,), (array.shape[axis],))
    except ValueError as e:
        raise CalibrationError(f"a sample cannot be learned: {e}", shape=list(array.shape)) from e


def state_layout(array: Array) -> RowLayout | None:
    """Layout of a recurrent state (layers, batch of 1, width), None for other shapes.

    Layers differ in distribution, so all layers form a single row.
    """
    if array.ndim != 3 or array.shape[0] < 2 or array.shape[1] != 1 or not 0 < array.size <= MAX_CHANNELS:
        return None
    return RowLayout(3, (0, 2), (array.shape[0], array.shape[2]))


def by_channel(array: Array, layout: Layout | RowLayout) -> Array:
    """A sample in `layout`: float32 (batch, places, channels).

    Raises:
        CalibrationError: not floats, not finite, empty, or of another layout.
    """
    if array.dtype.kind in "iub":
        raise CalibrationError(f"a tensor of {array.dtype} is not for a transform", dtype=str(array.dtype))
    try:
        _, channels, _, _ = layout.sizes(array.shape)
    except ValueError as e:
        raise CalibrationError(f"a sample cannot be learned: {e}", shape=list(array.shape)) from e
    if not array.size or channels > MAX_CHANNELS:
        raise CalibrationError(f"a sample of shape {list(array.shape)} cannot be learned", shape=list(array.shape))
    values = np.ascontiguousarray(layout.forward(array), np.float32)
    if not np.isfinite(values).all():
        raise CalibrationError("a sample holds NaN or infinity", shape=list(array.shape))
    return values


def root_scale(mean_square: float) -> float:
    """Root of a mean square, rounded to float32 as tables store scales; 1 for samples near zero.

    Raises:
        CalibrationError: the samples are too large.
    """
    # Squares of larger samples would overflow the float32 of the codecs.
    if not mean_square < 1e30:
        raise CalibrationError("the samples are too large to be learned", energy=mean_square)
    return float(np.float32(math.sqrt(mean_square))) if mean_square > 1e-20 else 1.0


def _roughness(array: Array, axis: int) -> float:
    """Mean squared difference of neighbours along an axis, relative to the variance."""
    if array.size == 0 or array.shape[axis] < 2:
        return 0.0
    values = array.astype(np.float64)
    return float(np.mean(np.diff(values, axis=axis) ** 2) / max(float(values.var()), 1e-30))
