"""Channels that structured pruning may remove: which nodes produce them, carry them and read them.

A group starts at the output of a Conv or a matrix product and follows it through operators that treat channels alike
(activations, depthwise convolutions, pooling, products with gates of as many channels) up to its consumers. Channels of
a residual stream, and those that leave the graph, stay: what reads them need not change.

Source: coupled channels as in DepGraph, Fang et al., arXiv 2301.12900.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from isthmus.arrays import Array

# A channel of the output depends on the same channel of the input alone, in pools too.
_ACTIVATIONS = (
    *(
        "Relu",
        "Clip",
        "Sigmoid",
        "HardSigmoid",
        "HardSwish",
        "LeakyRelu",
        "Elu",
        "Selu",
        "Celu",
        "Softplus",
        "Softsign",
    ),
    *("Tanh", "Erf", "Gelu", "ThresholdedRelu", "Mish", "Sqrt", "Exp", "Neg", "Abs", "Cast", "Identity", "Dropout"),
)
_CHANNELWISE = frozenset((*_ACTIVATIONS, "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"))
_ARITHMETIC = frozenset(["Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "PRelu"])
# A group of fewer channels saves nothing that a kernel would notice.
MIN_CHANNELS = 16


@dataclass(frozen=True)
class ConsumerLayer:
    """A node that sums over a group's channels: a convolution, or a matrix product.

    `residual` names the sum that its output goes to and the other operand; None where it goes elsewhere.
    """

    node: str
    source: str
    output: str
    residual: tuple[str, str] | None = None


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are removed together.

    `producers` and `carriers` are names of nodes: the first lose rows of their weights, the second entries of their
    constants along the channels, by (node, input, axis).
    """

    channels: int
    producers: tuple[str, ...]
    carriers: tuple[tuple[str, int, int], ...]
    consumers: tuple[ConsumerLayer, ...]

    @property
    def name(self) -> str:
        """The name of its first producer."""
        return self.producers[0]


@dataclass
class _Trace:
    """The state of following one group's channels; `axis` counts from the last dimension, -1."""

    channels: int
    axis: int
    producers: dict[str, None] = field(default_factory=dict)
    carriers: dict[tuple[str, int, int], None] = field(default_factory=dict)
    consumers: dict[str, ConsumerLayer] = field(default_factory=dict)
    values: dict[ir.Value, None] = field(default_factory=dict)


class _Stays(Exception):
    """The channels cannot be removed; the text says why."""


def channel_groups(model: ir.Model) -> tuple[list[ChannelGroup], dict[str, str]]:
    """The groups in the graph's order, and the reason why each other producer's channels stay, by its node's name."""
    groups, reasons, done = list[ChannelGroup](), dict[str, str](), set[str]()
    for node in model.graph:
        name = str(node.name)
        if name in done or (channels := produced_channels(node)) is None:
            continue
        trace = _Trace(*channels)
        try:
            _follow(node, trace)
            if trace.channels < MIN_CHANNELS:
                raise _Stays(f"{trace.channels} channels")
            # What nobody sums over cannot be made up for.
            if not trace.consumers:
                raise _Stays("no layer reads them")
        except _Stays as e:
            reasons[name] = str(e)
            continue
        done |= trace.producers.keys()
        groups.append(
            ChannelGroup(trace.channels, tuple(trace.producers), tuple(trace.carriers), tuple(trace.consumers.values()))
        )
    # A producer that joined a later group has channels that go after all.
    return groups, {name: reason for name, reason in reasons.items() if name not in done}


def constant_of(node: ir.Node, index: int) -> Array | None:
    """The array of a constant input; None for an absent or computed one."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    return np.asarray(value.const_value.numpy())


def is_depthwise(node: ir.Node) -> bool:
    """Whether a Conv computes each channel from the same channel alone."""
    weight = node.inputs[1] if node.op_type == "Conv" else None
    return weight is not None and weight.shape is not None and _groups(node) == weight.shape[0] and _groups(node) > 1


def _groups(node: ir.Node) -> int:
    return node.attributes.get_int("group", 1)


def automatic_padding(node: ir.Node) -> str | None:
    """How a Conv pads by the sizes of its inputs; None where its attributes state the padding."""
    padding = node.attributes.get_string("auto_pad", "NOTSET")
    return None if padding in ("NOTSET", "VALID") else padding


def produced_channels(node: ir.Node) -> tuple[int, int] | None:
    """The number of channels that a node produces, and their axis from the end; None for other nodes."""
    weight = constant_of(node, 1)
    if weight is None or node.domain:
        return None
    if node.op_type == "Conv" and _groups(node) == 1:
        return weight.shape[0], 1 - weight.ndim
    if node.op_type == "MatMul" and weight.ndim == 2:
        return weight.shape[1], -1
    if node.op_type == "Gemm" and is_plain_gemm(node):
        return weight.shape[0 if is_flag(node, "transB") else 1], -1
    return None


def is_plain_gemm(node: ir.Node) -> bool:
    """Whether a Gemm is a product and a sum, without factors and with rows of inputs first."""
    return not is_flag(node, "transA") and all(node.attributes.get_float(name, 1.0) == 1 for name in ("alpha", "beta"))


def is_flag(node: ir.Node, name: str) -> bool:
    """Whether an integer attribute is there and not 0."""
    return bool(node.attributes.get_int(name, 0))


def _follow(producer: ir.Node, trace: _Trace) -> None:
    pending = [producer]
    sums = list[ir.Node]()
    while pending:
        node = pending.pop()
        trace.producers.setdefault(str(node.name))
        queue = [node.outputs[0]]
        while queue:
            value = queue.pop()
            if value in trace.values:
                continue
            trace.values[value] = None
            if value.is_graph_output():
                raise _Stays(f"{value.name} leaves the segment")
            for use in value.uses():
                queue += _through(use.node, use.idx, value, trace, pending, sums)
    # Only now: both operands of a sum may be of this group, by ways of different lengths.
    for node in sums:
        if any(v not in trace.values for v in node.inputs):
            raise _Stays(f"they are added to others by {node.name}")


def _through(
    node: ir.Node, index: int, value: ir.Value, trace: _Trace, pending: list[ir.Node], sums: list[ir.Node]
) -> Sequence[ir.Value]:
    """The values behind a reader of a group's channels that have these channels too."""
    op = node.op_type
    # Operators of onnxruntime's own domain may mix channels under any name.
    if node.domain:
        raise _Stays(f"{node.name} is {node.domain}.{op}")
    if index == 0 and (op in _CHANNELWISE or _keeps_channels(node, trace.axis)):
        return node.outputs
    if op == "BatchNormalization" and index == 0:
        trace.carriers |= dict.fromkeys((str(node.name), i, 0) for i in range(1, 5))
        return node.outputs[:1]
    if op == "Conv" and index == 0:
        return _through_convolution(node, value, trace)
    if op in ("MatMul", "Gemm") and index == 0 and trace.axis == -1 and produced_channels(node) is not None:
        trace.consumers[str(node.name)] = consumer_layer(node, value)
        return ()
    if op in _ARITHMETIC:
        return _through_arithmetic(node, index, trace, pending, sums)
    raise _Stays(f"{node.name}, a {op}, reads them")


def _keeps_channels(node: ir.Node, axis: int) -> bool:
    """Whether a reduction or a resize leaves the channels as they are."""
    if node.op_type == "ReduceMean":
        constant = constant_of(node, 1)
        axes = node.attributes.get_ints("axes") if constant is None else constant.tolist()
        keeps = node.attributes.get_int("keepdims", 1)
        # From the front the channels are axis 1: convolutions alone are reduced so.
        return axes is not None and bool(keeps) and axis < -1 and not {1, axis} & set(axes)
    if node.op_type == "Resize":
        scales = constant_of(node, 2)
        return scales is not None and scales.size > 1 and scales.reshape(-1)[axis] == 1
    return False


def _through_convolution(node: ir.Node, value: ir.Value, trace: _Trace) -> Sequence[ir.Value]:
    weight = constant_of(node, 1)
    if weight is None or weight.ndim != 1 - trace.axis or (constant_of(node, 2) is None and len(node.inputs) > 2):
        raise _Stays(f"the weights of {node.name} are computed")
    if (padding := automatic_padding(node)) is not None:
        raise _Stays(f"{node.name} pads by {padding}")
    if is_depthwise(node) and weight.shape[0] == trace.channels:
        trace.carriers |= dict.fromkeys((str(node.name), i, 0) for i in range(1, len(node.inputs)))
        return node.outputs
    if _groups(node) != 1:
        raise _Stays(f"{node.name} is grouped")
    trace.consumers[str(node.name)] = consumer_layer(node, value)
    return ()


def _through_arithmetic(
    node: ir.Node, index: int, trace: _Trace, pending: list[ir.Node], sums: list[ir.Node]
) -> Sequence[ir.Value]:
    other = node.inputs[1 - index] if len(node.inputs) == 2 else None
    if other is None:
        raise _Stays(f"{node.name} has no second operand")
    if (constant := constant_of(node, 1 - index)) is not None:
        depth = -trace.axis
        if constant.ndim >= depth and constant.shape[trace.axis] == trace.channels:
            trace.carriers[str(node.name), 1 - index, constant.ndim + trace.axis] = None
        elif constant.ndim >= depth and constant.shape[trace.axis] != 1:
            raise _Stays(f"{node.name} has a constant of another number of channels")
        return node.outputs
    if other not in trace.values:
        if node.op_type != "Mul":
            # Where the other operand turns out to be of the group too, the sum is.
            sums.append(node)
        elif (gate := _gate(other, trace)) is not None:
            if str(gate.name) not in trace.producers and gate not in pending:
                pending.append(gate)
        else:
            sums.append(node)
    return node.outputs


def _gate(value: ir.Value, trace: _Trace) -> ir.Node | None:
    """The producer behind a factor of the group's channels, through activations: of a squeeze-and-excitation."""
    node = value.producer()
    while node is not None and node.op_type in _CHANNELWISE and not node.domain:
        source = node.inputs[0]
        node = None if source is None else source.producer()
    if node is None or produced_channels(node) != (trace.channels, trace.axis):
        return None
    return node


def consumer_layer(node: ir.Node, value: ir.Value) -> ConsumerLayer:
    """A layer as a reader of the channels of `value`."""
    output = node.outputs[0]
    return ConsumerLayer(str(node.name), str(value.name), str(output.name), residual_of(output))


def writes_boundary(output: ir.Value) -> ir.Node | None:
    """The layer whose output reaches a value through activations and sums alone; the last one of several."""
    pending = [output]
    while pending:
        node = pending.pop(0).producer()
        if node is None or node.domain:
            continue
        if produced_channels(node) is not None:
            return node
        if node.op_type in _ACTIVATIONS or node.op_type == "Add":
            pending += [v for v in node.inputs[: 2 if node.op_type == "Add" else 1] if v is not None]
    return None


def residual_of(output: ir.Value) -> tuple[str, str] | None:
    """The sum that alone reads a layer's output, and its other operand, which is computed elsewhere."""
    readers = [use.node for use in output.uses()]
    if len(readers) != 1 or output.is_graph_output() or (node := readers[0]).op_type != "Add":
        return None
    other = next((v for v in node.inputs if v is not output), None)
    if other is None or other.producer() is None:
        return None
    return str(node.outputs[0].name), str(other.name)


def macs_left(
    groups: Sequence[ChannelGroup], kept: Mapping[str, int], macs: Mapping[str, int], depthwise: frozenset[str]
) -> float:
    """MACs of all nodes with `kept` channels of each group, by its name. `macs` are the nodes' own."""
    factors = dict.fromkeys(macs, 1.0)
    for group in groups:
        share = kept.get(group.name, group.channels) / group.channels
        # A node carries a group once, whatever number of its constants do.
        carriers = {node for node, _, _ in group.carriers} & depthwise
        for node in (*group.producers, *carriers, *(c.node for c in group.consumers)):
            factors[node] *= share
    return math.fsum(macs[node] * factor for node, factor in factors.items())
