"""Refining what `transform/4` packed: each refinement makes the step a third, and takes what the finer step costs more.

Tensors are refined in the rotation and the planes of a `Table`; a `RowTable` sorts its rows by the step, so that what
was sent at one says nothing of another. A refinement is its gain (one byte), for finer steps show more of a tensor's
magnitude, and the coded thirds. docs/codecs.md, "Refining".
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import numpy as np

from isthmus.codecs import NotPackable, entropy, thirds
from isthmus.codecs.entropy import LARGEST
from isthmus.codecs.steps import FACTOR, THIRD, size_of
from isthmus.codecs.table import GAINS, Grid, Table
from isthmus.codecs.transform import gain_of, head, rounded, synthesised

Array = np.ndarray[Any, np.dtype[Any]]

_ASTRAY = 2
"""Finer steps: what was rounded to a step is within one and a half of them, and ties round to two."""


class Known(NamedTuple):
    """What is known of a tensor: its sorted components in whole steps, int8, int16 or int32 (n,), and the step."""

    step: int
    numbers: Array

    @classmethod
    def of(cls, step: int, numbers: Array) -> Self:
        """That of whole numbers, float32 (n,).

        Raises:
            ValueError: one is too large.
        """
        largest = float(np.abs(numbers).max())
        if not largest < LARGEST / 2:
            raise ValueError("a value is too far outside of the calibrated range")
        return cls(step, numbers.astype(np.int8 if largest < 2**7 else np.int16 if largest < 2**15 else np.int32))


def known_at(values: Array, step: int) -> Known:
    """What a payload at that step tells of components in units, sorted, float32 (n,).

    Raises:
        NotPackable: one is too large.
    """
    return Known.of(step, rounded(values, step, entropy.room(values.size))[: values.size])


def known_of(payload: memoryview, shape: tuple[int, ...], table: Table) -> Known:
    """What a payload of `transform/4` tells.

    Raises:
        ValueError: it is not one of a tensor of that shape, or the tensor is empty.
    """
    grid = _grid(shape, table)
    step, gain = head(payload, table)
    return Known.of(step, entropy.decode(payload[2:], grid.plan(step, gain)))


def refine(values: Array, shape: tuple[int, ...], known: Known, table: Table) -> tuple[bytes, Known]:
    """The next refinement of a tensor of which so much is known, and what is known after it.

    `values` are its components in units, sorted, float32 (n,); see `transform.analysed`.

    Raises:
        NotPackable: it would go below the finest step; values too large; `values` are not what is known.
    """
    step, grid = known.step - THIRD, _grid(shape, table)
    if step < table.steps[1]:
        raise NotPackable("there is no finer step")
    if known.numbers.size != values.size:
        raise NotPackable("this is not the tensor that was sent")
    coarse = _thrice(known)
    more = values * np.float32(1 / size_of(step))
    np.rint(more, out=more)
    more -= coarse
    if not float(np.abs(more).max()) <= _ASTRAY:
        raise NotPackable("this is not the tensor that was sent")
    more = np.minimum(np.maximum(more, -1), 1).astype(np.int8)
    coarse += more
    try:
        finer = Known.of(step, coarse)
    except ValueError as e:
        raise NotPackable(str(e)) from e
    gain = min(gain_of(values, grid, step), GAINS[1])
    return bytes((gain & 255,)) + thirds.encode(more, known.numbers, grid.runs(step, gain), grid.models), finer


def read(part: memoryview, known: Known, shape: tuple[int, ...], table: Table) -> Known:
    """What is known after one more refinement.

    Raises:
        ValueError: it is none of a tensor of that shape, of which so much is known; or beyond the finest step.
    """
    grid = _grid(shape, table)
    if known.numbers.size != grid.count:
        raise ValueError("a refinement of a tensor of another size")
    if (step := known.step - THIRD) < table.steps[1]:
        raise ValueError(f"a refinement to step {step}; the table ends at {table.steps[1]}")
    if not len(part) or not GAINS[0] <= (gain := int(np.frombuffer(part[:1], np.int8)[0])) <= GAINS[1]:
        raise ValueError("a refinement without a gain, or with one out of range")
    finer = _thrice(known)
    finer += thirds.decode(part[1:], known.numbers, grid.runs(step, gain), grid.models)
    return Known.of(step, finer)


def tensor_of(known: Known, dtype: np.dtype[Any], shape: tuple[int, ...], table: Table) -> Array:
    """The tensor of which so much is known.

    Raises:
        ValueError: it is not one of that shape.
    """
    return synthesised(known.numbers.astype(np.float32), known.step, _grid(shape, table), dtype, shape, table)


def _thrice(known: Known) -> Array:
    coarse = known.numbers.astype(np.float32)
    coarse *= FACTOR
    return coarse


def _grid(shape: tuple[int, ...], table: Table) -> Grid:
    if (grid := table.grid(shape)) is None:
        raise ValueError("an empty tensor is never refined")
    return grid
