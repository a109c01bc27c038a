"""The small model for photos with an exit and with a compressed head, made by hand: nothing is learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from msgspec import structs
from onnx import helper, numpy_helper

from isthmus.artifacts.bundle import Blob, Bundle, Exit, Segment, SegmentVariant, digest_of
from isthmus.artifacts.gate import EXIT_CONFIDENCE, EXIT_SCORES, Gate
from isthmus.artifacts.segment_id import SegmentId
from isthmus.artifacts.tensors import TensorSpec
from support.bundles import Published, save, value, weight

GATE = Gate("logits", 0.0, "disagreement", 0.02, 0.95, inputs=400, exiting=300, failing=2, bound=0.0175)
"""Of held-out inputs three in four exited."""


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


def with_exit(published: Published, folder: Path, gate: Gate = GATE, *, seed: int = 0) -> Published:
    """With an exit at the cut 6: of `seed` 0 it scores as the model does, and its confidence is the largest score."""
    nodes = [
        helper.make_node("Flatten", ["p6"], ["f"]),
        helper.make_node("Gemm", ["f", "w8", "b8"], [EXIT_SCORES]),
        helper.make_node("ReduceMax", [EXIT_SCORES], [EXIT_CONFIDENCE], axes=[1], keepdims=0),
    ]
    outputs = [value(EXIT_SCORES, 1, 5), value(EXIT_CONFIDENCE, 1)]
    weights = [weight("w8", 256, 5, seed=seed), weight("b8", 5, seed=seed)]
    path = save(folder / f"exit-{seed}.onnx", nodes, [value("p6", 1, 16, 4, 4)], outputs, weights)
    tensors = TensorSpec(EXIT_SCORES, "float32", (1, 5)), TensorSpec(EXIT_CONFIDENCE, "float32", (1,))
    branch = Segment(SegmentId("6", "6"), _blob(path), published.bundle.cuts["6"].tensors, tensors, ())
    bundle = structs.replace(published.bundle, exits=(Exit(branch, 1 - gate.failing / gate.inputs, gate),))
    return extended(published, bundle, {branch.graph.digest: path})


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
    graphs = published.folder.parent.rglob("*.onnx")
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
