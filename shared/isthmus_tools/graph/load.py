"""Read an ONNX file and bring its graph into the one form that the rest of this package works on.

After `read`: one opset-11-or-newer graph without local functions; every constant is an initialiser of the main graph
where that is possible; nodes in stable topological order, none unused; every value of the graph and of its bodies has
a name of its own. Positions of cuts count the nodes of this form.
"""

from __future__ import annotations

import logging
import os
import posixpath
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx_ir.passes import common

from isthmus.errors import IsthmusError, ModelError
from isthmus.wire.frame import entry_bytes, why_not_carried, why_not_together
from isthmus_tools.graph import lean, old_opsets
from isthmus_tools.graph.unsigned import to_unsigned
from isthmus_tools.graph.weights import ends, inline, is_outside, same_content

# Initialisers may stay out of a graph's inputs, and lie in external files, from IR version 4 on.
_OLDEST_IR = 7
_MAX_REASON = 500
_LFS = b"version https://git-lfs.github.com/spec/"

# The passes log what they skip, and the reader what it finds odd; what matters here is raised.
logging.getLogger("onnx_ir").setLevel(logging.CRITICAL)


def read(path: str | os.PathLike[str], *, normalise: bool = True) -> ir.Model:
    """Read an ONNX file; weights in external files stay there, memory-mapped when they are looked at.

    `normalise=False` takes the file's graph as it is: right for one that this package wrote.

    Raises:
        ModelError: not an ONNX model, of an opset that cannot be converted to 11, with text inputs, sparse initialisers
            or missing weights.
    """
    path = Path(path)
    model = _parse(path)
    _place_weights(model, path)
    if normalise:
        with refusals(path):
            _normalise(model)
    _check_interface(model, path)
    return model


@contextmanager
def refusals(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what onnx and onnx-ir raise about a graph into a ModelError that starts with the first cause.

    Raises:
        ModelError: something was raised.
    """
    try:
        yield
    except (IsthmusError, MemoryError):
        raise
    # onnx-ir documents no exceptions; on broken graphs it raises nearly anything, wrapped with a dump of the graph.
    except Exception as e:
        cause: BaseException = e
        # The context too: its wrapper fails itself over some tensors (onnx-ir 1.1), and hides what was wrong with them.
        while (earlier := cause.__cause__ or cause.__context__) is not None:
            cause = earlier
        text = " ".join(str(cause).split()).rstrip(".")[:_MAX_REASON] or type(cause).__name__
        raise ModelError(
            f"{text}: {Path(path).name} is not a valid ONNX graph",
            model=str(path),
            hint="python -c 'import onnx; onnx.checker.check_model(FILE, full_check=True)' checks it whole",
        ) from e


def _parse(path: Path) -> ir.Model:
    try:
        proto = lean.read(path)
        if old_opsets.is_old(proto):
            # The converter works on whole models alone.
            proto = onnx.load(str(path), format="protobuf", load_external_data=False)
    except OSError as e:
        raise ModelError(f"{path} cannot be read: {e.strerror or e}", model=str(path)) from e
    except (DecodeError, ValueError) as e:
        raise _not_onnx(path) from e
    if not proto.opset_import:
        raise _not_onnx(path)
    if not proto.graph.output:
        raise ModelError(f"{path.name} gives no outputs", model=str(path), hint="let the model return tensors")
    old_opsets.one_domain(proto, path)
    if proto.graph.sparse_initializer or any(a.HasField("sparse_tensor") for a in old_opsets.attributes(proto)):
        raise ModelError(f"{path.name} holds sparse weights", model=str(path), hint="export it with dense weights")
    proto, opset = old_opsets.converted(proto, path)
    with refusals(path):
        model = ir.serde.deserialize_model(proto)
    model.ir_version = max(model.ir_version, _OLDEST_IR)
    old_opsets.mark(model, opset)
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


def _place_weights(model: ir.Model, path: Path) -> None:
    """Check each tensor that lies in another file, and point to where that file really is.

    A file must lie in the model's folder as the model writes it, so that no model reads what it was not given. Whoever
    makes the folder may put links there, as model caches and mounted volumes do.
    """
    for value in _initialisers(model):
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = _placed(value.const_value, str(value.name), path)
    for graph in (model.graph, *(f.graph for f in model.functions.values())):
        for node in ir.traversal.RecursiveGraphIterator(graph):
            for name, attribute in tuple(node.attributes.items()):
                if isinstance(attribute.value, ir.ExternalTensor):
                    node.attributes[name] = ir.AttrTensor(name, _placed(attribute.value, str(node.name), path))


def _placed(tensor: ir.ExternalTensor, name: str, path: Path) -> ir.TensorProtocol:
    location, offset = str(tensor.location), tensor.offset or 0
    length = tensor.nbytes if tensor.length is None else tensor.length
    if length != tensor.nbytes or offset < 0:
        raise ModelError(
            f"{path.name} says that {name} has {length} bytes at {offset}; its shape needs {tensor.nbytes}",
            model=str(path),
            tensor=name,
        )
    if ".." in PurePosixPath(location.replace("\\", "/")).parts:
        # By the text alone: a link within the folder may lead anywhere, and what lies above that is not the folder's.
        location = posixpath.normpath(location.replace("\\", "/"))
    if os.path.isabs(location) or PurePosixPath(location).parts[:1] == ("..",):
        raise ModelError(
            f"{path.name} keeps weights in {location}, outside its own folder",
            model=str(path),
            file=location,
            hint="save the model with its weights beside the .onnx file: onnx.save(…, save_as_external_data=True)",
        )
    try:
        real = _beside(path, location)
        found = real.stat()
    except (OSError, ValueError, RuntimeError):
        wrong = "is missing"
    else:
        end = offset + length
        if not stat.S_ISREG(found.st_mode):
            wrong = "is no file"
        elif found.st_size < end:
            wrong = f"has {found.st_size} bytes, too few for {name}, which ends at {end}"
        else:
            return _at(tensor, real, offset, length)
    raise ModelError(
        f"{path.name} keeps weights in {location}, which {wrong}",
        model=str(path),
        file=location,
        hint="put that file beside the .onnx file, whole",
    )


def _beside(path: Path, location: str) -> Path:
    """Where a file of that name lies beside the model, or else beside the file that a link to the model leads to."""
    try:
        return Path(path.parent, location).resolve(strict=True)
    except FileNotFoundError:
        return Path(path.resolve().parent, location).resolve(strict=True)


def _at(tensor: ir.ExternalTensor, real: Path, offset: int, length: int) -> ir.TensorProtocol:
    placed = ir.ExternalTensor(
        real.name, offset, length, tensor.dtype, shape=tensor.shape, name=str(tensor.name), base_dir=real.parent
    )
    return placed if is_outside(placed) else inline(placed)


def _check_interface(model: ir.Model, path: Path) -> None:
    for value in (*model.graph.inputs, *model.graph.outputs):
        tensor = isinstance(value.type, ir.TensorType)
        if not tensor or value.dtype == ir.DataType.STRING:
            kind = "text" if tensor else "no plain tensor"
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
    for what, side in (("takes", model.graph.inputs), ("gives", model.graph.outputs)):
        names = Counter(str(v.name) for v in side)
        if twice := [name for name, count in names.items() if count > 1]:
            raise ModelError(
                f"{path.name} {what} {', '.join(twice)} twice",
                model=str(path),
                tensor=twice[0],
                hint="leave it once among the graph's inputs or outputs",
            )
        entries = sum(entry_bytes(str(v.name), 0 if v.shape is None else len(v.shape)) for v in side)
        if reason := why_not_together(len(side), entries):
            raise ModelError(f"{path.name} takes or gives {reason}", model=str(path), tensors=len(side))
    if not len(model.graph):
        raise ModelError(f"{path.name} has no nodes", model=str(path))


def _normalise(model: ir.Model) -> None:
    if model.functions:
        common.InlinePass()(model)
    common.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    model.graph.doc_string = model.doc_string = None
    common.RemoveInitializersFromInputsPass()(model)
    _check_made(model.graph)
    _take_outer_results(model.graph)
    _name_apart(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.LiftSubgraphInitializersToMainGraphPass()(model)
    _compute_constant_outputs(model.graph)
    to_unsigned(model.graph)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    _merge_equal_initialisers(model.graph)
    model.graph.sort()
    _name_apart(model)


def bodies(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs in a node's attributes."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _initialisers(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.initializers.values()


def _check_made(graph: ir.Graph) -> None:
    """Refuse nodes that read what nothing makes.

    Raises:
        ModelError: names the first.
    """
    for node in ir.traversal.RecursiveGraphIterator(graph):
        for value in node.inputs:
            if value is None or value.producer() is not None or value.is_graph_input() or value.is_initializer():
                continue
            raise ModelError(
                f"a node {node.op_type} reads {value.name}, which is no input, no initialiser and no node's output",
                tensor=value.name,
            )


def _take_outer_results(graph: ir.Graph, around: Mapping[str | None, ir.Value] | None = None) -> None:
    """Let an Identity give each result of a body that is a value from around it: nothing else takes such bodies.

    Raises:
        ModelError: nothing of that name is made around it, either.
    """
    for i, value in enumerate(graph.outputs):
        if value.producer() is not None or value.is_graph_input() or value.is_initializer():
            continue
        outer = (around or {}).get(value.name)
        if outer is None:
            raise ModelError(f"no node makes the output {value.name}", tensor=value.name)
        node = ir.node("Identity", [outer], name=f"{value.name}_of_body")
        node.outputs[0].name, node.outputs[0].type = f"{value.name}_of_body", value.type
        graph.append(node)
        graph.outputs[i] = node.outputs[0]
    made = (v for node in graph for v in node.outputs)
    within = {**(around or {}), **{v.name: v for v in (*graph.inputs, *graph.initializers.values(), *made)}}
    for node in graph:
        for body in bodies(node):
            _take_outer_results(body, within)


def _compute_constant_outputs(graph: ir.Graph) -> None:
    """Let an Identity compute each output that is an initialiser: every output then has a node that makes it."""
    for i, value in enumerate(graph.outputs):
        if value.is_initializer():
            name = value.name
            value.name = f"{name}_constant"
            node = ir.node("Identity", [value], name=f"{name}_identity")
            node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, value.type, value.shape
            graph.append(node)
            graph.outputs[i] = node.outputs[0]


def _merge_equal_initialisers(graph: ir.Graph) -> None:
    kept: dict[tuple[object, ...], list[tuple[ir.Value, ir.TensorProtocol]]] = {}
    for value in tuple(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.dtype == ir.DataType.STRING:
            continue
        group = kept.setdefault((tensor.dtype, tuple(tensor.shape), ends(tensor)), [])
        for other, content in group:
            if same_content(content, tensor):
                value.replace_all_uses_with(other)
                del graph.initializers[str(value.name)]
                break
        else:
            group.append((value, tensor))


def _name_apart(model: ir.Model) -> None:
    """Give every value and node of the graph and its bodies a name of its own; inputs and outputs keep theirs."""
    names, seen = _Names(), set[ir.Value]()

    def name(value: ir.Value) -> None:
        if value in seen or (not value.name and not value.uses() and not value.is_graph_output()):
            return
        seen.add(value)
        fresh = names.take(value.name or "value")
        if fresh != value.name:
            value.name = fresh

    for graph in model.graphs():
        for value in (*graph.inputs, *graph.outputs, *tuple(graph.initializers.values())):
            name(value)
    nodes = _Names()
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for value in node.outputs:
            name(value)
        node.name = nodes.take(node.name or node.op_type)


class _Names:
    """Names that are taken, and the next free number behind each."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._counts: dict[str, int] = {}

    def take(self, base: str) -> str:
        """`base` if it is free, else with a number behind it."""
        fresh = base
        while fresh in self._taken:
            self._counts[base] = self._counts.get(base, 0) + 1
            fresh = f"{base}_{self._counts[base]}"
        self._taken.add(fresh)
        return fresh
