"""Several classifiers as a single graph: the members' graphs side by side, a weighted sum of their scores at the end.

Names begin with the member's, so that `camera.input` and `radar.input` are inputs of the same model. A few nodes
compute the sum of `isthmus.pipeline.fusion`: in front of these nodes a score for each class and member crosses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from isthmus.arrays import Array
from isthmus.artifacts.fusion import ScoreKind
from isthmus.errors import ModelError
from isthmus.pipeline.fusion import MIN_PROBABILITY
from isthmus_tools.graph import probe
from isthmus_tools.graph.cuts import CutInfo, cut_at
from isthmus_tools.graph.load import read, refusals
from isthmus_tools.graph.model import Model
from isthmus_tools.graph.node_writer import NodeWriter, initialiser

FUSED = "fused_scores"
SCORES_CUT = "scores"
"""The cut in front of the sum: every member runs before it."""
# From this opset on ReduceMean takes its axes as an input.
_AXES_AS_INPUT = 18
_MAX_REASON = 300
# float32 against the sum of float64; half floats within the members lose more.
_MAX_DIFFERENCE = 1e-2
_MAX_CUT_NAME = 63


@dataclass(frozen=True)
class MemberGraph:
    """A classifier's uncut graph with the weights beside the file; `output` holds the scores.

    `name` is the prefix of its names. `rank` and `dtype` are the output's, which holds `probabilities` or logits.
    """

    name: str
    path: Path
    inputs: tuple[str, ...]
    output: str
    dtype: str
    rank: int
    probabilities: bool

    @property
    def scores(self) -> str:
        """The value that carries the scores to the sum."""
        return f"{self.name}.{self.output}"


@dataclass(frozen=True)
class ScoreSum:
    """The sum at the end, times `scale` for log-odds. Shapes: weights (members, 1) or (members, classes)."""

    kind: ScoreKind
    weights: Array
    scale: float


def input_name(member: str, name: str, *, shared: bool) -> str:
    """The fused graph's name of a member's input."""
    return name if shared else f"{member}.{name}"


def merge(members: Sequence[MemberGraph], total: ScoreSum, out: Path, *, shared: bool = False) -> Path:
    """Write the graph of all members and their sum, `fused_scores` (batch, classes), to `out`; weights lie beside it.

    `shared`: all members take the same inputs, which keep their names.

    Raises:
        ModelError: a member is no valid graph, or the opsets of two members cannot be brought together.
    """
    documents = _at_common_opset(members)
    with refusals(out):
        parts = _Parts()
        terms = [
            _take(member, document, parts, shared=shared) for member, document in zip(members, documents, strict=True)
        ]
        opsets = {domain: version for each in documents for domain, version in each.opset_imports.items()}
        fused = _sum(members, terms, total, parts, opsets[""])
        graph = ir.Graph(
            list(parts.inputs.values()),
            [fused],
            nodes=parts.writer.nodes,
            initializers=parts.constants,
            opset_imports=opsets,
            name="fusion",
        )
        version = max(document.ir_version for document in documents)
        # Streamed: the weights of all members together may not fit into memory.
        ir.save(ir.Model(graph, ir_version=version, producer_name="isthmus"), out, external_data=f"{out.name}.weights")
    return out


def fusion_cuts(model: Model, members: Sequence[MemberGraph], *, shared: bool = False) -> list[CutInfo]:
    """The cut in front of the sum, then a cut for each member: that member at the edge, the rest in the cloud.

    Raises:
        CutError: a member's scores do not separate it from the sum.
    """
    cuts = [cut_at(model, [member.scores for member in members], SCORES_CUT)]
    for member in members:
        others = [other for other in members if other is not member]
        passing = [input_name(other.name, name, shared=shared) for other in others for name in other.inputs]
        # Cut names have no dots.
        name = f"edge-{member.name.replace('.', '-')}"[:_MAX_CUT_NAME]
        cuts.append(cut_at(model, [member.scores, *passing], name))
    return cuts


def check_sum(model: Model, inputs: Sequence[Mapping[str, Array]], expected: Array) -> None:
    """Run the fused graph on some inputs, each a batch of 1, and compare the sum with the members' own, `expected`.

    Raises:
        ModelError: the sums differ beyond rounding: a converted member computes another function.
    """
    for arrays, row in zip(inputs, expected, strict=True):
        fused = probe.values(model.document, [FUSED], arrays)[FUSED].reshape(-1)
        error = float(np.abs(fused - row).max() / max(1.0, np.abs(row).max()))
        if not error <= _MAX_DIFFERENCE:
            raise ModelError(
                f"the fused graph differs from its members' own scores by {error:.1g} of their largest",
                difference=error,
                hint="members of different opsets are converted to the newest: export them with the same one",
            )


class _Parts:
    """Inputs, nodes and constants of the fused graph."""

    def __init__(self) -> None:
        self.inputs: dict[str, ir.Value] = {}
        self.writer = NodeWriter()
        self.constants: list[ir.Value] = []

    def constant(self, array: Array, name: str) -> ir.Value:
        """A new constant."""
        self.constants.append(initialiser(ir.tensor(array, name=name)))
        return self.constants[-1]


def _at_common_opset(members: Sequence[MemberGraph]) -> list[ir.Model]:
    """The members' graphs, converted to the newest opset among the members.

    Raises:
        ModelError: onnx's converter refuses a member, or two use different versions of another domain.
    """
    documents = [read(member.path, normalise=False) for member in members]
    versions = dict[str, int]()
    for member, document in zip(members, documents, strict=True):
        for domain, version in document.opset_imports.items():
            if domain and versions.setdefault(domain, version) != version:
                raise ModelError(
                    f"{member.name} uses version {version} of {domain}, another member version {versions[domain]}",
                    member=member.name,
                    hint="export both with the same tools",
                )
    newest = max(document.opset_imports[""] for document in documents)
    return [
        document if document.opset_imports[""] == newest else _converted(member, newest)
        for member, document in zip(members, documents, strict=True)
    ]


def _converted(member: MemberGraph, opset: int) -> ir.Model:
    try:
        # With its weights in memory: the converter folds constants.
        return ir.from_proto(onnx.version_converter.convert_version(onnx.load(member.path), opset))
    except Exception as e:  # the converter is C++ and raises RuntimeError, ValueError and errors of its own
        reason = " ".join(str(e).split())[:_MAX_REASON]
        raise ModelError(
            f"{member.name} cannot be converted to opset {opset} of another member: {reason}",
            member=member.name,
            hint=f"export it anew, with opset {opset}",
        ) from e


def _take(member: MemberGraph, document: ir.Model, parts: _Parts, *, shared: bool) -> ir.Value:
    """Move a member's nodes to the fused graph, names prefixed; returns the scores."""
    graph = document.graph
    # Nodes of further outputs have no reader left, and the normalisation removes them.
    scores = next(value for value in graph.outputs if value.name == member.output)
    _rename_sizes(member, [*graph.inputs, scores], scores, shared=shared)
    for value in graph.inputs:
        name = input_name(member.name, str(value.name), shared=shared)
        if (same := parts.inputs.get(name)) is not None:
            value.replace_all_uses_with(same)
        else:
            parts.inputs[name] = value
    _prefix_names(document, member.name, parts.inputs.values() if shared else ())
    nodes, constants = list(graph), list(graph.initializers.values())
    # Values and nodes belong to a single graph at a time.
    graph.outputs.clear()
    graph.inputs.clear()
    graph.initializers.clear()
    graph.remove(nodes)
    parts.writer.nodes += nodes
    parts.constants += constants
    return scores


def _rename_sizes(member: MemberGraph, values: Sequence[ir.Value], scores: ir.Value, *, shared: bool) -> None:
    """Free sizes: the first size of the scores is the batch of all members, any further size the member's own."""
    batch = None if scores.shape is None else str(scores.shape[0])

    def size(dim: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
        if isinstance(dim, int) or dim.value is None:
            return dim
        own = str(dim.value) if shared else f"{member.name}_{dim.value}"
        return ir.SymbolicDim("batch" if str(dim) == batch else own)

    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([size(dim) for dim in value.shape])


def _prefix_names(document: ir.Model, prefix: str, but: Iterable[ir.Value]) -> None:
    done = set(but)
    for graph in document.graphs():
        for value in (*graph.inputs, *tuple(graph.initializers.values()), *(v for n in graph for v in n.outputs)):
            if value.name and value not in done:
                done.add(value)
                value.name = f"{prefix}.{value.name}"
        # Profiles attribute kernels to nodes by name.
        for node in graph:
            node.name = f"{prefix}.{node.name}"


def _sum(
    members: Sequence[MemberGraph], terms: Sequence[ir.Value], total: ScoreSum, parts: _Parts, opset: int
) -> ir.Value:
    """The nodes of `centred_scores` and `weighted_sum`, in float32."""
    op = parts.writer.node
    axes: dict[str, Any] = {} if opset >= _AXES_AS_INPUT else {"axes": [1]}
    axis = [] if axes else [parts.constant(np.array([1], np.int64), "fused_axis")]
    weighted = []
    for member, scores, weights in zip(members, terms, total.weights, strict=True):

        def name(step: str, member: MemberGraph = member) -> str:
            return f"{member.name}.fused_{step}"

        # (batch, classes): further axes have a single value each
        x = scores if member.rank == 2 else op("Flatten", [scores], name("rows"), axis=1)
        x = x if member.dtype == "float32" else op("Cast", [x], name("float"), to=ir.DataType.FLOAT)
        if total.kind == "probabilities" and not member.probabilities:
            x = op("Softmax", [x], name("shares"), axis=1)
        elif total.kind == "log_odds" and member.probabilities:
            least = parts.constant(np.array(MIN_PROBABILITY, np.float32), name("least"))
            x = op("Log", [op("Max", [x, least], name("floored"))], name("logs"))
        centred = op("Sub", [x, op("ReduceMean", [x, *axis], name("mean"), keepdims=1, **axes)], name("centred"))
        factor = parts.constant((total.scale * weights).astype(np.float32), name("weights"))
        weighted.append(op("Mul", [centred, factor], name("weighted")))
    fused = op("Sum", weighted, FUSED)
    fused.type = ir.TensorType(ir.DataType.FLOAT)
    return fused
