"""Two sensors of one scene: networks that see the upper or the lower half of a digit, and data to fuse these with.

Run: python halves.py

It writes upper.onnx, lower.onnx, postprocess.json, and held-out inputs of both with their labels, sensors.npz.
"""

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

HALVES = {"upper": slice(0, 32), "lower": slice(32, 64)}
TRAINING = 400


def network(path: Path, weights: np.ndarray, bias: np.ndarray) -> None:
    """A linear classifier: pixels `x` (batch, 32) to logits `y` (batch, 10)."""
    arrays = {"weights": weights, "bias": bias}
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "weights", "bias"], ["y"])],
        path.stem,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", len(weights)])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", len(bias)])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def main() -> None:
    """Train both networks on some digits, and hold the others out."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    pixels, labels = (pixels[order] / 16).astype(np.float32), labels[order]
    for name, half in HALVES.items():
        fitted = LogisticRegression(max_iter=300).fit(pixels[:TRAINING, half], labels[:TRAINING])
        network(Path(f"{name}.onnx"), fitted.coef_.T, fitted.intercept_)
        print(f"{name} {fitted.score(pixels[TRAINING:, half], labels[TRAINING:]):.2%} right")
    # Under the names of the fused model's inputs: MEMBER.INPUT.
    held_out = {f"{name}.x": pixels[TRAINING:, half] for name, half in HALVES.items()}
    np.savez("sensors.npz", labels=labels[TRAINING:], **held_out)
    Path("postprocess.json").write_text(json.dumps({"kind": "classify", "output": "y", "softmax": True, "top_k": 3}))


if __name__ == "__main__":
    main()
