"""The dtype and shape of every value: by ONNX shape inference, completed by a single run.

Inference runs twice: with the graph's own free dimensions, for the specs that segments promise, and with bound
dimensions, for the bytes and multiply-accumulates (MACs) of cuts.

Source: onnx.ai/onnx/repo-docs/ShapeInference.html.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx
import onnx_ir as ir

from isthmus.arrays import Array
from isthmus.artifacts.tensors import Dim, TensorSpec
from isthmus.wire.frame import why_not_carried
from isthmus_tools.graph import probe
from isthmus_tools.graph.inputs import FREE, dims, dtype_name, dtype_of, feeds
from isthmus_tools.graph.load import constant
from isthmus_tools.graph.weights import is_outside

_Type: TypeAlias = tuple[str | None, tuple[Dim, ...] | None]
"""A dtype and a shape, each None where inference fails."""
_UNKNOWN: _Type = (None, None)


@dataclass(frozen=True)
class Types:
    """`specs` and `shapes` of the graph's inputs and of the requested values; `bound` also covers subgraph bodies.

    `refused` maps values that no frame carries to the reason. `claims` are sizes by axis that the model declares of its
    outputs and inference cannot derive: true under the binding, and perhaps for no other size.
    """

    specs: Mapping[str, TensorSpec]
    shapes: Mapping[str, tuple[int, ...]]
    bound: Mapping[str, tuple[int, ...]]
    refused: Mapping[str, str]
    claims: Mapping[str, Mapping[int, int]]


def infer(
    model: ir.Model, values: Sequence[ir.Value], bound: Mapping[str, tuple[int, ...]], examples: Mapping[str, Array]
) -> Types:
    """Types of the graph's inputs and of `values`; a value that no frame carries has no spec.

    Raises:
        ModelError: the run for shapes that inference cannot derive failed.
    """
    free = _inferred(model, {})
    complete = _inferred(model, bound)
    # A run costs seconds and memory, so only values without a complete type are probed.
    unknown = {v: complete.get(str(v.name), _UNKNOWN)[0] for v in values if not _is_complete(complete.get(str(v.name)))}
    probed = probe.types(model, unknown, feeds(model.graph, bound, examples)) if unknown else {}
    specs: dict[str, TensorSpec] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    refused: dict[str, str] = {}
    claims: dict[str, Mapping[int, int]] = {}
    for value in (*model.graph.inputs, *values):
        name = str(value.name)
        dtype, dimensions = probed[name] if name in probed else complete.get(name, _UNKNOWN)
        # Inputs have the bound shapes by definition.
        if value.is_graph_input():
            dtype, dimensions = dtype_of(value), bound[name]
        shape = _fixed(dimensions)
        if dtype is None or shape is None:
            continue
        if reason := why_not_carried(name, dtype, len(shape)):
            refused[name] = reason
            continue
        shapes[name] = shape
        spec = specs[name] = TensorSpec(name, dtype, _spec_dims(value, free.get(name, _UNKNOWN)[1], shape))
        if value.is_graph_output() and (claimed := _claims(value, spec, shape)):
            claims[name] = claimed
    everywhere = {n: s for n, (_, dimensions) in complete.items() if (s := _fixed(dimensions)) is not None}
    return Types(specs, shapes, {**everywhere, **shapes}, refused, claims)


def freeze(model: ir.Model, bound: Mapping[str, tuple[int, ...]]) -> None:
    """Declare the bound shapes as the inputs' own, and fold Shape and Size nodes to constants."""
    for value in model.graph.inputs:
        value.shape = ir.Shape(bound[str(value.name)])
    complete = _inferred(model, bound)
    for node in tuple(model.graph):
        source = node.inputs[0] if node.inputs else None
        if node.op_type not in ("Shape", "Size") or source is None or node.outputs[0].is_graph_output():
            continue
        shape = _fixed(complete.get(str(source.name), _UNKNOWN)[1])
        if shape is None:
            continue
        start, stop = node.attributes.get("start"), node.attributes.get("end")
        part = shape[None if start is None else start.as_int() : None if stop is None else stop.as_int()]
        array = np.array(part if node.op_type == "Shape" else math.prod(shape), np.int64)
        folded = constant(array, str(node.outputs[0].name))
        node.outputs[0].replace_all_uses_with(folded)
        model.graph.remove(node, safe=True)
        model.graph.register_initializer(folded)


def _inferred(model: ir.Model, bound: Mapping[str, tuple[int, ...]]) -> dict[str, _Type]:
    skeleton = _skeleton(model, bound)
    # Data propagation derives more shapes and fails on some valid graphs.
    for data_prop in (True, False):
        try:
            proto = onnx.shape_inference.infer_shapes(skeleton, strict_mode=False, data_prop=data_prop)
        except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
            continue
        return dict(_declared(proto.graph))
    return {}


def _skeleton(model: ir.Model, bound: Mapping[str, tuple[int, ...]]) -> onnx.ModelProto:
    """The model without large weights and without its own value shapes: declared shapes may be wrong."""
    graph = model.graph.clone()
    for value in tuple(graph.initializers.values()):
        tensor = value.const_value
        if tensor is not None and is_outside(tensor):
            del graph.initializers[str(value.name)]
            value.const_value = None
            value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
            # As an input a weight has a type and no bytes, so models beyond protobuf's 2 GiB serialise.
            graph.inputs.append(value)
    for name, shape in bound.items():
        next(v for v in graph.inputs if v.name == name).shape = ir.Shape(shape)
    for body in (graph, *graph.subgraphs()):
        for node in body:
            for output in node.outputs:
                output.shape = None
    return ir.serde.serialize_model(ir.Model(graph, ir_version=model.ir_version))


def _declared(graph: onnx.GraphProto) -> Iterable[tuple[str, _Type]]:
    for info in (*graph.input, *graph.output, *graph.value_info):
        if info.type.WhichOneof("value") != "tensor_type":
            continue
        tensor = info.type.tensor_type
        shape: tuple[Dim, ...] | None = None
        if tensor.HasField("shape"):
            shape = tuple(
                d.dim_value if d.HasField("dim_value") and d.dim_value >= 0 else d.dim_param or FREE
                for d in tensor.shape.dim
            )
        yield info.name, (dtype_name(tensor.elem_type), shape)
    for tensor_proto in graph.initializer:
        yield tensor_proto.name, (dtype_name(tensor_proto.data_type), tuple(tensor_proto.dims))
    for node in graph.node:
        for attribute in node.attribute:
            for body in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
                yield from _declared(body)


def _spec_dims(value: ir.Value, inferred: tuple[Dim, ...] | None, actual: tuple[int, ...]) -> tuple[Dim, ...]:
    declared = dims(value) if value.is_graph_input() or value.is_graph_output() else None
    names: tuple[Dim, ...] = (
        declared if declared is not None and len(declared) == len(actual) else (FREE,) * len(actual)
    )
    if value.is_graph_input():
        return names
    if inferred is None or len(inferred) != len(actual):
        inferred = (FREE,) * len(actual)
    merged: list[Dim] = []
    for derived, name, n in zip(inferred, names, actual, strict=True):
        if isinstance(derived, int):
            # Inference errs on some operators; the run's size decides.
            merged.append(derived if derived == n else FREE)
        elif isinstance(name, str) and name != FREE:
            merged.append(name)
        else:
            # onnx numbers dimensions that it cannot name: unk__0, unk__1, …
            merged.append(FREE if derived.startswith("unk__") else derived)
    return tuple(merged)


def _claims(value: ir.Value, spec: TensorSpec, actual: tuple[int, ...]) -> dict[int, int]:
    declared = dims(value)
    if declared is None or len(declared) != len(actual):
        return {}
    triples = enumerate(zip(spec.shape, declared, actual, strict=True))
    return {axis: n for axis, (dim, claimed, n) in triples if isinstance(dim, str) and claimed == n}


def _is_complete(inferred: _Type | None) -> bool:
    return inferred is not None and inferred[0] is not None and _fixed(inferred[1]) is not None


def _fixed(shape: tuple[Dim, ...] | None) -> tuple[int, ...] | None:
    """The shape if its rank and all dimensions are fixed."""
    if shape is None:
        return None
    numbers = tuple(d for d in shape if isinstance(d, int))
    return numbers if len(numbers) == len(shape) else None
