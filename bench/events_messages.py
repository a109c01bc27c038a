"""Messages of the events benchmark: a small trained model, requests of two kinds with known results, poisoned ones."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import models
import numpy as np
import onnx
from onnx import TensorProto, helper
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier

from isthmus.artifacts.segment_id import WHOLE
from isthmus.registry import open_registry
from isthmus.settings import RegistrySettings
from isthmus_tools.graph import build
from isthmus_tools.usecases.local_model import LocalModel

MODEL = "digits"
SIDE, HIDDEN = 8, 32
# scikit-learn's digits have 17 grey levels.
_LEVELS = 16.0
_PIXEL = 240.0
# Largest allowed difference from the uncut model's outputs; responses round probabilities.
TOLERANCE = 1e-4
POISON = ("truncated photo", "truncated JSON", "no request")


@dataclass(frozen=True)
class Sample:
    """A message: a photo, tensors as JSON, or poisoned. `expected` is its outputs; None where poisoned."""

    id: str
    kind: str
    body: bytes
    content_type: str
    expected: np.ndarray | None

    @property
    def is_poisoned(self) -> bool:
        """Whether it belongs to the dead letters."""
        return self.expected is None

    def is_right(self, body: bytes) -> bool:
        """Whether a router's response has the expected outputs."""
        if self.expected is None:
            return False
        try:
            outputs = _outputs(self.kind, json.loads(body))
        except (ValueError, KeyError, TypeError):
            return False
        return outputs.shape == self.expected.shape and bool(np.abs(outputs - self.expected).max() <= TOLERANCE)


def publish_model(registry: Path) -> None:
    """Train a network on scikit-learn's digits, a second's work, and publish it, cut behind its hidden layer."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits.onnx"
        onnx.save(_trained(), path)
        bundle, files = build(
            path,
            MODEL,
            Path(folder) / "out",
            partitions=[["hidden=active"]],
            preprocess={
                "kind": "image",
                "input": "image",
                "dtype": "float32",
                "steps": [
                    {"op": "normalize", "mean": [0.0] * 3, "std": [_PIXEL] * 3},
                    {"op": "layout", "to": "NCHW"},
                ],
            },
            postprocess={"kind": "classify", "output": "logits", "softmax": True, "top_k": 10},
        )
        open_registry(RegistrySettings(registry=str(registry))).publish(bundle, files, alias="prod")


def _trained() -> onnx.ModelProto:
    """The network as ONNX: a grey photo in RGB to the logits of ten digits."""
    data = load_digits()
    network = MLPClassifier(HIDDEN, tol=1e-3, random_state=0).fit(data.data / _LEVELS, data.target)
    first, second = (np.asarray(each, np.float32) for each in network.coefs_)
    biases = [np.asarray(each, np.float32) for each in network.intercepts_]
    # (3 * 64, hidden): the mean of three equal channels.
    constants = {"w1": np.concatenate([first / 3] * 3), "b1": biases[0], "w2": second, "b2": biases[1]}
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["image"], ["pixels"]),
            helper.make_node("Gemm", ["pixels", "w1", "b1"], ["sums"]),
            helper.make_node("Relu", ["sums"], ["active"]),
            helper.make_node("Gemm", ["active", "w2", "b2"], ["logits"]),
        ],
        MODEL,
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 10])],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def samples(registry: Path, count: int, *, poisoned: float = 0.02, seed: int = 0) -> list[Sample]:
    """Different messages, half of them photos; a share of them poisoned, in all ways alike."""
    model = LocalModel(MODEL, RegistrySettings(registry=str(registry)), WHOLE, threads=1)
    rng, images = np.random.default_rng(seed), load_digits().images
    is_poisoned = rng.random(count) < poisoned
    made = []
    for i in range(count):
        grey = images[i % len(images)] * (_PIXEL / _LEVELS) + rng.normal(0, 8, (SIDE, SIDE))
        pixels = np.clip(grey, 0, 255).astype(np.uint8)
        made.append(_poisoned(f"m{i}", pixels, i) if is_poisoned[i] else _sample(f"m{i}", pixels, model, i % 2 == 0))
    return made


def photo_samples(count: int) -> list[Sample]:
    """Real photos for EfficientNet-Lite0, the same ones again and again under other ids."""
    model = models.whole()
    made = [Sample("", "photo", photo, "image/jpeg", _probabilities(model.photo(photo))) for photo in models.photos()]
    return [replace(made[i % len(made)], id=f"p{i}") for i in range(count)]


def _sample(name: str, pixels: np.ndarray, model: LocalModel, is_photo: bool) -> Sample:
    photo = _png(pixels)
    arrays = model.preprocess(photo)
    if is_photo:
        return Sample(name, "photo", photo, "image/png", _probabilities(model.photo(photo)))
    return Sample(name, "tensors", _json(arrays["image"]), "application/json", model.run(arrays).outputs["logits"])


def _poisoned(name: str, pixels: np.ndarray, number: int) -> Sample:
    kind = POISON[number % len(POISON)]
    if kind == "truncated photo":
        photo = _png(pixels)
        return Sample(name, kind, photo[: len(photo) // 2], "image/png", None)
    if kind == "truncated JSON":
        return Sample(name, kind, _json(np.zeros((1, 3, SIDE, SIDE), np.float32))[:-40], "application/json", None)
    return Sample(name, kind, json.dumps({"reading": number}).encode(), "application/json", None)


def _png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def _json(image: np.ndarray) -> bytes:
    values = [round(float(value), 6) for value in image.ravel()]
    tensor = {"name": "image", "shape": list(image.shape), "datatype": "FP32", "data": values}
    return json.dumps({"inputs": [tensor]}).encode()


def _outputs(kind: str, document: Mapping[str, Any]) -> np.ndarray:
    if kind == "photo":
        return _probabilities(document)
    (output,) = document["outputs"]
    return np.asarray(output["data"], np.float32).reshape(output["shape"])


def _probabilities(document: Mapping[str, Any]) -> np.ndarray:
    """Probabilities by class, up to the last class of the response."""
    values = np.zeros(1 + max(each["index"] for each in document["classes"]), np.float32)
    for each in document["classes"]:
        values[each["index"]] = each["probability"]
    return values
