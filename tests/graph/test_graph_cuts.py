"""Where small graphs can be cut, what crosses, and what is refused."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import parser

from isthmus.artifacts.cuts import is_cut_name
from isthmus.errors import CutError, UnboundedCut, UnknownValue
from isthmus_tools.graph import Model, build, cut_at, cuts, narrowest, open_model, resolve_cut
from isthmus_tools.graph.cuts import upstream_of
from support.segments import difference, run_partition, run_whole

HEAD = '<ir_version: 8, opset_import: ["": 17]>\n'


def save(tmp_path: Path, text: str) -> Path:
    model = parser.parse_model(HEAD + text)
    onnx.checker.check_model(model)
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    return path


def opened(tmp_path: Path, text: str, **arguments: Any) -> Model:
    return open_model(save(tmp_path, text), **arguments)


def assert_every_cut_is_the_whole(tmp_path: Path, text: str, inputs: dict[str, Any], **arguments: Any) -> Model:
    path = save(tmp_path, text)
    model = open_model(path, **arguments)
    every = cuts(model)
    partitions = [[c] for c in every] + ([every] if len(every) > 1 else [])
    bundle, files = build(model, "small", tmp_path / "out", partitions=partitions)
    whole = run_whole(path, [inputs])[0]
    for partition in [[], *partitions]:
        split = run_partition(bundle, files, [c.name for c in partition], [inputs])[0]
        assert difference(whole, split) < 1e-6, [c.name for c in partition]
    return model


DIAMOND = """
g (float[2, 4] x) => (float[2, 4] y) {
    a = Relu(x)
    b = Neg(a)
    c = Exp(a)
    d = Add(b, c)
    y = Sqrt(d)
}
"""


def test_cuts_tell_what_crosses_and_how_much(tmp_path: Path) -> None:
    found = cuts(opened(tmp_path, DIAMOND))
    assert [[t.name for t in c.tensors] for c in found] == [["a"], ["a", "b"], ["b", "c"], ["d"]]
    assert [c.bytes for c in found] == [32, 64, 64, 32]
    assert [(c.name, c.position, c.op) for c in found][:2] == [("0", 0, "Relu"), ("1", 1, "Neg")]


def test_every_cut_of_a_diamond_is_the_whole(tmp_path: Path) -> None:
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    assert_every_cut_is_the_whole(tmp_path, DIAMOND, {"x": x})


def test_an_input_that_both_sides_need_crosses_and_is_marked(tmp_path: Path) -> None:
    text = "g (float[4] x, float[4] z) => (float[4] y) { a = Relu(x) b = Mul(a, z) y = Add(b, x) }"
    arrays = {"x": np.ones(4, np.float32), "z": np.full(4, 3, np.float32)}
    model = assert_every_cut_is_the_whole(tmp_path, text, arrays)
    first, second = cuts(model)
    assert ([t.name for t in first.tensors], first.passing) == (["x", "z", "a"], ("x", "z"))
    assert ([t.name for t in second.tensors], second.passing) == (["x", "b"], ("x",))


def test_an_output_made_before_the_cut_does_not_cross(tmp_path: Path) -> None:
    text = "g (float[4] x) => (float[4] early, float[4] late) { a = Relu(x) early = Neg(a) late = Exp(a) }"
    model = assert_every_cut_is_the_whole(tmp_path, text, {"x": np.ones(4, np.float32)})
    assert [t.name for t in cuts(model)[1].tensors] == ["a"]


def test_an_output_that_the_tail_reads_crosses(tmp_path: Path) -> None:
    text = "g (float[4] x) => (float[4] early, float[4] late) { early = Relu(x) late = Exp(early) }"
    model = assert_every_cut_is_the_whole(tmp_path, text, {"x": np.ones(4, np.float32)})
    assert [t.name for t in cuts(model)[0].tensors] == ["early"]


def test_static_nodes_go_into_every_segment_that_needs_them(tmp_path: Path) -> None:
    text = """
    g (float[2, 2] x) => (float[2, 2] y)
    <float[2, 2] w = {1, 2, 3, 4}>
    {
        t = Transpose(w)
        u = Exp(t)
        a = MatMul(x, u)
        b = MatMul(a, u)
        y = Add(b, t)
    }
    """
    model = assert_every_cut_is_the_whole(tmp_path, text, {"x": np.eye(2, dtype=np.float32)})
    assert model.dynamic == (False, False, True, True, True)
    assert [[t.name for t in c.tensors] for c in cuts(model)] == [["a"], ["b"]]


def test_an_output_that_no_input_reaches_comes_from_the_tail(tmp_path: Path) -> None:
    text = """
    g (float[2] x) => (float[2] y, float[2] k) <float[2] w = {1, 2}> { k = Exp(w) a = Relu(x) y = Add(a, w) }
    """
    assert_every_cut_is_the_whole(tmp_path, text, {"x": np.ones(2, np.float32)})


def test_a_random_value_is_drawn_once_and_crosses(tmp_path: Path) -> None:
    text = "g (float[2] x) => (float[2] y) { r = RandomNormal<shape = [2]>() a = Add(x, r) y = Sub(a, r) }"
    model = opened(tmp_path, text)
    assert [[t.name for t in c.tensors] for c in cuts(model)] == [["x", "r"], ["r", "a"]]
    bundle, files = build(model, "random", tmp_path / "out", partitions=[["1"]])
    result = run_partition(bundle, files, ["1"], [{"x": np.array([1, 2], np.float32)}])[0]
    np.testing.assert_allclose(result["y"], [1, 2], atol=1e-6)


IF = """
g (float[4] x, bool c) => (float[4] y) {
    a = Relu(x)
    b = Neg(a)
    d = If (c) <
        then_branch = t () => (float[4] p) { p = Mul(a, b) },
        else_branch = e () => (float[4] q) { q = Add(a, x) }
    >
    y = Exp(d)
}
"""


@pytest.mark.parametrize("condition", [True, False])
def test_what_an_ifs_branches_capture_crosses(tmp_path: Path, condition: bool) -> None:
    arrays = {"x": np.linspace(-1, 1, 4, dtype=np.float32), "c": np.array(condition)}
    model = assert_every_cut_is_the_whole(tmp_path, IF, arrays)
    found = cuts(model)
    assert {t.name for t in found[1].tensors} == {"x", "c", "a", "b"}
    assert {t.name for t in found[2].tensors} == {"d"}


def test_what_a_loops_body_captures_crosses(tmp_path: Path) -> None:
    text = """
    g (float[2] x, int64 n) => (float[2] y) <bool go = {1}> {
        a = Exp(x)
        b = Neg(x)
        l = Loop (n, go, b) <
            body = body (int64 i, bool more, float[2] carried) => (bool still, float[2] next) {
                still = Identity(more)
                next = Add(carried, a)
            }
        >
        y = Relu(l)
    }
    """
    arrays = {"x": np.array([1, 2], np.float32), "n": np.array(3, np.int64)}
    model = assert_every_cut_is_the_whole(tmp_path, text, arrays)
    assert {t.name for t in cuts(model)[1].tensors} == {"n", "a", "b"}


def test_what_a_scans_body_captures_crosses(tmp_path: Path) -> None:
    text = """
    g (float[3, 2] x) => (float[2] sum, float[3, 2] sums) {
        a = Exp(x)
        k = ReduceMax<keepdims = 0>(a)
        s = ReduceMin<axes = [0], keepdims = 0>(a)
        sum, sums = Scan (s, x) <
            num_scan_inputs = 1,
            body = body (float[2] carried, float[2] row) => (float[2] next, float[2] out) {
                m = Mul(row, k)
                next = Add(carried, m)
                out = Identity(next)
            }
        >
    }
    """
    arrays = {"x": np.arange(6, dtype=np.float32).reshape(3, 2) / 10}
    model = assert_every_cut_is_the_whole(tmp_path, text, arrays)
    assert {t.name for t in cuts(model)[2].tensors} == {"x", "k", "s"}


def test_weights_inside_branches_leave_for_the_weights_file(tmp_path: Path) -> None:
    weights = ", ".join(["1"] * 512)
    text = f"""
    g (float[512] x, bool c) => (float[512] y) {{
        a = Relu(x)
        y = If (c) <
            then_branch = t () => (float[512] p) {{ w = Constant<value = float[512] {{{weights}}}>() p = Mul(a, w) }},
            else_branch = e () => (float[512] q) {{ w2 = Constant<value = float[512] {{{weights}}}>() q = Add(a, w2) }}
        >
    }}
    """
    path = save(tmp_path, text)
    bundle, files = build(path, "branches", tmp_path / "out", partitions=[["0"]])
    assert [t.length for t in bundle.weights.tensors] == [2048]
    assert bundle.segment("..0").weights == ()
    assert bundle.segment("0..").weights == ((0, 1),)
    arrays = {"x": np.arange(512, dtype=np.float32), "c": np.array(True)}
    assert difference(run_whole(path, [arrays])[0], run_partition(bundle, files, ["0"], [arrays])[0]) == 0


def test_values_of_one_name_in_two_branches_stay_apart(tmp_path: Path) -> None:
    text = """
    g (float[2] x, bool c) => (float[2] y) {
        a = Relu(x)
        y = If (c) <
            then_branch = t () => (float[2] p) { h = Exp(a) p = Neg(h) },
            else_branch = e () => (float[2] p) { h = Abs(a) p = Add(h, a) }
        >
    }
    """
    for condition in (True, False):
        arrays = {"x": np.array([1, 2], np.float32), "c": np.array(condition)}
        assert_every_cut_is_the_whole(tmp_path, text, arrays)


def test_a_cut_of_given_tensors_need_be_no_prefix(tmp_path: Path) -> None:
    text = "g (float[4] x, float[4] z) => (float[4] y) { a = Relu(x) b = Exp(z) c = Neg(a) y = Add(b, c) }"
    path = save(tmp_path, text)
    model = open_model(path)
    cut = cut_at(model, ["c", "z"])
    assert cut.position is None
    assert cut.passing == ("z",)
    bundle, files = build(model, "small", tmp_path / "out", partitions=[["tops=c,z"]])
    arrays = {"x": np.ones(4, np.float32), "z": np.zeros(4, np.float32)}
    split = run_partition(bundle, files, ["tops"], [arrays])[0]
    assert difference(run_whole(path, [arrays])[0], split) == 0
    assert [s.name for s in bundle.segment("..tops").inputs] == ["x"]


def test_a_cut_of_given_tensors_that_is_a_prefix_has_its_position(tmp_path: Path) -> None:
    assert cut_at(opened(tmp_path, DIAMOND), ["d"]).position == 3


def test_a_cut_that_leaves_a_way_around_names_what_leaks(tmp_path: Path) -> None:
    with pytest.raises(UnboundedCut, match=r"around it goes a$") as caught:
        cut_at(opened(tmp_path, DIAMOND), ["b"])
    assert caught.value.facts["leaks"] == ["a"]


def test_every_cut_that_is_listed_is_found_by_its_tensors(tmp_path: Path) -> None:
    # The first output is made of what does not cross after it is made.
    text = "g (float[4] x) => (float[4] y, float[4] z) { a = Relu(x) b = Exp(a) y = Neg(a) c = Abs(b) z = Neg(c) }"
    model = opened(tmp_path, text)
    listed = cuts(model)
    assert [[t.name for t in c.tensors] for c in listed] == [["a"], ["a", "b"], ["b"], ["c"]]
    for cut in listed:
        found = cut_at(model, [t.name for t in cut.tensors])
        assert (found.position, found.tensors) == (cut.position, cut.tensors)
        assert upstream_of(model, found) == upstream_of(model, cut)


def test_a_cut_names_the_input_that_passes_around_it(tmp_path: Path) -> None:
    text = "g (float[4] x, float[4] mask) => (float[4] y) { a = Relu(x) y = Mul(a, mask) }"
    with pytest.raises(UnboundedCut) as caught:
        cut_at(opened(tmp_path, text), ["a"])
    assert caught.value.facts["leaks"] == ["mask"]


def test_an_unknown_value_is_refused_with_those_like_it(tmp_path: Path) -> None:
    text = "g (float[4] x) => (float[4] y) { hidden_state = Relu(x) y = Neg(hidden_state) }"
    with pytest.raises(UnknownValue) as caught:
        resolve_cut(opened(tmp_path, text), "hiden_state")
    assert caught.value.facts["similar"] == ["hidden_state"]


@pytest.mark.parametrize("position", ["4", "5", "99"])
def test_a_position_without_a_cut_is_refused_with_those_near_it(tmp_path: Path, position: str) -> None:
    with pytest.raises(UnknownValue) as caught:
        resolve_cut(opened(tmp_path, DIAMOND), position)
    assert caught.value.facts["similar"] == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [(["a", "d"], "nothing after the cut needs a"), (["y"], "nothing after the cut needs y"), (["x"], "only inputs")],
)
def test_a_pointless_cut_is_refused(tmp_path: Path, tensors: list[str], message: str) -> None:
    with pytest.raises(CutError, match=message):
        cut_at(opened(tmp_path, DIAMOND), tensors)


def test_a_static_value_cannot_be_cut_at(tmp_path: Path) -> None:
    text = "g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { a = Relu(x) y = Add(a, w) }"
    with pytest.raises(CutError, match="the same for every input"):
        cut_at(opened(tmp_path, text), ["a", "w"])


def test_cuts_out_of_order_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CutError, match="the cut 0 does not lie after the cut 3"):
        build(opened(tmp_path, DIAMOND), "small", tmp_path / "out", partitions=[["3", "0"]])


def test_the_same_cut_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CutError, match="does not lie after"):
        build(opened(tmp_path, DIAMOND), "small", tmp_path / "out", partitions=[["3", "d"]])


def test_a_sequence_never_crosses(tmp_path: Path) -> None:
    text = """
    g (float[2] x) => (float[2] y) <int64 zero = {0}> {
        a = Relu(x)
        s = SequenceConstruct(a, x)
        y = SequenceAt(s, zero)
    }
    """
    model = assert_every_cut_is_the_whole(tmp_path, text, {"x": np.ones(2, np.float32)})
    assert [c.name for c in cuts(model)] == ["0"]
    with pytest.raises(CutError, match="no plain tensor"):
        resolve_cut(model, "1")


def test_a_model_of_one_node_has_no_cut_and_is_bundled_whole(tmp_path: Path) -> None:
    text = "g (float[2] x) => (float[2] y) { y = Relu(x) }"
    model = assert_every_cut_is_the_whole(tmp_path, text, {"x": np.ones(2, np.float32)})
    assert cuts(model) == []
    assert narrowest(model) is None
    bundle, _ = build(model, "one", tmp_path / "out")
    assert bundle.default_cuts == ()
    assert list(bundle.segments) == [".."]


@pytest.mark.parametrize("tensors", [["a/b:0"], ["x", "y"], ["31"], ["/"], ["a" * 80], ["日本"]])
def test_a_derived_name_can_name_a_cut_and_is_no_position(tensors: list[str]) -> None:
    from isthmus_tools.graph.cuts import derived_name

    assert is_cut_name(derived_name(tensors))
    assert not derived_name(tensors).isdecimal()


def test_the_work_before_a_cut_counts_products_only(tmp_path: Path) -> None:
    text = """
    g (float[3, 4] x) => (float[3, 6] y) <float[4, 5] v, float[5, 6] w> {
        a = MatMul(x, v)
        b = Relu(a)
        y = MatMul(b, w)
    }
    """
    proto = parser.parse_model(HEAD + text.replace(" <float[4, 5] v, float[5, 6] w>", ""))
    for name, shape in (("v", (4, 5)), ("w", (5, 6))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(shape, np.float32), name))
    onnx.save(proto, tmp_path / "m.onnx")
    model = open_model(tmp_path / "m.onnx")
    assert model.macs == (60, 0, 90)
    assert [c.macs_before for c in cuts(model)] == [0.4, 0.4]


def test_two_thousand_nodes_are_cut_in_no_time(tmp_path: Path) -> None:
    nodes, width = 2000, 40
    names = [f"v{i}" for i in range(nodes)]
    made = [
        onnx.helper.make_node("Add", [names[i - 1] if i else "x", names[i - width] if i >= width else "x"], [names[i]])
        for i in range(nodes)
    ]
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(made, "chain", [value("x", 1, [4])], [value(names[-1], 1, [4])])
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8),
        tmp_path / "m.onnx",
    )
    start = time.perf_counter()
    model = open_model(tmp_path / "m.onnx")
    middle = time.perf_counter()
    found = cuts(model)
    end = time.perf_counter()
    print(f"2,000 nodes: opened in {middle - start:.2f} s, cut in {end - middle:.3f} s, up to {width} tensors a cut")  # noqa: T201
    assert len(found) == nodes - 1
    assert max(len(c.tensors) for c in found) == width
