"""`transform/2`: calibrated rotation of the channels, DCT of the planes, even rounding, entropy coding.

A payload is the step (one byte), the gain (one byte) and the coded coefficients, sorted by what the table expects of
them; an empty tensor's is empty. Every decision that the reader repeats is made of integers, so the same coefficients
come out on every machine; the transform back is in float32. docs/codecs.md, "transform/2".
"""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np

from isthmus.codecs import NotPackable, Packing, entropy
from isthmus.codecs.entropy import LARGEST
from isthmus.codecs.rows import RowTable, applied, packed_classes, unpacked_classes
from isthmus.codecs.steps import in_eighths, size_of, step_of
from isthmus.codecs.table import EXPECTED_MAGNITUDE, GAINS, OCTAVE, ZERO_DEVIATION, Grid, Sorting, Table

Array = np.ndarray[Any, np.dtype[Any]]

DTYPES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32))
"""That are packed."""


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
        if isinstance(table, RowTable):
            return _encode_rows(array, table, packing.quality)
        if isinstance(table, Table):
            return coded(array, table, packing.quality)[0]
        raise NotPackable("there is no table for this tensor")

    def decode(self, payload: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...], table: object) -> Array:
        """The tensor that was packed, within its step.

        Raises:
            ValueError: no table, or another tensor's; or the payload is not one of that dtype and shape.
        """
        if not isinstance(table, Table | RowTable):
            raise ValueError("there is no table for this tensor")
        if dtype not in DTYPES:
            raise ValueError(f"a transform does not pack {dtype}")
        if isinstance(table, RowTable):
            return _decode_rows(payload, dtype, shape, table)
        if (grid := grid_of(shape, table)) is None:
            return _empty(payload, dtype, shape)
        step, gain = head(payload, table)
        return synthesised(entropy.decode(payload[2:], grid.plan(step, gain)), step, grid, dtype, shape, table)


TRANSFORM = Transform()


def grid_of(shape: tuple[int, ...], table: Table) -> Grid | None:
    """Where the coefficients of a tensor of that shape go; None where it has none.

    Raises:
        ValueError: it is none that the table was learned for.
    """
    batch, channels, height, width = table.layout.sizes(shape)
    if channels != table.channels:
        raise ValueError(f"a tensor of {channels} channels; the table has {table.channels}")
    return table.grid(batch, height, width) if math.prod(shape) else None


def coded(array: Array, table: Table, quality: float) -> tuple[bytes, int, Array]:
    """A tensor's payload at that quality, its step, and its components in units, sorted, float32 (n,).

    Raises:
        NotPackable: see `Transform.encode`.
    """
    values, grid = analysed(array, table)
    step = step_of(quality, table.steps)
    if grid is None:
        return b"", step, values
    with np.errstate(all="ignore"):  # of NaN and infinity, which gain_of finds
        gain = gain_of(values, grid, step)
    if gain > GAINS[1]:
        raise NotPackable(f"the tensor has {2 ** (gain / OCTAVE):.3g} times the magnitude of what was learned from")
    data = entropy.encode_in_place(rounded(values, step), grid.plan(step, gain))
    return bytes((step & 255, gain & 255)) + data, step, values


def analysed(array: Array, table: Table) -> tuple[Array, Grid | None]:
    """The components of a tensor, in units and sorted, and where each goes.

    Raises:
        NotPackable: not a tensor that the table was learned for.
    """
    _check_dtype(array)
    try:
        grid, analysis = grid_of(array.shape, table), table.analysis_at_work
    except ValueError as e:
        raise NotPackable(str(e)) from e
    if grid is None:
        return np.zeros(0, np.float32), None
    with np.errstate(all="ignore"):  # of NaN and infinity, which whoever rounds them finds
        planes = table.layout.forward(array).astype(np.float32, copy=False)
        coefficients = grid.transform.channels_forward(planes)
        # A plane's mean is the first coefficient of the first band.
        coefficients[:, :, 0] -= table.mean * np.float32(math.sqrt(planes.shape[1]))
        return grid.sort(_rotated(analysis, coefficients, grid).reshape(-1)), grid


def synthesised(
    values: Array, step: int, grid: Grid, dtype: np.dtype[Any], shape: tuple[int, ...], table: Table
) -> Array:
    """The tensor of sorted components in steps, float32; they are overwritten."""
    values *= np.float32(size_of(step))
    hw = grid.transform.order.size
    components = grid.unsort(values).reshape(-1, table.channels, hw)
    coefficients = _rotated(table.synthesis_at_work, components, grid)
    coefficients[:, :, 0] += table.mean * np.float32(math.sqrt(hw))
    return _of_dtype(table.layout.backward(grid.transform.channels_backward(coefficients), shape), dtype)


def _encode_rows(array: Array, table: RowTable, quality: float) -> bytes:
    _check_dtype(array)
    try:
        rows = table.layout.forward(array)[0].astype(np.float32, copy=False)
        analysis = table.analysis_at_work
    except ValueError as e:
        raise NotPackable(str(e)) from e
    if not array.size:
        return b""
    step = step_of(quality, table.steps)
    with np.errstate(all="ignore"):  # of NaN and infinity, which gain_of finds
        components = applied(analysis, rows)
        classes = table.nearest(components, step)
        sorting = table.sorting(classes)
        weighted = (components - table.centres[classes]) * table.factors[classes]
        values = weighted.reshape(-1)[sorting.order]
        # A row that is hardly like its class may be any number of times as large as expected, and is kept all the same.
        gain = min(gain_of(values, sorting, step), GAINS[1])
    start = bytes((step & 255, gain & 255)) + packed_classes(classes, table.bits)
    return start + entropy.encode_in_place(rounded(values, step), sorting.plan(step, gain))


def _decode_rows(payload: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...], table: RowTable) -> Array:
    _, channels, rows, _ = table.layout.sizes(shape)
    if not rows:
        return _empty(payload, dtype, shape)
    step, gain = head(payload, table)
    start = 2 + -(-rows * table.bits // 8)
    classes = unpacked_classes(payload[2:start], rows, table.bits)
    sorting = table.sorting(classes)
    values = entropy.decode(payload[start:], sorting.plan(step, gain)) * np.float32(size_of(step))
    components = values[sorting.place].reshape(rows, channels) / table.factors[classes]
    found = applied(table.synthesis_at_work, components) + table.means[classes]
    return _of_dtype(table.layout.backward(found, shape), dtype)


def head(payload: memoryview, table: Table | RowTable) -> tuple[int, int]:
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


def _check_dtype(array: Array) -> None:
    if array.dtype not in DTYPES:
        raise NotPackable(f"{array.dtype} is not packed by a transform")


def _empty(payload: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    if len(payload):
        raise ValueError("an empty tensor has an empty payload")
    return np.zeros(shape, dtype)


def _of_dtype(array: Array, dtype: np.dtype[Any]) -> Array:
    if dtype == np.float16:
        largest = float(np.finfo(np.float16).max)
        array = np.clip(array, -largest, largest)
    return np.ascontiguousarray(array, dtype)


def _rotated(rotations: Array, by_band: Array, grid: Grid) -> Array:
    """Each band's channels, float32 (batch, channels, height * width), multiplied by its rotation."""
    found = np.empty_like(by_band, order="C")
    for rotation, start, stop in _bands(rotations, grid):
        np.matmul(rotation, by_band[:, :, start:stop], out=found[:, :, start:stop])
    return found


def _bands(rotations: Array, grid: Grid) -> list[tuple[Array, int, int]]:
    starts = grid.transform.starts
    return [(r, a, b) for r, a, b in zip(rotations, starts, starts[1:], strict=False) if a < b]


def gain_of(values: Array, grid: Sorting, step: int) -> int:
    """How much larger this tensor's values are than was learned, from those that matter at this step.

    Raises:
        NotPackable: NaN or infinity.
    """
    # Deviations of half a step and more; all, where there are none.
    least = int(grid.deviations.searchsorted(ZERO_DEVIATION + in_eighths(step) - OCTAVE))
    start = int(grid.ends[least - 1]) if 0 < least < len(grid.ends) else 0
    if not math.isfinite(float(values @ values)):
        raise NotPackable("NaN, infinity and numbers near the largest cannot be packed by a transform")
    mean = float(np.abs(values[start:]) @ grid.per_unit[start:]) / (values.size - start) / EXPECTED_MAGNITUDE
    return max(round(OCTAVE * math.log2(mean)), GAINS[0]) if mean > 0 else GAINS[0]


def rounded(values: Array, step: int) -> Array:
    """Whole multiples of the step as float32, the nearest ones, where `entropy.encode_in_place` takes them.

    Nothing moves values towards zero, neither a dead zone nor the mean of what is rounded to the same: such errors all
    point one way and add up over a plane. Unpacked to such means, EfficientNet-Lite0's activations took up to a fifth
    more bytes for the same divergence of its answers.

    Raises:
        NotPackable: one would be too large.
    """
    scaled = entropy.room(values.size)
    np.multiply(values, np.float32(1 / size_of(step)), out=scaled[: values.size])
    norm = math.sqrt(float(scaled @ scaled))
    if norm >= LARGEST / 2 and not float(np.abs(scaled).max()) < LARGEST / 2:
        raise NotPackable("a value is too far outside of the calibrated range")
    return np.rint(scaled, out=scaled)
