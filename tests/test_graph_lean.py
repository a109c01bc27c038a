"""ONNX files whose weights stay in the file, and the memory of an import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from isthmus_tools.graph import build, external_data
from support.segments import difference, run_partition, run_whole

MAX_GROWTH = 2.5
"""Memory that an import may take, as a multiple of the model's file."""


def weight(name: str, *shape: int, seed: int = 0) -> onnx.TensorProto:
    values = np.random.default_rng(seed).normal(size=shape).astype("float32")
    return numpy_helper.from_array(values, name)


def nested() -> onnx.ModelProto:
    """Weights as an initialiser, in a constant, in a body's constant and initialiser, in a function, and in floats."""
    value, node = helper.make_tensor_value_info, helper.make_node
    floats = helper.make_tensor("floats", TensorProto.FLOAT, [20, 20], np.ones(400, np.float32).tolist())

    def body(name: str, seed: int) -> onnx.GraphProto:
        nodes = [
            node("Constant", [], [f"{name}_c"], value=weight("", 20, 20, seed=seed)),
            node("Add", [f"{name}_c", f"{name}_i"], [f"{name}_s"]),
            node("MatMul", ["a", f"{name}_s"], [f"{name}_y"]),
        ]
        result = [value(f"{name}_y", TensorProto.FLOAT, [1, 20])]
        return helper.make_graph(nodes, name, [], result, [weight(f"{name}_i", 20, 20, seed=seed + 1)])

    nodes = [
        node("Constant", [], ["c"], value=weight("", 20, 20, seed=1)),
        node("MatMul", ["x", "c"], ["m"]),
        node("MatMul", ["m", "w"], ["a"]),
        node("ReduceSum", ["a"], ["total"], keepdims=0),
        node("Cast", ["total"], ["positive"], to=TensorProto.BOOL),
        node("If", ["positive"], ["b"], then_branch=body("then", 2), else_branch=body("other", 4)),
        node("Scale", ["b"], ["s"], domain="own"),
        node("MatMul", ["s", "floats"], ["y"]),
    ]
    scale = helper.make_function(
        "own",
        "Scale",
        ["p"],
        ["q"],
        [node("Constant", [], ["k"], value=weight("", 20, 20, seed=7)), node("MatMul", ["p", "k"], ["q"])],
        [helper.make_opsetid("", 17)],
    )
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, [1, 20])],
        [value("y", TensorProto.FLOAT, [1, 20])],
        [weight("w", 20, 20, seed=6), floats],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, functions=[scale], opset_imports=opsets, ir_version=9)


def inlined(path: Path) -> onnx.ModelProto:
    """What `external_data.read` gives, with the bytes that it left in the file."""
    proto, data = external_data.read(path), path.read_bytes()

    def fill(tensor: onnx.TensorProto) -> None:
        if tensor.data_location == TensorProto.EXTERNAL:
            place = {e.key: e.value for e in tensor.external_data}
            assert place["location"] == path.name
            start = int(place["offset"])
            del tensor.external_data[:]
            tensor.ClearField("data_location")
            tensor.raw_data = data[start : start + int(place["length"])]

    def walk(nodes: object, tensors: object = ()) -> None:
        for tensor in tensors:  # type: ignore[attr-defined]
            fill(tensor)
        for node in nodes:  # type: ignore[attr-defined]
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    fill(attribute.t)
                if attribute.HasField("g"):
                    walk(attribute.g.node, attribute.g.initializer)

    walk(proto.graph.node, proto.graph.initializer)
    for function in proto.functions:
        walk(function.node)
    return proto


def test_every_large_tensor_stays_in_the_file_and_is_found_there(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(nested(), path)
    assert path.stat().st_size > 8 * 1600
    assert external_data.read(path).ByteSize() < 2 * 1600 + 2500
    assert inlined(path) == nested()


def test_a_model_read_so_is_cut_as_before(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(nested(), path)
    bundle, files = build(path, "nested", tmp_path / "out", partitions=["a"])
    x = [{"x": np.linspace(-1, 1, 20, dtype=np.float32)[None]}]
    got = run_partition(bundle, files, bundle.default_cuts, x)[0]
    assert difference(run_whole(path, x)[0], got) < 1e-5


@given(st.data())
def test_broken_bytes_are_read_as_protobuf_reads_them(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(nested().SerializeToString())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    path = tmp_path_factory.mktemp("broken") / "model.onnx"
    path.write_bytes(content)
    try:
        expected = onnx.ModelProto.FromString(bytes(content))
    except DecodeError:
        with pytest.raises(DecodeError):
            external_data.read(path)
    else:
        assert inlined(path) == expected


_IMPORT = """
import sys
from isthmus_tools.graph import open_model
import isthmus_tools.graph.probe
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
before = peak()
open_model(sys.argv[1])
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_import_takes_little_more_memory_than_twice_the_file(tmp_path: Path) -> None:
    width, layers = 1024, 24
    nodes, weights, last = [], [], "x"
    for i in range(layers):
        weights.append(weight(f"w{i}", width, width, seed=i))
        nodes.append(helper.make_node("MatMul", [last, f"w{i}"], [last := f"m{i}"]))
    # How much is left only a run tells.
    nodes += [helper.make_node("NonZero", [last], ["n"]), helper.make_node("Cast", ["n"], ["y"], to=TensorProto.FLOAT)]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, [1, width])],
        [value("y", TensorProto.FLOAT, [2, "left"])],
        weights,
    )
    path = tmp_path / "large.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    ran = subprocess.run([sys.executable, "-c", _IMPORT, path], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) < MAX_GROWTH * path.stat().st_size
