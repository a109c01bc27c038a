"""What is said of a model that cannot be imported: the reason first, whole, and nothing beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes import common

from isthmus.errors import ModelError
from isthmus.runtime.ort import reason_of
from isthmus_tools.graph import build, open_model
from support.cli import isthmus
from support.segments import run_partition


def save(path: Path, nodes: Sequence[onnx.NodeProto], outputs: Sequence[str] = ("y",), **weights: Any) -> Path:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, [1, 4])],
        [value(n, TensorProto.FLOAT, None) for n in outputs],
        [numpy_helper.from_array(np.asarray(w), n) for n, w in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as error:
        open_model(path)
    return error.value.message


def test_an_unknown_operator_is_named_first(tmp_path: Path) -> None:
    nodes = [helper.make_node("FancyNewOp", ["x"], ["y"], name="fancy")]
    said = refusal(save(tmp_path / "m.onnx", nodes))
    assert said.startswith("No Op registered for FancyNewOp with domain_version of 17 (node fancy): onnxruntime")
    assert "known at run time" not in said


def test_a_reason_behind_pages_of_types_is_kept(tmp_path: Path) -> None:
    nodes = [helper.make_node("Identity", ["x"], [f"a_value_with_a_rather_long_name_{i}"]) for i in range(90)]
    nodes.append(helper.make_node("FancyNewOp", [n.output[0] for n in nodes], ["y"]))
    assert refusal(save(tmp_path / "m.onnx", nodes)).startswith("No Op registered for FancyNewOp")


def test_a_run_that_fails_says_why_first(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gather", ["table", "at"], ["g"], name="look_up"),
        helper.make_node("Add", ["g", "x"], ["s"]),
        helper.make_node("NonZero", ["s"], ["n"]),
        helper.make_node("Cast", ["n"], ["y"], to=TensorProto.FLOAT),
    ]
    said = refusal(save(tmp_path / "m.onnx", nodes, table=np.ones((3, 4), np.float32), at=np.array(7)))
    assert said.startswith("indices element out of data bounds")
    assert "(node look_up)" in said
    assert "ONNXRuntimeError" not in said


def test_what_onnx_ir_raises_is_a_refusal_with_its_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class WrappedError(Exception):
        pass

    def fail(*_: object) -> None:
        try:
            raise KeyError("the cause")
        except KeyError as e:
            raise WrappedError("An error occurred in a pass with pages of graph") from e

    path = save(tmp_path / "m.onnx", [helper.make_node("Neg", ["x"], ["y"])])
    monkeypatch.setattr(common.RemoveUnusedNodesPass, "__call__", fail)
    assert refusal(path).startswith("'the cause': m.onnx is not a valid ONNX graph")


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([("Neg", "x", "a"), ("Relu", "x", "a"), ("Exp", "a", "y")], ""),
        ([("Neg", "x", "a")], "no node makes the output y"),
        ([("Neg", "none", "y")], "a node Neg reads none, which is no input"),
        ([("Neg", "b", "y"), ("Exp", "y", "b")], ""),
    ],
)
def test_a_broken_graph_is_a_refusal_and_no_trace(nodes: list[tuple[str, str, str]], said: str, tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", [helper.make_node(op, [a], [b]) for op, a, b in nodes])
    result = isthmus("import", path, "--registry", tmp_path / "registry")
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert f"error: {said}" in result.stderr


def test_a_body_that_gives_a_value_from_around_it_is_imported(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    then = helper.make_graph([], "t", [], [value("a", TensorProto.FLOAT, [1, 4])])
    other = helper.make_graph([helper.make_node("Neg", ["a"], ["e"])], "e", [], [value("e", TensorProto.FLOAT, [1, 4])])
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("ReduceSum", ["a"], ["s"], keepdims=0),
        helper.make_node("Cast", ["s"], ["c"], to=TensorProto.BOOL),
        helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other),
    ]
    bundle, files = build(save(tmp_path / "m.onnx", nodes), "outer", tmp_path / "out", partitions=["0"])
    x = np.array([[1, -2, 3, -4]], np.float32)
    assert np.array_equal(run_partition(bundle, files, ["0"], [{"x": x}])[0]["y"], np.maximum(x, 0))


def test_a_reason_is_freed_from_what_is_around_it() -> None:
    text = (
        "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Non-zero status code returned while running Gather node. "
        "Name:'/emb/Gather' Status Message: indices element out of data bounds, idx=99 must be within [-10,9]"
    )
    assert reason_of(Exception(text)) == (
        "indices element out of data bounds, idx=99 must be within [-10,9] (node /emb/Gather)"
    )


@pytest.mark.parametrize(("key", "text"), [("offset", "-1"), ("offset", "one"), ("length", "")])
def test_a_place_of_weights_that_is_no_number_is_told(key: str, text: str, tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
    path = save(tmp_path / "m.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])])
    model = onnx.load(path)
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for k, v in {"location": "w.bin", key: text}.items():
        weight.external_data.add(key=k, value=v)
    model.graph.initializer.append(weight)
    onnx.save(model, path)
    said = refusal(path)
    assert "lambda" not in said
    assert "must be non-negative" in said or "invalid literal for int" in said


@pytest.mark.parametrize("size", [0, 1023])
def test_a_weight_without_its_bytes_takes_no_others(size: int, tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("MatMul", ["a", "v"], ["y"])]
    path = save(tmp_path / "m.onnx", nodes, w=np.ones((4, 400), np.float32), v=np.ones((400, 400), np.float32))
    model = onnx.load(path)
    model.graph.initializer[0].raw_data = bytes(size)
    onnx.save(model, path)
    with pytest.raises(ModelError, match=f"w holds {size} bytes; its shape needs 6400"):
        build(path, "m", tmp_path / "out")
