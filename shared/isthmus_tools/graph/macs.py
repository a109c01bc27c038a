"""Multiply-accumulates (MACs) of a node, from the shapes of its inputs and outputs; 0 for elementwise operators.

An estimate to prune candidates, not a cost: times are measured. A node with an unknown shape counts 0.

Sources: operator definitions of onnx.ai/onnx/operators; Sze et al., "Efficient Processing of Deep Neural
Networks: A Tutorial and Survey", Proceedings of the IEEE, 2017.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from isthmus_tools.graph.load import bodies

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

_MAX_TRIPS = 2**31


def of_node(node: ir.Node, shapes: Shapes) -> int:
    """MACs of a run of `node`: the costlier branch of an If, the body of a Loop or Scan times its trip count.

    A trip count that depends on values counts as 1.
    """
    if node.op_type == "If":
        return max((_of_body(body, shapes) for body in bodies(node)), default=0)
    if node.op_type in ("Loop", "Scan"):
        return _trips(node, shapes) * sum(_of_body(body, shapes) for body in bodies(node))
    count = _COUNTS.get(node.op_type)
    return 0 if count is None else count(node, shapes)


def _of_body(body: ir.Graph, shapes: Shapes) -> int:
    return sum(of_node(node, shapes) for node in body)


def _trips(node: ir.Node, shapes: Shapes) -> int:
    if node.op_type == "Loop":
        limit = node.inputs[0] if node.inputs else None
        tensor = None if limit is None else limit.const_value
        # Exporters write INT64_MAX for loops that end by their condition.
        return 1 if tensor is None else min(int(np.asarray(tensor.numpy()).reshape(-1)[0]), _MAX_TRIPS)
    attribute = node.attributes.get("num_scan_inputs")
    scanned = 0 if attribute is None else attribute.as_int()
    axes = node.attributes.get("scan_input_axes")
    shape = _input(node, len(node.inputs) - scanned, shapes)
    return 1 if not shape else shape[axes.as_ints()[0] if axes is not None else 0]


def _input(node: ir.Node, index: int, shapes: Shapes) -> tuple[int, ...] | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None else shapes.get(str(value.name))


def _output(node: ir.Node, shapes: Shapes) -> tuple[int, ...] | None:
    return next((shapes[str(v.name)] for v in node.outputs if v.name in shapes), None)


def _conv(weight: int) -> Callable[[ir.Node, Shapes], int]:
    # Each output element sums over (input channels / group) x kernel: the weight's shape without its first axis.
    def count(node: ir.Node, shapes: Shapes) -> int:
        out, w = _output(node, shapes), _input(node, weight, shapes)
        return 0 if out is None or not w else prod(out) * prod(w[1:])

    return count


def _conv_transpose(node: ir.Node, shapes: Shapes) -> int:
    # Each input element adds to (output channels / group) x kernel elements.
    x, w = _input(node, 0, shapes), _input(node, 1, shapes)
    return 0 if x is None or not w else prod(x) * prod(w[1:])


def _matmul(node: ir.Node, shapes: Shapes) -> int:
    a, out = _input(node, 0, shapes), _output(node, shapes)
    if not a or out is None:
        return 0
    transposed = node.attributes.get("transA")
    return prod(out) * (a[-2] if transposed is not None and transposed.as_int() and len(a) > 1 else a[-1])


def _matmul_n_bits(node: ir.Node, shapes: Shapes) -> int:
    out, k = _output(node, shapes), node.attributes.get("K")
    return 0 if out is None or k is None else prod(out) * k.as_int()


def _recurrent(node: ir.Node, shapes: Shapes) -> int:
    # x: (steps, batch, width), or (batch, steps, width) where layout is 1; every step reads all of W and R.
    x, w, r = (_input(node, i, shapes) for i in range(3))
    return 0 if x is None or w is None or r is None or len(x) < 2 else x[0] * x[1] * (prod(w) + prod(r))


def _attention(node: ir.Node, shapes: Shapes) -> int:
    # Q K^T takes every query element times every key; the product with V, every output element times every key.
    q, k, out = _input(node, 0, shapes), _input(node, 1, shapes), _output(node, shapes)
    return 0 if q is None or out is None or not k or len(k) < 2 else (prod(q) + prod(out)) * k[-2]


def _einsum(node: ir.Node, shapes: Shapes) -> int:
    # Each index combination of all terms is a product, so the sizes of all labels multiply.
    equation = node.attributes["equation"].as_string().replace(" ", "")
    terms = equation.partition("->")[0].split(",")
    if "." in equation or len(terms) < 2:
        return 0
    sizes: dict[str, int] = {}
    for i, term in enumerate(terms):
        shape = _input(node, i, shapes)
        if shape is None or len(shape) != len(term):
            return 0
        sizes.update(zip(term, shape, strict=True))
    return prod(sizes.values())


_COUNTS: Mapping[str, Callable[[ir.Node, Shapes], int]] = {
    "Conv": _conv(1),
    "FusedConv": _conv(1),
    "ConvInteger": _conv(1),
    "DeformConv": _conv(1),
    "QLinearConv": _conv(3),
    "ConvTranspose": _conv_transpose,
    "Gemm": _matmul,
    "FusedGemm": _matmul,
    "QGemm": _matmul,
    "MatMul": _matmul,
    "FusedMatMul": _matmul,
    "MatMulInteger": _matmul,
    "QLinearMatMul": _matmul,
    "MatMulNBits": _matmul_n_bits,
    "Einsum": _einsum,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
    "Attention": _attention,
}
