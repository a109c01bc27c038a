"""Segments: the part of a model between two cuts, as an ONNX graph of its own that points into the weights file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TypeAlias

import onnx_ir as ir

from isthmus.arrays import DTYPES
from isthmus.artifacts import bundle
from isthmus.artifacts.bundle import Blob, Segment, Weights, WeightTensor
from isthmus.artifacts.segment_id import SegmentId
from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import CutError
from isthmus_tools.graph.cuts import CutInfo, crossing_values, upstream_of
from isthmus_tools.graph.model import Model
from isthmus_tools.graph.weights import placed

AnyCut: TypeAlias = CutInfo | bundle.Cut


@dataclass(frozen=True)
class Extracted:
    """A segment's graph as bytes, and what its manifest entry says; `weights` are ranges of indices, half-open."""

    id: SegmentId
    graph: bytes
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: tuple[tuple[int, int], ...]
    macs: int

    @cached_property
    def segment(self) -> Segment:
        """The manifest's entry."""
        blob = Blob(bundle.digest_of(self.graph), len(self.graph))
        return Segment(self.id, blob, self.inputs, self.outputs, self.weights, self.macs)


def partition(model: Model, weights: Weights, cuts: Sequence[AnyCut]) -> list[Extracted]:
    """The segments that `cuts` part the model into, in order.

    Raises:
        CutError: a cut is not downstream of the one before it.
    """
    check_order(model, cuts)
    ends: list[AnyCut | None] = [None, *cuts, None]
    return [extract(model, weights, a, b) for a, b in pairwise(ends)]


def check_order(model: Model, cuts: Sequence[AnyCut]) -> None:
    """See that each cut lies downstream of the one before it.

    Raises:
        CutError: one does not; names both.
    """
    for first, second in pairwise(cuts):
        if not upstream_of(model, first) < upstream_of(model, second):
            raise CutError(
                f"the cut {second.name} does not lie after the cut {first.name}",
                first=first.name,
                second=second.name,
                hint="give the cuts in the order in which data passes them, each with nodes between it and the next",
            )


def extract(model: Model, weights: Weights, start: AnyCut | None, stop: AnyCut | None) -> Extracted:
    """The segment from `start` (None: the model's inputs) to `stop` (None: its outputs).

    It takes the values that its nodes read and do not make, and gives those it makes that cross `stop` or are outputs
    of the model. Static nodes are copied into every segment that needs them; static outputs come from the last one.

    Raises:
        CutError: nothing lies between the two.
    """
    before = frozenset[int]() if start is None else upstream_of(model, start)
    everything = frozenset(i for i, dynamic in enumerate(model.dynamic) if dynamic)
    region = (everything if stop is None else upstream_of(model, stop)) - before
    segment_id = SegmentId(start.name if start else "", stop.name if stop else "")
    crossing = {} if stop is None else crossing_values(model, before | region)
    used = {v for i in region for v in model.uses[i] if not model.is_static(v)}
    made = [v for i in sorted(region) for v in model.nodes[i].outputs if v.name]
    within = set(made)
    if start is None and stop is None:
        inputs = list(model.inputs)
    else:
        known = (*model.inputs, *(v for i in sorted(before) for v in model.nodes[i].outputs))
        inputs = [v for v in known if v in used and v not in within]
    results = [v for v in model.outputs if v in within or (stop is None and model.is_static(v))]
    outputs = [*(v for v in made if v in crossing and v not in results), *results]
    if not outputs:
        raise CutError(f"the segment {segment_id} would compute nothing", segment=segment_id)
    graph = ir.convenience.extract(model.graph, inputs, outputs)
    data, indices = _serialise(model, graph, weights)
    return Extracted(
        id=segment_id,
        graph=data,
        inputs=tuple(model.specs[str(v.name)] for v in inputs),
        outputs=tuple(_spec(model, v) for v in outputs),
        weights=_ranges(indices),
        macs=sum(model.macs[i] for i in region),
    )


def _spec(model: Model, value: ir.Value) -> TensorSpec:
    spec = model.specs.get(str(value.name))
    if spec is None:
        raise CutError(f"the type of the output {value.name} is unknown", tensor=value.name)
    return spec


def _serialise(model: Model, graph: ir.Graph, weights: Weights) -> tuple[bytes, list[int]]:
    places: Mapping[str, WeightTensor] = {t.name: t for t in weights.tensors}
    order = {t.name: i for i, t in enumerate(weights.tensors)}
    found = []
    # They come out of a set; sorted, equal segments have equal bytes.
    values = sorted(graph.initializers.values(), key=lambda v: str(v.name))
    graph.initializers.clear()
    for value in values:
        # The value is the clone's own; its tensor is shared with the model, and so replaced, not changed.
        if (tensor := placed(places, value)) is not None:
            value.const_value = tensor
            found.append(order[str(value.name)])
        graph.initializers.add(value)
    boundary = {*graph.inputs, *graph.outputs}
    for node in graph:
        for value in node.outputs:
            if value not in boundary:
                value.type = value.shape = None
    for value in boundary:
        spec = model.specs[str(value.name)]
        value.type = ir.TensorType(_data_type(spec.dtype))
        value.shape = ir.Shape([None if d == "?" else d for d in spec.shape])
    for body in graph.subgraphs():
        for node in body:
            for value in node.outputs:
                value.shape = None
    whole = ir.Model(graph, ir_version=model.document.ir_version, producer_name="isthmus")
    return ir.serde.serialize_model(whole).SerializeToString(deterministic=True), sorted(found)


def _data_type(name: str) -> ir.DataType:
    return ir.DataType.from_numpy(DTYPES[name])


def _ranges(indices: Sequence[int]) -> tuple[tuple[int, int], ...]:
    ranges: list[tuple[int, int]] = []
    for i in indices:
        if ranges and ranges[-1][1] == i:
            ranges[-1] = (ranges[-1][0], i + 1)
        else:
            ranges.append((i, i + 1))
    return tuple(ranges)
