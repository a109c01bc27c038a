"""Graphs with further outputs: inner values of a model beside its prediction, from a single run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from isthmus.artifacts.bundle import Blob, Segment, digest_of
from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import ModelError
from isthmus_tools.graph.node_writer import declare


def observing(whole: Path, segment: Segment, specs: Sequence[TensorSpec]) -> tuple[bytes, Segment]:
    """The graph of `segment`, in the file `whole`, with the values of `specs` as outputs too; not for publication.

    Inputs and outputs of the segment among `specs` stay as they are.

    Raises:
        ModelError: the graph lacks a value.
    """
    model = ir.load(whole)
    values = {value.name: value for node in model.graph for value in node.outputs}
    ends = {spec.name for spec in (*segment.inputs, *segment.outputs)}
    inner = {spec.name: spec for spec in specs if spec.name not in ends}
    for spec in inner.values():
        if (value := values.get(spec.name)) is None:
            raise ModelError(f"the graph of segment {segment.id} has no value {spec.name}", value=spec.name)
        # State stays an output too: GroupQueryAttention has no form without.
        model.graph.outputs.append(declare(value, spec))
    data = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    outputs = (*segment.outputs, *inner.values())
    return data, Segment(segment.id, Blob(digest_of(data), len(data)), segment.inputs, outputs, segment.weights)
