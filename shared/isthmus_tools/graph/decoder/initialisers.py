"""A decoder's weights as initialisers of its graph, in the precision of their layer, each read when it is written.

A float16 matrix is cast to float32 when a session is made. int8 and int4 are weight-only: blocks of 32 along a matrix's
inputs with a scale each, multiplied by onnxruntime's MatMulNBits.

Source: MatMulNBits and GatherBlockQuantized of onnxruntime (ContribOperators).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from isthmus.arrays import Array
from isthmus.errors import ModelError
from isthmus_tools.graph.decoder.config import DecoderWeights
from isthmus_tools.graph.node_writer import initialiser
from isthmus_tools.graph.quantise import BLOCK, quantise_blocks


class MatrixPart(NamedTuple):
    """A tensor of the file that holds rows of a matrix, (rows, inputs)."""

    name: str
    rows: int


class Initialisers:
    """The initialisers of a graph, by name; `values` are in the order of their first use."""

    def __init__(self, weights: DecoderWeights) -> None:
        self._weights = weights
        self.values: dict[str, ir.Value] = {}
        self._used: set[str] = set()
        # Packed integers and scales of a matrix are written one after the other, of one reading.
        self._blocks = lru_cache(1)(self._quantised)

    def constant(self, name: str, array: Array) -> ir.Value:
        """An array that the graph brings itself."""
        return self._add(name, array.shape, array.dtype.type, lambda: array)

    def unused(self) -> list[str]:
        """Tensors of the file that no value reads."""
        return self._weights.others(self._used)

    def vector(self, name: str, parts: Sequence[MatrixPart]) -> ir.Value:
        """Biases or scales of the file, in float32 always: these are small, and norms multiply their errors."""
        self._check(parts)
        # Read now: a small tensor is part of the graph's document, whose writer hides errors.
        return self.constant(name, np.concatenate([self._read(part.name, (part.rows,)) for part in parts]))

    def table(self, name: str, shape: tuple[int, int], *, half: bool) -> ir.Value:
        """A matrix as the file has it. Shapes: (rows, width)."""
        self._check([MatrixPart(name, shape[0])])
        return self._floats(name, shape, half, lambda: self._read(name, shape))

    def matrix(self, name: str, parts: Sequence[MatrixPart], inputs: int, *, half: bool) -> ir.Value:
        """The rows of these parts, transposed to multiply from the right. Shapes: (inputs, rows)."""
        self._check(parts)
        shape = (inputs, sum(part.rows for part in parts))
        return self._floats(name, shape, half, lambda: self._joined(parts, inputs))

    def blocks(
        self, name: str, parts: Sequence[MatrixPart], inputs: int, bits: int, *, flat: bool = False
    ) -> tuple[ir.Value, ir.Value]:
        """The rows of these parts as packed integers and scales.

        Shapes: (rows, blocks, 32 * bits / 8) uint8, or (rows, blocks * 32 * bits / 8) where `flat`; (rows, blocks)
        float32.
        """
        self._check(parts)
        rows, count, packed_bytes = sum(part.rows for part in parts), -(-inputs // BLOCK), BLOCK * bits // 8
        layout: list[tuple[str, tuple[int, ...], type[Any]]] = [
            ("packed", (rows, count * packed_bytes) if flat else (rows, count, packed_bytes), np.uint8),
            ("scales", (rows, count), np.float32),
        ]

        def reader(i: int) -> Callable[[], Array]:
            return lambda: self._blocks(tuple(parts), inputs, bits)[i].reshape(layout[i][1])

        packed, scales = (
            self._add(f"{name}.int{bits}.{kind}", shape, dtype, reader(i))
            for i, (kind, shape, dtype) in enumerate(layout)
        )
        return packed, scales

    def _quantised(self, parts: tuple[MatrixPart, ...], inputs: int, bits: int) -> tuple[Array, Array]:
        return quantise_blocks(self._joined(parts, inputs), bits)

    def _joined(self, parts: Sequence[MatrixPart], inputs: int) -> Array:
        rows = [self._read(part.name, (part.rows, inputs)) for part in parts]
        return np.ascontiguousarray(np.concatenate(rows).T)

    def _read(self, name: str, shape: tuple[int, ...]) -> Array:
        array = self._weights.get(name)
        if array.shape != shape:
            raise ModelError(
                f"the tensor {name} has the shape {list(array.shape)}; the configuration says {list(shape)}",
                tensor=name,
                got=list(array.shape),
                expected=list(shape),
            )
        return array

    def _floats(self, name: str, shape: tuple[int, int], half: bool, read: Callable[[], Array]) -> ir.Value:
        if not half:
            return self._add(name, shape, np.float32, read)

        def read_half() -> Array:
            with np.errstate(over="ignore"):  # refused by name instead
                values = read().astype(np.float16)
            if not np.isfinite(values).all():
                raise ModelError(f"the tensor {name} holds numbers beyond float16", tensor=name)
            return values

        return self._add(f"{name}.float16", shape, np.float16, read_half)

    def _check(self, parts: Sequence[MatrixPart]) -> None:
        # Before the first byte is written: a missing tensor of the last layer would be found after minutes.
        if missing := [part.name for part in parts if part.name not in self._weights]:
            raise ModelError(f"the model lacks the tensor {missing[0]}", tensor=missing[0])
        self._used.update(part.name for part in parts)

    def _add(self, name: str, shape: tuple[int, ...], dtype: type[Any], read: Callable[[], Array]) -> ir.Value:
        if name not in self.values:
            kind = ir.DataType.from_numpy(np.dtype(dtype))
            tensor = ir.LazyTensor(lambda: ir.tensor(read(), name=name), kind, ir.Shape(shape), name=name)
            self.values[name] = initialiser(tensor)
        return self.values[name]
