"""Models with a classifier's exit, built by hand: a linear branch, whose answers a test chooses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from msgspec import structs
from onnx import helper, numpy_helper

from isthmus.artifacts.bundle import Blob, Exit, Segment, digest_of
from isthmus.artifacts.gate import EXIT_CONFIDENCE, EXIT_SCORES, Gate
from isthmus.artifacts.plan import PlannedExit
from isthmus.artifacts.segment_id import SegmentId
from isthmus.artifacts.tensors import TensorSpec
from support.bundles import Published, publish, save, value, weight

ALWAYS, NEVER = -1.0, 2.0
"""Thresholds of a confidence that is a probability."""


def classifier_model(path: Path) -> Path:
    """Any number of rows of 32 numbers, a hidden layer, and scores of 4 classes."""
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["m0"]),
        helper.make_node("Relu", ["m0"], ["r1"]),
        helper.make_node("MatMul", ["r1", "w2"], ["logits"]),
    ]
    weights = [weight("w0", 32, 32), weight("w2", 32, 4)]
    return save(path, nodes, [value("x", "n", 32)], [value("logits", "n", 4)], weights)


def rows(count: int, seed: int = 0) -> dict[str, Any]:
    return {"x": np.random.default_rng(seed).standard_normal((count, 32)).astype(np.float32)}


def publish_classifier(folder: Path, **gate: Any) -> Published:
    """`classifier_model` with an exit at its hidden layer; see `with_exit`."""
    published = publish(folder, classifier_model(folder / "classes.onnx"), rows(1), partitions=[["1"]])
    return with_exit(published, folder, "1", **gate)


def gate_of(threshold: float, **changes: Any) -> Gate:
    facts: dict[str, Any] = {"risk": "disagreement", "limit": 0.01, "confidence": 0.95}
    facts |= {"inputs": 1000, "exiting": 700, "failing": 2, "bound": 0.006}
    return Gate("logits", threshold, **facts | changes)


def with_exit(
    published: Published,
    folder: Path,
    cut: str = "6",
    threshold: float = 0.5,
    *,
    wrong: bool = False,
    temperature: float = 1.0,
    **gate: Any,
) -> Published:
    """The next version, with an exit at `cut` whose branch is the model's last layer.

    So its predictions are the model's own wherever that layer follows the cut; `wrong` moves each class to the next.
    The confidence is the probability of the likeliest class, by scores over `temperature`: a softmax that saturates
    gives many inputs the same confidence.
    """
    boundary = published.bundle.cuts[cut].tensors[0]
    last = next(n for n in reversed(onnx.load(published.onnx).graph.node) if n.op_type in ("Gemm", "MatMul"))
    arrays = {t.name: numpy_helper.to_array(t) for t in onnx.load(published.onnx).graph.initializer}
    matrix = arrays[last.input[1]]
    bias = arrays[last.input[2]] if len(last.input) > 2 else np.zeros(matrix.shape[1], np.float32)
    if wrong:
        matrix, bias = np.roll(matrix, 1, axis=1), np.roll(bias, 1)
    output = published.bundle.outputs[0]
    nodes = [
        helper.make_node("Flatten", [boundary.name], ["features"]),
        helper.make_node("Gemm", ["features", "matrix", "bias"], [EXIT_SCORES]),
        helper.make_node("Div", [EXIT_SCORES, "temperature"], ["scaled"]),
        helper.make_node("Softmax", ["scaled"], ["shares"], axis=-1),
        helper.make_node("ReduceMax", ["shares"], [EXIT_CONFIDENCE], axes=[-1], keepdims=0),
    ]
    constants = {"matrix": matrix, "bias": bias, "temperature": np.array(temperature, np.float32)}
    weights = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    ends = [value(EXIT_SCORES, *output.shape), value(EXIT_CONFIDENCE, output.shape[0])]
    path = save(folder / f"exit-{cut}.onnx", nodes, [value(boundary.name, *boundary.shape)], ends, weights)
    data = path.read_bytes()
    outputs = (
        TensorSpec(EXIT_SCORES, "float32", output.shape),
        TensorSpec(EXIT_CONFIDENCE, "float32", output.shape[:1]),
    )
    branch = Segment(SegmentId(cut, cut), Blob(digest_of(data), len(data)), (boundary,), outputs, ())
    exits = (Exit(branch, 0.99, gate_of(threshold, **gate)),)
    bundle = structs.replace(published.bundle, exits=exits)
    version = published.registry.publish(bundle, {branch.graph.digest: path})
    return replace(published, bundle=bundle, version=version.version, digest=version.digest)


def planned_exit(share: float) -> PlannedExit:
    return PlannedExit(share, 1000)
