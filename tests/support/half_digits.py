"""Two sensors that see halves of scikit-learn's digits: a small network each, and labelled data for both."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import structs
from onnx import TensorProto, helper, numpy_helper, save
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Blob, Bundle, Exit, Segment, digest_of
from isthmus.artifacts.gate import EXIT_CONFIDENCE, EXIT_SCORES, Gate
from isthmus.artifacts.segment_id import SegmentId
from isthmus.artifacts.tensors import TensorSpec
from isthmus.processing.classify import softmax
from isthmus.registry import FolderStore, Registry
from isthmus_tools import array_files
from isthmus_tools.graph import build

HALVES = {"top": slice(0, 32), "bottom": slice(32, 64)}
TRAINING = 400
CLASSES = 10


@dataclass(frozen=True)
class Digits:
    """Rows of 64 pixels from 0 to 1, and their digits, in a fixed random order."""

    pixels: Array
    labels: Array

    def half(self, name: str, rows: slice = slice(None)) -> Array:
        return self.pixels[rows, HALVES[name]]


@cache
def digits() -> Digits:
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    return Digits((pixels[order] / 16).astype(np.float32), labels[order].astype(np.int64))


@cache
def weights_of(half: str, pixels: int = 32) -> tuple[Array, Array]:
    """A trained linear classifier of the first pixels of a half. Shapes: (pixels, classes), (classes,)."""
    data = digits()
    fitted = LogisticRegression(max_iter=300).fit(data.half(half)[:TRAINING, :pixels], data.labels[:TRAINING])
    return fitted.coef_.T.astype(np.float32), fitted.intercept_.astype(np.float32)


def write_classifier(path: Path, weights: Array, bias: Array, *, softmax: bool = False, opset: int = 17) -> Path:
    """A network `x` (batch, pixels) to `y` (batch, classes): its first layer carries the pixels over unchanged."""
    pixels, classes = weights.shape
    nodes = [
        helper.make_node("MatMul", ["x", "eye"], ["copy"]),
        helper.make_node("Relu", ["copy"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "weights"], ["products"]),
        helper.make_node("Add", ["products", "bias"], ["logits" if softmax else "y"]),
    ]
    if softmax:
        nodes.append(helper.make_node("Softmax", ["logits"], ["y"], axis=1))
    arrays = {"eye": np.eye(pixels, dtype=np.float32), "weights": weights, "bias": bias}
    graph = helper.make_graph(
        nodes,
        path.stem,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", pixels])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", classes])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return path


def publish_half(registry: Registry, folder: Path, half: str, name: str = "", **options: Any) -> None:
    """Publish the network of one half as a model, of its own name unless another is given."""
    path = write_classifier(folder / f"{name or half}.onnx", *weights_of(half), **options)
    bundle, files = build(
        path,
        name or half,
        folder / f"{name or half}-bundle",
        postprocess={"kind": "classify", "output": "y", "softmax": not options.get("softmax", False), "top_k": 3},
        labels=[str(i) for i in range(CLASSES)],
    )
    registry.publish(bundle, files, alias="prod")


def write_data(folder: Path, rows: slice = slice(TRAINING, 1797)) -> tuple[Path, Path]:
    """The inputs of both sensors, row by row, and a file of their labels."""
    data, inputs = digits(), folder / "inputs"
    inputs.mkdir(parents=True)
    array_files.write_npz(inputs / "digits.npz", {f"{half}.x": data.half(half, rows) for half in HALVES})
    labels = folder / "labels.npy"
    np.save(labels, data.labels[rows])
    return inputs, labels


def registry_of(folder: Path) -> Registry:
    """A registry with the two sensors' models: one gives logits, the other probabilities, by another opset."""
    registry = Registry(FolderStore(folder / "registry"))
    publish_half(registry, folder, "top")
    publish_half(registry, folder, "bottom", softmax=True, opset=18)
    return registry


def publish_with_exit(registry: Registry, folder: Path, share: float = 0.5) -> Bundle:
    """A model `whole` that decides by the lower half, with an exit at `hidden` that decides by the upper one.

    `share` of the training inputs exit: those of which the exit is surest. The two err on different digits.
    """
    upper, lower = (np.zeros((64, CLASSES), np.float32) for _ in HALVES)
    upper[HALVES["top"]], exit_bias = weights_of("top")
    lower[HALVES["bottom"]], bias = weights_of("bottom")
    path = write_classifier(folder / "whole.onnx", lower, bias)
    bundle, files = build(
        path,
        "whole",
        folder / "whole-bundle",
        partitions=["hidden"],
        postprocess={"kind": "classify", "output": "y", "softmax": True, "top_k": 3},
        labels=[str(i) for i in range(CLASSES)],
    )
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["hidden", "matrix", "bias"], [EXIT_SCORES]),
            helper.make_node("Softmax", [EXIT_SCORES], ["shares"], axis=-1),
            helper.make_node("ReduceMax", ["shares"], [EXIT_CONFIDENCE], axes=[-1], keepdims=0),
        ],
        "exit",
        [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["n", 64])],
        [
            helper.make_tensor_value_info(EXIT_SCORES, TensorProto.FLOAT, ["n", CLASSES]),
            helper.make_tensor_value_info(EXIT_CONFIDENCE, TensorProto.FLOAT, ["n"]),
        ],
        [numpy_helper.from_array(array, name) for name, array in (("matrix", upper), ("bias", exit_bias))],
    )
    branch = folder / "exit.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), branch)
    data = branch.read_bytes()
    segment = Segment(
        SegmentId("hidden", "hidden"),
        Blob(digest_of(data), len(data)),
        (TensorSpec("hidden", "float32", ("n", 64)),),
        (TensorSpec(EXIT_SCORES, "float32", ("n", CLASSES)), TensorSpec(EXIT_CONFIDENCE, "float32", ("n",))),
        (),
    )
    sureness = softmax(digits().pixels[:TRAINING] @ upper + exit_bias).max(axis=1)
    # Below the value itself, which onnxruntime rounds otherwise.
    threshold = float(np.quantile(sureness, 1 - share)) - 1e-4
    gate = Gate("y", threshold, "accuracy", 0.05, 0.9, TRAINING, int(share * TRAINING), 0, 0.05)
    bundle = structs.replace(bundle, exits=(Exit(segment, 0.9, gate),))
    registry.publish(bundle, {**files, segment.graph.digest: branch}, alias="prod")
    return bundle
