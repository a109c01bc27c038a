"""Edits of a graph's channels and weights: what structured pruning and distillation change in a head."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx_ir as ir
from msgspec import structs

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Blob, Segment, digest_of
from isthmus.artifacts.tensors import TensorSpec
from isthmus_tools.graph.channel_groups import (
    ChannelGroup,
    ConsumerLayer,
    channel_groups,
    constant_of,
    consumer_layer,
    is_depthwise,
    is_flag,
    writes_boundary,
)
from isthmus_tools.graph.model import open_model
from isthmus_tools.graph.node_writer import initialiser


@dataclass(frozen=True)
class LayerGeometry:
    """Where a convolution reads: empty sequences for a matrix product. `pads` are those before the first element."""

    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()


@dataclass(frozen=True)
class LayerWeights:
    """A layer as a matrix. Shapes: matrix (channels * block, outputs), bias (outputs,), None without a place for it."""

    matrix: Array
    bias: Array | None
    block: int
    geometry: LayerGeometry


class EditableGraph:
    """A graph whose weights are inside its file, to be changed in memory."""

    def __init__(self, path: Path) -> None:
        self.model = ir.load(path)
        self._path = path
        self._nodes = {str(node.name): node for node in self.model.graph}
        self.outputs_left: dict[str, Sequence[int]] = {}
        """The output channels that are left of layers that lost some."""

    @cached_property
    def groups(self) -> tuple[list[ChannelGroup], dict[str, str]]:
        """As `channel_groups`."""
        return channel_groups(self.model)

    @cached_property
    def depthwise(self) -> frozenset[str]:
        """The names of depthwise convolutions."""
        return frozenset(name for name, node in self._nodes.items() if is_depthwise(node))

    def macs(self, inputs: Mapping[str, Array]) -> dict[str, int]:
        """MACs of each node for these inputs, by name."""
        model = open_model(self._path, bind={n: a.shape for n, a in inputs.items()}, examples=inputs, normalise=False)
        return {str(node.name): macs for node, macs in zip(model.nodes, model.macs, strict=True)}

    def boundary_layers(self) -> list[ConsumerLayer]:
        """The last layer before each output of the graph, behind activations and sums."""
        nodes = [node for value in self.model.graph.outputs if (node := writes_boundary(value)) is not None]
        return [consumer_layer(node, node.inputs[0]) for node in nodes if node.inputs[0] is not None]

    def layer(self, name: str) -> LayerWeights:
        """The weights of a Conv, a MatMul or a Gemm."""
        node = self._nodes[name]
        weight = _constant(node, 1)
        bias = constant_of(node, 2)
        if node.op_type != "Conv":
            matrix = weight.T if is_flag(node, "transB") else weight
            # A MatMul has no place for a bias; the sum behind it keeps its own.
            offset = None if node.op_type == "MatMul" else np.zeros(matrix.shape[1]) if bias is None else bias
            return LayerWeights(matrix, None if offset is None else offset.reshape(-1), 1, LayerGeometry())
        outputs, block = weight.shape[0], math.prod(weight.shape[2:])
        rank = weight.ndim - 2
        geometry = LayerGeometry(
            tuple(weight.shape[2:]),
            tuple(node.attributes.get_ints("strides", (1,) * rank)),
            tuple(node.attributes.get_ints("pads", (0,) * 2 * rank)[:rank]),
            tuple(node.attributes.get_ints("dilations", (1,) * rank)),
        )
        return LayerWeights(weight.reshape(outputs, -1).T, np.zeros(outputs) if bias is None else bias, block, geometry)

    def set_layer(self, name: str, matrix: Array, bias: Array | None) -> None:
        """Replace a layer's weights by others of the same shape."""
        node = self._nodes[name]
        weight = _constant(node, 1)
        if node.op_type == "Conv":
            changed = matrix.T.reshape(weight.shape)
        else:
            changed = matrix.T if is_flag(node, "transB") else matrix
        self._set(node, 1, changed.astype(weight.dtype))
        if bias is not None and node.op_type != "MatMul":
            self._set(node, 2, bias.astype(weight.dtype))

    def set_constant(self, name: str, index: int, array: Array) -> None:
        """Replace a constant input of a node."""
        self._set(self._nodes[name], index, array)

    def remove(self, group: ChannelGroup, kept: Sequence[int]) -> None:
        """Leave only the channels `kept` of a group."""
        for name in group.producers:
            node = self._nodes[name]
            self.outputs_left[name] = kept
            self._take(node, 1, _output_axis(node), kept)
            bias = constant_of(node, 2)
            if bias is not None and bias.size == group.channels:
                self._take(node, 2, bias.ndim - 1, kept)
        for name, index, axis in group.carriers:
            node = self._nodes[name]
            self._take(node, index, axis, kept)
            if node.op_type == "Conv":
                node.attributes["group"] = ir.AttrInt64("group", len(kept))
        for consumer in group.consumers:
            node = self._nodes[consumer.node]
            self._take(node, 1, 1 - _output_axis(node), kept)

    def observing(self, names: list[str], segment: Segment) -> tuple[bytes, Segment]:
        """The part of the graph as it is now that computes some of its values, and its declaration, for runs of these.

        Nodes that none of the values needs are left out.
        """
        graph = self.model.graph
        values = {str(v.name): v for v in (*graph.inputs, *(v for node in graph for v in node.outputs))}
        part = ir.convenience.extract(graph, list(graph.inputs), [values[name] for name in names])
        for value in part.outputs:
            # Inner values declare no type; what they are made of is float32 in every graph that compression takes.
            value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), None
        model = ir.Model(part, ir_version=self.model.ir_version, producer_name="isthmus")
        data = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
        specs = tuple(TensorSpec(name, "float32", ()) for name in names)
        blob = Blob(digest_of(data), len(data))
        return data, structs.replace(segment, graph=blob, outputs=specs, weights=())

    def save(self, path: Path) -> Path:
        """Write the graph, without constants that nothing reads."""
        graph = self.model.graph
        for name, value in tuple(graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del graph.initializers[name]
        ir.save(self.model, path)
        return path

    def _take(self, node: ir.Node, index: int, axis: int, kept: Sequence[int]) -> None:
        self._set(node, index, np.take(_constant(node, index), kept, axis=axis))

    def _set(self, node: ir.Node, index: int, array: Array) -> None:
        # A value of the node's own: two layers may share a constant, and only one of them changes.
        name = f"{node.name}/{index}"
        graph = self.model.graph
        if name in graph.initializers:
            old = graph.initializers[name]
            old.const_value = ir.tensor(np.ascontiguousarray(array), name=name)
            old.shape = ir.Shape(array.shape)
            return
        value = initialiser(ir.tensor(np.ascontiguousarray(array), name=name))
        graph.register_initializer(value)
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        node.replace_input_with(index, value)


def _constant(node: ir.Node, index: int) -> Array:
    array = constant_of(node, index)
    if array is None:
        raise ValueError(f"{node.name} has no constant input {index}")
    return array


def _output_axis(node: ir.Node) -> int:
    """The axis of the outputs in a layer's weights; that of its inputs is the other of the first two."""
    return 0 if node.op_type == "Conv" or is_flag(node, "transB") else 1
