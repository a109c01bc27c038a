"""A segment by itself: its graph and its own weights in one folder, for an image that needs no registry."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from isthmus.artifacts.bundle import Blob, Bundle, Segment, digest_of
from isthmus.registry.baked import BLOBS, GRAPH, MANIFEST, SEGMENT, WEIGHTS
from isthmus.registry.source import Located
from isthmus_tools.graph.weights import ALIGNMENT, LOCATION


def bake(located: Located, manifest: bytes, folder: Path) -> int:
    """Write a segment that lies on this machine to `folder` as BakedSegment reads it; returns the bytes of its weights.

    The weights file holds this segment's tensors alone, so the graph's references into it are written anew.
    Source: docs/registry.md, "A baked segment".
    """
    folder.mkdir(parents=True, exist_ok=True)
    moved, weights_digest, size = _weights(located, folder / WEIGHTS)
    model = ir.load(located.path)
    for value in model.graph.initializers.values():
        if isinstance(tensor := value.const_value, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                LOCATION,
                moved[tensor.offset or 0],
                tensor.length,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=str(value.name),
            )
    graph = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    (folder / GRAPH).write_bytes(graph)
    (folder / MANIFEST).write_bytes(manifest)
    doc = {
        "segment": located.segment.id,
        "graph": {"digest": digest_of(graph), "size": len(graph)},
        "weights": {"digest": weights_digest, "size": size},
    }
    (folder / SEGMENT).write_text(json.dumps(doc, indent=1) + "\n")
    return size


def bake_tables(bundle: Bundle, segment: Segment, blob: Callable[[Blob], bytes], folder: Path) -> int:
    """Put the codecs' tables that unpacking the segment's inputs takes beside it in `folder`; returns their bytes.

    Raises:
        RegistryError: `blob` cannot give one.
    """
    size = 0
    for table in {bundle.tables[spec.name] for spec in segment.inputs if spec.name in bundle.tables}:
        path = folder / BLOBS / table.digest.removeprefix("sha256:")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(blob(table))
        size += table.size
    return size


def _weights(located: Located, path: Path) -> tuple[dict[int, int], str, int]:
    """Copies the segment's tensors; the new place of each old one, the file's digest and its length."""
    moved: dict[int, int] = {}
    digest, end = hashlib.sha256(), 0
    with (located.path.parent / LOCATION).open("rb") as source, path.open("wb") as target:
        for tensor in located.bundle.weight_ranges(located.segment):
            source.seek(tensor.offset)
            for piece in (bytes(-end % ALIGNMENT), source.read(tensor.length)):
                target.write(piece)
                digest.update(piece)
            moved[tensor.offset] = end + -end % ALIGNMENT
            end = moved[tensor.offset] + tensor.length
    return moved, f"sha256:{digest.hexdigest()}", end
