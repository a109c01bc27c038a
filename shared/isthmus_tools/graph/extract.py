"""Segments: the part of a model between two cuts, as a graph of its own that refers into the shared weights file.

`bake` writes a segment with its own weights into a folder, for images without a registry.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import onnx_ir as ir

from isthmus.artifacts.bundle import Blob, Bundle, Segment, Weights, digest_of
from isthmus.artifacts.segment_id import SegmentId
from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import CutError
from isthmus.registry.source import BLOBS, GRAPH, MANIFEST, SEGMENT, WEIGHTS, Located
from isthmus_tools.graph.cuts import AnyCut, boundary_values, upstream_of
from isthmus_tools.graph.model import Model
from isthmus_tools.graph.node_writer import declare
from isthmus_tools.graph.weights import ALIGNMENT, LOCATION, reference


@dataclass(frozen=True)
class Extracted:
    """A segment's serialised graph and its manifest facts; `weights` are half-open index ranges of weight tensors."""

    id: SegmentId
    graph: bytes
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: tuple[tuple[int, int], ...]
    macs: int

    @cached_property
    def segment(self) -> Segment:
        """The manifest's entry."""
        blob = Blob(digest_of(self.graph), len(self.graph))
        return Segment(self.id, blob, self.inputs, self.outputs, self.weights, self.macs)


def partition(model: Model, weights: Weights, cuts: Sequence[AnyCut]) -> list[Extracted]:
    """The segments between consecutive `cuts`, in order.

    Raises:
        CutError: a cut does not lie downstream of its predecessor.
    """
    check_order(model, cuts)
    ends: list[AnyCut | None] = [None, *cuts, None]
    return [extract(model, weights, a, b) for a, b in pairwise(ends)]


def check_order(model: Model, cuts: Sequence[AnyCut]) -> None:
    """Check that each cut lies downstream of its predecessor.

    Raises:
        CutError: names both cuts.
    """
    for first, second in pairwise(cuts):
        # A strict subset: equal sets would leave a segment without nodes.
        if not upstream_of(model, first) < upstream_of(model, second):
            raise CutError(
                f"the cut {second.name} does not lie after the cut {first.name}",
                first=first.name,
                second=second.name,
                hint="give the cuts in the order in which data passes them, each with nodes between it and the next",
            )


def extract(model: Model, weights: Weights, start: AnyCut | None, stop: AnyCut | None) -> Extracted:
    """The segment from `start` (None: the model's inputs) to `stop` (None: the model's outputs).

    Inputs are the values that its nodes read and do not produce; outputs are its boundary tensors at `stop` and the
    model's outputs that it produces. Static nodes are copied into every segment that needs them; static outputs come
    from the last segment.

    Raises:
        CutError: no node lies between the cuts.
    """
    before = frozenset[int]() if start is None else upstream_of(model, start)
    everything = frozenset(i for i, dynamic in enumerate(model.dynamic) if dynamic)
    region = (everything if stop is None else upstream_of(model, stop)) - before
    segment_id = SegmentId(start.name if start else "", stop.name if stop else "")
    boundary = {} if stop is None else boundary_values(model, before | region)
    used = {v for i in region for v in model.uses[i] if not model.is_static(v)}
    produced = [v for i in sorted(region) for v in model.nodes[i].outputs if v.name]
    inside = set(produced)
    # The uncut model takes all declared inputs, used or not: callers send what the model declares.
    if start is None and stop is None:
        inputs = list(model.inputs)
    else:
        earlier = (*model.inputs, *(v for i in sorted(before) for v in model.nodes[i].outputs))
        inputs = [v for v in earlier if v in used and v not in inside]
    # Model outputs come last and in the model's order, as its callers expect.
    results = [v for v in model.outputs if v in inside or (stop is None and model.is_static(v))]
    outputs = [*(v for v in produced if v in boundary and v not in results), *results]
    if not outputs:
        raise CutError(f"the segment {segment_id} would compute nothing", segment=segment_id)
    data, indices = _serialise(model, ir.convenience.extract(model.graph, inputs, outputs), weights)
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
    """The graph's bytes and the indices of its tensors in the weights file, ascending."""
    places = {t.name: t for t in weights.tensors}
    order = {t.name: i for i, t in enumerate(weights.tensors)}
    indices = []
    # Sorted, since onnx-ir collects initialisers in a set: equal segments then have equal bytes and digests.
    values = sorted(graph.initializers.values(), key=lambda v: str(v.name))
    graph.initializers.clear()
    for value in values:
        # The value is the clone's own; its tensor is shared with the model, hence replaced and not changed.
        if (tensor := reference(places, value)) is not None:
            value.const_value = tensor
            indices.append(order[str(value.name)])
        graph.initializers.add(value)
    _declare_boundary_types(model, graph)
    document = ir.Model(graph, ir_version=model.document.ir_version, producer_name="isthmus")
    return ir.serde.serialize_model(document).SerializeToString(deterministic=True), sorted(indices)


def _declare_boundary_types(model: Model, graph: ir.Graph) -> None:
    """Keep types at the segment's boundary only: inner declarations may be wrong, and onnxruntime infers them."""
    boundary = {*graph.inputs, *graph.outputs}
    for node in graph:
        for value in node.outputs:
            if value not in boundary:
                value.type = value.shape = None
    for value in boundary:
        declare(value, model.specs[str(value.name)])
    for body in graph.subgraphs():
        for node in body:
            for value in node.outputs:
                value.shape = None


def _ranges(indices: Sequence[int]) -> tuple[tuple[int, int], ...]:
    ranges: list[tuple[int, int]] = []
    for i in indices:
        if ranges and ranges[-1][1] == i:
            ranges[-1] = (ranges[-1][0], i + 1)
        else:
            ranges.append((i, i + 1))
    return tuple(ranges)


def bake(located: Located, manifest: bytes, folder: Path) -> int:
    """Write a local segment to `folder` as BakedSegment reads it; returns the bytes of its weights.

    The weights file holds this segment's tensors only, so the graph's references are rewritten.

    Source: docs/reference/registry.md, "A baked segment".
    """
    folder.mkdir(parents=True, exist_ok=True)
    offsets, weights_digest, size = _copy_weights(located, folder / WEIGHTS)
    model = ir.load(located.path)
    for value in model.graph.initializers.values():
        if isinstance(tensor := value.const_value, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                LOCATION,
                offsets[tensor.offset or 0],
                tensor.length,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=str(value.name),
            )
    graph = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    (folder / GRAPH).write_bytes(graph)
    (folder / MANIFEST).write_bytes(manifest)
    document = {
        "segment": located.segment.id,
        "graph": {"digest": digest_of(graph), "size": len(graph)},
        "weights": {"digest": weights_digest, "size": size},
    }
    (folder / SEGMENT).write_text(json.dumps(document, indent=1) + "\n")
    return size


def bake_tables(bundle: Bundle, segment: Segment, blob: Callable[[Blob], bytes], folder: Path) -> int:
    """Write the codec tables that decode the segment's inputs to `folder`; returns their bytes.

    Raises:
        RegistryError: `blob` cannot supply a table.
    """
    tables = {bundle.tables[spec.name] for spec in segment.inputs if spec.name in bundle.tables}
    return sum(bake_blob(table, blob, folder) for table in tables)


def bake_blob(wanted: Blob, blob: Callable[[Blob], bytes], folder: Path) -> int:
    """Write a blob beside a baked segment: a table, or the graph of the exit behind a head; returns its bytes.

    Raises:
        RegistryError: `blob` cannot supply it.
    """
    path = folder / BLOBS / wanted.digest.removeprefix("sha256:")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(blob(wanted))
    return wanted.size


def _copy_weights(located: Located, path: Path) -> tuple[dict[int, int], str, int]:
    """Copy the segment's tensors; returns each old offset's new offset, the file's digest and its length."""
    offsets: dict[int, int] = {}
    digest, end = hashlib.sha256(), 0
    with (located.path.parent / LOCATION).open("rb") as source, path.open("wb") as target:
        for tensor in located.bundle.weight_ranges(located.segment):
            source.seek(tensor.offset)
            # Aligned as in the bundle's file: onnxruntime maps both.
            padding = bytes(-end % ALIGNMENT)
            for piece in (padding, source.read(tensor.length)):
                target.write(piece)
                digest.update(piece)
            offsets[tensor.offset] = end + len(padding)
            end = offsets[tensor.offset] + tensor.length
    return offsets, f"sha256:{digest.hexdigest()}", end
