"""Models of opsets before 11 are converted and compared with themselves; `ai.onnx` is the empty domain's other name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from isthmus.errors import ModelError
from isthmus_tools.graph import build, open_model, opset_conversion
from support.segments import difference, run_partition, run_whole

node, value, array = helper.make_node, helper.make_tensor_value_info, numpy_helper.from_array
FLOAT = TensorProto.FLOAT


def save(
    path: Path,
    nodes: list[Any],
    opset: int,
    weights: list[Any] | None = None,
    *,
    domain: str = "",
    shape: tuple[int, ...] = (1, 2, 4, 4),
    external: bool = False,
) -> Path:
    weights = weights or []
    inputs = [value("x", FLOAT, shape)]
    if opset < 9:  # IR version 3: initialisers are inputs, too
        inputs += [value(w.name, w.data_type, list(w.dims)) for w in weights]
    graph = helper.make_graph(nodes, "g", inputs, [value("y", FLOAT, None)], weights)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid(domain, opset)], ir_version=3 if opset < 9 else 4
    )
    onnx.save(model, path, save_as_external_data=external, size_threshold=0, location="w.bin")
    return path


FOUR = array(np.array([1, 1, 2, 2], np.float32), "scales")
OLD = {
    "slice": (9, [node("Slice", ["x"], ["y"], axes=[2], starts=[1], ends=[3])], []),
    "pad": (7, [node("Pad", ["x"], ["y"], pads=[0, 0, 1, 1, 0, 0, 1, 1], value=1.0)], []),
    "clip": (8, [node("Clip", ["x"], ["y"], min=0.2, max=0.6)], []),
    "softmax": (7, [node("Softmax", ["x"], ["y"], axis=1)], []),
    "batch norm": (
        7,
        [node("BatchNormalization", ["x", "s", "b", "m", "v"], ["y"])],
        [array(np.array([0.5, 2], np.float32), n) for n in "sbmv"],
    ),
    "dropout": (7, [node("Dropout", ["x"], ["y"], ratio=0.5)], []),
    "upsample nearest": (7, [node("Upsample", ["x"], ["y"], mode="nearest", scales=[1.0, 1.0, 1.5, 2.0])], []),
    "upsample linear": (9, [node("Upsample", ["x", "scales"], ["y"], mode="linear")], [FOUR]),
    "resize linear": (10, [node("Resize", ["x", "scales"], ["y"], mode="linear")], [FOUR]),
}


@pytest.mark.parametrize("name", list(OLD))
def test_an_old_model_computes_what_it_did(tmp_path: Path, name: str) -> None:
    opset, nodes, weights = OLD[name]
    path = save(tmp_path / "old.onnx", [node("Neg", ["x"], ["n"]), node("Neg", ["n"], ["p"]), *nodes], opset, weights)
    proto = onnx.load(path)
    proto.graph.node[2].input[0] = "p"
    onnx.save(proto, path)
    model = open_model(path)
    assert model.document.opset_imports[""] == opset_conversion.MIN_OPSET
    bundle, files = build(model, "old", tmp_path / "out", partitions=["1"])
    inputs = [{"x": np.random.default_rng(s).standard_normal((1, 2, 4, 4)).astype(np.float32)} for s in range(2)]
    for whole, split in zip(run_whole(path, inputs), run_partition(bundle, files, ["1"], inputs), strict=True):
        assert difference(whole, split) < 1e-5


def test_an_old_model_keeps_weights_that_lie_beside_it(tmp_path: Path) -> None:
    weights = [array(np.random.default_rng(0).random((64, 8)).astype(np.float32), "w")]
    nodes = [node("MatMul", ["x", "w"], ["m"]), node("Softmax", ["m"], ["y"])]
    path = save(tmp_path / "old.onnx", nodes, 9, weights, shape=(1, 64), external=True)
    bundle, files = build(path, "old", tmp_path / "out", partitions=["0"])
    inputs = [{"x": np.ones((1, 64), np.float32)}]
    assert difference(run_whole(path, inputs)[0], run_partition(bundle, files, ["0"], inputs)[0]) < 1e-6


def test_initialisers_that_an_old_file_lists_among_no_inputs_are_found(tmp_path: Path) -> None:
    weights = [array(np.full((1, 2, 4, 4), 2, np.float32), "w")]
    path = save(tmp_path / "old.onnx", [node("Mul", ["x", "w"], ["m"]), node("Neg", ["m"], ["y"])], 9, weights)
    proto = onnx.load(path)
    proto.ir_version = 3
    onnx.save(proto, path)
    build(path, "old", tmp_path / "out")


def test_what_the_converter_does_not_know_is_refused_with_its_reason(tmp_path: Path) -> None:
    path = save(tmp_path / "old.onnx", [node("Nonesuch", ["x"], ["y"])], 9)
    with pytest.raises(ModelError, match=r"uses opset 9 and cannot be converted to 11: .*Nonesuch") as caught:
        open_model(path)
    assert "export it anew" in caught.value.hint


def test_an_opset_that_onnxruntime_does_not_run_cannot_be_compared(tmp_path: Path) -> None:
    path = save(tmp_path / "old.onnx", [node("Relu", ["x"], ["y"])], 5)
    with pytest.raises(ModelError, match=r"cannot be compared: Could not find an implementation for Relu\(1\)"):
        open_model(path)


def test_a_conversion_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opset, nodes, weights = OLD["upsample linear"]
    path = save(tmp_path / "old.onnx", nodes, opset, weights)
    monkeypatch.setattr(opset_conversion, "_set_resize_defaults", lambda node: None)
    with pytest.raises(ModelError, match="converted to 11 it computes something else: its outputs differ by 0"):
        open_model(path)


@pytest.mark.parametrize("opset", [9, 17])
def test_ai_onnx_is_the_default_domain(tmp_path: Path, opset: int) -> None:
    nodes = [node("Relu", ["x"], ["a"], domain="ai.onnx"), node("Neg", ["a"], ["y"])]
    path = save(tmp_path / "named.onnx", nodes, opset, domain="ai.onnx")
    model = open_model(path)
    assert dict(model.document.opset_imports) == {"": max(opset, 11)}
    assert {n.domain for n in model.nodes} == {""}
    build(model, "named", tmp_path / "out", partitions=["0"])


def test_ai_onnx_inside_bodies_and_functions_is_the_default_domain(tmp_path: Path) -> None:
    body = helper.make_graph([node("Neg", ["x"], ["b"], domain="ai.onnx")], "body", [], [value("b", FLOAT, None)])
    function = helper.make_function(
        "own",
        "twice",
        ["p"],
        ["q"],
        [node("Add", ["p", "p"], ["q"], domain="ai.onnx")],
        [helper.make_opsetid("ai.onnx", 17)],
    )
    graph = helper.make_graph(
        [
            node("If", ["c"], ["i"], domain="ai.onnx", then_branch=body, else_branch=body),
            node("twice", ["i"], ["y"], domain="own"),
        ],
        "g",
        [value("x", FLOAT, [4])],
        [value("y", FLOAT, [4])],
        [array(np.array(True), "c")],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx", 17), helper.make_opsetid("own", 1)]
    onnx.save(helper.make_model(graph, functions=[function], opset_imports=imports, ir_version=9), tmp_path / "m.onnx")
    model = open_model(tmp_path / "m.onnx")
    assert dict(model.document.opset_imports) == {"": 17}
    bundle, files = build(model, "m", tmp_path / "out")
    (outputs,) = run_partition(bundle, files, [], [{"x": np.ones(4, np.float32)}])
    assert outputs["y"].tolist() == [-2, -2, -2, -2]


def test_two_opsets_of_one_domain_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", [node("Relu", ["x"], ["y"])], 17)
    proto = onnx.load(path)
    proto.opset_import.append(helper.make_opsetid("ai.onnx", 13))
    onnx.save(proto, path)
    with pytest.raises(ModelError, match="imports the opsets 17 and 13 of one domain"):
        open_model(path)
