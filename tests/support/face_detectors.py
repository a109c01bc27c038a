"""Face detectors for bundles: graphs that say where faces are whatever the photo shows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto, helper, numpy_helper

SIDE = 64
"""Pixels of the picture that the graphs take."""


def fixed_detector(boxes: Sequence[Sequence[float]], scores: Sequence[float], side: int = SIDE) -> bytes:
    """A graph that gives these boxes, in pixels of its picture, and scores."""
    values = {"boxes": np.array(boxes, np.float32).reshape(-1, 4), "scores": np.array(scores, np.float32)}
    graph = helper.make_graph(
        [helper.make_node("Identity", [f"of_{name}"], [name]) for name in values],
        "faces",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, side, side])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape) for name, value in values.items()],
        [numpy_helper.from_array(value, f"of_{name}") for name, value in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())
