"""Places: the axes of a tensor along which it has values for parts of the input, of a picture or of a sequence.

Convolutions and encoders keep their input's layout: a boundary tensor of 14 by 14 values has one for each sixteenth of
a picture's sides. Nothing in ONNX states that, so it is read from shapes, against the input's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import ShapeMismatch

Sizes = tuple[int, ...]
"""Rows and columns of a picture, or the length of a sequence."""
Window = tuple[slice, ...]


@dataclass(frozen=True)
class Places:
    """A tensor's places: `covered` axes from `axis` on hold `sizes`, after `leading` values without a place.

    Vision transformers flatten rows and columns into one axis, behind a class token.
    """

    tensor: str
    axis: int
    sizes: Sizes
    covered: int = 1
    leading: int = 0

    def view(self, array: Array) -> Array:
        """A view of `array` in which each of `sizes` is an axis of its own, the first at `axis`."""
        placed = array[(slice(None),) * self.axis + (slice(self.leading, None),)]
        return placed.reshape(*placed.shape[: self.axis], *self.sizes, *placed.shape[self.axis + self.covered :])


def windows(grid: Sizes, width: int, sizes: Sizes) -> Iterator[Window]:
    """Windows of `width` cells of a grid over `sizes` places, sliding by a cell, row by row.

    They begin before the first cell and end behind the last, so that as many windows cover a cell at the border as any
    other. Where places do not divide evenly among cells, a window has all places that it touches.
    """
    return product(
        *(
            [
                slice(max(0, i) * size // count, -(-min(count, i + width) * size // count))
                for i in range(1 - width, count)
            ]
            for count, size in zip(grid, sizes, strict=True)
        )
    )


def input_places(bundle: Bundle, inputs: Mapping[str, Array]) -> Places:
    """The places of the model's inputs: of its photo, else of a picture (4 axes), else of tokens (whole numbers).

    Of several inputs of tokens, the attention mask counts: a token that it excludes is hidden, and its id stays.

    Raises:
        ShapeMismatch: no input has places.
    """
    specs = {spec.name: spec for spec in bundle.inputs if spec.name in inputs}
    if bundle.preprocess is not None and (name := bundle.preprocess["input"]) in specs:
        layout = next(step["to"] for step in bundle.preprocess["steps"] if step["op"] == "layout")
        axis = 2 if layout == "NCHW" else 1
        return Places(name, axis, inputs[name].shape[axis : axis + 2], 2)
    for name, array in inputs.items():
        if array.ndim == 4 and array.dtype.kind == "f":
            # A picture has few channels, and most models have them before rows and columns.
            axis = 1 if array.shape[3] <= 4 < array.shape[1] else 2
            return Places(name, axis, array.shape[axis : axis + 2], 2)
    tokens = [name for name, array in inputs.items() if array.ndim == 2 and array.dtype.kind in "iu"]
    tokens.sort(key=lambda name: "mask" not in name)
    if tokens:
        return Places(tokens[0], 1, inputs[tokens[0]].shape[1:2])
    raise ShapeMismatch(
        f"{bundle.name} takes neither a picture nor tokens, and an explanation hides parts of these",
        got={spec.name: [spec.dtype, *spec.shape] for spec in specs.values()},
        expected="a float tensor with 4 axes, or whole numbers with 2",
    )


def boundary_places(specs: Sequence[TensorSpec], arrays: Mapping[str, Array], whole: Sizes) -> list[Places]:
    """The places of boundary tensors, for an input of `whole` places; tensors without places are left out."""
    found = (_places(spec.name, arrays[spec.name], whole) for spec in specs)
    return [places for places in found if places is not None]


def _places(name: str, array: Array, whole: Sizes) -> Places | None:
    shape = array.shape
    if array.dtype.kind not in "fV":  # bfloat16 is of kind V
        return None
    if len(whole) == 1:
        # (batch, tokens, width), or (batch, channels, steps).
        axis = next((i for i in (1, 2) if len(shape) == 3 and shape[i] == whole[0] > 1), 0)
        return Places(name, axis, whole) if axis else None
    if len(shape) == 4:
        # ONNX convolves (batch, channels, rows, columns); graphs of TensorFlow may hold channels last.
        axis = next((i for i in (2, 1) if _has_form(shape[i : i + 2], whole)), 0)
        return Places(name, axis, shape[axis : axis + 2], 2) if axis else None
    if len(shape) == 3:
        for axis, leading in product((1, 2), (0, 1)):
            sizes = _rows_and_columns(shape[axis] - leading, whole)
            if _has_form(sizes, whole):
                return Places(name, axis, sizes, 1, leading)
    return None


def _rows_and_columns(count: int, whole: Sizes) -> Sizes:
    """The rows and columns of the form of `whole` that make `count` places; empty if none do."""
    rows = round(math.sqrt(max(0, count) * whole[0] / whole[1]))
    return (rows, count // rows) if rows and count % rows == 0 else ()


def _has_form(sizes: Sizes, whole: Sizes) -> bool:
    """Whether `sizes` is `whole` made smaller by one factor, up to one row or column; a single place is none."""
    if len(sizes) != 2 or max(sizes) < 2 or any(size > full for size, full in zip(sizes, whole, strict=True)):
        return False
    return abs(sizes[0] * whole[1] - sizes[1] * whole[0]) <= max(whole)
