"""A published network with channels that others repeat, and inputs for it: what compression is tested on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from onnx import helper, numpy_helper

from support.bundles import Published, publish, save, value

CUT = "6"
"""Behind the residual block; the head ends in its sum."""


def redundant_network(path: Path) -> Path:
    """1x3x12x12 pixels, 4 classes: a stem, an inverted residual whose 32 channels are 16 twice, pooling, a Gemm."""
    rng = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> Any:
        return rng.standard_normal(shape).astype(np.float32) / np.sqrt(np.prod(shape[1:]) or 1)

    expand, depthwise = weight("e", 16, 8, 1, 1), weight("d", 16, 1, 3, 3)
    arrays = {
        "w0": weight("w0", 8, 3, 3, 3),
        "b0": weight("b0", 8),
        "w2": np.concatenate([expand, expand]),
        "b2": np.tile(weight("b2", 16), 2),
        "w4": np.concatenate([depthwise, depthwise]),
        "b4": np.tile(weight("b4", 16), 2),
        "w5": weight("w5", 8, 32, 1, 1),
        "b5": weight("b5", 8),
        "w9": weight("w9", 8, 4),
        "b9": weight("b9", 4),
        "low": np.array(0, np.float32),
        "high": np.array(6, np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["c0"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c0"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"]),
        helper.make_node("Clip", ["c2", "low", "high"], ["r3"]),
        helper.make_node("Conv", ["r3", "w4", "b4"], ["c4"], pads=[1, 1, 1, 1], group=32),
        helper.make_node("Conv", ["c4", "w5", "b5"], ["c5"]),
        helper.make_node("Add", ["c5", "r1"], ["a6"]),
        helper.make_node("GlobalAveragePool", ["a6"], ["p7"]),
        helper.make_node("Flatten", ["p7"], ["f8"]),
        helper.make_node("Gemm", ["f8", "w9", "b9"], ["scores"]),
    ]
    weights = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()]
    return save(path, nodes, [value("x", 1, 3, 12, 12)], [value("scores", 1, 4)], weights)


def publish_redundant(folder: Path) -> Published:
    """The network, cut behind its residual block."""
    inputs = {"x": np.random.default_rng(1).standard_normal((1, 3, 12, 12)).astype(np.float32)}
    return publish(folder, redundant_network(folder / "network.onnx"), inputs, partitions=[[CUT]])


def write_inputs(folder: Path, files: int = 8, rows: int = 8) -> Path:
    """Files of inputs, each a batch of rows."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(2)
    for index in range(files):
        np.savez(folder / f"{index}.npz", x=rng.standard_normal((rows, 1, 3, 12, 12)).astype(np.float32))
    return folder
