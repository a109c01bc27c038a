"""`transform/4`: calibrated rotation of the channels, DCT of the planes, even rounding, entropy coding.

A payload is the step (one byte), the gain (one byte) and the coded coefficients, sorted by what the table expects of
them; an empty tensor's is empty. Every decision that the reader repeats is made of integers, so the same coefficients
come out on every machine; the transform back is in float32. docs/codecs.md, "transform/4".
"""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np

from isthmus.arrays import Array
from isthmus.codecs import Encoding, NotEncodable, entropy
from isthmus.codecs.classes import packed_classes, unpacked_classes
from isthmus.codecs.entropy import LARGEST
from isthmus.codecs.payload import count_of
from isthmus.codecs.planes import MAX_AXIS
from isthmus.codecs.rows import RowTable, applied
from isthmus.codecs.steps import in_eighths, size_of, step_of
from isthmus.codecs.table import EXPECTED_MAGNITUDE, GAINS, OCTAVE, ZERO_DEVIATION, Grid, Sorting, Table

VALUE_BYTES = 48
"""What decoding takes for each value, rows or planes: 16 for the order and its inverse, which are cached, 9 while these
are made; 12 for coefficients and maps in float32; the rest for what few values exceed their level's limit by."""
_MATRIX_BYTES = 12
"""What a plane transform's matrix takes for each number while it is made: itself, and its rows in another order."""

DTYPES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32))
"""That are packed."""


class Transform:
    """The codec; it keeps nothing."""

    calibrated = True

    def encode(self, array: Array, encoding: Encoding) -> bytes:
        """The payload of a tensor of floats, at the table's step for `encoding.quality`.

        Raises:
            NotEncodable: not a tensor that the table was learned for; NaN or infinity; values more than eight times as
                large as those learned from.
        """
        table = encoding.table
        if isinstance(table, RowTable):
            return _encode_rows(array, table, encoding.quality)
        if isinstance(table, Table):
            return _encode_planes(array, table, encoding.quality)
        raise NotEncodable("there is no table for this tensor")

    def working_bytes(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
        """See `Codec`: where each coefficient goes, coefficients on their way, and the matrices of the plane transform.

        Which axes are planes is the table's to say: the longest that may be one counts.
        """
        # The first of four axes is the batch.
        some = {1: (), 4: shape[1:]}.get(len(shape), shape)
        longest = max((n for n in some if n <= MAX_AXIS), default=0)
        return count_of(shape) * VALUE_BYTES + longest**2 * _MATRIX_BYTES

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
        if (grid := table.grid(shape)) is None:
            return _empty(payload, dtype, shape)
        step, gain = _head(payload, table)
        return _synthesised(entropy.decode(payload[2:], grid.plan(step, gain)), step, grid, dtype, shape, table)


TRANSFORM = Transform()


def _encode_planes(array: Array, table: Table, quality: float) -> bytes:
    values, grid, spare = analysed(array, table)
    if grid is None:
        return b""
    step = step_of(quality, table.steps)
    whole = rounded(values, step, spare)
    gain = gain_of(values, grid, step)
    if gain > GAINS[1]:
        raise NotEncodable(f"the tensor has {2 ** (gain / OCTAVE):.3g} times the magnitude of what was learned from")
    data = entropy.encode_in_place(whole, grid.plan(step, gain))
    return bytes((step & 255, gain & 255)) + data


def analysed(array: Array, table: Table) -> tuple[Array, Grid | None, Array]:
    """The components of a tensor, in units and sorted; where each goes; and an `entropy.room` for as many.

    Raises:
        NotEncodable: not a tensor that the table was learned for.
    """
    _check_dtype(array)
    try:
        grid, analysis = table.grid(array.shape), table.analysis_at_work
    except ValueError as e:
        raise NotEncodable(str(e)) from e
    if grid is None:
        return np.zeros(0, np.float32), None, np.zeros(0, np.float32)
    values, spare = np.empty(grid.count, np.float32), entropy.room(grid.count)
    with np.errstate(all="ignore"):  # of NaN and infinity, which whoever rounds them finds
        maps = table.layout.maps(array).astype(np.float32, copy=False)
        one, other = values.reshape(grid.shape), spare[: grid.count].reshape(grid.shape)
        grid.transform.channels_forward(maps, one, other)
        one[:, :, 0] -= grid.mean
        grid.rotate(analysis, one, other)
        return grid.sort(other.reshape(-1), values), grid, spare


def _synthesised(
    values: Array, step: int, grid: Grid, dtype: np.dtype[Any], shape: tuple[int, ...], table: Table
) -> Array:
    """The tensor of sorted components in steps, float32; they are overwritten."""
    values *= np.float32(size_of(step))
    one, other = np.empty(grid.shape, np.float32), values.reshape(grid.shape)
    grid.unsort(values, one.reshape(-1))
    grid.rotate(table.synthesis_at_work, one, other)
    other[:, :, 0] += grid.mean
    return _of_dtype(table.layout.unmapped(grid.transform.channels_backward(other, one), shape), dtype)


def _encode_rows(array: Array, table: RowTable, quality: float) -> bytes:
    _check_dtype(array)
    try:
        rows = table.layout.forward(array)[0].astype(np.float32, copy=False)
        analysis = table.analysis_at_work
    except ValueError as e:
        raise NotEncodable(str(e)) from e
    if not array.size:
        return b""
    step = step_of(quality, table.steps)
    with np.errstate(all="ignore"):  # of NaN and infinity, which rounding finds
        components = applied(analysis, rows)
        classes = table.classes.likeliest(components)
        sorting = table.sorting(classes)
        weighted = (components - table.centres[classes]) * table.factors[classes]
        values = weighted.reshape(-1)[sorting.order]
    whole = rounded(values, step, entropy.room(values.size))
    # A row that is hardly like its class may be any number of times as large as expected, and is kept all the same.
    gain = min(gain_of(values, sorting, step), GAINS[1])
    whole[: values.size] *= np.abs(values) >= sorting.dead_zones(step, gain) * np.float32(size_of(step))
    start = bytes((step & 255, gain & 255)) + packed_classes(classes, table.bits)
    return start + entropy.encode_in_place(whole, sorting.plan(step, gain))


def _decode_rows(payload: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...], table: RowTable) -> Array:
    _, channels, rows, _ = table.layout.sizes(shape)
    if not rows:
        return _empty(payload, dtype, shape)
    step, gain = _head(payload, table)
    start = 2 + -(-rows * table.bits // 8)
    classes = unpacked_classes(payload[2:start], rows, table.bits)
    sorting = table.sorting(classes)
    values = entropy.decode(payload[start:], sorting.plan(step, gain)) * np.float32(size_of(step))
    components = values[sorting.place].reshape(rows, channels) / table.factors[classes]
    found = applied(table.synthesis_at_work, components) + table.means[classes]
    return _of_dtype(table.layout.backward(found, shape), dtype)


def _head(payload: memoryview, table: Table | RowTable) -> tuple[int, int]:
    """The step and the gain.

    Raises:
        ValueError: the payload has none, or others than the table allows.
    """
    if len(payload) < 2:
        raise ValueError(f"a payload of {len(payload)} bytes is too short")
    step, gain = np.frombuffer(payload[:2], np.int8).tolist()
    if not GAINS[0] <= gain <= GAINS[1] or not table.steps[1] <= step <= table.steps[0]:
        raise ValueError(f"a step of {step} and a gain of {gain} are out of range")
    return step, gain


def _check_dtype(array: Array) -> None:
    if array.dtype not in DTYPES:
        raise NotEncodable(f"{array.dtype} is not packed by a transform")


def _empty(payload: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    if len(payload):
        raise ValueError("an empty tensor has an empty payload")
    return np.zeros(shape, dtype)


def _of_dtype(array: Array, dtype: np.dtype[Any]) -> Array:
    if dtype == np.float16:
        largest = float(np.finfo(np.float16).max)
        array = np.clip(array, -largest, largest)
    return np.ascontiguousarray(array, dtype)


def gain_of(values: Array, grid: Sorting, step: int) -> int:
    """How much larger this tensor's finite values are than was learned, from those that matter at this step."""
    # Deviations of half a step and more; all, where there are none.
    least = int(grid.deviations.searchsorted(ZERO_DEVIATION + in_eighths(step) - OCTAVE))
    some, per_unit = grid.sampled(least % grid.deviations.size)
    mean = float(np.abs(values[some]) @ per_unit) / per_unit.size / EXPECTED_MAGNITUDE
    return max(round(OCTAVE * math.log2(mean)), GAINS[0]) if mean > 0 else GAINS[0]


def rounded(values: Array, step: int, room: Array) -> Array:
    """Whole multiples of the step as float32, the nearest ones, in an `entropy.room`.

    Nothing moves those of a plane towards zero, neither a dead zone nor the mean of what is rounded to the same: such
    errors all point one way and add up. Unpacked to such means, EfficientNet-Lite0's activations took up to a fifth
    more bytes for the same divergence of its answers.

    Raises:
        NotEncodable: NaN or infinity; one would be too large.
    """
    with np.errstate(all="ignore"):  # of what is refused here
        np.multiply(values, np.float32(1 / size_of(step)), out=room[: values.size])
        square = float(room @ room)
        if not square < (LARGEST / 2) ** 2 and not float(np.abs(room).max()) < LARGEST / 2:
            if not math.isfinite(square):
                raise NotEncodable("NaN, infinity and numbers near the largest cannot be packed by a transform")
            raise NotEncodable("a value is too far outside of the calibrated range")
        return np.rint(room, out=room)
