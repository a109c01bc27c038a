"""A fixed batch dimension made free: where every row keeps its result, and refused elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper, numpy_helper

from isthmus.artifacts.segment_id import WHOLE
from isthmus.errors import ModelError
from isthmus.settings import RegistrySettings
from isthmus_tools.graph import build, open_model
from isthmus_tools.usecases.model_import import ImportRequest, import_model
from support.bundles import save, value, weight
from support.models import efficientnet_lite0
from support.segments import difference, run_partition, run_whole, runner


def reshaping(path: Path, shape: list[int], *, allowzero: int = 0, rows: int = 1) -> Path:
    """Rows of 2 x 3 values, reshaped to `shape` and multiplied."""
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("Reshape", ["r", "shape"], ["flat"], allowzero=allowzero),
        helper.make_node("MatMul", ["flat", "w"], ["y"]),
    ]
    target = numpy_helper.from_array(np.array(shape, np.int64), "shape")
    return save(path, nodes, [value("x", rows, 2, 3)], [value("y", rows, 4)], [weight("w", 6, 4), target])


@pytest.mark.parametrize(("shape", "allowzero"), [([1, 6], 0), ([1, -1], 1), ([-1, 6], 0), ([0, 6], 0)])
def test_a_reshape_takes_any_batch(shape: list[int], allowzero: int, tmp_path: Path) -> None:
    path = reshaping(tmp_path / "m.onnx", shape, allowzero=allowzero)
    bundle, files = build(path, "m", tmp_path / "built", partitions=[["0"]], free_batch=True)
    assert bundle.inputs[0].shape == ("batch", 2, 3)
    # Shape inference loses the name behind a -1.
    assert bundle.outputs[0].shape == ("?" if shape[0] == -1 else "batch", 4)
    rows = [{"x": np.random.default_rng(i).standard_normal((1, 2, 3)).astype(np.float32)} for i in range(4)]
    expected = np.concatenate([each["y"] for each in run_whole(path, rows)])
    (batch,) = run_partition(bundle, files, ["0"], [{"x": np.concatenate([row["x"] for row in rows])}])
    assert difference({"y": expected}, batch) < 1e-6


def one_node(path: Path, op: str, *more: Any, **attributes: Any) -> Path:
    names = [initialiser.name for initialiser in more]
    node = helper.make_node(op, ["x", *names], ["y"], **attributes)
    return save(path, [node], [value("x", 1, 3)], [value("y", 1, 3)], list(more))


@pytest.mark.parametrize(
    ("op", "more", "attributes"),
    [
        ("CumSum", [numpy_helper.from_array(np.array(0, np.int64), "axis")], {}),
        ("LpNormalization", [], {"axis": 0}),
        ("Concat", [weight("token", 1, 3)], {"axis": 0}),
    ],
)
def test_a_graph_that_mixes_the_rows_is_refused(op: str, more: list[Any], attributes: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    if op == "Concat":
        node = helper.make_node(op, ["x", "token"], ["y"], **attributes)
        save(path, [node], [value("x", 1, 3)], [value("y", 2, 3)], more)
    else:
        one_node(path, op, *more, **attributes)
    with pytest.raises(ModelError, match="batch dimension cannot be made free: in a batch the rows of y"):
        open_model(path, free_batch=True)


def test_a_graph_that_fixes_the_batch_elsewhere_is_refused_with_the_reason(tmp_path: Path) -> None:
    token = numpy_helper.from_array(np.array([1, 1, 3], np.int64), "shape")
    nodes = [
        helper.make_node("Expand", ["token", "shape"], ["tokens"]),
        helper.make_node("Concat", ["x", "tokens"], ["y"], axis=1),
    ]
    path = save(
        tmp_path / "m.onnx", nodes, [value("x", 1, 2, 3)], [value("y", 1, 3, 3)], [weight("token", 1, 1, 3), token]
    )
    with pytest.raises(ModelError, match="with a batch of 3"):
        open_model(path, free_batch=True)


def test_outputs_that_tell_no_rows_apart_are_refused(tmp_path: Path) -> None:
    zero = numpy_helper.from_array(np.zeros((1, 3), np.float32), "zero")
    with pytest.raises(ModelError, match="same for different inputs"):
        open_model(one_node(tmp_path / "m.onnx", "Mul", zero), free_batch=True)


def test_an_input_without_a_first_dimension_of_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="x has no first dimension of 1"):
        open_model(reshaping(tmp_path / "m.onnx", [2, 6], rows=2), free_batch=True)


def test_a_batch_is_either_frozen_or_free(tmp_path: Path) -> None:
    request = ImportRequest(
        model=str(reshaping(tmp_path / "m.onnx", [1, 6])),
        registry=RegistrySettings(registry=str(tmp_path / "registry")),
        freeze=True,
        free_batch=True,
    )
    with pytest.raises(ModelError, match="not both"):
        import_model(request)


def test_a_real_model_of_photos_takes_batches_and_gives_each_photo_its_own(tmp_path: Path) -> None:
    path = efficientnet_lite0()
    bundle, files = build(path, "m", tmp_path / "built", partitions=[["65"]], free_batch=True)
    rng = np.random.default_rng(0)
    rows = [{"image": rng.standard_normal((1, 3, 224, 224)).astype(np.float32)} for _ in range(3)]
    expected = np.concatenate([each["logits"] for each in run_whole(path, rows)])
    stacked = {"image": np.concatenate([row["image"] for row in rows])}
    (batch,) = run_partition(bundle, files, ["65"], [stacked])
    assert difference({"logits": expected}, batch) < 1e-5
    assert difference({"logits": expected}, runner(bundle.segment(WHOLE), files).run(stacked)) < 1e-5
