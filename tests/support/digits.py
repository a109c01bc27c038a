"""scikit-learn's digits, 8x8 pixels, and a classifier of these: random convolutions under a ridge regression."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from onnx import helper, numpy_helper
from sklearn.datasets import load_digits

from isthmus.runtime.ort import ort
from support.bundles import Published, publish, save, value

TRAINED = 500
"""The first digits in the fixed order fit the model; exits and bounds take the rest."""
_CHANNELS = 12


@cache
def digits() -> tuple[Any, Any]:
    """Pixels (1797, 1, 8, 8) from -1 to 1 and classes, in a fixed random order."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    pixels = (data.images[order, None] / 8 - 1).astype(np.float32)
    return pixels, data.target[order].astype(np.int64)


def digits_model(path: Path) -> Path:
    """Two random convolutions, each with a ReLU, and a linear map in closed form: about 96% right."""
    rng = np.random.default_rng(1)

    def tensor(name: str, *shape: int) -> Any:
        return numpy_helper.from_array((rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype("f4"), name)

    weights = [tensor("w0", _CHANNELS, 1, 3, 3), tensor("b0", _CHANNELS), tensor("w2", 32, _CHANNELS, 3, 3)]
    body = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["c0"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c0"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c2"], ["r3"]),
        helper.make_node("AveragePool", ["r3"], ["p4"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["p4"], ["f5"]),
    ]
    features_path = path.with_name("features.onnx")
    save(features_path, body, [value("x", "batch", 1, 8, 8)], [value("f5", "batch", 512)], weights)
    pixels, classes = digits()
    session = ort.InferenceSession(str(features_path), providers=["CPUExecutionProvider"])
    x = session.run(None, {"x": pixels[:TRAINED]})[0].astype(np.float64)
    x1 = np.concatenate([x, np.ones((len(x), 1))], 1)
    solved = np.linalg.solve(x1.T @ x1 + 0.1 * np.eye(x1.shape[1]), x1.T @ np.eye(10)[classes[:TRAINED]])
    # Log-odds rather than shares, as trained networks give.
    parts = {"w6": 10 * solved[:-1], "b6": 10 * solved[-1]}
    head = [numpy_helper.from_array(part.astype("f4"), name) for name, part in parts.items()]
    nodes = [*body, helper.make_node("Gemm", ["f5", "w6", "b6"], ["scores"])]
    return save(path, nodes, [value("x", "batch", 1, 8, 8)], [value("scores", "batch", 10)], [*weights, *head])


def publish_digits(folder: Path, **changes: Any) -> Published:
    """The classifier of digits, cut behind each convolution."""
    folder.mkdir(parents=True, exist_ok=True)
    arguments: dict[str, Any] = {
        "partitions": [["1"], ["3"]],
        "postprocess": {"kind": "classify", "output": "scores", "softmax": True, "top_k": 3},
        "labels": [str(digit) for digit in range(10)],
    }
    return publish(folder, digits_model(folder / "digits.onnx"), {"x": digits()[0][:1]}, **(arguments | changes))


def write_digits(folder: Path, start: int = TRAINED, stop: int | None = None) -> Path:
    """Digits that did not fit the model, with labels, as a file in `folder`."""
    pixels, classes = digits()
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "digits.npz", x=pixels[start:stop], labels=classes[start:stop])
    return folder
