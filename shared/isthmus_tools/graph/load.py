"""Read an ONNX file and normalise its graph: the form that every other module of this room works on.

A normalised graph has opset 11 or newer and no local functions. Its constants are initialisers of the main graph where
possible, its nodes stand in a stable topological order without dead nodes, and the names of its values, those of
subgraph bodies included, are unique. A cut's position counts the nodes of this form.

Source: onnx.ai/onnx/repo-docs/IR.html, "Graphs" and "Names Within a Graph".
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx_ir.passes import common

from isthmus.errors import IsthmusError, ModelError
from isthmus.wire.frame import entry_bytes, why_not_carried, why_not_together
from isthmus_tools.graph import external_data, opset_conversion
from isthmus_tools.graph.weights import ends, same_content

# From IR version 4 on initialisers need not be graph inputs; 7 is the version that opset 12 tools write.
_MIN_IR = 7
_MAX_REASON = 500
_LFS = b"version https://git-lfs.github.com/spec/"
# Half of the values of a byte: int8 plus 128 is uint8.
_ZERO_POINT_SHIFT = 128

# The passes log every value that they skip; errors that matter are raised.
logging.getLogger("onnx_ir").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class OptimisedNode:
    """A node of a graph after the runtime's optimisations; names are the original's where the runtime kept them."""

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def read_optimised(data: bytes) -> tuple[OptimisedNode, ...]:
    """The nodes of a serialised ONNX model, in order, without its weights.

    Raises:
        ModelError: not an ONNX model.
    """
    try:
        graph = onnx.ModelProto.FromString(data).graph
    except DecodeError as e:
        raise ModelError(f"the optimised graph is not an ONNX model: {e}") from e
    return tuple(
        OptimisedNode(n.name, n.op_type, tuple(i for i in n.input if i), tuple(o for o in n.output if o))
        for n in graph.node
    )


def read(path: str | os.PathLike[str], *, normalise: bool = True) -> ir.Model:
    """Read an ONNX file; large weights stay in their files.

    `normalise=False` keeps the graph as stored: for segments that this package wrote.

    Raises:
        ModelError: not an ONNX model, an opset that cannot be converted to 11, text inputs, sparse initialisers, or
            missing weights.
    """
    path = Path(path)
    model = _parse(path)
    external_data.locate(model, path)
    if normalise:
        with refusals(path):
            _normalise(model)
    _check_interface(model, path)
    return model


@contextmanager
def refusals(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn exceptions of onnx and onnx-ir about a graph into a ModelError that starts with the first cause.

    Raises:
        ModelError: the block raised.
    """
    try:
        yield
    except (IsthmusError, MemoryError):
        raise
    # onnx-ir documents no exceptions; on broken graphs it raises nearly anything, wrapped with a dump of the graph.
    except Exception as e:
        cause: BaseException = e
        # The context too: onnx-ir 1.1's wrapper itself fails on some tensors, and hides the first cause.
        while (earlier := cause.__cause__ or cause.__context__) is not None:
            cause = earlier
        text = " ".join(str(cause).split()).rstrip(".")[:_MAX_REASON] or type(cause).__name__
        raise ModelError(
            f"{text}: {Path(path).name} is not a valid ONNX graph",
            model=str(path),
            hint="python -c 'import onnx; onnx.checker.check_model(FILE, full_check=True)' checks it whole",
        ) from e


def bodies(node: ir.Node) -> Iterator[ir.Graph]:
    """The subgraphs in a node's attributes: branches of an If, bodies of a Loop or Scan."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _parse(path: Path) -> ir.Model:
    try:
        proto = external_data.read(path)
        if opset_conversion.is_old(proto):
            # onnx's version converter needs the weights in the model.
            proto = onnx.load(str(path), format="protobuf", load_external_data=False)
    except OSError as e:
        raise ModelError(f"{path} cannot be read: {e.strerror or e}", model=str(path)) from e
    except (DecodeError, ValueError) as e:
        raise _not_onnx(path) from e
    if not proto.opset_import:
        raise _not_onnx(path)
    if not proto.graph.output:
        raise ModelError(f"{path.name} gives no outputs", model=str(path), hint="let the model return tensors")
    opset_conversion.merge_default_domain(proto, path)
    sparse = any(a.HasField("sparse_tensor") for a in opset_conversion.attributes(proto))
    if proto.graph.sparse_initializer or sparse:
        raise ModelError(f"{path.name} holds sparse weights", model=str(path), hint="export it with dense weights")
    proto, opset = opset_conversion.converted(proto, path)
    with refusals(path):
        model = ir.serde.deserialize_model(proto)
    model.ir_version = max(model.ir_version, _MIN_IR)
    opset_conversion.mark(model, opset)
    return model


def _not_onnx(path: Path) -> ModelError:
    with open(path, "rb") as file:
        if file.read(len(_LFS)) == _LFS:
            return ModelError(
                f"{path.name} is a pointer of Git LFS, not the model", model=str(path), hint="fetch it: git lfs pull"
            )
    return ModelError(
        f"{path.name} is not an ONNX model, or was cut short",
        model=str(path),
        hint="pass a whole .onnx file, or export a torch model with: isthmus import package.module:factory",
    )


def _check_interface(model: ir.Model, path: Path) -> None:
    for value in (*model.graph.inputs, *model.graph.outputs):
        _check_boundary_value(value, path)
    for verb, side in (("takes", model.graph.inputs), ("gives", model.graph.outputs)):
        names = Counter(str(v.name) for v in side)
        if twice := [name for name, count in names.items() if count > 1]:
            raise ModelError(
                f"{path.name} {verb} {', '.join(twice)} twice",
                model=str(path),
                tensor=twice[0],
                hint="leave it once among the graph's inputs or outputs",
            )
        entries = sum(entry_bytes(str(v.name), 0 if v.shape is None else len(v.shape)) for v in side)
        if reason := why_not_together(len(side), entries):
            raise ModelError(f"{path.name} takes or gives {reason}", model=str(path), tensors=len(side))
    if not len(model.graph):
        raise ModelError(f"{path.name} has no nodes", model=str(path))


def _check_boundary_value(value: ir.Value, path: Path) -> None:
    is_tensor = isinstance(value.type, ir.TensorType)
    if not is_tensor or value.dtype == ir.DataType.STRING:
        kind = "text" if is_tensor else "no plain tensor"
        raise ModelError(
            f"{path.name}'s {value.name} is {kind}; inputs and outputs are tensors of numbers",
            model=str(path),
            tensor=value.name,
            hint="cut that part of the model off before the import",
        )
    dtype = "float32" if value.dtype in (None, ir.DataType.UNDEFINED) else str(value.dtype.numpy().name)
    if reason := why_not_carried(str(value.name), dtype, 0 if value.shape is None else len(value.shape)):
        raise ModelError(
            f"no frame carries {path.name}'s {str(value.name)[:200]}: {reason}",
            model=str(path),
            tensor=value.name,
            hint="cast or rename it before the import",
        )
    if value.is_graph_input() and value.is_graph_output():
        raise ModelError(
            f"{path.name} gives its input {value.name} back unchanged as an output",
            model=str(path),
            tensor=value.name,
            hint="remove that output",
        )


def _normalise(model: ir.Model) -> None:
    # Cuts lie between nodes of the main graph, so functions are inlined first.
    if model.functions:
        common.InlinePass()(model)
    common.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    model.graph.doc_string = model.doc_string = None
    common.RemoveInitializersFromInputsPass()(model)
    _check_definitions(model.graph)
    _copy_outer_results(model.graph)
    # Lifting moves names of bodies to the main graph, where they must not collide.
    _make_names_unique(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.LiftSubgraphInitializersToMainGraphPass()(model)
    # Every output needs a producing node, so that the last segment can give it.
    _copy_constant_outputs(model.graph)
    _make_activations_unsigned(model.graph)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    _merge_equal_initialisers(model.graph)
    model.graph.sort()
    _make_names_unique(model)


def _is_defined(value: ir.Value) -> bool:
    return value.producer() is not None or value.is_graph_input() or value.is_initializer()


def _check_definitions(graph: ir.Graph) -> None:
    for node in ir.traversal.RecursiveGraphIterator(graph):
        for value in node.inputs:
            if value is not None and not _is_defined(value):
                raise ModelError(
                    f"a node {node.op_type} reads {value.name}, which is no input, no initialiser and no node's output",
                    tensor=value.name,
                )


def _copy_outer_results(graph: ir.Graph, outer: Mapping[str | None, ir.Value] | None = None) -> None:
    """Let an Identity produce each result of a body that is a value of the graph around: runtimes refuse such bodies.

    Raises:
        ModelError: no surrounding graph defines that name either.
    """
    for i, value in enumerate(graph.outputs):
        if _is_defined(value):
            continue
        source = (outer or {}).get(value.name)
        if source is None:
            raise ModelError(f"no node makes the output {value.name}", tensor=value.name)
        graph.outputs[i] = _appended_identity(graph, source, f"{value.name}_of_body", value)
    results = (v for node in graph for v in node.outputs)
    scope = {**(outer or {}), **{v.name: v for v in (*graph.inputs, *graph.initializers.values(), *results)}}
    for node in graph:
        for body in bodies(node):
            _copy_outer_results(body, scope)


def _copy_constant_outputs(graph: ir.Graph) -> None:
    """Let an Identity produce each output that is an initialiser, so that every output has a producer."""
    for i, value in enumerate(graph.outputs):
        if value.is_initializer():
            name = str(value.name)
            value.name = f"{name}_constant"
            graph.outputs[i] = _appended_identity(graph, value, name, value)
            graph.outputs[i].shape = value.shape


def _appended_identity(graph: ir.Graph, source: ir.Value, name: str, like: ir.Value) -> ir.Value:
    node = ir.node("Identity", [source], name=f"{name}_identity")
    node.outputs[0].name, node.outputs[0].type = name, like.type
    graph.append(node)
    return node.outputs[0]


def _merge_equal_initialisers(graph: ir.Graph) -> None:
    groups: dict[tuple[object, ...], list[tuple[ir.Value, ir.TensorProtocol]]] = {}
    for value in tuple(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.dtype == ir.DataType.STRING:
            continue
        # Comparing both ends first reads few bytes of large tensors that differ.
        group = groups.setdefault((tensor.dtype, tuple(tensor.shape), ends(tensor)), [])
        for other, content in group:
            if same_content(content, tensor):
                value.replace_all_uses_with(other)
                del graph.initializers[str(value.name)]
                break
        else:
            group.append((value, tensor))


def _make_names_unique(model: ir.Model) -> None:
    """Give every value and node of the graph and its bodies a unique name; inputs and outputs keep theirs."""
    names, done = _Names(), set[ir.Value]()

    def rename(value: ir.Value) -> None:
        if value in done or (not value.name and not value.uses() and not value.is_graph_output()):
            return
        done.add(value)
        fresh = names.take(value.name or "value")
        if fresh != value.name:
            value.name = fresh

    for graph in model.graphs():
        for value in (*graph.inputs, *graph.outputs, *tuple(graph.initializers.values())):
            rename(value)
    node_names = _Names()
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for value in node.outputs:
            rename(value)
        # Profiles attribute the runtime's kernels to nodes by name.
        node.name = node_names.take(node.name or node.op_type)


class _Names:
    """Names in use, and the next free suffix of each."""

    def __init__(self) -> None:
        self._used: set[str] = set()
        self._counts: dict[str, int] = {}

    def take(self, base: str) -> str:
        """`base` if free, else `base_1`, `base_2`, …; linear also where thousands of values share a name."""
        fresh = base
        while fresh in self._used:
            self._counts[base] = self._counts.get(base, 0) + 1
            fresh = f"{base}_{self._counts[base]}"
        self._used.add(fresh)
        return fresh


def _make_activations_unsigned(graph: ir.Graph) -> None:
    """Rewrite each int8 QuantizeLinear between operators, and its DequantizeLinears, to uint8: the same real values.

    On x86 onnxruntime does so itself inside a graph, where uint8 x int8 products are fast, but not for a graph's inputs
    and outputs. At a cut both sides would mix the two types and compute in float, unlike the whole model.
    """
    shifted: dict[ir.Value, ir.Value] = {}
    for node in tuple(graph):
        if node.op_type != "QuantizeLinear" or node.domain or node.outputs[0].is_graph_output():
            continue
        readers = [use.node for use in node.outputs[0].uses()]
        if (
            readers
            and all(r.op_type == "DequantizeLinear" and r.graph is graph for r in readers)
            and all(_has_constant_int8_zero_point(n) for n in (node, *readers))
        ):
            for each in (node, *readers):
                each.replace_input_with(2, _shifted_zero_point(graph, each, shifted))
            node.outputs[0].dtype = ir.DataType.UINT8


def _has_constant_int8_zero_point(node: ir.Node) -> bool:
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    output_dtype = node.attributes.get("output_dtype")
    return (
        zero is not None
        and zero.const_value is not None
        and zero.const_value.dtype == ir.DataType.INT8
        and zero.is_initializer()
        and (output_dtype is None or output_dtype.as_int() == 0)
    )


def _shifted_zero_point(graph: ir.Graph, node: ir.Node, shifted: dict[ir.Value, ir.Value]) -> ir.Value:
    zero = node.inputs[2]
    if zero is None or zero.const_value is None:
        raise ValueError(f"{node.name} has no zero point")
    if zero not in shifted:
        name = f"{zero.name}_unsigned"
        while name in graph.initializers:
            name += "_"
        array = (zero.const_value.numpy().astype(np.int16) + _ZERO_POINT_SHIFT).astype(np.uint8)
        shifted[zero] = constant(array, name)
        graph.register_initializer(shifted[zero])
    return shifted[zero]


def constant(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]], name: str) -> ir.Value:
    """A value for `graph.register_initializer` that holds `array`."""
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
