"""Graphs of a segment's variants: files that hold their weights, and declare the segment's own inputs and outputs."""

from __future__ import annotations

from pathlib import Path

import onnx
from msgspec import structs

from isthmus.artifacts.bundle import Blob, Segment, digest_of
from isthmus.artifacts.segment_id import SegmentId
from isthmus.errors import ModelError
from isthmus_tools.graph.load import refusals

# protobuf's own bound is 2 GiB, and a quantiser holds several copies.
MAX_GRAPH_BYTES = 2**30


def standalone(path: Path, out: Path) -> Path:
    """Write the graph at `path` to `out` with its weights inside.

    Raises:
        ModelError: more than MAX_GRAPH_BYTES.
    """
    with refusals(path):
        graph = onnx.load(str(path), load_external_data=False).graph
        size = sum(int(e.value) for t in graph.initializer for e in t.external_data if e.key == "length")
        if size > MAX_GRAPH_BYTES:
            raise ModelError(
                f"the segment's weights have {size} bytes; a variant holds up to {MAX_GRAPH_BYTES} in its graph",
                bytes=size,
                limit=MAX_GRAPH_BYTES,
                hint="cut the model so that the segment is smaller",
            )
        onnx.save(onnx.load(str(path)), str(out))
    return out


def variant_segment(plain: Segment, name: str, graph: bytes, macs: int) -> Segment:
    """The declaration of a variant of the segment `plain`.

    Raises:
        ModelError: the graph takes or gives other tensors.
    """
    document = onnx.ModelProto.FromString(graph).graph
    for kind, specs, values in (("takes", plain.inputs, document.input), ("gives", plain.outputs, document.output)):
        names = [value.name for value in values]
        if sorted(names) != sorted(spec.name for spec in specs):
            raise ModelError(f"the variant {name} {kind} {', '.join(names)[:300]}, and its segment other tensors")
    # No ranges of the weights file: a function that runs the variant alone fetches nothing of it.
    blob = Blob(digest_of(graph), len(graph))
    segment_id = SegmentId(plain.id.start, plain.id.stop, name)
    return structs.replace(plain, id=segment_id, graph=blob, weights=(), macs=macs)
