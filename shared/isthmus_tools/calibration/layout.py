"""Which axis of an activation holds its channels."""

from __future__ import annotations

import numpy as np

from isthmus.arrays import Array
from isthmus.codecs.planes import Layout
from isthmus.codecs.row_layout import RowLayout
from isthmus.codecs.table import MAX_CHANNELS
from isthmus.errors import CalibrationError


def row_layout_of(array: Array, layout: Layout | RowLayout | None = None) -> RowLayout:
    """The layout as rows of tensors such as `array`: each row is all channels at one place.

    Raises:
        CalibrationError: no axis, or more than four; or rows too long.
    """
    if isinstance(layout, RowLayout):
        return layout
    if layout is None and (state := state_layout_of(array)) is not None:
        return state
    axis = (layout or layout_of(array)).channel_axis
    try:
        return RowLayout(array.ndim, (axis,), (array.shape[axis],))
    except ValueError as e:
        raise CalibrationError(f"a sample cannot be learned: {e}", shape=list(array.shape)) from e


def state_layout_of(array: Array) -> RowLayout | None:
    """The layout of a recurrent network's state, (layers, batch, width) with a batch of one: layers are not alike."""
    if array.ndim != 3 or array.shape[0] < 2 or array.shape[1] != 1 or not 0 < array.size <= MAX_CHANNELS:
        return None
    return RowLayout(3, (0, 2), (array.shape[0], array.shape[2]))


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
