"""`transform/1`: calibrated rotation of the channels, DCT of the planes, even rounding, entropy coding.

A payload is the step (one byte), the gain (one byte) and the coded coefficients, sorted by what the table expects of
them; an empty tensor's is empty. Every decision that the reader repeats is made of integers, so the same coefficients
come out on every machine; the transform back is in float32. docs/codecs.md, "transform/1".
"""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np

from isthmus.codecs import NotPackable, Packing, entropy
from isthmus.codecs.entropy import LARGEST
from isthmus.codecs.rows import RowTable, applied, packed_classes, unpacked_classes
from isthmus.codecs.table import EXPECTED_MAGNITUDE, GAINS, OCTAVE, ZERO_DEVIATION, Grid, Sorting, Table

Array = np.ndarray[Any, np.dtype[Any]]

_DTYPES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32))


class Transform:
    """The codec; it keeps nothing."""

    calibrated = True

    def encode(self, array: Array, packing: Packing) -> bytes:
        """The payload of a tensor of floats, at the table's step for `packing.quality`.

        Raises:
            NotPackable: not a tensor that the table was learned for; NaN or infinity; values more than eight times as
                large as those learned from.
        """
        table = packing.table
        if not isinstance(table, Table | RowTable):
            raise NotPackable("there is no table for this tensor")
        if array.dtype not in _DTYPES:
            raise NotPackable(f"{array.dtype} is not packed by a transform")
        if isinstance(table, RowTable):
            return _encode_rows(array, table, packing.quality)
        try:
            batch, channels, height, width = table.layout.sizes(array.shape)
        except ValueError as e:
            raise NotPackable(str(e)) from e
        if channels != table.channels:
            raise NotPackable(f"a tensor of {channels} channels; the table has {table.channels}")
        if not array.size:
            return b""
        step = step_for(table, packing.quality)
        try:
            analysis = table.analysis_at_work
        except ValueError as e:
            raise NotPackable(str(e)) from e
        grid = table.grid(batch, height, width)
        with np.errstate(all="ignore"):  # of NaN and infinity, which _gain finds
            values = _analyse(table.layout.forward(array).astype(np.float32, copy=False), table.mean, analysis, grid)
            gain = _gain(values, grid, step)
        if gain > GAINS[1]:
            raise NotPackable(f"the tensor has {2 ** (gain / OCTAVE):.3g} times the magnitude of what was learned from")
        return bytes((step & 255, gain & 255)) + entropy.encode_in_place(_quantise(values, step), grid.plan(step, gain))

    def decode(self, payload: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...], table: object) -> Array:
        """The tensor that was packed, within its step.

        Raises:
            ValueError: no table, or another tensor's; or the payload is not one of that dtype and shape.
        """
        if not isinstance(table, Table | RowTable):
            raise ValueError("there is no table for this tensor")
        if dtype not in _DTYPES:
            raise ValueError(f"a transform does not pack {dtype}")
        if isinstance(table, RowTable):
            return _decode_rows(payload, dtype, shape, table)
        batch, channels, height, width = table.layout.sizes(shape)
        if channels != table.channels:
            raise ValueError(f"a tensor of {channels} channels; the table has {table.channels}")
        if not math.prod(shape):
            return _empty(payload, dtype, shape)
        step, gain = _head(payload, table)
        grid = table.grid(batch, height, width)
        values = entropy.decode(payload[2:], grid.plan(step, gain))
        values *= np.float32(_size(step))
        planes = _synthesise(values, table, grid, batch)
        return _of_dtype(table.layout.backward(planes, shape), dtype)


TRANSFORM = Transform()


def step_for(table: Table | RowTable, quality: float) -> int:
    """The step of a quality from 0 (the coarsest) to 1, in eighths of an octave.

    Raises:
        ValueError: the quality is not in that range.
    """
    if not 0 <= quality <= 1:
        raise ValueError(f"a quality is a number from 0 to 1, not {quality}")
    coarsest, finest = table.steps
    return round(coarsest + (finest - coarsest) * quality)


def _encode_rows(array: Array, table: RowTable, quality: float) -> bytes:
    try:
        rows = table.layout.forward(array)[0].astype(np.float32, copy=False)
        analysis = table.analysis_at_work
    except ValueError as e:
        raise NotPackable(str(e)) from e
    if not array.size:
        return b""
    step = step_for(table, quality)
    with np.errstate(all="ignore"):  # of NaN and infinity, which _gain finds
        components = applied(analysis, rows)
        classes = table.nearest(components, step)
        sorting = table.sorting(classes)
        weighted = (components - table.centres[classes]) * table.factors[classes]
        values = weighted.reshape(-1)[sorting.order]
        # A row that is hardly like its class may be any number of times as large as expected, and is kept all the same.
        gain = min(_gain(values, sorting, step), GAINS[1])
    head = bytes((step & 255, gain & 255)) + packed_classes(classes, table.bits)
    return head + entropy.encode_in_place(_quantise(values, step), sorting.plan(step, gain))


def _decode_rows(payload: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...], table: RowTable) -> Array:
    _, channels, rows, _ = table.layout.sizes(shape)
    if not rows:
        return _empty(payload, dtype, shape)
    step, gain = _head(payload, table)
    start = 2 + -(-rows * table.bits // 8)
    classes = unpacked_classes(payload[2:start], rows, table.bits)
    sorting = table.sorting(classes)
    values = entropy.decode(payload[start:], sorting.plan(step, gain)) * np.float32(_size(step))
    components = values[sorting.place].reshape(rows, channels) / table.factors[classes]
    found = applied(table.synthesis_at_work, components) + table.means[classes]
    return _of_dtype(table.layout.backward(found, shape), dtype)


def _head(payload: memoryview, table: Table | RowTable) -> tuple[int, int]:
    """The step and the gain.

    Raises:
        ValueError: the payload has none, or others than the table allows.
    """
    if len(payload) < 3:
        raise ValueError(f"a payload of {len(payload)} bytes is too short")
    step, gain = np.frombuffer(payload[:2], np.int8).tolist()
    if not GAINS[0] <= gain <= GAINS[1] or not table.steps[1] <= step <= table.steps[0]:
        raise ValueError(f"a step of {step} and a gain of {gain} are out of range")
    return step, gain


def _empty(payload: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    if len(payload):
        raise ValueError("an empty tensor has an empty payload")
    return np.zeros(shape, dtype)


def _of_dtype(array: Array, dtype: np.dtype[Any]) -> Array:
    if dtype == np.float16:
        largest = float(np.finfo(np.float16).max)
        array = np.clip(array, -largest, largest)
    return np.ascontiguousarray(array, dtype)


def _analyse(planes: Array, mean: Array, analysis: Array, grid: Grid) -> Array:
    """Components in units, sorted."""
    coefficients = grid.transform.channels_forward(planes)
    # A plane's mean is the first coefficient of the first band.
    coefficients[:, :, 0] -= mean * np.float32(math.sqrt(planes.shape[1]))
    return grid.sort(_rotated(analysis, coefficients, grid).reshape(-1))


def _synthesise(values: Array, table: Table, grid: Grid, batch: int) -> Array:
    """Planes (batch, height * width, channels) from components in units."""
    hw = grid.transform.order.size
    components = grid.unsort(values).reshape(batch, table.channels, hw)
    coefficients = _rotated(table.synthesis_at_work, components, grid)
    coefficients[:, :, 0] += table.mean * np.float32(math.sqrt(hw))
    return grid.transform.channels_backward(coefficients)


def _rotated(rotations: Array, by_band: Array, grid: Grid) -> Array:
    """Each band's channels, float32 (batch, channels, height * width), multiplied by its rotation."""
    found = np.empty_like(by_band, order="C")
    for rotation, start, stop in _bands(rotations, grid):
        np.matmul(rotation, by_band[:, :, start:stop], out=found[:, :, start:stop])
    return found


def _bands(rotations: Array, grid: Grid) -> list[tuple[Array, int, int]]:
    starts = grid.transform.starts
    return [(r, a, b) for r, a, b in zip(rotations, starts, starts[1:], strict=False) if a < b]


def _gain(values: Array, grid: Sorting, step: int) -> int:
    """How much larger this tensor's values are than was learned, from those that matter at this step.

    Raises:
        NotPackable: NaN or infinity.
    """
    # Deviations of half a step and more, or else the largest.
    least = int(grid.deviations.searchsorted(ZERO_DEVIATION + step - OCTAVE))
    start = int(grid.ends[least - 1]) if 0 < least < len(grid.ends) else 0
    if not math.isfinite(float(values @ values)):
        raise NotPackable("NaN, infinity and numbers near the largest cannot be packed by a transform")
    mean = float(np.abs(values[start:]) @ grid.per_unit[start:]) / (values.size - start) / EXPECTED_MAGNITUDE
    return max(round(OCTAVE * math.log2(mean)), GAINS[0]) if mean > 0 else GAINS[0]


def _quantise(values: Array, step: int) -> Array:
    """Whole multiples of the step as float32, the nearest ones, where `entropy.encode_in_place` takes them.

    Nothing moves values towards zero, neither a dead zone nor the mean of what is rounded to the same: such errors all
    point one way and add up over a plane. Unpacked to such means, EfficientNet-Lite0's activations took up to a fifth
    more bytes for the same divergence of its answers.

    Raises:
        NotPackable: one would be too large.
    """
    scaled = entropy.room(values.size)
    np.multiply(values, np.float32(1 / _size(step)), out=scaled[: values.size])
    norm = math.sqrt(float(scaled @ scaled))
    if norm >= LARGEST / 2 and not float(np.abs(scaled).max()) < LARGEST / 2:
        raise NotPackable("a value is too far outside of the calibrated range")
    return np.rint(scaled, out=scaled)


def _size(step: int) -> float:
    """A step in units."""
    return float(2.0 ** (step / OCTAVE))
