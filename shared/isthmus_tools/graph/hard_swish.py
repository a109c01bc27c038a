"""Hard swishes that a graph spells out, as two operators instead of four: between int8 layers they stay in float."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as ir_passes

from isthmus_tools.graph.channel_groups import constant_of
from isthmus_tools.graph.node_writer import NodeWriter, initialiser


def fuse_hard_swishes(path: Path) -> int:
    """Rewrite x * clip(x + 3, 0, 6) / 6 in the file as x * HardSigmoid(x), and tell how many there were.

    A convolution takes the sums with, and the products by, a number that read it alone. Where a number s > 0 multiplies
    the swish of a convolution's result, that one takes s too, and the slope of HardSigmoid 1 / s: networks that learn
    scales around activations spend as much time on these as on the swishes.
    """
    model = ir.load(path)
    for node in tuple(model.graph):
        if node.op_type == "Conv":
            while _fold_reader(model.graph, node):
                pass
    count = sum(_fuse(model.graph, node) for node in tuple(model.graph) if node.op_type == "Clip")
    if count:
        ir_passes.RemoveUnusedNodesPass()(model)
        ir.save(model, path)
    return count


def _fuse(graph: ir.Graph, clip: ir.Node) -> bool:
    add, product = _producer(clip), _reader(clip)
    if add is None or product is None or product.op_type != "Mul" or _scalar(add, "Add") != 3.0:
        return False
    division = _reader(product)
    x = next((value for value in add.inputs if value is not None and value.const_value is None), None)
    bounds = [
        None if array is None else float(array.reshape(-1)[0]) for array in map(partial(constant_of, clip), (1, 2))
    ]
    if x is None or x not in product.inputs or bounds != [0.0, 6.0] or _scalar(division, "Div") != 6.0:
        return False
    scale, last = 1.0, division
    scaled = _reader(last) if last is not None else None
    factor, layer = _scalar(scaled, "Mul"), x.producer()
    alone = not x.is_graph_output() and {*x.consumers()} == {add, product}
    # Of a negative factor the slope would turn, and HardSigmoid be another function.
    if factor is not None and factor > 0 and alone and _change_convolution(graph, layer, factor, 0.0):
        scale, last = factor, scaled
    if last is None:
        return False
    output = last.outputs[0]
    writer = NodeWriter()
    gate = writer.node("HardSigmoid", [x], f"{output.name}_gate", alpha=1 / (6 * scale), beta=0.5)
    fused = writer.node("Mul", [x, gate], f"{output.name}_fused")
    fused.shape, fused.type, gate.shape, gate.type = output.shape, output.type, x.shape, x.type
    graph.insert_before(last, writer.nodes)
    ir.convenience.replace_all_uses_with(output, fused)
    return True


def _fold_reader(graph: ir.Graph, layer: ir.Node) -> bool:
    """Let a convolution do the sum with a constant, or the product, that reads it alone."""
    reader = _reader(layer)
    factor, offset = _scalar(reader, "Mul"), _scalar(reader, "Add")
    if reader is None or (factor is None and offset is None):
        return False
    if not _change_convolution(graph, layer, 1.0 if factor is None else factor, offset or 0.0):
        return False
    ir.convenience.replace_all_uses_with(reader.outputs[0], layer.outputs[0])
    # Left there, it would count as one that reads the convolution.
    graph.remove(reader, safe=True)
    return True


def _change_convolution(graph: ir.Graph, layer: ir.Node | None, factor: float, offset: float) -> bool:
    """Multiply what a convolution gives by a number, and add another; False where its weights are no constants."""
    if layer is None or layer.op_type != "Conv":
        return False
    weight, bias = constant_of(layer, 1), constant_of(layer, 2)
    if weight is None or (bias is None and len(layer.inputs) > 2 and layer.inputs[2] is not None):
        return False
    old = np.zeros(len(weight), weight.dtype) if bias is None else bias
    layer.resize_inputs(3)
    for index, array in ((1, weight * factor), (2, old * factor + offset)):
        # A value of the layer's own: another may share the constant.
        value = initialiser(ir.tensor(array.astype(weight.dtype), name=f"{layer.outputs[0].name}/folded/{index}"))
        graph.initializers.pop(str(value.name), None)
        graph.register_initializer(value)
        layer.replace_input_with(index, value)
    return True


def _producer(node: ir.Node) -> ir.Node | None:
    return node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None


def _reader(node: ir.Node) -> ir.Node | None:
    """The only node that reads the result, None where it has others or is the graph's."""
    output = node.outputs[0]
    readers = output.consumers()
    return None if output.is_graph_output() or len(readers) != 1 else readers[0]


def _scalar(node: ir.Node | None, kind: str) -> float | None:
    """The single number that a sum, product or division takes beside a tensor; None where it is another node."""
    if node is None or node.op_type != kind or len(node.inputs) != 2 or node.outputs[0].is_graph_output():
        return None
    # Sums and products take it on either side.
    for index in (1,) if kind == "Div" else (0, 1):
        array = constant_of(node, index)
        if array is not None and array.shape in ((), (1,)):
            return float(array.reshape(-1)[0])
    return None
