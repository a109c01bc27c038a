"""The graph of a face detector as bundles carry it, of CenterFace's published graph.

The published graph gives a heat map, sizes and offsets; boxes are computed from these within the graph, so that
functions need no code of a detector's own. Source: github.com/Star-Clouds/CenterFace; arXiv 1911.03599, section 3.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from isthmus.errors import ModelError

# Heat map (1, 1, n, n), logarithms of height and width, and offsets of the centre, both (1, 2, n, n).
_HEAT, _SIZES, _OFFSETS = "537", "538", "539"
# Pixels of a cell; the network halves a picture five times.
_STRIDE, _MULTIPLE = 4, 32


def centerface(path: Path, side: int) -> bytes:
    """The graph from `image` (1, 3, side, side) to `boxes` and `scores`, with its weights.

    Raises:
        ModelError: the side is no multiple of 32, or the file is not CenterFace's.
    """
    if side < _MULTIPLE or side % _MULTIPLE:
        raise ModelError(f"the side is {side} pixels; it is a multiple of {_MULTIPLE}", side=side)
    try:
        model = onnx.load(path)  # the weights are in the file
        _declare(model.graph, side)
        _decode(model.graph, side // _STRIDE)
        onnx.checker.check_model(model)
    except Exception as e:  # protobuf's and onnx's errors share no base but Exception
        raise ModelError(f"{path.name} is not the graph of CenterFace: {str(e)[:200]}", path=str(path)) from e
    return bytes(model.SerializeToString())


def _declare(graph: onnx.GraphProto, side: int) -> None:
    """One input, `image`, of a fixed shape; the file lists its weights as inputs too."""
    weights = {tensor.name for tensor in graph.initializer}
    (name,) = (value.name for value in graph.input if value.name not in weights)
    for node in graph.node:
        node.input[:] = ["image" if each == name else each for each in node.input]
    # Shapes within the graph are those of another size of picture; onnxruntime infers them anew.
    for values in (graph.input, graph.output, graph.value_info):
        del values[:]
    graph.input.append(helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, side, side]))


def _decode(graph: onnx.GraphProto, cells: int) -> None:
    """Append the nodes from sizes and offsets to boxes, and from the heat map to scores."""
    # (1, 2, n, n), rows before columns; in the middle of a cell.
    grid = (np.indices((cells, cells))[np.newaxis] + 0.5) * _STRIDE
    constants = {
        "grid": grid.astype(np.float32),
        "stride": np.float32(_STRIDE),
        "half_stride": np.float32(_STRIDE / 2),
        # Top, left, bottom, right to left, top, right, bottom.
        "columns_first": np.array([1, 0, 3, 2]),
        "flat": np.array([-1]),
        "rows_of_four": np.array([-1, 4]),
    }
    graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items())
    node = helper.make_node
    graph.node.extend(
        [
            node("Exp", [_SIZES], ["size"]),
            node("Mul", ["size", "half_stride"], ["half_size"]),
            node("Mul", [_OFFSETS, "stride"], ["offset"]),
            node("Add", ["offset", "grid"], ["centre"]),
            node("Sub", ["centre", "half_size"], ["first_corner"]),
            node("Add", ["centre", "half_size"], ["last_corner"]),
            node("Concat", ["first_corner", "last_corner"], ["corners"], axis=1),
            node("Gather", ["corners", "columns_first"], ["sides"], axis=1),
            node("Transpose", ["sides"], ["sides_last"], perm=[0, 2, 3, 1]),
            node("Reshape", ["sides_last", "rows_of_four"], ["boxes"]),
            node("Reshape", [_HEAT, "flat"], ["scores"]),
        ]
    )
    # Every cell is a candidate: the threshold is the bundle's, and joining the boxes is the same for all detectors.
    outputs: dict[str, list[int]] = {"boxes": [cells * cells, 4], "scores": [cells * cells]}
    for name, shape in outputs.items():
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
