"""Cuts lie only where a frame carries what crosses: dtypes, ranks, names, how many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from isthmus.errors import CutError, ModelError
from isthmus.oip.tensor import datatype_of
from isthmus.wire import frame
from isthmus.wire.frame import Frame
from isthmus_tools.graph import build, cut_after, cut_at, cuts, narrowest, open_model

value = helper.make_tensor_value_info
FLOAT = TensorProto.FLOAT


def save(
    path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: list[Any], opset: int = 21
) -> Path:
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), path)
    return path


def quantised(path: Path, kind: int) -> Path:
    """A float layer, activations rounded to `kind` and back, and another layer."""
    return save(
        path,
        [
            helper.make_node("MatMul", ["x", "a_weight"], ["a"]),
            helper.make_node("QuantizeLinear", ["a", "scale", "zero"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
            helper.make_node("MatMul", ["d", "b_weight"], ["y"]),
        ],
        [value("x", FLOAT, ["n", 16])],
        [value("y", FLOAT, ["n", 5])],
        [
            numpy_helper.from_array(np.ones((16, 64), np.float32), "a_weight"),
            numpy_helper.from_array(np.ones((64, 5), np.float32), "b_weight"),
            numpy_helper.from_array(np.float32(0.5), "scale"),
            helper.make_tensor("zero", kind, [], [0]),
        ],
    )


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (TensorProto.FLOAT8E4M3FN, "float8_e4m3fn"),
        (TensorProto.FLOAT8E5M2, "float8_e5m2"),
        (TensorProto.INT4, "int4"),
        (TensorProto.UINT4, "uint4"),
    ],
)
def test_no_cut_is_at_a_dtype_that_frames_lack(tmp_path: Path, kind: int, name: str) -> None:
    model = open_model(quantised(tmp_path / "m.onnx", kind))
    assert [[t.name for t in c.tensors] for c in cuts(model)] == [["a"], ["d"]]
    chosen = narrowest(model)
    assert chosen is not None
    assert chosen.position != 1
    for ask in (lambda: cut_at(model, ["q"]), lambda: cut_after(model, 1)):
        with pytest.raises(CutError, match=f"no frame carries q: its dtype is {name}"):
            ask()


def test_a_model_that_takes_what_frames_lack_is_refused(tmp_path: Path) -> None:
    path = save(
        tmp_path / "m.onnx",
        [helper.make_node("Cast", ["x"], ["f"], to=FLOAT), helper.make_node("Neg", ["f"], ["y"])],
        [value("x", TensorProto.FLOAT8E4M3FN, [4])],
        [value("y", FLOAT, [4])],
        [],
    )
    with pytest.raises(ModelError, match=r"no frame carries m\.onnx's x: its dtype is float8_e4m3fn"):
        open_model(path)


def chain(path: Path, middle: str, end: str = "y") -> Path:
    nodes = [
        helper.make_node("Neg", ["x"], ["a"]),
        helper.make_node("Neg", ["a"], [middle]),
        helper.make_node("Neg", [middle], [end]),
    ]
    return save(path, nodes, [value("x", FLOAT, [4])], [value(end, FLOAT, [4])], [])


def test_no_cut_is_at_a_name_longer_than_frames_carry(tmp_path: Path) -> None:
    assert len(cuts(open_model(chain(tmp_path / "fits.onnx", "é" * 256)))) == 2
    model = open_model(chain(tmp_path / "long.onnx", "é" * 256 + "a"))
    assert [c.position for c in cuts(model)] == [0]
    with pytest.raises(CutError, match="its name has 513 bytes; frames carry names of 1 to 512"):
        cut_after(model, 1)
    with pytest.raises(ModelError, match="its name has 600 bytes"):
        open_model(chain(tmp_path / "end.onnx", "b", "e" * 600))


def test_no_cut_is_at_a_rank_higher_than_frames_carry(tmp_path: Path) -> None:
    path = save(
        tmp_path / "m.onnx",
        [
            helper.make_node("Neg", ["x"], ["a"]),
            helper.make_node("Reshape", ["a", "deep"], ["r"]),
            helper.make_node("Reshape", ["r", "flat"], ["b"]),
            helper.make_node("Neg", ["b"], ["y"]),
        ],
        [value("x", FLOAT, [4])],
        [value("y", FLOAT, [4])],
        [
            numpy_helper.from_array(np.array([4] + [1] * 32, np.int64), "deep"),
            numpy_helper.from_array(np.array([4], np.int64), "flat"),
        ],
    )
    assert [c.position for c in cuts(open_model(path))] == [0, 2]


def wide(path: Path, count: int, name: str = "a{}") -> Path:
    """So many tensors side by side between two nodes."""
    names = [name.format(i) for i in range(count)]
    return save(
        path,
        [
            helper.make_node("Split", ["x"], names, num_outputs=count, axis=0),
            helper.make_node("Concat", names, ["c"], axis=0),
            helper.make_node("Neg", ["c"], ["y"]),
        ],
        [value("x", FLOAT, [count])],
        [value("y", FLOAT, [count])],
        [],
    )


def test_no_cut_is_where_more_tensors_cross_than_a_frame_carries(tmp_path: Path) -> None:
    assert [c.position for c in cuts(open_model(wide(tmp_path / "fits.onnx", 1000)))] == [0, 1]
    model = open_model(wide(tmp_path / "many.onnx", 1100))
    assert [c.position for c in cuts(model)] == [1]
    with pytest.raises(CutError, match="1101 tensors; a frame carries at most 1024"):
        cut_after(model, 0)


def test_no_cut_is_where_the_names_exceed_a_frames_header(tmp_path: Path) -> None:
    # A control character takes six bytes of JSON.
    model = open_model(wide(tmp_path / "long.onnx", 900, "\x01" * 200 + "{}"))
    assert [c.position for c in cuts(model)] == [1]
    with pytest.raises(CutError, match="a frame's header has at most"):
        cut_after(model, 0)


def test_every_cut_that_is_listed_is_carried(tmp_path: Path) -> None:
    model = open_model(wide(tmp_path / "m.onnx", 1000, "\x01" * 100 + "{}"))
    for cut in cuts(model):
        arrays = {t.name: np.zeros([int(n) for n in t.shape], t.dtype) for t in cut.tensors}
        sent = frame.encode(Frame(arrays, "sha256:" + "0" * 64, f"..{cut.name}", "\x01" * 128))
        assert frame.decode(sent, max_bytes=2**30).tensors.keys() == arrays.keys()


def test_what_frames_carry_the_open_inference_protocol_names() -> None:
    assert len({datatype_of(dtype) for dtype in frame.DTYPES}) == len(frame.DTYPES)


def test_the_default_cut_of_a_float8_model_is_published_and_runs(tmp_path: Path) -> None:
    bundle, _ = build(quantised(tmp_path / "m.onnx", TensorProto.FLOAT8E4M3FN), "m", tmp_path / "out")
    assert {t.dtype for c in bundle.cuts.values() for t in c.tensors} == {"float32"}
