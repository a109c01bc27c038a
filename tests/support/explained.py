"""Models whose decisive parts are known: a picture's bright cell, a sequence's token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from isthmus.context import Context
from isthmus.pipeline import LocalHop, Route, execute, local_route
from isthmus.pipeline.occlusion import Occlusion, OcclusionRequest, class_scores, occlude
from isthmus.runtime.store import SegmentStore
from support.bundles import Published, cache_of, publish, save, segment_settings, value
from support.patience import LONG_S

CELL = (1, 2)
"""The decisive cell of `picture`, of a grid of 4 by 4."""
TOKEN = 3
"""The decisive id of `sentence`."""
PIXELS = {
    "kind": "image",
    "input": "x",
    "dtype": "float32",
    "steps": [
        {"op": "resize", "size": [8, 8], "interpolation": "nearest"},
        {"op": "normalize", "mean": [0.0] * 3, "std": [255.0] * 3},
        {"op": "layout", "to": "NCHW"},
    ],
}
CLASSES = {"kind": "classify", "output": "logits", "softmax": True, "top_k": 2}


def constant(name: str, array: Any) -> Any:
    return numpy_helper.from_array(np.asarray(array, np.float32), name)


def picture(folder: Path, batch: int | str = 1, *, baked: bool = False, **processing: Any) -> Published:
    """Class 1 is likely where the cell CELL is bright; at the cut 1 a full and a halved resolution cross.

    With `baked` the graph holds a batch of 1, whatever it declares.
    """
    full, half = np.zeros((1, 3, 8, 8)), np.zeros((1, 3, 4, 4))
    row, column = CELL
    full[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = 0.2
    half[:, :, row, column] = 0.3
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("AveragePool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Mul", ["r", "full"], ["m"]),
        helper.make_node("Mul", ["p", "half"], ["n"]),
        helper.make_node("Reshape", ["m", "shape"], ["fm"]) if baked else helper.make_node("Flatten", ["m"], ["fm"]),
        helper.make_node("Flatten", ["n"], ["fn"]),
        helper.make_node("MatMul", ["fm", "wm"], ["lm"]),
        helper.make_node("MatMul", ["fn", "wn"], ["ln"]),
        helper.make_node("Add", ["lm", "ln"], ["logits"]),
    ]
    weights = [
        constant("full", full),
        constant("half", half),
        constant("wm", np.repeat([[0, 1]], 192, 0)),
        constant("wn", np.repeat([[0, 1]], 48, 0)),
        *([numpy_helper.from_array(np.array([1, 192]), "shape")] if baked else []),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    model = save(folder / "picture.onnx", nodes, [value("x", batch, 3, 8, 8)], [value("logits", batch, 2)], weights)
    x = np.full((1, 3, 8, 8), 1.0, np.float32)
    # After node 6 the halved picture's part has become a vector, and after node 7 everything has.
    return publish(folder, model, {"x": x}, partitions=[["0"], ["1"], ["7"], ["0", "1"], []], **processing)


def sentence(folder: Path, *, mask: bool = False) -> Published:
    """Tokens of eight ids; class 1 is likely where TOKEN is among them. `mask` adds an attention mask."""
    table = np.zeros((8, 4))
    table[:, 0] = 1.0
    table[TOKEN, 1] = 40.0
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["h"]),
        helper.make_node("Cast", ["attention_mask" if mask else "ones"], ["c"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["c", "last"], ["u"]),
        helper.make_node("Mul", ["h", "u"], ["k"]),
        helper.make_node("ReduceMean", ["k"], ["v"], axes=[1], keepdims=0),
        helper.make_node("MatMul", ["v", "w"], ["logits"]),
    ]
    weights = [
        constant("table", table),
        constant("w", [[0, 0], [0, 1], [0, 0], [0, 0]]),
        numpy_helper.from_array(np.array([2]), "last"),
        *([] if mask else [constant("ones", np.ones((1, 6)))]),
    ]
    inputs = [value("input_ids", "batch", 6, dtype=TensorProto.INT64)]
    arrays = {"input_ids": np.array([[5, 6, TOKEN, 1, 2, 7]])}
    if mask:
        inputs.append(value("attention_mask", "batch", 6, dtype=TensorProto.INT64))
        arrays["attention_mask"] = np.ones((1, 6), np.int64)
    folder.mkdir(parents=True, exist_ok=True)
    model = save(folder / "sentence.onnx", nodes, inputs, [value("logits", "batch", 2)], weights)
    return publish(folder, model, arrays, partitions=[["0"], []])


def local(published: Published, cache: Path, *cuts: str) -> Route:
    """A route in this process."""
    store = SegmentStore(cache_of(published, cache), segment_settings(published, cache))
    return local_route(published.digest, published.bundle, published.bundle.partition(cuts), LocalHop(store))


def explained(route: Route, inputs: Any, **wanted: Any) -> Occlusion:
    context = Context.from_headers({}, longest_s=LONG_S)
    request = OcclusionRequest(class_scores(route.bundle, wanted.pop("output", "")), **wanted)
    return occlude(route, inputs, request, lambda route, arrays: execute(route, arrays, context), context.deadline)
