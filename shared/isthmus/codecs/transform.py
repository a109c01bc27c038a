"""`transform/1`: calibrated rotation of the channels, DCT of the planes, rate-distortion quantisation, entropy coding.

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
from isthmus.codecs.entropy import LARGEST, LEVELS, Run
from isthmus.codecs.table import EXPECTED_MAGNITUDE, GAINS, OCTAVE, ZERO_DEVIATION, Grid, Table

Array = np.ndarray[Any, np.dtype[Any]]

_DTYPES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32))


class Transform:
    """The codec; it keeps nothing."""

    calibrated = True

    def encode(self, array: Array, packing: Packing) -> bytes:
        """The payload of a tensor of floats, at the table's step for `packing.quality`.

        Raises:
            NotPackable: not a tensor that the table was learned for; NaN or infinity; more than eight times the energy.
        """
        table = packing.table
        if not isinstance(table, Table):
            raise NotPackable("there is no table for this tensor")
        if array.dtype not in _DTYPES:
            raise NotPackable(f"{array.dtype} is not packed by a transform")
        try:
            batch, channels, height, width = table.layout.sizes(array.shape)
        except ValueError as e:
            raise NotPackable(str(e)) from e
        if channels != table.channels:
            raise NotPackable(f"a tensor of {channels} channels; the table has {table.channels}")
        if not array.size:
            return b""
        step = step_for(table, packing.quality)
        grid = table.grid(batch, height, width)
        planes = np.ascontiguousarray(table.layout.forward(array), np.float32)
        values = _analyse(planes, table, grid)
        gain = _gain(values, grid, step)
        runs = grid.runs(step, gain)
        whole = _quantise(values, table, runs, step)
        return bytes((step & 255, gain & 255)) + entropy.encode(whole, runs, table.models)

    def decode(self, payload: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...], table: object) -> Array:
        """The tensor that was packed, within its step.

        Raises:
            ValueError: no table, or another tensor's; or the payload is not one of that dtype and shape.
        """
        if not isinstance(table, Table):
            raise ValueError("there is no table for this tensor")
        if dtype not in _DTYPES:
            raise ValueError(f"a transform does not pack {dtype}")
        batch, channels, height, width = table.layout.sizes(shape)
        if channels != table.channels:
            raise ValueError(f"a tensor of {channels} channels; the table has {table.channels}")
        if not math.prod(shape):
            if len(payload):
                raise ValueError("an empty tensor has an empty payload")
            return np.zeros(shape, dtype)
        if len(payload) < 3:
            raise ValueError(f"a payload of {len(payload)} bytes is too short")
        step, gain = np.frombuffer(payload[:2], np.int8).tolist()
        if not GAINS[0] <= gain <= GAINS[1] or not table.steps[1] <= step <= table.steps[0]:
            raise ValueError(f"a step of {step} and a gain of {gain} are out of range")
        grid = table.grid(batch, height, width)
        runs = grid.runs(step, gain)
        whole = entropy.decode(payload[2:], runs, table.models)
        planes = _synthesise(_reconstruct(whole, table, runs, step), table, grid, batch)
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(table.layout.backward(planes, shape).astype(dtype, copy=False))


TRANSFORM = Transform()


def step_for(table: Table, quality: float) -> int:
    """The step of a quality from 0 (the coarsest) to 1, in eighths of an octave.

    Raises:
        ValueError: the quality is not in that range.
    """
    if not 0 <= quality <= 1:
        raise ValueError(f"a quality is a number from 0 to 1, not {quality}")
    coarsest, finest = table.steps
    return round(coarsest + (finest - coarsest) * quality)


def _analyse(planes: Array, table: Table, grid: Grid) -> Array:
    """Components in units, in the grid's order."""
    n, c, hw = planes.shape
    coefficients = grid.transform.forward(planes)
    # The mean of a plane is its first coefficient, in every order of bands.
    centred = coefficients.copy() if coefficients is planes else coefficients
    centred[:, :, 0] -= table.mean * np.float32(math.sqrt(hw))
    flat = np.empty(planes.size, np.float32)
    for rotation, start, stop in _bands(table.analysis_at_work, grid):
        block = flat[n * c * start : n * c * stop].reshape(n, c, stop - start)
        np.matmul(rotation, centred[:, :, start:stop], out=block)
    return flat[grid.order]


def _synthesise(values: Array, table: Table, grid: Grid, batch: int) -> Array:
    """Planes (batch, channels, height * width) from components in units."""
    c = table.channels
    hw = grid.transform.height * grid.transform.width
    flat = np.empty(values.size, np.float32)
    flat[grid.order] = values
    coefficients = np.empty((batch, c, hw), np.float32)
    for rotation, start, stop in _bands(table.synthesis_at_work, grid):
        block = flat[batch * c * start : batch * c * stop].reshape(batch, c, stop - start)
        np.matmul(rotation, block, out=coefficients[:, :, start:stop])
    coefficients[:, :, 0] += table.mean * np.float32(math.sqrt(hw))
    return grid.transform.backward(coefficients)


def _bands(rotations: Array, grid: Grid) -> list[tuple[Array, int, int]]:
    starts = grid.transform.starts
    return [(r, a, b) for r, a, b in zip(rotations, starts, starts[1:], strict=False) if a < b]


def _gain(values: Array, grid: Grid, step: int) -> int:
    """How much more energy this tensor has than was learned, from the values that matter at this step.

    Raises:
        NotPackable: NaN or infinity, or more than eight times the energy.
    """
    # Deviations of half a step and more, or else the largest.
    least = int(np.searchsorted(grid.deviations, ZERO_DEVIATION + step - OCTAVE))
    start = int(grid.ends[least - 1]) if 0 < least < len(grid.ends) else 0
    part = values[start:] * grid.per_unit[start:]
    total = float(np.abs(values).sum(dtype=np.float64))
    if not math.isfinite(total):
        raise NotPackable("NaN or infinity cannot be packed by a transform")
    mean = float(np.abs(part).mean(dtype=np.float64)) / EXPECTED_MAGNITUDE
    gain = round(OCTAVE * math.log2(mean)) if mean > 0 else GAINS[0]
    if gain > GAINS[1]:
        raise NotPackable(f"the tensor has {mean:.3g} times the energy of those it was calibrated on")
    return max(gain, GAINS[0])


def _quantise(values: Array, table: Table, runs: list[Run], step: int) -> Array:
    """int32 multiples of the step.

    Raises:
        NotPackable: one would be too large.
    """
    lengths = [stop - start for _, start, stop in runs]
    chosen = table.thresholds[[min(at, LEVELS - 1) for at, _, _ in runs]].astype(np.float32) / 128
    zero, rounding = np.repeat(chosen[:, 0], lengths), np.repeat(chosen[:, 1], lengths)
    scaled = values * np.float32(2.0 ** (-step / OCTAVE))
    magnitude = np.abs(scaled)
    if float(magnitude.max()) >= LARGEST - 1:
        raise NotPackable("a value is too far outside of the calibrated range")
    whole = (magnitude + rounding).astype(np.int32)
    whole *= magnitude >= zero
    return np.where(scaled < 0, -whole, whole)


def _reconstruct(whole: Array, table: Table, runs: list[Run], step: int) -> Array:
    """Components in units."""
    unit = np.float32(2.0 ** (step / OCTAVE))
    lengths = [stop - start for _, start, stop in runs]
    row = np.repeat(np.array([4 * min(at, LEVELS - 1) for at, _, _ in runs], np.int32), lengths)
    moved = table.offsets_at_work.reshape(-1)[row + np.minimum(np.abs(whole), 3)]
    return (whole + np.sign(whole) * moved) * unit
