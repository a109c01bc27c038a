"""External data: large tensors stay in their files, and models name no file outside their folder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from isthmus.errors import ModelError
from isthmus_tools.graph import build, external_data, open_model
from support.segments import difference, run_partition, run_whole

INPUTS = [{"x": np.linspace(-1, 1, 32, dtype=np.float32)[None]}]


def model(folder: Path, *, each: bool = False, **constant: object) -> Path:
    """x · w, its positive numbers' places, and a sum with what is small; how many places only a run tells."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("Add", ["m", "b"], ["s"]),
        helper.make_node("Relu", ["s"], ["r"]),
        helper.make_node("NonZero", ["r"], ["n"]),
        helper.make_node("Cast", ["n"], ["y"], to=TensorProto.FLOAT),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, [1, 32])],
        [value("y", TensorProto.FLOAT, [2, "places"])],
        [numpy_helper.from_array(rng.normal(size=s).astype("float32"), n) for n, s in (("w", (32, 32)), ("b", (32,)))],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path = folder / "model.onnx"
    how = {"all_tensors_to_one_file": False} if each else {"location": "weights.bin"}
    onnx.save(made, path, save_as_external_data=True, size_threshold=0, **how)
    return path


def linked_files(folder: Path) -> Path:
    """Each file a link into a store beside, as model caches and data versioning do."""
    model(folder / "made", each=True)
    (folder / "snapshot").mkdir()
    for i, file in enumerate(sorted((folder / "made").iterdir())):
        store = folder / "store" / str(i)
        store.mkdir(parents=True)
        file.rename(store / "content")
        (folder / "snapshot" / file.name).symlink_to(f"../store/{i}/content")
    return folder / "snapshot" / "model.onnx"


def linked_folder(folder: Path) -> Path:
    """Files linked through a link to the current folder, as volumes of a cluster's secrets and maps do."""
    model(folder / "volume" / "..2026_11_28")
    (folder / "volume" / "..data").symlink_to("..2026_11_28")
    for name in ("model.onnx", "weights.bin"):
        (folder / "volume" / name).symlink_to(f"..data/{name}")
    return folder / "volume" / "model.onnx"


def linked_model(folder: Path) -> Path:
    model(folder / "made")
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "mine.onnx").symlink_to("../made/model.onnx")
    return folder / "elsewhere" / "mine.onnx"


def hard_links(folder: Path) -> Path:
    model(folder / "made")
    (folder / "copy").mkdir()
    for file in (folder / "made").iterdir():
        os.link(file, folder / "copy" / file.name)
    return folder / "copy" / "model.onnx"


@pytest.mark.parametrize("layout", [linked_files, linked_folder, linked_model, hard_links])
def test_weights_behind_links_are_read(layout: Callable[[Path], Path], tmp_path: Path) -> None:
    plain, _ = build(model(tmp_path / "plain"), "plain", tmp_path / "a")
    bundle, files = build(layout(tmp_path), "linked", tmp_path / "b")
    assert bundle.weights == plain.weights
    whole = run_partition(*build(tmp_path / "plain" / "model.onnx", "plain", tmp_path / "c"), [], INPUTS)[0]
    assert difference(whole, run_partition(bundle, files, bundle.default_cuts, INPUTS)[0]) == 0


def with_location(path: Path, location: str) -> Path:
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.mark.parametrize("location", ["../weights.bin", "a/../../weights.bin", "/etc/hostname", "..\\weights.bin"])
def test_a_model_that_names_a_file_outside_its_folder_is_refused(location: str, tmp_path: Path) -> None:
    path = with_location(model(tmp_path / "model"), location)
    (tmp_path / "weights.bin").write_bytes((tmp_path / "model" / "weights.bin").read_bytes())
    with pytest.raises(ModelError, match="outside its own folder"):
        open_model(path)


@pytest.mark.parametrize("location", ["weights.bin", "./weights.bin", "none/../weights.bin", "..data/weights.bin"])
def test_a_place_that_stays_in_the_folder_as_written_is_read(location: str, tmp_path: Path) -> None:
    path = with_location(model(tmp_path / "model"), location)
    (tmp_path / "model" / "..data").symlink_to(".")
    assert build(path, "model", tmp_path / "out")[0].weights.blob.size >= 32 * 32 * 4


def test_a_constant_whose_file_lies_outside_is_refused_too(tmp_path: Path) -> None:
    path = model(tmp_path / "model")
    proto = onnx.load(path, load_external_data=False)
    tensor = proto.graph.initializer[0]
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=tensor))
    del proto.graph.initializer[0]
    path.write_bytes(proto.SerializeToString())
    assert build(path, "constant", tmp_path / "out")[0].weights.blob.size >= 32 * 32 * 4
    for entry in proto.graph.node[0].attribute[0].t.external_data:
        if entry.key == "location":
            entry.value = "../weights.bin"
    path.write_bytes(proto.SerializeToString())
    (tmp_path / "weights.bin").write_bytes((tmp_path / "model" / "weights.bin").read_bytes())
    with pytest.raises(ModelError, match="outside its own folder"):
        open_model(path)


@pytest.mark.parametrize("what", ["folder", "pipe", "loop", "nothing"])
def test_weights_that_are_no_file_are_refused(what: str, tmp_path: Path) -> None:
    path = model(tmp_path)
    weights = tmp_path / "weights.bin"
    weights.unlink()
    {
        "folder": weights.mkdir,
        "pipe": lambda: os.mkfifo(weights),
        "loop": lambda: weights.symlink_to("weights.bin"),
        "nothing": lambda: weights.symlink_to("none"),
    }[what]()
    with pytest.raises(ModelError, match=r"weights\.bin, which is (missing|no file)"):
        open_model(path)


def test_small_weights_of_another_file_end_up_in_the_segments(tmp_path: Path) -> None:
    bundle, files = build(model(tmp_path / "m"), "small", tmp_path / "out")
    (tmp_path / "m" / "weights.bin").unlink()
    assert [t.name for t in bundle.weights.tensors] == ["w"]
    assert run_partition(bundle, files, bundle.default_cuts, INPUTS)[0]["y"].shape[0] == 2


@pytest.mark.parametrize(
    ("dtype", "code"),
    [(ml_dtypes.bfloat16, TensorProto.BFLOAT16), ("float16", TensorProto.FLOAT16), (ml_dtypes.int4, TensorProto.INT4)],
)
def test_a_run_for_shapes_takes_external_weights_of_every_type(dtype: object, code: int, tmp_path: Path) -> None:
    values = np.arange(64 * 64).reshape(64, 64) % 7
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "one"], ["f"])
        if code == TensorProto.INT4
        else helper.make_node("Cast", ["w"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x", "f"], ["m"]),
        helper.make_node("NonZero", ["m"], ["n"]),
        helper.make_node("Cast", ["n"], ["y"], to=TensorProto.FLOAT),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, [1, 64])],
        [value("y", TensorProto.FLOAT, [2, "places"])],
        [
            numpy_helper.from_array(values.astype(dtype), "w"),
            numpy_helper.from_array(np.float32(1), "one"),
        ],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(made, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0, location="w.bin")
    opened = open_model(tmp_path / "m.onnx")
    assert opened.shapes["y"] == (2, np.count_nonzero(values))


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
