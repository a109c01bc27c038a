"""The dtype and shape of every value: by inference, and where that does not tell, by one run.

Twice: with the graph's own free dimensions, which is what a segment promises, and with bound ones, which is what bytes
and multiply-accumulates are counted for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import ml_dtypes  # noqa: F401  numpy then knows bfloat16 by name
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from isthmus.artifacts.tensors import Dim, TensorSpec
from isthmus.errors import ModelError
from isthmus.units import format_size
from isthmus.wire.frame import why_not_carried
from isthmus_tools.graph import probe
from isthmus_tools.graph.weights import is_outside

FREE = "?"
"""The name of a free dimension that has none of its own."""
MAX_INPUT_BYTES = 2**31
"""Of one input: thirty times what a request holds by default. Arrays of that size are made to run the model with."""


@dataclass(frozen=True)
class Types:
    """`specs` and `shapes` of the graph's inputs and wanted values; `bound` also knows values inside bodies.

    `refused` are values that no frame carries, and why. `claims` are sizes by axis that the model declares of its
    outputs and inference cannot derive: true under the binding, and perhaps only there.
    """

    specs: Mapping[str, TensorSpec]
    shapes: Mapping[str, tuple[int, ...]]
    bound: Mapping[str, tuple[int, ...]]
    refused: Mapping[str, str]
    claims: Mapping[str, Mapping[int, int]]


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of an array as numpy holds it."""
    return math.prod(shape) * np.dtype(dtype).itemsize


def dims(value: ir.Value) -> tuple[Dim, ...] | None:
    """A value's declared shape; a dimension that is not a positive number is free. None where no rank is declared."""
    if value.shape is None:
        return None
    return tuple(d if isinstance(d, int) and d >= 0 else str(getattr(d, "value", None) or FREE) for d in value.shape)


def bind_inputs(
    graph: ir.Graph, bind: Mapping[str, Sequence[int]], examples: Mapping[str, npt.NDArray[np.generic]]
) -> dict[str, tuple[int, ...]]:
    """A whole shape for each input: from `bind`, else from `examples`, else as declared with a free first dimension 1.

    Raises:
        ModelError: an unknown input, a shape that contradicts the declared one, or another free dimension left over.
    """
    return bind_shapes({str(v.name): (_dtype(v), dims(v)) for v in graph.inputs}, bind, examples)


def bind_shapes(
    inputs: Mapping[str, tuple[str | None, tuple[Dim, ...] | None]],
    bind: Mapping[str, Sequence[int]],
    examples: Mapping[str, npt.NDArray[np.generic]],
) -> dict[str, tuple[int, ...]]:
    """As `bind_inputs`, for inputs given by name as their dtype and declared shape, None where they are unknown.

    Raises:
        ModelError: as `bind_inputs`.
    """
    names = list(inputs)
    for name in (*bind, *examples):
        if name not in names:
            raise ModelError(f"the model has no input {name!r}; it has {', '.join(names)}", input=name, inputs=names)
    bound = {}
    for name, (dtype, declared) in inputs.items():
        example = examples.get(name)
        if example is not None and dtype not in (None, example.dtype.name):
            raise ModelError(
                f"the input {name} takes {dtype}, and its example holds {example.dtype.name}",
                input=name,
                hint=f"save it as {dtype}: numpy.save(file, array.astype({dtype!r}))",
            )
        shape = bind.get(name, None if example is None else example.shape)
        if shape is None:
            if declared is None or any(isinstance(d, str) for d in declared[1:]):
                template = (
                    "NxN" if declared is None else "x".join("N" if isinstance(d, str) else str(d) for d in declared)
                )
                raise ModelError(
                    f"the input {name} has the shape {_text(declared)}, and nothing binds its free dimensions",
                    input=name,
                    hint=f"give one shape to count with, a number for each N: --shape {name}={template}",
                )
            shape = tuple(1 if isinstance(d, str) else d for d in declared)
        _check_fits(name, declared, tuple(shape))
        check_size(name, dtype or "float32", shape)
        if example is not None and example.shape != tuple(shape):
            raise ModelError(
                f"the example of {name} has the shape {_text(example.shape)}, and {_text(tuple(shape))} was given",
                input=name,
                hint="leave the shape out: the example has one",
            )
        bound[name] = tuple(int(n) for n in shape)
    return bound


def check_size(name: str, dtype: str, shape: Sequence[int]) -> None:
    """Refuse the shape of an input that no request could hold.

    Raises:
        ModelError: it takes more than MAX_INPUT_BYTES.
    """
    if (size := nbytes(dtype, shape)) > MAX_INPUT_BYTES:
        raise ModelError(
            f"the input {name} would take {format_size(size)} at the shape {_text(tuple(shape))}; at most"
            f" {format_size(MAX_INPUT_BYTES)} are run",
            input=name,
            limit=MAX_INPUT_BYTES,
            hint="give a smaller shape to count with: --shape",
        )


def _check_fits(name: str, declared: tuple[Dim, ...] | None, shape: tuple[int, ...]) -> None:
    if declared is not None and (
        len(shape) != len(declared) or any(isinstance(d, int) and d != n for d, n in zip(declared, shape, strict=True))
    ):
        raise ModelError(
            f"the input {name} has the shape {_text(declared)}; {_text(shape)} does not fit it", input=name
        )


def infer(
    model: ir.Model,
    wanted: Sequence[ir.Value],
    bound: Mapping[str, tuple[int, ...]],
    examples: Mapping[str, npt.NDArray[np.generic]],
) -> Types:
    """Types of the graph's inputs and of `wanted` values; a value that no frame carries has no spec.

    Raises:
        ModelError: the run that had to tell some shapes failed.
    """
    free = _inferred(model, {})
    known = _inferred(model, bound)
    unknown = {v: known.get(str(v.name), (None, None))[0] for v in wanted if not _is_known(known.get(str(v.name)))}
    seen = probe.types(model, unknown, feeds(model.graph, bound, examples)) if unknown else {}
    specs: dict[str, TensorSpec] = {}
    found: dict[str, tuple[int, ...]] = {}
    refused: dict[str, str] = {}
    claims: dict[str, Mapping[int, int]] = {}
    for value in (*model.graph.inputs, *wanted):
        name = str(value.name)
        dtype, shape = seen[name] if name in seen else known.get(name, (None, None))
        if value.is_graph_input():
            dtype, shape = _dtype(value), bound[name]
        whole = _whole(shape)
        if dtype is None or whole is None:
            continue
        if reason := why_not_carried(name, dtype, len(whole)):
            refused[name] = reason
            continue
        found[name] = whole
        spec = specs[name] = TensorSpec(name, dtype, _spec_dims(value, free.get(name, (None, None))[1], whole))
        if value.is_graph_output() and (claimed := _claims(value, spec, whole)):
            claims[name] = claimed
    everywhere = {n: s for n, (_, dims_) in known.items() if (s := _whole(dims_)) is not None}
    return Types(specs, found, {**everywhere, **found}, refused, claims)


def feeds(
    graph: ir.Graph, bound: Mapping[str, tuple[int, ...]], examples: Mapping[str, npt.NDArray[np.generic]]
) -> dict[str, npt.NDArray[np.generic]]:
    """One array for each input: the example, else ones of the bound shape (zeros where it holds whole numbers)."""
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    for value in graph.inputs:
        name, dtype = str(value.name), np.dtype(_dtype(value) or "float32")
        make = np.zeros if dtype.kind in "iu" else np.ones
        arrays[name] = examples[name] if name in examples else make(bound[name], dtype)
    return arrays


def trial_inputs(
    graph: ir.Graph, bound: Mapping[str, tuple[int, ...]], examples: Mapping[str, npt.NDArray[np.generic]]
) -> list[dict[str, npt.NDArray[np.generic]]]:
    """Inputs to run a model with, the most telling first.

    Where no example is given, floats are numbers between 0 and 1, of which two operators make different ones; else as
    `feeds`, for models that take floats as counts.
    """
    plain = feeds(graph, bound, examples)
    rng = np.random.default_rng(0)
    varied = {
        name: a if name in examples or a.dtype.kind in "iub" else np.asarray(rng.random(a.shape), a.dtype)
        for name, a in plain.items()
    }
    return [varied, plain]


def freeze(model: ir.Model, bound: Mapping[str, tuple[int, ...]]) -> None:
    """Make the bound shapes the inputs' own, and what only asks for a shape a constant."""
    for value in model.graph.inputs:
        value.shape = ir.Shape(bound[str(value.name)])
    known = _inferred(model, bound)
    for node in tuple(model.graph):
        source = node.inputs[0] if node.inputs else None
        if node.op_type not in ("Shape", "Size") or source is None or node.outputs[0].is_graph_output():
            continue
        shape = _whole(known.get(str(source.name), (None, None))[1])
        if shape is None:
            continue
        start, stop = node.attributes.get("start"), node.attributes.get("end")
        part = shape[None if start is None else start.as_int() : None if stop is None else stop.as_int()]
        name = str(node.outputs[0].name)
        tensor = ir.tensor(np.array(part if node.op_type == "Shape" else math.prod(shape), np.int64), name=name)
        constant = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
        )
        node.outputs[0].replace_all_uses_with(constant)
        model.graph.remove(node, safe=True)
        model.graph.register_initializer(constant)


def _inferred(
    model: ir.Model, bound: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[str | None, tuple[Dim, ...] | None]]:
    skeleton = _skeleton(model, bound)
    for data_prop in (True, False):
        try:
            proto = onnx.shape_inference.infer_shapes(skeleton, strict_mode=False, data_prop=data_prop)
        except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
            continue
        return dict(_declared(proto.graph))
    return {}


def _skeleton(model: ir.Model, bound: Mapping[str, tuple[int, ...]]) -> onnx.ModelProto:
    """The model without large weights and without what it says about its own values, which may be wrong."""
    graph = model.graph.clone()
    for value in tuple(graph.initializers.values()):
        tensor = value.const_value
        if tensor is not None and is_outside(tensor):
            del graph.initializers[str(value.name)]
            value.const_value = None
            value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
            graph.inputs.append(value)
    for name, shape in bound.items():
        next(v for v in graph.inputs if v.name == name).shape = ir.Shape(shape)
    for body in (graph, *graph.subgraphs()):
        for node in body:
            for output in node.outputs:
                output.shape = None
    return ir.serde.serialize_model(ir.Model(graph, ir_version=model.ir_version))


def _declared(graph: onnx.GraphProto) -> Iterable[tuple[str, tuple[str | None, tuple[Dim, ...] | None]]]:
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
        yield info.name, (_dtype_name(tensor.elem_type), shape)
    for tensor_proto in graph.initializer:
        yield tensor_proto.name, (_dtype_name(tensor_proto.data_type), tuple(tensor_proto.dims))
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
    for known, declared_dim, n in zip(inferred, names, actual, strict=True):
        if isinstance(known, int):
            merged.append(known if known == n else FREE)
        elif isinstance(declared_dim, str) and declared_dim != FREE:
            merged.append(declared_dim)
        else:
            merged.append(FREE if known.startswith("unk__") else known)
    return tuple(merged)


def _claims(value: ir.Value, spec: TensorSpec, actual: tuple[int, ...]) -> dict[int, int]:
    declared = dims(value)
    if declared is None or len(declared) != len(actual):
        return {}
    triples = enumerate(zip(spec.shape, declared, actual, strict=True))
    return {axis: n for axis, (dim, claimed, n) in triples if isinstance(dim, str) and claimed == n}


def _is_known(found: tuple[str | None, tuple[Dim, ...] | None] | None) -> bool:
    return found is not None and found[0] is not None and _whole(found[1]) is not None


def _whole(shape: tuple[Dim, ...] | None) -> tuple[int, ...] | None:
    if shape is None:
        return None
    numbers = tuple(d for d in shape if isinstance(d, int))
    return numbers if len(numbers) == len(shape) else None


def _dtype(value: ir.Value) -> str | None:
    return None if value.dtype is None else _dtype_name(int(value.dtype))


def _dtype_name(code: int) -> str | None:
    kind = ir.DataType(code)
    return None if kind in (ir.DataType.UNDEFINED, ir.DataType.STRING) else str(kind.numpy().name)


def _text(shape: Sequence[Dim] | None) -> str:
    return "(of unknown rank)" if shape is None else "x".join(str(d) for d in shape) or "of a single number"
