"""What is read, what is refused, and that weights stay where they are."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from isthmus.errors import ModelError
from isthmus_tools.graph import build, cuts, open_model
from support.segments import difference, run_partition, run_whole

HEAD = '<ir_version: 8, opset_import: ["": 17]>\n'


def save(tmp_path: Path, text: str, head: str = HEAD) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(parser.parse_model(head + text), path)
    return path


def chain(tmp_path: Path, layers: int, width: int, **save_arguments: object) -> Path:
    """`layers` matrix products in a row, each with weights of its own."""
    rng = np.random.default_rng(0)
    nodes = [helper.make_node("MatMul", [f"h{i}", f"w{i}"], [f"h{i + 1}"]) for i in range(layers)]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "chain",
        [value("h0", TensorProto.FLOAT, [1, width])],
        [value(f"h{layers}", TensorProto.FLOAT, [1, width])],
        [
            numpy_helper.from_array(rng.normal(0, width**-0.5, (width, width)).astype(np.float32), f"w{i}")
            for i in range(layers)
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "chain.onnx", **save_arguments)
    return tmp_path / "chain.onnx"


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x89PNG\r\n\x1a\n" + bytes(64), b"{}"])
def test_what_is_not_onnx_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ModelError, match="is not an ONNX model"):
        open_model(tmp_path / "model.onnx")


def test_a_pointer_to_a_model_is_told(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(ModelError, match="pointer of Git LFS"):
        open_model(tmp_path / "model.onnx")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        open_model(tmp_path / "none.onnx")


def test_a_model_without_outputs_or_with_one_twice_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, "g (float[2] x) => (float[2] y) { a = Relu(x) y = Exp(a) }")
    model = onnx.load(path)
    model.graph.output.append(model.graph.output[0])
    onnx.save(model, path)
    with pytest.raises(ModelError, match="gives y twice"):
        open_model(path)
    del model.graph.output[:]
    onnx.save(model, path)
    with pytest.raises(ModelError, match="gives no outputs"):
        open_model(path)


@pytest.mark.parametrize(("dims", "bind"), [("n, 1099511627776", {}), ("n, m", {"x": (99999, 99999)})])
def test_an_input_that_no_request_holds_is_refused(tmp_path: Path, dims: str, bind: dict[str, tuple[int, int]]) -> None:
    path = save(tmp_path, f"g (float[{dims}] x) => (float[{dims}] y) {{ a = Relu(x) y = Exp(a) }}")
    with pytest.raises(ModelError, match=r"the input x would take .*GB at the shape"):
        open_model(path, bind=bind)


def test_sparse_constants_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, "g (float[2] x) => (float[2] y) { a = Relu(x) y = Add(a, c) }")
    model = onnx.load(path)
    values = numpy_helper.from_array(np.ones(1, np.float32), "v")
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(np.zeros(1, np.int64), "i"), [2])
    model.graph.node.insert(0, helper.make_node("Constant", [], ["c"], sparse_value=sparse))
    onnx.save(model, path)
    with pytest.raises(ModelError, match="holds sparse weights"):
        open_model(path)


def test_text_inputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="x is text"):
        open_model(save(tmp_path, "g (string[2] x) => (string[2] y) { y = Identity(x) }"))


def test_a_free_dimension_that_nothing_binds_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, "g (float[n, c, 4] x) => (float[n, c, 4] y) { a = Relu(x) y = Exp(a) }")
    with pytest.raises(ModelError, match="nxcx4, and nothing binds"):
        open_model(path)
    assert cuts(open_model(path, bind={"x": (2, 3, 4)}))[0].bytes == 96
    example = {"x": np.zeros((1, 3, 4), np.float32)}
    assert cuts(open_model(path, examples=example))[0].bytes == 48


def test_a_free_first_dimension_counts_as_one(tmp_path: Path) -> None:
    path = save(tmp_path, "g (float[n, 4] x) => (float[n, 4] y) { a = Relu(x) y = Exp(a) }")
    cut = cuts(open_model(path))[0]
    assert cut.bytes == 16
    assert cut.tensors[0].shape == ("n", 4)


@pytest.mark.parametrize("bind", [{"x": (2, 5)}, {"x": (2,)}, {"z": (1, 4)}])
def test_a_binding_that_does_not_fit_is_refused(tmp_path: Path, bind: dict[str, tuple[int, ...]]) -> None:
    path = save(tmp_path, "g (float[n, 4] x) => (float[n, 4] y) { y = Relu(x) }")
    with pytest.raises(ModelError, match=r"does not fit|no input"):
        open_model(path, bind=bind)


def test_initialisers_among_the_inputs_are_inputs_no_more(tmp_path: Path) -> None:
    path = save(tmp_path, "g (float[2] x, float[2] w) => (float[2] y) { a = Relu(x) y = Add(a, w) }")
    proto = onnx.load(path)
    proto.graph.initializer.append(numpy_helper.from_array(np.array([1, 2], np.float32), "w"))
    onnx.save(proto, path)
    model = open_model(path)
    assert [v.name for v in model.inputs] == ["x"]
    assert [t.name for t in cuts(model)[0].tensors] == ["a"]


def test_functions_are_written_out(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["": 17, "local": 1]>
    g (float[2] x) => (float[2] y) { a = local.twice(x) y = local.twice(a) }
    <domain: "local", opset_import: ["": 17]>
    twice (p) => (q) { r = Exp(p) q = Add(r, r) }
    """
    path = save(tmp_path, text, "")
    model = open_model(path)
    assert [n.op_type for n in model.nodes] == ["Exp", "Add", "Exp", "Add"]
    bundle, files = build(model, "functions", tmp_path / "out", partitions=[["1"]])
    inputs = [{"x": np.array([0.5, 1], np.float32)}]
    assert difference(run_whole(path, inputs)[0], run_partition(bundle, files, ["1"], inputs)[0]) == 0


def test_freezing_makes_what_only_asks_for_a_shape_constant(tmp_path: Path) -> None:
    text = """
    g (float[n, 4] x) => (float[m] y) {
        a = Relu(x)
        s = Shape(a)
        e = Exp(a)
        p = ReduceProd<keepdims = 1>(s)
        y = Reshape(e, p)
    }
    """
    path = save(tmp_path, text)
    free, frozen = open_model(path), open_model(path, bind={"x": (3, 4)}, freeze=True)
    assert max(len(c.tensors) for c in cuts(free)) == 2
    assert max(len(c.tensors) for c in cuts(frozen)) == 1
    assert cuts(frozen)[-1].tensors[0].shape == (3, 4)


def test_the_deployed_graph_keeps_its_free_dimensions(tmp_path: Path) -> None:
    path = save(tmp_path, "g (float[n, 4] x) => (float[n, 4] y) { a = Relu(x) y = Exp(a) }")
    bundle, files = build(path, "free", tmp_path / "out", bind={"x": (7, 4)}, partitions=[["0"]])
    for batch in (1, 5):
        inputs = [{"x": np.ones((batch, 4), np.float32)}]
        assert difference(run_whole(path, inputs)[0], run_partition(bundle, files, ["0"], inputs)[0]) == 0


def test_a_shape_that_depends_on_values_is_seen_in_a_run(tmp_path: Path) -> None:
    text = """
    g (float[4] x, int64[1] n) => (float[k] y) <int64[1] start = {0}> { a = Slice(x, start, n) b = Exp(a) y = Neg(b) }
    """
    path = save(tmp_path, text)
    model = open_model(path, examples={"n": np.array([3])})
    assert [c.bytes for c in cuts(model)] == [12, 12]
    assert cuts(model)[0].tensors[0].shape == ("?",)


def test_a_run_that_fails_is_told(tmp_path: Path) -> None:
    text = "g (float[4] x, int64[2] n) => (float[a, b] y) { r = Reshape(x, n) y = Exp(r) }"
    with pytest.raises(ModelError, match="does not run with the inputs given"):
        open_model(save(tmp_path, text), examples={"n": np.array([3, 3])})


def test_external_weights_are_read_from_beside_the_model(tmp_path: Path) -> None:
    path = chain(tmp_path, 4, 32, save_as_external_data=True, location="w.bin", size_threshold=0)
    bundle, files = build(path, "external", tmp_path / "out", partitions=[["1"]])
    inputs = [{"h0": np.ones((1, 32), np.float32)}]
    assert difference(run_whole(path, inputs)[0], run_partition(bundle, files, ["1"], inputs)[0]) < 1e-6


def test_missing_external_weights_are_named(tmp_path: Path) -> None:
    path = chain(tmp_path, 2, 32, save_as_external_data=True, location="w.bin", size_threshold=0)
    (tmp_path / "w.bin").unlink()
    with pytest.raises(ModelError, match=r"w\.bin, which is missing"):
        open_model(path)


def test_external_weights_that_are_cut_short_are_named(tmp_path: Path) -> None:
    path = chain(tmp_path, 2, 32, save_as_external_data=True, location="w.bin", size_threshold=0)
    os.truncate(tmp_path / "w.bin", 5000)
    with pytest.raises(ModelError, match="has 5000 bytes, too few for w1"):
        open_model(path)


def test_external_weights_outside_the_models_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    path = chain(tmp_path / "model", 1, 32, save_as_external_data=True, location="w.bin", size_threshold=0)
    shutil.move(tmp_path / "model" / "w.bin", tmp_path / "w.bin")
    proto = onnx.load(path, load_external_data=False)
    for entry in proto.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = "../w.bin"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="outside its own folder"):
        open_model(path)


def test_weights_of_over_two_gib_never_fill_the_memory(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 8 * 2**30:
        pytest.skip("needs 8 GiB of disk")
    # Eight of 256 MiB, and a small one that ends beyond 2 GiB; nothing but each one's first number is on the disk.
    shapes = [(8192, 8192)] * 8 + [(8192, 512)]
    layers, size = len(shapes), 8192 * 8192 * 4
    end = 8 * size + 8192 * 512 * 4
    value = helper.make_tensor_value_info
    weights = []
    for i, shape in enumerate(shapes):
        tensor = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        length = shape[0] * shape[1] * 4
        for key, entry in (("location", "w.bin"), ("offset", str(i * size)), ("length", str(length))):
            tensor.external_data.add(key=key, value=entry)
        weights.append(tensor)
    graph = helper.make_graph(
        [helper.make_node("MatMul", [f"h{i}", f"w{i}"], [f"h{i + 1}"]) for i in range(layers)],
        "large",
        [value("h0", TensorProto.FLOAT, [1, 8192])],
        [value(f"h{layers}", TensorProto.FLOAT, [1, 512])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "large.onnx").write_bytes(model.SerializeToString())
    with open(tmp_path / "w.bin", "wb") as file:
        for i in range(layers):
            file.seek(i * size)
            file.write(np.float32(i + 1).tobytes())
        file.truncate(end)
    process = psutil.Process()
    before = process.memory_info().rss
    grown = 0

    def progress(what: str, done: int, total: int) -> None:
        nonlocal grown
        grown = max(grown, process.memory_info().rss - before)

    bundle, files = build(tmp_path / "large.onnx", "large", tmp_path / "out", partitions=[["3"]], progress=progress)
    assert bundle.weights.blob.size == end > 2 * 2**30
    assert grown < 200 * 2**20
    assert bundle.segment("..3").weights == ((0, 4),)
    assert all(s.graph.size < 10_000 for s in bundle.segments.values())
    (tmp_path / "w.bin").unlink()
    weights_file = files[bundle.weights.blob.digest]
    with open(weights_file, "rb") as file:
        for i, tensor in enumerate(bundle.weights.tensors):
            file.seek(tensor.offset)
            assert np.frombuffer(file.read(4), np.float32) == i + 1
    weights_file.unlink()
