"""Nodes of a decoder's graph that multiply with its weights, by the precision of their layer.

int8 and int4 products round their activations to 8 bits by blocks of 32 (accuracy level 4): measured ten times as fast
as with float32 activations, and the one kernel whose row does not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from isthmus.arrays import Array
from isthmus_tools.graph.decoder.config import DecoderWeights, Precision
from isthmus_tools.graph.decoder.initialisers import Initialisers, MatrixPart
from isthmus_tools.graph.node_writer import NodeWriter
from isthmus_tools.graph.quantise import BLOCK

_BITS: dict[Precision, int] = {"int8": 8, "int4": 4}
# The session's own default is that of the runtime, which differs between segments: stated in each node.
_INT8_ACTIVATIONS = 4


class Products(NodeWriter):
    """Appends nodes; `initialisers` are their constants."""

    def __init__(self, weights: DecoderWeights) -> None:
        super().__init__()
        self.initialisers = Initialisers(weights)

    def constant(self, name: str, array: Array) -> ir.Value:
        """An array that the graph brings itself."""
        return self.initialisers.constant(name, array)

    def rows(self, name: str, ids: ir.Value, shape: tuple[int, int], precision: Precision, output: str) -> ir.Value:
        """Rows of a matrix by index, in float32. Only these are cast or scaled: the table stays as it is stored."""
        if precision in _BITS:
            packed, scales = self._flat(name, shape, precision)
            sizes = {"bits": _BITS[precision], "block_size": BLOCK}
            return self.node(
                "GatherBlockQuantized", [packed, ids, scales], output, gather_axis=0, quantize_axis=1, **sizes
            )
        table = self.initialisers.table(name, shape, half=precision == "float16")
        if precision == "float32":
            return self.node("Gather", [table, ids], output)
        return self._float32(self.node("Gather", [table, ids], f"{output}.half"), output)

    def product(
        self, x: ir.Value, name: str, parts: Sequence[MatrixPart], inputs: int, precision: Precision
    ) -> ir.Value:
        """`x` times the rows of these parts. Shapes: (batch, tokens, inputs) to (batch, tokens, rows)."""
        if precision in _BITS:
            blocks = self.initialisers.blocks(f"{name}.weight", parts, inputs, _BITS[precision])
            return self._multiply(x, blocks, (sum(part.rows for part in parts), inputs), precision, f"{name}.out")
        matrix = self.initialisers.matrix(f"{name}.weight", parts, inputs, half=precision == "float16")
        if precision == "float16":
            # Of constants alone: done once, when a session is made.
            matrix = self._float32(matrix, f"{name}.weight.cast")
        return self.node("MatMul", [x, matrix], f"{name}.out")

    def scores(
        self, x: ir.Value, name: str, shape: tuple[int, int], precision: Precision, output: ir.Value
    ) -> ir.Value:
        """`x` times the rows of a table, stored as `rows` reads it: a tied embedding is stored once."""
        if precision in _BITS:
            packed, scales = self._flat(name, shape, precision)
            sizes = self.constant("output_shape", np.array([shape[0], shape[1] // BLOCK, -1]))
            matrix = self.node("Reshape", [packed, sizes], "output_matrix")
            return self._multiply(x, [matrix, scales], shape, precision, output)
        table = self.initialisers.table(name, shape, half=precision == "float16")
        if precision == "float16":
            table = self._float32(table, "output_cast")
        # Transposed when a session is made.
        return self.node("MatMul", [x, self.node("Transpose", [table], "output_matrix", perm=[1, 0])], output)

    def _flat(self, name: str, shape: tuple[int, int], precision: Precision) -> tuple[ir.Value, ir.Value]:
        return self.initialisers.blocks(name, [MatrixPart(name, shape[0])], shape[1], _BITS[precision], flat=True)

    def _multiply(
        self,
        x: ir.Value,
        blocks: Sequence[ir.Value],
        shape: tuple[int, int],
        precision: Precision,
        output: ir.Value | str,
    ) -> ir.Value:
        sizes = {"N": shape[0], "K": shape[1], "bits": _BITS[precision], "block_size": BLOCK}
        return self.node("MatMulNBits", [x, *blocks], output, accuracy_level=_INT8_ACTIVATIONS, **sizes)

    def _float32(self, value: ir.Value, output: str) -> ir.Value:
        return self.node("Cast", [value], output, to=int(ir.DataType.FLOAT))
