"""Models of opsets before 11: converted by onnx's version converter, and compared with the original by running both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from isthmus.errors import ModelError
from isthmus.runtime.ort import ort, time_limit
from isthmus.runtime.ort_runner import reason_of
from isthmus_tools.graph import probe
from isthmus_tools.graph.compare import difference

OLDEST_OPSET = 11
SAME = 1e-4
"""The largest difference of an original and its conversion, relative to an output's largest magnitude."""
_CONVERTED = "isthmus.converted_from"
_AI_ONNX = "ai.onnx"
_INITIALISERS_APART = 4
_MAX_REASON = 300

Arrays = Mapping[str, npt.NDArray[np.generic]]


def one_domain(proto: onnx.ModelProto, path: Path) -> None:
    """Write the default domain as the empty text everywhere; `ai.onnx` is its other name.

    Raises:
        ModelError: the model imports two opsets of it.
    """
    for importer in (proto, *proto.functions):
        versions: dict[str, int] = {}
        for entry in importer.opset_import:
            domain = "" if entry.domain == _AI_ONNX else entry.domain
            if versions.setdefault(domain, entry.version) != entry.version:
                raise ModelError(
                    f"{path.name} imports the opsets {versions[domain]} and {entry.version} of one domain",
                    model=str(path),
                    hint="leave one of the two in opset_import",
                )
        del importer.opset_import[:]
        importer.opset_import.extend(onnx.helper.make_opsetid(d, v) for d, v in versions.items())
    for function in proto.functions:
        if function.domain == _AI_ONNX:
            function.domain = ""
    for nodes in (proto.graph.node, *(f.node for f in proto.functions)):
        for node in _nodes(nodes):
            if node.domain == _AI_ONNX:
                node.domain = ""


def attributes(proto: onnx.ModelProto) -> Iterator[onnx.AttributeProto]:
    """The attributes of all nodes, those in bodies and functions too."""
    for nodes in (proto.graph.node, *(f.node for f in proto.functions)):
        for node in _nodes(nodes):
            yield from node.attribute


def is_old(proto: onnx.ModelProto) -> bool:
    """Whether the model uses an opset before 11."""
    return any(o.version < OLDEST_OPSET for o in proto.opset_import if o.domain in ("", _AI_ONNX))


def converted(proto: onnx.ModelProto, path: Path) -> tuple[onnx.ModelProto, int | None]:
    """The model at opset 11 where it uses an older one, and the opset that it was converted from.

    Raises:
        ModelError: the converter does not know how; its reason is in the message.
    """
    opset = {o.domain: o.version for o in proto.opset_import}.get("", OLDEST_OPSET)
    if opset >= OLDEST_OPSET:
        return proto, None
    # Before it, initialisers had to be inputs, and the converter finds no others; many files never kept to that.
    proto.ir_version = max(proto.ir_version, _INITIALISERS_APART)
    try:
        made = onnx.version_converter.convert_version(proto, OLDEST_OPSET)
    except Exception as e:  # the converter is C++ and raises RuntimeError, ValueError and errors of its own
        raise ModelError(
            f"{path.name} uses opset {opset} and cannot be converted to {OLDEST_OPSET}:"
            f" {' '.join(str(e).split())[:_MAX_REASON]}",
            model=str(path),
            opset=opset,
            hint=f"export it anew, with opset {OLDEST_OPSET} or newer",
        ) from e
    for node in _nodes(made.graph.node):
        if node.op_type == "Resize" and not node.domain:
            _as_before_11(node)
    return made, opset


def mark(model: ir.Model, opset: int | None) -> None:
    """Note on a model that it was converted from `opset`."""
    if opset is not None:
        model.meta[_CONVERTED] = opset


def converted_from(model: ir.Model) -> int | None:
    """The opset that a model was converted from; None where it is as its file has it."""
    found: int | None = model.meta.get(_CONVERTED)
    return found


def check_same(path: Path, model: ir.Model, inputs: Sequence[Arrays], *, random: bool) -> None:
    """Run the file at `path` and its conversion on the first of `inputs` that the original runs with, and compare.

    What differs from itself cannot be compared; `random` says that it may.

    Raises:
        ModelError: onnxruntime cannot run the original or the conversion, or their outputs differ.
    """
    opset = converted_from(model)
    names = [str(v.name) for v in model.graph.outputs]
    expected, given = _original(path, names, inputs, opset)
    found = probe.values(model, names, given)
    off = max(difference(expected[n], found[n]) for n in names)
    if off > SAME and not (random and _differs_from_itself(path, names, expected, given, opset)):
        raise ModelError(
            f"{path.name} uses opset {opset}, and converted to {OLDEST_OPSET} it computes something else: its outputs"
            f" differ by {off:.1g} of their largest value",
            model=str(path),
            opset=opset,
            hint=f"export it anew, with opset {OLDEST_OPSET} or newer",
        )


def _differs_from_itself(path: Path, names: list[str], expected: Arrays, given: Arrays, opset: int | None) -> bool:
    again, _ = _original(path, names, [given], opset)
    return any(difference(expected[n], again[n]) > SAME for n in names)


def _original(path: Path, names: list[str], inputs: Sequence[Arrays], opset: int | None) -> tuple[Arrays, Arrays]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    reason = ""
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for arrays in inputs:
            try:
                with time_limit(probe.MAX_RUN_S) as limited:
                    return dict(zip(names, session.run(names, dict(arrays), limited), strict=True)), arrays
            except Exception as e:  # onnxruntime's own errors share no base but Exception
                reason = reason_of(e)
    except Exception as e:
        reason = reason_of(e)
    raise ModelError(
        f"{path.name} uses opset {opset} and does not run as it is, so its conversion to {OLDEST_OPSET} cannot be"
        f" compared: {reason}",
        model=str(path),
        opset=opset,
        hint=f"give an input that it accepts (--example), or export it anew with opset {OLDEST_OPSET} or newer",
    )


def _as_before_11(node: onnx.NodeProto) -> None:
    """Let a Resize find its samples as Upsample, and Resize before opset 11, did; the converter leaves that open."""
    known = {a.name for a in node.attribute}
    for name, value in (("coordinate_transformation_mode", "asymmetric"), ("nearest_mode", "floor")):
        if name not in known:
            node.attribute.append(onnx.helper.make_attribute(name, value))


def _nodes(nodes: object) -> Iterator[onnx.NodeProto]:
    """The nodes and those of their bodies."""
    stack = list(nodes)  # type: ignore[call-overload]
    while stack:
        node = stack.pop()
        yield node
        for attribute in node.attribute:
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                stack.extend(graph.node)
