"""The small model for photos with an exit that serves, and with a compressed head; nothing is learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from msgspec import structs
from onnx import numpy_helper

from isthmus.artifacts.bundle import Blob, Bundle, Segment, SegmentVariant, digest_of
from isthmus.artifacts.segment_id import SegmentId
from support.bundles import Published
from support.exits import with_exit

BOUND = 0.0175
"""Of the gate of `with_served_exit`."""


def extended(published: Published, bundle: Bundle, files: dict[str, Path]) -> Published:
    """A next version of the model, which serves."""
    version = published.registry.publish(bundle, files, alias="prod")
    return Published(
        published.registry,
        published.folder,
        bundle,
        version.version,
        version.digest,
        published.onnx,
        published.inputs,
    )


def with_served_exit(published: Published, folder: Path, threshold: float = 0.5, **gate: Any) -> Published:
    """With an exit at the cut 6, of which three in four held-out inputs exited; see `exits.with_exit`."""
    facts: dict[str, Any] = {"inputs": 400, "exiting": 300, "failing": 2, "limit": 0.02, "bound": BOUND} | gate
    found = with_exit(published, folder, "6", threshold, **facts)
    found.registry.move_alias(found.name, "prod", found.version)
    return found


def with_variants(published: Published, folder: Path, name: str = "small", **facts: Any) -> Published:
    """With the variant `name` of the head at 6 and of the whole model: the same graphs with slightly other weights."""
    bundle, files = published.bundle, dict[str, Path]()
    for segment_id in ("..6", ".."):
        segment = bundle.segments[segment_id]
        path = folder / f"{name}-{len(files)}.onnx"
        onnx.save(_rounded(published, segment), path)
        plain = segment.id
        own = structs.replace(segment, id=SegmentId(plain.start, plain.stop, name), graph=_blob(path), weights=())
        measured: dict[str, Any] = {"method": "rounded", "agreement": 0.995, "inputs": 200} | facts
        bundle = structs.replace(bundle, variants=(*bundle.variants, SegmentVariant(own, **measured)))
        files[own.graph.digest] = path
    return extended(published, bundle, files)


def _rounded(published: Published, segment: Segment) -> onnx.ModelProto:
    """The segment's graph with its weights inside, in steps of 0.005."""
    # Beside the weights file, as the graphs of a build lie.
    graphs = published.onnx.parent.rglob("*.onnx")
    built = next(path for path in graphs if digest_of(path.read_bytes()) == segment.graph.digest)
    model = onnx.load(built)
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array((np.round(array * 200) / 200).astype(np.float32), tensor.name))
    return model


def _blob(path: Path) -> Blob:
    data = path.read_bytes()
    return Blob(digest_of(data), len(data))
