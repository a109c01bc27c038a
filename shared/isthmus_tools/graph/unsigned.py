"""Quantised activations as unsigned bytes, as onnxruntime makes them on x86 itself."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

_SHIFT = 128


def to_unsigned(graph: ir.Graph) -> None:
    """Let each QuantizeLinear to int8 between operators, with its DequantizeLinears, go through uint8: the same values.

    onnxruntime does so on x86, where products of uint8 by int8 are fast, but not for a tensor that enters or leaves a
    graph. At a cut, the operators on both sides would mix the two and so run in float, unlike those of the whole model.
    """
    shifted: dict[ir.Value, ir.Value] = {}
    for node in tuple(graph):
        if node.op_type != "QuantizeLinear" or node.domain or node.outputs[0].is_graph_output():
            continue
        readers = [use.node for use in node.outputs[0].uses()]
        if (
            readers
            and all(r.op_type == "DequantizeLinear" and r.graph is graph for r in readers)
            and all(_is_signed(n) for n in (node, *readers))
        ):
            for each in (node, *readers):
                each.replace_input_with(2, _shifted(graph, each, shifted))
            node.outputs[0].dtype = ir.DataType.UINT8


def _is_signed(node: ir.Node) -> bool:
    """Whether the node's zero point is constant and int8, one for the whole tensor or for each channel."""
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    named = node.attributes.get("output_dtype")
    return (
        zero is not None
        and zero.const_value is not None
        and zero.const_value.dtype == ir.DataType.INT8
        and zero.is_initializer()
        and (named is None or named.as_int() == 0)
    )


def _shifted(graph: ir.Graph, node: ir.Node, known: dict[ir.Value, ir.Value]) -> ir.Value:
    zero = node.inputs[2]
    if zero is None or zero.const_value is None:
        raise ValueError(f"{node.name} has no zero point")
    if zero not in known:
        name = f"{zero.name}_unsigned"
        while name in graph.initializers:
            name += "_"
        array = (zero.const_value.numpy().astype(np.int16) + _SHIFT).astype(np.uint8)
        tensor = ir.tensor(array, name=name)
        known[zero] = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
        )
        graph.register_initializer(known[zero])
    return known[zero]
