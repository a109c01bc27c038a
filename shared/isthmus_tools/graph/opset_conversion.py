"""Conversion of models of opsets before 11 by onnx's version converter, verified by running original and conversion.

Source: onnx.ai/onnx/api/version_converter.html.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir

from isthmus.arrays import Array
from isthmus.errors import ModelError
from isthmus.runtime.ort import ort, reason_of, time_limit
from isthmus_tools.graph import probe
from isthmus_tools.graph.probe import difference

MIN_OPSET = 11
# Relative to an output's largest magnitude: float32 rounding of another operator order stays below.
MAX_DIFFERENCE = 1e-4
_CONVERTED = "isthmus.converted_from"
_AI_ONNX = "ai.onnx"
# From IR version 4 on initialisers need not be graph inputs.
_IR_OF_FREE_INITIALISERS = 4
_MAX_REASON = 300

Arrays = Mapping[str, Array]


def merge_default_domain(proto: onnx.ModelProto, path: Path) -> None:
    """Write the default domain as the empty text everywhere; `ai.onnx` is its other name.

    Raises:
        ModelError: the model imports two opsets of that domain.
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
    for node in _all_nodes(proto):
        if node.domain == _AI_ONNX:
            node.domain = ""


def attributes(proto: onnx.ModelProto) -> Iterator[onnx.AttributeProto]:
    """The attributes of all nodes, including those of subgraph bodies and local functions."""
    for node in _all_nodes(proto):
        yield from node.attribute


def is_old(proto: onnx.ModelProto) -> bool:
    """Whether the model uses an opset before MIN_OPSET."""
    return any(o.version < MIN_OPSET for o in proto.opset_import if o.domain in ("", _AI_ONNX))


def converted(proto: onnx.ModelProto, path: Path) -> tuple[onnx.ModelProto, int | None]:
    """The model at MIN_OPSET or newer, and the opset before a conversion; None without a conversion.

    Raises:
        ModelError: onnx's converter refuses the model; its reason is in the message.
    """
    opset = {o.domain: o.version for o in proto.opset_import}.get("", MIN_OPSET)
    if opset >= MIN_OPSET:
        return proto, None
    # Many old files declare an IR version that demands initialisers among the inputs, and do not comply.
    proto.ir_version = max(proto.ir_version, _IR_OF_FREE_INITIALISERS)
    try:
        result = onnx.version_converter.convert_version(proto, MIN_OPSET)
    except Exception as e:  # the converter is C++ and raises RuntimeError, ValueError and errors of its own
        raise ModelError(
            f"{path.name} uses opset {opset} and cannot be converted to {MIN_OPSET}:"
            f" {' '.join(str(e).split())[:_MAX_REASON]}",
            model=str(path),
            opset=opset,
            hint=f"export it anew, with opset {MIN_OPSET} or newer",
        ) from e
    for node in _nodes(result.graph.node):
        if node.op_type == "Resize" and not node.domain:
            _set_resize_defaults(node)
    return result, opset


def mark(model: ir.Model, opset: int | None) -> None:
    """Record the opset before a conversion on the model."""
    if opset is not None:
        model.meta[_CONVERTED] = opset


def converted_from(model: ir.Model) -> int | None:
    """The opset before the conversion; None for a model as stored in its file."""
    opset: int | None = model.meta.get(_CONVERTED)
    return opset


def check_same(path: Path, model: ir.Model, inputs: Sequence[Arrays], *, random: bool) -> None:
    """Compare the original at `path` and its conversion on the first of `inputs` that the original accepts.

    `random`: the model may have random operators; a model whose own runs differ is not compared.

    Raises:
        ModelError: onnxruntime cannot run the original or the conversion, or their outputs differ.
    """
    opset = converted_from(model)
    names = [str(v.name) for v in model.graph.outputs]
    expected, accepted = _run_original(path, names, inputs, opset)
    actual = probe.values(model, names, accepted)
    error = max(difference(expected[n], actual[n]) for n in names)
    if error > MAX_DIFFERENCE and not (random and _differs_between_runs(path, names, expected, accepted, opset)):
        raise ModelError(
            f"{path.name} uses opset {opset}, and converted to {MIN_OPSET} it computes something else: its outputs"
            f" differ by {error:.1g} of their largest value",
            model=str(path),
            opset=opset,
            hint=f"export it anew, with opset {MIN_OPSET} or newer",
        )


def _differs_between_runs(path: Path, names: list[str], first: Arrays, inputs: Arrays, opset: int | None) -> bool:
    second, _ = _run_original(path, names, [inputs], opset)
    return any(difference(first[n], second[n]) > MAX_DIFFERENCE for n in names)


def _run_original(path: Path, names: list[str], inputs: Sequence[Arrays], opset: int | None) -> tuple[Arrays, Arrays]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    # Optimised graphs round elsewhere; the comparison is of operators.
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
        f"{path.name} uses opset {opset} and does not run as it is, so its conversion to {MIN_OPSET} cannot be"
        f" compared: {reason}",
        model=str(path),
        opset=opset,
        hint=f"give an input that it accepts (--example), or export it anew with opset {MIN_OPSET} or newer",
    )


def _set_resize_defaults(node: onnx.NodeProto) -> None:
    """Set the sampling of Upsample, and of Resize before opset 11; the converter leaves opset 11's defaults."""
    present = {a.name for a in node.attribute}
    for name, value in (("coordinate_transformation_mode", "asymmetric"), ("nearest_mode", "floor")):
        if name not in present:
            node.attribute.append(onnx.helper.make_attribute(name, value))


def _all_nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for nodes in (proto.graph.node, *(f.node for f in proto.functions)):
        yield from _nodes(nodes)


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    stack = list(nodes)
    while stack:
        node = stack.pop()
        yield node
        for attribute in node.attribute:
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                stack.extend(graph.node)
