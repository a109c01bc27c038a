"""Graphs that are written node by node: those of decoders, of their exit branches, and of sentence encoders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import onnx_ir as ir

from isthmus.arrays import DTYPES
from isthmus.artifacts.tensors import TensorSpec

MICROSOFT = "com.microsoft"
# Operators with one output that onnxruntime alone has.
_MICROSOFTS = ("MatMulNBits", "GatherBlockQuantized")
_OPSET, _IR_VERSION = 21, 10


class NodeWriter:
    """Appends nodes to `nodes`, each behind those that compute its inputs."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []

    def node(self, kind: str, inputs: Sequence[ir.Value | None], output: ir.Value | str, **attributes: Any) -> ir.Value:
        """A node of a single output, which it is named after; of onnxruntime's domain where that has the operator."""
        value = ir.Value(name=output) if isinstance(output, str) else output
        domain = MICROSOFT if kind in _MICROSOFTS else ""
        self.nodes.append(ir.node(kind, inputs, attributes, domain=domain, outputs=[value], name=str(value.name)))
        return value


def initialiser(tensor: ir.TensorProtocol) -> ir.Value:
    """The value of a tensor that a graph brings itself, of the tensor's name."""
    kind, shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
    return ir.Value(name=tensor.name, type=kind, shape=shape, const_value=tensor)


def declare(value: ir.Value, spec: TensorSpec) -> ir.Value:
    """The value with the dtype and the shape that its segment declares."""
    value.type = ir.TensorType(ir.DataType.from_numpy(DTYPES[spec.dtype]))
    value.shape = ir.Shape([None if size == "?" else size for size in spec.shape])
    return value


def written_model(
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
    nodes: Sequence[ir.Node],
    initialisers: Iterable[ir.Value],
    name: str,
) -> ir.Model:
    """The model of a graph."""
    opsets = {"": _OPSET} | ({MICROSOFT: 1} if any(node.domain == MICROSOFT for node in nodes) else {})
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=list(initialisers), opset_imports=opsets, name=name)
    return ir.Model(graph, ir_version=_IR_VERSION, producer_name="isthmus")
