"""Inputs of a model: shapes bound to free dimensions, and synthetic arrays for runs without examples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ml_dtypes  # noqa: F401  numpy then knows bfloat16 by name
import numpy as np
import onnx_ir as ir

from isthmus.arrays import Array
from isthmus.artifacts.tensors import Dim, TensorSpec
from isthmus.errors import ModelError
from isthmus.units import format_size

FREE = "?"
"""The name of a free dimension without a name of its own."""
# Of each input: thirty times the default bound of a request. Arrays of bound shapes are allocated to run the model.
MAX_INPUT_BYTES = 2**31
# Noise blocks along each axis: coarse enough for pooled features, fine enough to differ between regions.
_BLOCKS = 8


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of an array in numpy's layout."""
    return math.prod(shape) * np.dtype(dtype).itemsize


def dims(value: ir.Value) -> tuple[Dim, ...] | None:
    """A value's declared shape; non-negative integers are fixed, all else is free. None without a declared rank."""
    if value.shape is None:
        return None
    return tuple(d if isinstance(d, int) and d >= 0 else str(getattr(d, "value", None) or FREE) for d in value.shape)


def dtype_of(value: ir.Value) -> str | None:
    """numpy's name of a value's dtype; None for texts and undeclared dtypes."""
    return None if value.dtype is None else dtype_name(int(value.dtype))


def dtype_name(code: int) -> str | None:
    """numpy's name of an ONNX data type code; None for texts and the undefined type."""
    kind = ir.DataType(code)
    return None if kind in (ir.DataType.UNDEFINED, ir.DataType.STRING) else str(kind.numpy().name)


def bind_inputs(
    graph: ir.Graph, bind: Mapping[str, Sequence[int]], examples: Mapping[str, Array]
) -> dict[str, tuple[int, ...]]:
    """A complete shape for each input: from `bind`, else from `examples`, else declared with a free first dimension 1.

    Raises:
        ModelError: an unknown input, a shape that contradicts the declared shape, or an unbound free dimension.
    """
    return bind_shapes({str(v.name): (dtype_of(v), dims(v)) for v in graph.inputs}, bind, examples)


def bind_shapes(
    inputs: Mapping[str, tuple[str | None, tuple[Dim, ...] | None]],
    bind: Mapping[str, Sequence[int]],
    examples: Mapping[str, Array],
) -> dict[str, tuple[int, ...]]:
    """As `bind_inputs`, for inputs given by name as dtype and declared shape; None for unknown.

    Raises:
        ModelError: as `bind_inputs`.
    """
    names = list(inputs)
    for name in (*bind, *examples):
        if name not in names:
            raise ModelError(f"the model has no input {name!r}; it has {', '.join(names)}", input=name, inputs=names)
    return {n: _bound(n, dtype, shape, bind.get(n), examples.get(n)) for n, (dtype, shape) in inputs.items()}


def _bound(
    name: str,
    dtype: str | None,
    declared: tuple[Dim, ...] | None,
    explicit: Sequence[int] | None,
    example: Array | None,
) -> tuple[int, ...]:
    if example is not None and dtype not in (None, example.dtype.name):
        raise ModelError(
            f"the input {name} takes {dtype}, and its example holds {example.dtype.name}",
            input=name,
            hint=f"save it as {dtype}: numpy.save(file, array.astype({dtype!r}))",
        )
    shape = explicit if explicit is not None or example is None else example.shape
    if shape is None:
        if declared is None or any(isinstance(d, str) for d in declared[1:]):
            template = "NxN" if declared is None else "x".join("N" if isinstance(d, str) else str(d) for d in declared)
            raise ModelError(
                f"the input {name} has the shape {_text(declared)}, and nothing binds its free dimensions",
                input=name,
                hint=f"give one shape to count with, a number for each N: --shape {name}={template}",
            )
        shape = tuple(1 if isinstance(d, str) else d for d in declared)
    bound = tuple(int(n) for n in shape)
    if declared is not None and not agrees(declared, bound):
        raise ModelError(
            f"the input {name} has the shape {_text(declared)}; {_text(bound)} does not fit it", input=name
        )
    check_size(name, dtype or "float32", bound)
    if example is not None and example.shape != bound:
        raise ModelError(
            f"the example of {name} has the shape {_text(example.shape)}, and {_text(bound)} was given",
            input=name,
            hint="leave the shape out: the example has one",
        )
    return bound


def agrees(declared: Sequence[Dim], shape: Sequence[int]) -> bool:
    """Whether `shape` has the declared rank and fixed dimensions."""
    return len(shape) == len(declared) and all(
        isinstance(d, str) or d == n for d, n in zip(declared, shape, strict=True)
    )


def check_size(name: str, dtype: str, shape: Sequence[int]) -> None:
    """Refuse an input shape beyond any request's bound.

    Raises:
        ModelError: more than MAX_INPUT_BYTES.
    """
    if (size := nbytes(dtype, shape)) > MAX_INPUT_BYTES:
        raise ModelError(
            f"the input {name} would take {format_size(size)} at the shape {_text(tuple(shape))}; at most"
            f" {format_size(MAX_INPUT_BYTES)} are run",
            input=name,
            limit=MAX_INPUT_BYTES,
            hint="give a smaller shape to count with: --shape",
        )


def _text(shape: Sequence[Dim] | None) -> str:
    return "(of unknown rank)" if shape is None else "x".join(str(d) for d in shape) or "of a single number"


def feeds(graph: ir.Graph, bound: Mapping[str, tuple[int, ...]], examples: Mapping[str, Array]) -> dict[str, Array]:
    """An array for each input: the example, else ones of the bound shape, or zeros for integers."""
    arrays: dict[str, Array] = {}
    for value in graph.inputs:
        name, dtype = str(value.name), np.dtype(dtype_of(value) or "float32")
        # Zero is a valid index and token id for every model.
        make = np.zeros if dtype.kind in "iu" else np.ones
        arrays[name] = examples[name] if name in examples else make(bound[name], dtype)
    return arrays


def trial_inputs(
    graph: ir.Graph, bound: Mapping[str, tuple[int, ...]], examples: Mapping[str, Array]
) -> list[dict[str, Array]]:
    """Sets of inputs to run a model with, the most discriminating first.

    First floats uniform in [0, 1) where no example exists, so that two operators' outputs differ; then `feeds`, for
    models that take floats as counts.
    """
    plain = feeds(graph, bound, examples)
    # A fixed seed: an import of the same model gives the same findings.
    rng = np.random.default_rng(0)
    varied = {
        name: a if name in examples or a.dtype.kind in "iub" else np.asarray(rng.random(a.shape), a.dtype)
        for name, a in plain.items()
    }
    return [varied, plain]


class FreeDim(NamedTuple):
    """A free dimension: its label, the inputs and axes that have it, its size in the example, and alternative sizes."""

    label: str
    places: Sequence[tuple[str, int]]
    size: int
    alternatives: Sequence[int]


def free_dims(specs: Sequence[TensorSpec], arrays: Mapping[str, Array]) -> list[FreeDim]:
    """The free dimensions of `specs`; equal names are a single dimension, unnamed ones each their own."""
    places: dict[str, list[tuple[str, int]]] = {}
    for spec in specs:
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, str):
                places.setdefault(dim if dim != FREE else f"axis {axis} of {spec.name}", []).append((spec.name, axis))
    sizes = {label: arrays[axes[0][0]].shape[axes[0][1]] for label, axes in places.items()}
    return [FreeDim(label, axes, sizes[label], _alternatives(sizes[label])) for label, axes in places.items()]


def distinct_sizes(free: Sequence[FreeDim]) -> list[int]:
    """An alternative size for each dimension, pairwise distinct where possible.

    Equal sizes would not show the dimension that a value's shape follows.
    """
    sizes: list[int] = []
    for dim in free:
        sizes.append(next((n for n in dim.alternatives if n not in sizes), dim.alternatives[0]))
    return sizes


def _alternatives(n: int) -> list[int]:
    # Half and twice first: they keep the factors that strides and heads need. Size 1 would be broadcast, and so hide a
    # shape that does not follow, hence only where n is 2.
    halves = [n // 2] if n % 2 == 0 and n > 2 else []
    return [m for m in dict.fromkeys((*halves, 2 * n, n + 1, n - 1)) if m > 0 and m != n]


def resized(arrays: Mapping[str, Array], sizes: Sequence[tuple[FreeDim, int]]) -> dict[str, Array]:
    """`arrays` with each free dimension of the size beside it; values repeat, so token ids stay token ids."""
    shapes = {name: list(a.shape) for name, a in arrays.items()}
    for dim, size in sizes:
        for name, axis in dim.places:
            shapes[name][axis] = size
    return {name: _tiled(a, shapes[name]) for name, a in arrays.items()}


def _tiled(array: Array, shape: Sequence[int]) -> Array:
    for axis, size in enumerate(shape):
        if array.shape[axis] == 0:
            array = np.zeros((*array.shape[:axis], size, *array.shape[axis + 1 :]), array.dtype)
        elif array.shape[axis] != size:
            array = np.take(array, np.arange(size) % array.shape[axis], axis)
    return np.asarray(array, order="C")  # ascontiguousarray would give a number an axis


def noise(arrays: Mapping[str, Array], seed: int) -> dict[str, Array]:
    """Normally distributed floats; for odd seeds constant within blocks, as in images and audio. Integers reversed."""
    rng = np.random.default_rng([1, seed])

    def sample(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Array:
        array = rng.normal(0, 1 + seed // 2, shape)
        for axis in range(1, len(shape)) if seed % 2 else ():
            block = max(1, shape[axis] // _BLOCKS)
            array = np.take(array, np.arange(shape[axis]) // block * block, axis)
        return np.asarray(array, dtype)

    return {n: np.flip(a) if a.dtype.kind in "iub" else sample(a.shape, a.dtype) for n, a in arrays.items()}


def other_values(array: Array) -> Array:
    """Different values of the same dtype and shape that stay in the array's own range."""
    if array.dtype.kind in "iu":
        return np.flip(array) if array.any() else np.ones_like(array)
    return ~array if array.dtype.kind == "b" else np.flip(-array)


def named_sizes(specs: Sequence[TensorSpec], arrays: Mapping[str, Array]) -> dict[str, int]:
    """The size of each named free dimension."""
    return {
        dim: n
        for spec in specs
        for dim, n in zip(spec.shape, arrays[spec.name].shape, strict=True)
        if isinstance(dim, str) and dim != FREE
    }
