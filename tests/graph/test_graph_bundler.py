"""Bundles: what they hold, that cutting again leaves the weights alone, and the cut that is chosen unasked."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from isthmus.artifacts import bundle as manifest
from isthmus.artifacts.bundle import digest_of
from isthmus.artifacts.segment_id import WHOLE
from isthmus.errors import CutError, ModelError
from isthmus_tools.figures.cuts import draw
from isthmus_tools.graph import add_cuts, build, cut_at, cuts, narrowest, open_model
from support.models import REAL
from support.segments import difference, run_partition, run_whole


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """Two layers; the first's weights are used again at the end, as tied embeddings are. Some are small."""
    rng = np.random.default_rng(0)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "late_in_the_file"], ["a"]),
            helper.make_node("Add", ["a", "small"], ["b"]),
            helper.make_node("MatMul", ["b", "middle"], ["c"]),
            helper.make_node("Relu", ["c"], ["d"]),
            helper.make_node("MatMul", ["d", "late_in_the_file"], ["y"]),
        ],
        "tied",
        [value("x", 1, [1, 32])],
        [value("y", 1, [1, 32])],
        [
            numpy_helper.from_array(rng.normal(0, 0.2, shape).astype(np.float32), name)
            for name, shape in (("small", (32,)), ("middle", (32, 32)), ("late_in_the_file", (32, 32)))
        ],
    )
    path = tmp_path / "tied.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_weights_lie_in_the_order_of_first_use_aligned_with_a_digest_each(tied: Path, tmp_path: Path) -> None:
    bundle, files = build(tied, "tied", tmp_path / "out")
    assert [t.name for t in bundle.weights.tensors] == ["late_in_the_file", "middle"]
    assert all(t.offset % 64 == 0 for t in bundle.weights.tensors)
    data = files[bundle.weights.blob.digest].read_bytes()
    assert digest_of(data) == bundle.weights.blob.digest
    assert len(data) == bundle.weights.blob.size
    for tensor in bundle.weights.tensors:
        assert digest_of(data[tensor.offset : tensor.offset + tensor.length]) == tensor.digest


def test_what_both_sides_use_is_pointed_to_by_both(tied: Path, tmp_path: Path) -> None:
    bundle, files = build(tied, "tied", tmp_path / "out", partitions=[["1"]])
    head, tail = bundle.partition()
    assert head.weights == ((0, 1),)
    assert tail.weights == ((0, 2),)
    inputs = [{"x": np.ones((1, 32), np.float32)}]
    assert difference(run_whole(tied, inputs)[0], run_partition(bundle, files, ["1"], inputs)[0]) < 1e-6


def test_weights_of_equal_content_are_stored_once(tied: Path, tmp_path: Path) -> None:
    proto = onnx.load(tied)
    copy = onnx.TensorProto()
    copy.CopyFrom(proto.graph.initializer[2])
    copy.name = "copied"
    proto.graph.initializer.append(copy)
    proto.graph.node[4].input[1] = "copied"
    onnx.save(proto, tied)
    bundle, _ = build(tied, "tied", tmp_path / "out")
    assert len(bundle.weights.tensors) == 2


def test_every_file_has_its_digest_and_all_content_is_there(tied: Path, tmp_path: Path) -> None:
    bundle, files = build(
        tied,
        "tied",
        tmp_path / "out",
        partitions=[["1"], ["1", "3"]],
        postprocess={"kind": "classify", "output": "y", "softmax": True, "top_k": 5},
        labels=[str(i) for i in range(32)],
    )
    assert set(files) == bundle.blobs()
    for digest, path in files.items():
        assert f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" == digest
    assert set(bundle.segments) == {"..", "..1", "1..", "1..3", "3.."}
    assert bundle.default_cuts == ("1",)


def test_a_bundle_survives_its_manifest(tied: Path, tmp_path: Path) -> None:
    bundle, _ = build(tied, "tied", tmp_path / "out", partitions=[["c"], ["1", "3"]], source={"from": "a test"})
    again = manifest.from_json(manifest.to_json(bundle))
    assert manifest.to_json(again) == manifest.to_json(bundle)
    assert again.partition() == bundle.partition()


def test_building_twice_gives_the_same_bytes(tied: Path, tmp_path: Path) -> None:
    one, _ = build(tied, "tied", tmp_path / "one", partitions=[["1", "3"]])
    two, _ = build(tied, "tied", tmp_path / "two", partitions=[["1", "3"]])
    assert manifest.to_json(one) == manifest.to_json(two)


def test_without_a_cut_the_narrowest_is_chosen(tied: Path, tmp_path: Path) -> None:
    chosen = narrowest(open_model(tied))
    assert chosen is not None
    assert chosen.position == 0
    assert build(tied, "tied", tmp_path / "out")[0].default_cuts == ("0",)


def test_cutting_again_writes_small_graphs_and_no_weights(tied: Path, tmp_path: Path) -> None:
    bundle, files = build(tied, "tied", tmp_path / "out", partitions=[["1"]])
    weights = files[bundle.weights.blob.digest]
    before = (weights.stat().st_mtime_ns, weights.stat().st_ino)
    whole = files[bundle.segment(WHOLE).graph.digest]
    more, new = add_cuts(bundle, whole, [["3"], ["1", "late=d"]])
    assert (weights.stat().st_mtime_ns, weights.stat().st_ino) == before
    assert more.weights == bundle.weights
    assert more.default_cuts == bundle.default_cuts
    assert set(new) == {more.segments[s].graph.digest for s in ("..3", "3..", "1..late", "late..")} - set(files)
    inputs = [{"x": np.ones((1, 32), np.float32)}]
    expected = run_whole(tied, inputs)[0]
    for names in (["3"], ["1", "late"]):
        assert difference(expected, run_partition(more, {**files, **new}, names, inputs)[0]) < 1e-6


def test_cutting_again_gives_the_segments_that_cutting_at_once_gives(tmp_path: Path) -> None:
    real = REAL["silero"]
    model = open_model(real.path(), **real.open_arguments())
    names = [c.name for c in cuts(model)[::7]]
    at_once, _ = build(model, "silero", tmp_path / "once", partitions=[[n] for n in names])
    first, files = build(model, "silero", tmp_path / "later", partitions=[[names[0]]])
    later, _ = add_cuts(first, files[first.segment(WHOLE).graph.digest], [[n] for n in names])
    assert manifest.to_json(later) == manifest.to_json(at_once)


def test_a_named_cut_of_the_bundle_can_be_used_again(tied: Path, tmp_path: Path) -> None:
    bundle, files = build(tied, "tied", tmp_path / "out", partitions=[["narrow=b"]])
    more, _ = add_cuts(bundle, files[bundle.segment(WHOLE).graph.digest], [["narrow", "3"]])
    assert "narrow..3" in more.segments
    assert more.default_cuts == ("narrow",)


def test_a_new_partition_can_become_the_default(tied: Path, tmp_path: Path) -> None:
    bundle, files = build(tied, "tied", tmp_path / "out", partitions=[["1"]])
    more, _ = add_cuts(bundle, files[bundle.segment(WHOLE).graph.digest], [["b", "d"]], default=True)
    assert [s.id for s in more.partition()] == ["..b", "b..d", "d.."]


def test_an_open_model_takes_no_binding_anymore(tied: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="open_model"):
        build(open_model(tied), "tied", tmp_path / "out", bind={"x": (1, 32)})


def test_two_cuts_of_one_name_are_refused(tied: Path, tmp_path: Path) -> None:
    with pytest.raises(CutError, match="another cut of the name here"):
        build(tied, "tied", tmp_path / "out", partitions=[["here=b"], ["here=c"]])


def test_a_bad_model_name_is_refused(tied: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot name a model"):
        build(tied, "Tied!", tmp_path / "out")


def test_a_bad_cut_name_is_refused(tied: Path) -> None:
    with pytest.raises(CutError, match="cannot name a cut"):
        cut_at(open_model(tied), ["b"], "a..b")


def test_progress_tells_bytes_and_segments(tied: Path, tmp_path: Path) -> None:
    told: dict[str, tuple[int, int]] = {}
    build(tied, "tied", tmp_path / "out", partitions=[["1"]], progress=lambda what, n, of: told.update({what: (n, of)}))
    assert told == {"weights": (8192, 8192), "segments": (2, 2)}


def test_the_picture_of_a_models_cuts_is_a_png(tied: Path, tmp_path: Path) -> None:
    data = draw(open_model(tied), "tied", tmp_path / "cuts.png")
    assert data.startswith(b"\x89PNG")
    assert (tmp_path / "cuts.png").read_bytes() == data
