"""Before anything is published: every segment loads, runs through frames, and computes what the whole model does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.segment_id import WHOLE
from isthmus.errors import CutError, ModelError
from isthmus.registry import FolderStore, Registry
from isthmus.runtime.ort_runner import UnpublishedRunner
from isthmus_tools.cli import app
from isthmus_tools.cli.importing import read_labels
from isthmus_tools.graph import add_cuts, build, cuts, open_model, partition
from isthmus_tools.graph import weights as weights_file
from isthmus_tools.graph.cuts import within_quantised_operators
from isthmus_tools.graph.dry_run import DryRun
from isthmus_tools.graph.extract import extract
from support.bundles import LABELS, POSTPROCESS, PREPROCESS, photos_model
from support.segments import difference, run_partition, run_whole

value = helper.make_tensor_value_info
node = helper.make_node
array = numpy_helper.from_array
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def save(
    path: Path,
    nodes: list[Any],
    inputs: list[Any],
    outputs: list[Any],
    weights: list[Any] | None = None,
    *,
    opset: int = 17,
    ir_version: int = 9,
    domain: str = "",
) -> Path:
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights or [])
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=ir_version), path)
    return path


def small(path: Path, op: str = "Relu", *, domain: str = "", opset: int = 17, ir_version: int = 9) -> Path:
    return save(
        path,
        [node(op, ["x"], ["a"], domain=domain), node("Neg", ["a"], ["y"])],
        [value("x", FLOAT, [1, 4])],
        [value("y", FLOAT, [1, 4])],
        opset=opset,
        ir_version=ir_version,
        domain=domain,
    )


def shape_of(bundle: Bundle, name: str) -> tuple[int | str, ...]:
    return next(s.shape for s in bundle.outputs if s.name == name)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"ir_version": 14}, "onnxruntime cannot load the model: Unsupported model IR version: 14, max"),
        ({"opset": 40}, "Opset 40 is under development"),
        ({"op": "Nonesuch", "domain": "my.own"}, "my.own:Nonesuch.* is not a registered function/op"),
        ({"op": "Nonesuch", "domain": "com.microsoft"}, "com.microsoft:Nonesuch.* is not a registered function/op"),
    ],
    ids=["ir version", "opset", "custom operator", "unknown operator"],
)
def test_what_onnxruntime_cannot_load_is_refused_with_its_reason(
    tmp_path: Path, how: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        build(small(tmp_path / "m.onnx", **how), "m", tmp_path / "out")
    assert "onnxruntime_src" not in caught.value.message
    assert str(tmp_path) not in caught.value.message


def test_a_refused_model_leaves_the_registry_and_its_prod_as_they_were(tmp_path: Path) -> None:
    registry = tmp_path / "registry"

    def imported(path: Path) -> Any:
        return CliRunner().invoke(app, ["import", str(path), "--name", "m", "--registry", str(registry)])

    assert imported(small(tmp_path / "good.onnx")).exit_code == 0
    before = sorted(p for p in registry.rglob("*") if p.is_file())
    refused = imported(small(tmp_path / "newer.onnx", ir_version=14))
    assert refused.exit_code == 1
    assert "Unsupported model IR version: 14, max supported IR version" in refused.stderr
    assert sorted(p for p in registry.rglob("*") if p.is_file()) == before
    assert Registry(FolderStore(registry)).resolve("m").version == "1"


def test_a_new_cut_that_onnxruntime_cannot_load_is_refused(tmp_path: Path) -> None:
    bundle, files = build(photos_model(tmp_path / "m.onnx"), "m", tmp_path / "out", partitions=["6"])
    whole = files[bundle.segment(WHOLE).graph.digest]
    later = onnx.load(whole, load_external_data=False)
    later.ir_version = 14
    onnx.save(later, whole)
    with pytest.raises(ModelError, match="onnxruntime cannot load the model: Unsupported model IR version: 14"):
        add_cuts(bundle, whole, ["3"])


def test_a_partition_that_the_dry_run_refuses_is_left_out_where_the_caller_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, files = build(photos_model(tmp_path / "m.onnx"), "m", tmp_path / "out", partitions=["6"])
    whole = files[bundle.segment(WHOLE).graph.digest]
    monkeypatch.setattr("isthmus_tools.graph.dry_run.WRONG", -1.0)
    with pytest.raises(CutError, match="the segments at the cut 3 do not compute what the model does"):
        add_cuts(bundle, whole, ["3"])
    refused: list[CutError] = []
    more, new = add_cuts(bundle, whole, ["3"], on_refusal=refused.append)
    assert (more.segments, new, len(refused)) == (bundle.segments, {}, 1)


def test_an_output_declared_for_one_batch_takes_the_batch_of_the_input(tmp_path: Path) -> None:
    path = save(
        tmp_path / "m.onnx",
        [node("MatMul", ["x", "w"], ["a"]), node("Relu", ["a"], ["y"])],
        [value("x", FLOAT, ["n", 4])],
        [value("y", FLOAT, [1, 3])],
        [array(np.ones((4, 3), np.float32), "w")],
    )
    bundle, files = build(path, "m", tmp_path / "out", partitions=["0"])
    assert shape_of(bundle, "y") == ("n", 3)
    inputs = [{"x": np.ones((n, 4), np.float32)} for n in (1, 2, 5)]
    assert [o["y"].shape for o in run_partition(bundle, files, ["0"], inputs)] == [(1, 3), (2, 3), (5, 3)]


def unknown_to_inference(path: Path, declared: list[int | str]) -> Path:
    """onnx's inference knows no operator of this domain, so only the model itself tells the output's shape."""
    return save(
        path,
        [node("Neg", ["x"], ["a"]), node("BiasGelu", ["a", "b"], ["y"], domain="com.microsoft")],
        [value("x", FLOAT, ["n", 4])],
        [value("y", FLOAT, declared)],
        [array(np.ones(4, np.float32), "b")],
        domain="com.microsoft",
    )


def test_a_model_with_a_number_among_its_inputs_runs_at_second_sizes(tmp_path: Path) -> None:
    path = save(
        tmp_path / "m.onnx",
        [node("Mul", ["x", "scale"], ["a"]), node("Neg", ["a"], ["y"])],
        [value("x", FLOAT, ["n", 4]), value("scale", FLOAT, [])],
        [value("y", FLOAT, [1, 4])],
    )
    bundle, _ = build(path, "m", tmp_path / "out")
    assert shape_of(bundle, "y") == ("n", 4)
    assert "dry_run" not in bundle.source


def test_a_model_runs_with_an_empty_past(tmp_path: Path) -> None:
    path = save(
        tmp_path / "m.onnx",
        [node("Concat", ["past", "x"], ["a"], axis=2), node("Neg", ["a"], ["y"])],
        [value("past", FLOAT, [1, 12, "p", 64]), value("x", FLOAT, [1, 12, "s", 64])],
        [value("y", FLOAT, [1, 12, "all", 64])],
    )
    bundle, _ = build(path, "m", tmp_path / "out", bind={"past": (1, 12, 0, 64), "x": (1, 12, 1, 64)})
    assert shape_of(bundle, "y") == (1, 12, "all", 64)


def test_a_model_of_many_small_outputs_runs(tmp_path: Path) -> None:
    names = [str(i) for i in range(300)]
    path = save(
        tmp_path / "m.onnx",
        [node("Relu", ["x"], ["a"]), node("Split", ["a"], names, axis=1, num_outputs=300)],
        [value("x", FLOAT, ["n", 300])],
        [value(name, FLOAT, ["n", 1]) for name in names],
        opset=18,
    )
    bundle, _ = build(path, "m", tmp_path / "out")
    assert len(bundle.outputs) == 300


def test_a_declared_size_that_holds_for_every_size_tried_is_kept_and_the_others_are_free(tmp_path: Path) -> None:
    bundle, _ = build(unknown_to_inference(tmp_path / "a.onnx", [1, 4]), "a", tmp_path / "a")
    assert shape_of(bundle, "y") == ("?", 4)
    bundle, _ = build(unknown_to_inference(tmp_path / "b.onnx", ["n", 4]), "b", tmp_path / "b")
    assert shape_of(bundle, "y") == ("n", 4)


def test_a_declared_name_that_does_not_follow_its_input_is_free(tmp_path: Path) -> None:
    path = save(
        tmp_path / "m.onnx",
        [node("Neg", ["x"], ["a"]), node("Concat", ["a", "a"], ["y"], axis=0), node("Neg", ["a"], ["z"])],
        [value("x", FLOAT, ["n", 4])],
        [value("y", FLOAT, ["n", 4]), value("z", FLOAT, ["n", 4])],
    )
    bundle, files = build(path, "m", tmp_path / "out", partitions=["0"])
    assert (shape_of(bundle, "y"), shape_of(bundle, "z")) == (("?", 4), ("n", 4))
    inputs = [{"x": np.ones((3, 4), np.float32)}]
    assert difference(run_whole(path, inputs)[0], run_partition(bundle, files, ["0"], inputs)[0]) == 0


def test_which_of_two_equal_sizes_an_output_follows_is_found(tmp_path: Path) -> None:
    path = save(
        tmp_path / "m.onnx",
        [
            node("Neg", ["x"], ["a"]),
            node("BiasGelu", ["a", "b"], ["g"], domain="com.microsoft"),
            node("Neg", ["g"], ["y"]),
        ],
        [value("x", FLOAT, ["h", "w", 4])],
        [value("y", FLOAT, ["w", "h", 4])],
        [array(np.ones(4, np.float32), "b")],
        domain="com.microsoft",
    )
    bundle, _ = build(path, "m", tmp_path / "out", bind={"x": (8, 8, 4)})
    assert shape_of(bundle, "y") == ("?", "?", 4)


def test_a_size_that_values_decide_is_free_even_where_all_inputs_are_fixed(tmp_path: Path) -> None:
    path = save(
        tmp_path / "m.onnx",
        [node("Relu", ["x"], ["a"]), node("NonZero", ["a"], ["y"])],
        [value("x", FLOAT, [6])],
        [value("y", INT64, [1, 6])],
    )
    bundle, _ = build(path, "m", tmp_path / "out")
    assert shape_of(bundle, "y") == (1, "?")


def test_a_boundary_tensor_that_its_loop_misdeclares_has_free_sizes(tmp_path: Path) -> None:
    body = helper.make_graph(
        [node("Identity", ["c"], ["go"]), node("Neg", ["carried"], ["next"])],
        "body",
        [value("i", INT64, []), value("c", TensorProto.BOOL, []), value("carried", FLOAT, [1, 4])],
        [value("go", TensorProto.BOOL, []), value("next", FLOAT, [1, 4])],
    )
    path = save(
        tmp_path / "m.onnx",
        [node("Loop", ["trips", "", "x"], ["l"], body=body), node("Relu", ["l"], ["y"])],
        [value("x", FLOAT, ["n", 4])],
        [value("y", FLOAT, [1, 4])],
        [array(np.array(3, np.int64), "trips")],
    )
    bundle, files = build(path, "m", tmp_path / "out", partitions=["l"])
    assert bundle.cuts["l"].tensors[0].shape[0] in ("?", "n")
    outputs = run_partition(bundle, files, ["l"], [{"x": -np.ones((3, 4), np.float32)}])
    assert outputs[0]["y"].shape == (3, 4)


def four_rows_only(path: Path) -> Path:
    return save(
        path,
        [node("Neg", ["x"], ["a"]), node("Reshape", ["a", "shape"], ["y"])],
        [value("x", FLOAT, ["n", 8])],
        [value("y", FLOAT, [2, 16])],
        [array(np.array([2, 16], np.int64), "shape")],
    )


def test_a_model_that_runs_at_one_size_only_is_taken_and_the_sizes_tried_are_recorded(tmp_path: Path) -> None:
    bundle, _ = build(four_rows_only(tmp_path / "m.onnx"), "m", tmp_path / "out", bind={"x": (4, 8)})
    (note,) = bundle.source["dry_run"]["notes"]
    assert note.startswith("only the size 4 of n was run; 2: ")
    with pytest.raises(ModelError, match="does not run with inputs made up for it"):
        build(four_rows_only(tmp_path / "m.onnx"), "m", tmp_path / "other")


def test_runs_of_second_sizes_end_when_their_time_is_spent(tmp_path: Path) -> None:
    model = open_model(unknown_to_inference(tmp_path / "m.onnx", [1, 4]))
    weights = weights_file.write(model.initialisers(), tmp_path / weights_file.LOCATION)
    run = DryRun(model, tmp_path, weights.tensors, budget_s=0)
    # What was not tried is promised by nobody.
    assert run.whole(extract(model, weights, None, None))[0] == {}
    assert "the 0 s for such runs were spent" in run.notes[0]
    assert run.partition(partition(model, weights, [cuts(model)[0]])).difference == 0


def test_partitions_run_at_one_size_once_the_time_for_others_is_spent(tmp_path: Path) -> None:
    model = open_model(unknown_to_inference(tmp_path / "m.onnx", ["n", 4]))
    weights = weights_file.write(model.initialisers(), tmp_path / weights_file.LOCATION)
    run = DryRun(model, tmp_path, weights.tensors)
    run.whole(extract(model, weights, None, None))
    run.budget_s = 0
    assert run.partition(partition(model, weights, [cuts(model)[0]])) == (0.0, {})


def counting(path: Path) -> Path:
    """Adds one to x as often as `trips` says."""
    body = helper.make_graph(
        [node("Identity", ["go"], ["again"]), node("Add", ["carried", "one"], ["next"])],
        "body",
        [value("i", INT64, []), value("go", TensorProto.BOOL, []), value("carried", FLOAT, [4])],
        [value("again", TensorProto.BOOL, []), value("next", FLOAT, [4])],
    )
    return save(
        path,
        [node("Neg", ["x"], ["a"]), node("Loop", ["trips", "", "a"], ["l"], body=body), node("Neg", ["l"], ["y"])],
        [value("x", FLOAT, [4]), value("trips", INT64, [])],
        [value("y", FLOAT, [4])],
        [array(np.float32(1), "one")],
    )


FOR_EVER = np.array(2**60, np.int64)


def test_a_run_that_does_not_end_is_ended_and_recorded(tmp_path: Path) -> None:
    model = open_model(counting(tmp_path / "m.onnx"), examples={"trips": np.array(1, np.int64)})
    weights = weights_file.write(model.initialisers(), tmp_path / weights_file.LOCATION)
    endless = replace(model, examples={"trips": FOR_EVER})
    run = DryRun(endless, tmp_path, weights.tensors, run_s=0.1)
    run.whole(extract(model, weights, None, None))
    assert run.notes == ["loaded, not run to its end: a run took longer than 0.1 s"]
    assert run.partition(partition(model, weights, [cuts(model)[0]])) == (0.0, {})


def test_a_model_too_slow_to_run_is_published_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UnpublishedRunner, "run_within", too_slow)
    bundle, _ = build(
        photos_model(tmp_path / "m.onnx"), "m", tmp_path / "out", preprocess=PREPROCESS, postprocess=POSTPROCESS
    )
    assert bundle.source["dry_run"]["notes"] == ["loaded, not run to its end: a run took longer than 600 s"]


def too_slow(*arguments: Any) -> Any:
    raise TimeoutError("a run took longer than 600 s")


def test_the_run_that_tells_shapes_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus_tools.graph.probe.MAX_RUN_S", 0.1)
    with pytest.raises(ModelError, match=r"a run took longer than 0\.1 s"):
        open_model(counting(tmp_path / "m.onnx"), examples={"trips": FOR_EVER})


def shaped_by_values(path: Path) -> Path:
    return save(
        path,
        [node("Reshape", ["data", "x"], ["a"]), node("Neg", ["a"], ["y"])],
        [value("x", INT64, [2])],
        [value("y", FLOAT, ["r", "c"])],
        [array(np.arange(6, dtype=np.float32), "data")],
    )


def test_a_model_that_made_up_inputs_do_not_suit_asks_for_an_example(tmp_path: Path) -> None:
    path = shaped_by_values(tmp_path / "m.onnx")
    with pytest.raises(ModelError) as caught:
        build(path, "m", tmp_path / "out")
    assert "example" in caught.value.hint
    bundle, files = build(path, "m", tmp_path / "given", examples={"x": np.array([2, 3])}, partitions=["0"])
    assert "dry_run" not in bundle.source
    add_cuts(bundle, files[bundle.segment(WHOLE).graph.digest], ["again=a"])


def test_segments_that_compute_something_else_are_refused(tmp_path: Path) -> None:
    one, other = (open_model(small(tmp_path / f"{op}.onnx", op)) for op in ("Relu", "Sigmoid"))
    weights = weights_file.write(one.initialisers(), tmp_path / weights_file.LOCATION)
    run = DryRun(one, tmp_path, weights.tensors)
    run.whole(extract(one, weights, None, None))
    assert run.partition(partition(one, weights, [cuts(one)[0]])).difference == 0
    with pytest.raises(CutError, match="do not compute what the model does: outputs differ by") as caught:
        run.partition(partition(other, weights, [cuts(other)[0]]))
    assert caught.value.facts["difference"] > 0.5


def test_a_model_that_draws_random_numbers_is_not_compared(tmp_path: Path) -> None:
    path = save(
        tmp_path / "m.onnx",
        [node("RandomNormalLike", ["x"], ["r"]), node("Add", ["x", "r"], ["a"]), node("Neg", ["a"], ["y"])],
        [value("x", FLOAT, [1, 4])],
        [value("y", FLOAT, [1, 4])],
    )
    bundle, _ = build(path, "m", tmp_path / "out", partitions=["1"])
    (note,) = bundle.source["dry_run"]["notes"]
    assert note == "two runs with the same input differ, so segments were not compared with the whole model"


def test_sizes_that_follow_from_one_another_are_tried_together(tmp_path: Path) -> None:
    path = save(
        tmp_path / "m.onnx",
        [
            node("Concat", ["past", "x"], ["all"], axis=1),
            node("Neg", ["all"], ["a"]),
            node("BiasGelu", ["a", "b"], ["g"], domain="com.microsoft"),
            node("Mul", ["g", "mask"], ["y"]),
        ],
        [value("past", FLOAT, [1, "p", 4]), value("x", FLOAT, [1, "s", 4]), value("mask", FLOAT, [1, "t", 1])],
        [value("y", FLOAT, [1, "t", 4])],
        [array(np.ones(4, np.float32), "b")],
        domain="com.microsoft",
    )
    bind = {"past": (1, 3, 4), "x": (1, 2, 4), "mask": (1, 5, 1)}
    bundle, _ = build(path, "m", tmp_path / "out", partitions=["1"], bind=bind)
    assert "dry_run" not in bundle.source
    assert shape_of(bundle, "y")[1:] in (("t", 4), ("?", 4))


def test_a_model_whose_cuts_are_all_refused_is_left_whole_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus_tools.graph.dry_run.WRONG", -1.0)
    bundle, _ = build(small(tmp_path / "m.onnx"), "m", tmp_path / "out")
    assert bundle.default_cuts == ()
    assert bundle.source["dry_run"]["notes"][0].startswith("left whole: the segments at the cut 0")


def changed(step: Mapping[str, Any]) -> dict[str, Any]:
    steps = [*(s for s in PREPROCESS["steps"] if s["op"] != step["op"]), step]
    order = ("blur", "resize", "center_crop", "normalize", "layout")
    return {**PREPROCESS, "steps": sorted(steps, key=lambda s: order.index(s["op"]))}


@pytest.mark.parametrize(
    ("processing", "reason"),
    [
        ({"preprocess": changed({"op": "blur", "size": 3})}, "preprocess step is 'blur'"),
        ({"preprocess": {**PREPROCESS, "colour": "BGR"}}, "unknown keys: colour"),
        ({"preprocess": {**PREPROCESS, "input": "pixels"}}, "makes the input 'pixels'; the model takes x"),
        ({"preprocess": {**PREPROCESS, "dtype": "float16"}}, r"preprocess does not fit .*x: float16 \[1, 3, 8, 8\]"),
        ({"preprocess": changed({"op": "center_crop", "size": [6, 6]})}, r"float32\[1, 3, 6, 6\]; the model takes"),
        ({"preprocess": changed({"op": "layout", "to": "NHWC"})}, r"float32\[1, 8, 8, 3\]; the model takes"),
        ({"preprocess": ["resize"]}, "preprocess is not an object"),
        ({"preprocess": changed({"op": "center_crop", "size": [60000, 60000]})}, "3600000000 pixels of any picture"),
        ({"preprocess": changed({"op": "normalize", "mean": [10**400] * 3, "std": [1] * 3})}, "normalize mean is"),
        ({"preprocess": changed({"op": "normalize", "mean": [0] * 3, "std": [1e-44] * 3})}, "are not finite"),
        ({"postprocess": {**POSTPROCESS, "kind": "detect"}}, "postprocess kind is 'detect'"),
        ({"postprocess": {**POSTPROCESS, "threshold": 1}}, "postprocess has the keys"),
        ({"postprocess": {**POSTPROCESS, "output": "probs"}}, "reads the output 'probs'; the model gives logits"),
        (
            {"postprocess": {**POSTPROCESS, "labels": {"digest": "sha256:1", "size": 2}}},
            "postprocess labels is neither",
        ),
        ({"postprocess": {**POSTPROCESS, "labels": {"digest": 3, "size": 2}}}, "postprocess labels is neither"),
        ({"postprocess": ["classify"]}, "postprocess has the keys list"),
        ({"postprocess": POSTPROCESS, "labels": LABELS[:2]}, "has 5 classes and there are 2 labels"),
        ({"postprocess": POSTPROCESS, "labels": [*LABELS, "fox"]}, "has 5 classes and there are 6 labels"),
        ({"postprocess": POSTPROCESS, "labels": []}, "the labels are not a list of at least one class name"),
    ],
)
def test_processing_that_does_not_fit_the_model_is_refused(
    tmp_path: Path, processing: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ModelError, match=reason):
        build(photos_model(tmp_path / "m.onnx"), "m", tmp_path / "out", **processing)


def test_an_output_that_is_no_table_of_classes_is_refused(tmp_path: Path) -> None:
    path = save(
        tmp_path / "m.onnx",
        [node("Neg", ["x"], ["logits"])],
        [value("x", FLOAT, [1, 3, 8, 8])],
        [value("logits", FLOAT, [1, 3, 8, 8])],
    )
    with pytest.raises(ModelError, match="no table of logits"):
        build(path, "m", tmp_path / "out", preprocess=PREPROCESS, postprocess=POSTPROCESS)


def test_a_photo_for_a_model_of_two_inputs_is_refused(tmp_path: Path) -> None:
    path = save(
        tmp_path / "m.onnx",
        [node("Mul", ["x", "scale"], ["y"])],
        [value("x", FLOAT, [1, 3, 8, 8]), value("scale", FLOAT, [1])],
        [value("y", FLOAT, [1, 3, 8, 8])],
    )
    with pytest.raises(ModelError, match="preprocess makes x of a photo, and nothing makes scale"):
        build(path, "m", tmp_path / "out", preprocess=PREPROCESS)


def test_labels_may_be_left_out_of_the_postprocess(tmp_path: Path) -> None:
    bundle, _ = build(photos_model(tmp_path / "m.onnx"), "m", tmp_path / "out", postprocess=POSTPROCESS)
    assert bundle.postprocess == {**POSTPROCESS, "labels": None}


@pytest.fixture(scope="module", params=["QInt8", "QUInt8"])
def quantised(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An int8 model as onnxruntime's own quantiser makes it: every operator between Q/DQ pairs.

    Weights have 7 bits: with 8, sums saturate on a CPU without VNNI, in other places for a segment than for the whole.
    """
    from onnxruntime import quantization

    folder = tmp_path_factory.mktemp("quantised")
    photos_model(folder / "photos.onnx")
    rng = np.random.default_rng(0)
    inputs = iter([{"x": rng.random((1, 3, 8, 8)).astype(np.float32)} for _ in range(4)])

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> Any:
            return next(inputs, None)

    quantization.quantize_static(
        str(folder / "photos.onnx"),
        str(folder / "q.onnx"),
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        activation_type=quantization.QuantType[request.param],
        reduce_range=True,
    )
    return folder / "q.onnx"


def test_an_int8_model_computes_what_its_file_does_and_cuts_after_quantise_are_exact(
    quantised: Path, tmp_path: Path
) -> None:
    model = open_model(quantised)
    fused = {v.name for v in within_quantised_operators(model)}
    clean = [c.name for c in cuts(model) if not fused & {t.name for t in c.tensors}]
    assert clean
    bundle, files = build(model, "q", tmp_path / "out", partitions=clean)
    assert {t.dtype for c in bundle.cuts.values() for t in c.tensors} <= {"uint8", "float32"}
    inputs = [{"x": np.random.default_rng(s).normal(0, 1, (1, 3, 8, 8)).astype(np.float32)} for s in range(3)]
    expected = run_whole(quantised, inputs)
    for cut in ([], *([name] for name in clean)):
        for whole, split in zip(expected, run_partition(bundle, files, cut, inputs), strict=True):
            assert difference(whole, split) < 1e-5


def test_values_between_dequantise_and_quantise_are_known(quantised: Path) -> None:
    model = open_model(quantised)
    fused = {str(v.name) for v in within_quantised_operators(model)}
    assert {"c0", "a5", "p6"} & set(model.values) <= fused
    assert not any(name.endswith("_QuantizeLinear_Output") for name in fused)


def test_cuts_that_part_a_fused_operator_are_marked_in_the_list(quantised: Path) -> None:
    listed = json.loads(CliRunner().invoke(app, ["cuts", str(quantised), "--json"]).stdout)["cuts"]
    marks = {(c["op"], c["fused"]) for c in listed if len(c["tensors"]) == 1}
    assert {("QuantizeLinear", False), ("DequantizeLinear", True), ("Conv", True)} <= marks
    assert ("QuantizeLinear", True) not in marks


def test_the_default_cut_of_an_int8_model_is_exact(quantised: Path, tmp_path: Path) -> None:
    bundle, files = build(quantised, "q", tmp_path / "out")
    inputs = [{"x": np.random.default_rng(s).random((1, 3, 8, 8), np.float32)} for s in range(3)]
    splits = run_partition(bundle, files, list(bundle.default_cuts), inputs)
    for whole, split in zip(run_whole(quantised, inputs), splits, strict=True):
        assert difference(whole, split) < 1e-4


def test_a_cut_that_differs_from_the_whole_is_recorded_and_stated(quantised: Path, tmp_path: Path) -> None:
    inputs = {"x": np.random.default_rng(5).random((1, 3, 8, 8), np.float32)}
    model = open_model(quantised, examples=inputs)
    every = [c.name for c in cuts(model)]
    bundle, files = build(model, "q", tmp_path / "out", partitions=every)
    whole = run_partition(bundle, files, [], [inputs])[0]
    found = {name: difference(whole, run_partition(bundle, files, [name], [inputs])[0]) for name in every}
    stated = bundle.source.get("dry_run", {}).get("differences", {})
    assert {name for name, d in found.items() if d > 1e-4} <= stated.keys()
    assert all(stated[name] >= 0.2 * d for name, d in found.items() if name in stated)
    fused = {v.name for v in within_quantised_operators(model)}
    parted = {c for c, cut in bundle.cuts.items() if fused & {t.name for t in cut.tensors}}
    noted = {note.split()[2] for note in bundle.source["dry_run"]["notes"] if note.startswith("the cut ")}
    assert parted == noted | (stated.keys() & parted)


def test_the_command_states_a_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "x.npy", np.ones((1, 4), np.float32))
    monkeypatch.setattr(DryRun, "tolerance", -1.0)
    path, registry = small(tmp_path / "m.onnx"), str(tmp_path / "registry")
    ran = CliRunner().invoke(app, ["import", str(path), "--registry", registry])
    assert "warning: at the cut 0 predictions differ from the whole model's by up to 0 of" in ran.stderr
    ran = CliRunner().invoke(app, ["cut", "m", "--cut", "again=a", "--registry", registry, "--json"])
    (warning,) = json.loads(ran.stdout)["warnings"]
    assert warning.startswith("at the cut again predictions differ")


def test_four_bit_weights_give_the_same_in_a_head_and_in_the_whole(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    path = save(
        tmp_path / "m.onnx",
        [
            node("DequantizeLinear", ["w4", "s"], ["w"]),
            node("MatMul", ["x", "w"], ["a"]),
            node("Relu", ["a"], ["r"]),
            node("MatMul", ["r", "b"], ["y"]),
        ],
        [value("x", FLOAT, [1, 16])],
        [value("y", FLOAT, [1, 5])],
        [
            helper.make_tensor("w4", TensorProto.INT4, [16, 512], rng.integers(-8, 8, 8192).astype(np.int8).tolist()),
            array(np.float32(0.1), "s"),
            array(rng.standard_normal((512, 5)).astype(np.float32), "b"),
        ],
        opset=21,
        ir_version=10,
    )
    bundle, files = build(path, "m", tmp_path / "out")
    inputs = [{"x": 2 * rng.standard_normal((1, 16)).astype(np.float32)}]
    cut = list(bundle.default_cuts)
    whole, split = (run_partition(bundle, files, at, inputs)[0] for at in ([], cut))
    assert difference(whole, split) < 1e-6


@pytest.mark.parametrize(
    ("option", "content", "said"),
    [
        ("preprocess", b"[" * 100_000, "cannot be read as JSON: maximum recursion"),
        ("postprocess", b'{"a":' * 100_000, "cannot be read as JSON: maximum recursion"),
        ("labels", b"[" * 100_000, "cannot be read as JSON: maximum recursion"),
        ("labels", b'{"0": "ape"}', "is not a JSON list of class names"),
        ("labels", b'[["ape"], "bee"]', "is not a JSON list of class names"),
        ("labels", b'["ape", null]', "is not a JSON list of class names"),
        ("labels", b"\xff", "cannot be read: 'utf-8' codec"),
    ],
)
def test_documents_that_cannot_be_meant_are_refused(option: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "given").write_bytes(content)
    where = [str(small(tmp_path / "m.onnx")), "--registry", str(tmp_path / "registry")]
    result = CliRunner().invoke(app, ["import", *where, f"--{option}", str(tmp_path / "given")])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {tmp_path / 'given'} {said}")
    assert not (tmp_path / "registry").exists()


@pytest.mark.parametrize(
    "text", ["\ufeff" + "\n".join(LABELS), "\r\n".join([*LABELS, ""]), "\ufeff" + json.dumps(LABELS)]
)
def test_labels_are_read_as_editors_write_them(text: str, tmp_path: Path) -> None:
    (tmp_path / "labels").write_bytes(text.encode())
    assert read_labels(tmp_path / "labels") == LABELS
