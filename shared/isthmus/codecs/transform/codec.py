"""`transform/4`: a rate–distortion codec for activations, learned from a model's own inputs.

1. A Karhunen–Loève transform of the channels, weighted by the Fisher information of the model's output: in its
   components, noise of one unit costs the same output divergence everywhere.
2. A DCT along the plane's axes; tensors without planes have rows of channels in clusters instead (see `rows`).
3. A uniform quantiser; rows have a dead zone as well.
4. Bit allocation by the components' learned deviations, and entropy coding: context models and rANS.

A payload is the step (one byte), the gain (one byte) and the coded coefficients, sorted by expected deviation; an empty
tensor has an empty payload. Every decision that the decoder repeats is made of integers, so all machines decode the
same coefficients; the inverse transform is in float32. Source: docs/reference/codecs.md, "transform/4".
"""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np

from isthmus.arrays import Array
from isthmus.codecs import Encoding, NotEncodable
from isthmus.codecs.payload import count_of
from isthmus.codecs.transform import entropy
from isthmus.codecs.transform.entropy import MAX_MAGNITUDE
from isthmus.codecs.transform.levels import OCTAVE, ZERO_DEVIATION, step_in_eighths, step_of_quality, step_size
from isthmus.codecs.transform.planes import MAX_AXIS
from isthmus.codecs.transform.rows import RowTable, decode_clusters, encode_clusters, transform_rows
from isthmus.codecs.transform.sorting import Grid, Sorting
from isthmus.codecs.transform.table import PlaneTable

# The range of a tensor's magnitude relative to calibration, in eighths of an octave: a 4,096th to eight times.
GAINS = (-96, 24)

# Mean magnitude of a value in units of its deviation: 0.71 for a Laplacian. Gains are relative to this.
EXPECTED_MAGNITUDE = 0.7

# Decoding takes, for each value: 16 bytes for the order and its inverse (cached), 9 more during their computation,
# 12 for coefficients and maps in float32; the rest is for the excess of the few values beyond their level's limit.
VALUE_BYTES = 48
# The matrix of a plane transform, for each number: itself, and its rows in another order during its computation.
_MATRIX_BYTES = 12

DTYPES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32))


class Transform:
    """See `Codec`; stateless, its table is a `PlaneTable` or a `RowTable`."""

    calibrated = True

    def encode(self, array: Array, encoding: Encoding) -> bytes:
        """Encode a tensor of floats, at the table's step for `encoding.quality`.

        Raises:
            NotEncodable: the table is of another kind of tensor; NaN or infinity; values more than eight times as
                large as those of calibration.
        """
        table = encoding.table
        if isinstance(table, RowTable):
            return _encode_rows(array, table, encoding.quality)
        if isinstance(table, PlaneTable):
            return _encode_planes(array, table, encoding.quality)
        raise NotEncodable("there is no table for this tensor")

    def working_bytes(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
        """See `Codec`: the sorting, coefficients in several forms, and the matrices of the plane transform.

        Only the table knows the axes of the planes, so the longest axis of valid length counts.
        """
        # The first of four axes is the batch.
        plane_axes = {1: (), 4: shape[1:]}.get(len(shape), shape)
        longest = max((n for n in plane_axes if n <= MAX_AXIS), default=0)
        return count_of(shape) * VALUE_BYTES + longest**2 * _MATRIX_BYTES

    def decode(self, payload: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...], table: object) -> Array:
        """Decode the tensor, within its step.

        Raises:
            ValueError: no table, or another tensor's; or the payload does not fit that dtype and shape.
        """
        if not isinstance(table, PlaneTable | RowTable):
            raise ValueError("there is no table for this tensor")
        if dtype not in DTYPES:
            raise ValueError(f"a transform does not encode {dtype}")
        if isinstance(table, RowTable):
            return _decode_rows(payload, dtype, shape, table)
        if (grid := table.grid(shape)) is None:
            return _empty(payload, dtype, shape)
        step, gain = _head(payload, table)
        return _synthesise(entropy.decode(payload[2:], grid.plan(step, gain)), step, grid, dtype, shape, table)


TRANSFORM = Transform()


def analyse(array: Array, table: PlaneTable) -> tuple[Array, Grid | None, Array]:
    """The components of a tensor, in units and sorted; its grid; and an `entropy.padded_buffer` of their number.

    Raises:
        NotEncodable: the table is of another kind of tensor.
    """
    _check_dtype(array)
    try:
        grid, analysis = table.grid(array.shape), table.analysis_matrix
    except ValueError as e:
        raise NotEncodable(str(e)) from e
    if grid is None:
        return np.zeros(0, np.float32), None, np.zeros(0, np.float32)
    values, spare = np.empty(grid.count, np.float32), entropy.padded_buffer(grid.count)
    with np.errstate(all="ignore"):  # the quantiser detects NaN and infinity
        maps = table.layout.maps(array).astype(np.float32, copy=False)
        components, buffer = values.reshape(grid.shape), spare[: grid.count].reshape(grid.shape)
        grid.transform.channels_forward(maps, components, buffer)
        components[:, :, 0] -= grid.mean
        grid.rotate(analysis, components, buffer)
        return grid.sort(buffer.reshape(-1), values), grid, spare


def quantise(values: Array, step: int, buffer: Array) -> Array:
    """Round to multiples of the step: integers as float32, in an `entropy.padded_buffer`.

    Planes have neither a dead zone nor a decoder that reconstructs at centroids: either would bias errors towards zero,
    and biased errors add up. With centroids, EfficientNet-Lite0's activations took up to a fifth more bytes at the same
    output divergence.

    Raises:
        NotEncodable: NaN or infinity, or a multiple too large for the coder.
    """
    with np.errstate(all="ignore"):  # overflow is refused below
        np.multiply(values, np.float32(1 / step_size(step)), out=buffer[: values.size])
        square = float(buffer @ buffer)
        if not square < (MAX_MAGNITUDE / 2) ** 2 and not float(np.abs(buffer).max()) < MAX_MAGNITUDE / 2:
            if not math.isfinite(square):
                raise NotEncodable("NaN, infinity and numbers near the largest cannot be encoded by a transform")
            raise NotEncodable("a value is too far outside of the calibrated range")
        return np.rint(buffer, out=buffer)


def _encode_planes(array: Array, table: PlaneTable, quality: float) -> bytes:
    values, grid, buffer = analyse(array, table)
    if grid is None:
        return b""
    step = step_of_quality(quality, table.steps)
    whole = quantise(values, step, buffer)
    gain = _gain_of(values, grid, step)
    if gain > GAINS[1]:
        raise NotEncodable(f"the tensor has {2 ** (gain / OCTAVE):.3g} times the magnitude of what was learned from")
    data = entropy.encode_in_place(whole, grid.plan(step, gain))
    return bytes((step & 255, gain & 255)) + data


def _synthesise(
    values: Array, step: int, grid: Grid, dtype: np.dtype[Any], shape: tuple[int, ...], table: PlaneTable
) -> Array:
    """The inverse of `analyse` and `quantise`; overwrites `values`, float32."""
    values *= np.float32(step_size(step))
    components, buffer = np.empty(grid.shape, np.float32), values.reshape(grid.shape)
    grid.unsort(values, components.reshape(-1))
    grid.rotate(table.synthesis_matrix, components, buffer)
    buffer[:, :, 0] += grid.mean
    return _of_dtype(table.layout.unmapped(grid.transform.channels_backward(buffer, components), shape), dtype)


def _encode_rows(array: Array, table: RowTable, quality: float) -> bytes:
    _check_dtype(array)
    try:
        rows = table.layout.forward(array)[0].astype(np.float32, copy=False)
        analysis = table.analysis_matrix
    except ValueError as e:
        raise NotEncodable(str(e)) from e
    if not array.size:
        return b""
    step = step_of_quality(quality, table.steps)
    with np.errstate(all="ignore"):  # the quantiser detects NaN and infinity
        # In float64, whose rounding no quantiser sees: float32's differs with the number of rows, and a token of a
        # language model would have other coefficients in a step of its own than in a prompt.
        components = transform_rows(analysis.astype(np.float64), rows)
        clusters = table.clusters.likeliest(components.astype(np.float32))
        sorting = table.sorting(clusters)
        weighted = (components - table.centres[clusters]) * table.factors[clusters]
        values = weighted.astype(np.float32).reshape(-1)[sorting.order]
    whole = quantise(values, step, entropy.padded_buffer(values.size))
    # A row unlike its cluster may exceed the expected magnitude by any factor, and is encoded nevertheless.
    gain = min(_gain_of(values, sorting, step), GAINS[1])
    whole[: values.size] *= np.abs(values) >= sorting.dead_zones(step) * np.float32(step_size(step))
    head = bytes((step & 255, gain & 255)) + encode_clusters(clusters, table.bits)
    return head + entropy.encode_in_place(whole, sorting.plan(step, gain))


def _decode_rows(payload: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...], table: RowTable) -> Array:
    _, channels, rows, _ = table.layout.sizes(shape)
    if not rows:
        return _empty(payload, dtype, shape)
    step, gain = _head(payload, table)
    start = 2 + -(-rows * table.bits // 8)
    clusters = decode_clusters(payload[2:start], rows, table.bits)
    sorting = table.sorting(clusters)
    values = entropy.decode(payload[start:], sorting.plan(step, gain)) * np.float32(step_size(step))
    components = values[sorting.place].reshape(rows, channels) / table.factors[clusters]
    decoded = transform_rows(table.synthesis_matrix, components) + table.means[clusters]
    return _of_dtype(table.layout.backward(decoded, shape), dtype)


def _head(payload: memoryview, table: PlaneTable | RowTable) -> tuple[int, int]:
    """The step and the gain.

    Raises:
        ValueError: the payload is too short, or out of the table's range.
    """
    if len(payload) < 2:
        raise ValueError(f"a payload of {len(payload)} bytes is too short")
    step, gain = np.frombuffer(payload[:2], np.int8).tolist()
    if not GAINS[0] <= gain <= GAINS[1] or not table.steps[1] <= step <= table.steps[0]:
        raise ValueError(f"a step of {step} and a gain of {gain} are out of range")
    return step, gain


def _gain_of(values: Array, sorting: Sorting, step: int) -> int:
    """The tensor's magnitude relative to calibration, from the finite values that matter at this step."""
    # Components of at least half a step's deviation; all components, if there are none.
    first = int(sorting.deviations.searchsorted(ZERO_DEVIATION + step_in_eighths(step) - OCTAVE))
    samples, per_unit = sorting.gain_samples(first % sorting.deviations.size)
    mean = float(np.abs(values[samples]) @ per_unit) / per_unit.size / EXPECTED_MAGNITUDE
    return max(round(OCTAVE * math.log2(mean)), GAINS[0]) if mean > 0 else GAINS[0]


def _check_dtype(array: Array) -> None:
    if array.dtype not in DTYPES:
        raise NotEncodable(f"{array.dtype} is not encoded by a transform")


def _empty(payload: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    if len(payload):
        raise ValueError("an empty tensor has an empty payload")
    return np.zeros(shape, dtype)


def _of_dtype(array: Array, dtype: np.dtype[Any]) -> Array:
    if dtype == np.float16:
        limit = float(np.finfo(np.float16).max)
        array = np.clip(array, -limit, limit)
    return np.ascontiguousarray(array, dtype)
