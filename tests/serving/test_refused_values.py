"""Indices out of range: the caller's fault, told with the value, wherever the segment runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from isthmus.artifacts.bundle import Blob, Segment
from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import RunFailed, ValueRefused
from isthmus.runtime.ort_runner import OrtRunner
from isthmus.serving import create_router_app, create_segment_app
from support.bundles import publish, ready, router_settings, save, segment_settings, served, value, weight

UPDATES = numpy_helper.from_array(np.zeros((2, 4), np.float32), "updates")
TABLE = numpy_helper.from_array(np.zeros((10, 4), np.float32), "table")
OPERATORS: dict[str, tuple[dict[str, Any], list[str], tuple[int, ...]]] = {
    "Gather": ({}, ["table", "ids"], (2, 4)),
    "GatherElements": ({"axis": 0}, ["table", "ids"], (2, 4)),
    "GatherND": ({}, ["table", "ids"], (2, 1)),
    "ScatterElements": ({"axis": 0}, ["table", "ids", "updates"], (2, 4)),
    "ScatterND": ({}, ["table", "ids", "updates"], (2, 1)),
}


def runner_of(path: Path, nodes: list[Any], shape: tuple[int | str, ...], dtype: int = TensorProto.INT64) -> OrtRunner:
    save(path, nodes, [value("ids", *shape, dtype=dtype)], [value("y", *["any"] * 2)], [TABLE, UPDATES])
    taken = TensorSpec("ids", "int64" if dtype == TensorProto.INT64 else "float32", shape)
    segment = Segment("..", Blob("sha256:" + "0" * 64, 1), (taken,), (TensorSpec("y", "float32", ("m", "n")),), ())
    return OrtRunner(path, segment, providers=("CPUExecutionProvider",), threads=1)


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("operator", OPERATORS)
def test_an_index_out_of_range_is_refused_with_its_value(operator: str, free: bool, tmp_path: Path) -> None:
    attributes, inputs, shape = OPERATORS[operator]
    nodes = [helper.make_node(operator, inputs, ["out"], **attributes), helper.make_node("Flatten", ["out"], ["y"])]
    runner = runner_of(tmp_path / "model.onnx", nodes, ("n", *shape[1:]) if free else shape)
    ids = np.zeros(shape, np.int64)
    runner.run({"ids": ids})
    ids.flat[-1] = 99
    with pytest.raises(ValueRefused, match=r"^an index is out of range") as e:
        runner.run({"ids": ids})
    if operator != "GatherElements":  # which names neither
        assert (e.value.facts["tensor"], e.value.facts["value"]) == ("ids", 99)
        assert "ids holds 99" in e.value.message
    if operator in ("Gather", "ScatterElements"):
        assert e.value.facts["expected"] == "-10 to 9"


def test_counts_that_a_graph_of_fixed_shapes_refuses_are_the_callers_values(tmp_path: Path) -> None:
    runner = runner_of(tmp_path / "tile.onnx", [helper.make_node("Tile", ["table", "ids"], ["y"])], (2,))
    with pytest.raises(ValueRefused, match=r"cannot run with these values: .*-3"):
        runner.run({"ids": np.array([-3, 1])})


def test_a_graph_that_fails_on_fixed_shapes_of_floats_fails_by_itself(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["ids"], ["sizes"], to=TensorProto.INT64),
        helper.make_node("Tile", ["table", "sizes"], ["y"]),
    ]
    runner = runner_of(tmp_path / "tile.onnx", nodes, (2,), TensorProto.FLOAT)
    with pytest.raises(RunFailed):
        runner.run({"ids": np.array([-3, 1], np.float32)})


@pytest.mark.parametrize("batch", [1, "batch"])
@pytest.mark.parametrize("at", ["head", "tail"])
@pytest.mark.parametrize("remote", [False, True])
def test_an_index_out_of_range_is_a_400_that_names_the_value(
    batch: int | str, at: str, remote: bool, tmp_path: Path
) -> None:
    first, last = ("ids", "others") if at == "head" else ("others", "ids")
    nodes = [
        helper.make_node("Gather", ["w0", first], ["g0"]),
        helper.make_node("Relu", ["g0"], ["r1"]),
        helper.make_node("Gather", ["w2", last], ["g2"]),
        helper.make_node("Add", ["r1", "g2"], ["y"]),
    ]
    ends = [value(name, batch, 3, dtype=TensorProto.INT64) for name in ("ids", "others")]
    path = save(
        tmp_path / "words.onnx", nodes, ends, [value("y", batch, 3, 8)], [weight(f"w{i}", 10, 8) for i in (0, 2)]
    )
    words = publish(tmp_path, path, {}, partitions=[["1"]])
    body = {
        "inputs": [
            {"name": "ids", "shape": [1, 3], "datatype": "INT64", "data": [1, 2, 30522]},
            {"name": "others", "shape": [1, 3], "datatype": "INT64", "data": [0, 1, 9]},
        ]
    }
    with served(create_segment_app(segment_settings(words, tmp_path / "cache"))) as url:
        hops = (url,) if remote else ("local",)
        client = ready(create_router_app(router_settings(words, tmp_path / "router", hops)).test_client())
        answer = client.post("/", json=body)
    assert (answer.status_code, answer.json["type"]) == (400, "ValueRefused")
    assert answer.json["error"].startswith("an index is out of range: ids holds 30522, and -10 to 9 are taken")
    facts = answer.json["facts"]
    assert (facts["tensor"], facts["value"], facts["expected"]) == ("ids", 30522, "-10 to 9")
