"""Compression: variants keep the head's tensors, are measured, published and served; what cannot be is refused."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper, numpy_helper

from isthmus.artifacts.bundle import Segment, SegmentVariant
from isthmus.artifacts.constraints import Blob
from isthmus.artifacts.fidelity import Measure
from isthmus.artifacts.segment_id import SegmentId
from isthmus.errors import CalibrationError, ModelError, RequestMalformed
from isthmus.registry import FolderStore, Registry
from isthmus.runtime.ort_runner import OrtRunner
from isthmus.serving import create_segment_app
from isthmus.wire import frame as frames
from isthmus_tools.calibration.inputs import CalibrationInput
from isthmus_tools.graph.channel_edits import EditableGraph, LayerGeometry, LayerWeights
from isthmus_tools.graph.hard_swish import fuse_hard_swishes
from isthmus_tools.graph.quantise import saturates
from isthmus_tools.graph.torch_graph import TorchGraph
from isthmus_tools.graph.variant_graphs import standalone
from isthmus_tools.learning.compression.choice import THE_SEGMENT, choose_variant, dominated_by, parse_target
from isthmus_tools.learning.compression.distillation import Distillation, HeadFigures, distil, training_part
from isthmus_tools.learning.compression.measurement import PlainFigures
from isthmus_tools.learning.compression.pruning import ChannelPruner, sampled
from isthmus_tools.learning.compression.repair import GramSums, ReadingLayer, eliminate, refit
from isthmus_tools.learning.compression.subject import HeadSubject, head_boundary, store_samples
from support.bundles import Published, cache_of, framed, publish, save, segment_settings, value, weight
from support.cli import document, isthmus, refusal
from support.executors import executor_of
from support.redundant_networks import CUT, publish_redundant, write_inputs
from support.segments import run_whole

INT8 = f"..{CUT}~int8"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return publish_redundant(tmp_path_factory.mktemp("network"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def compressed(original: Published, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Published, Any]:
    """A copy of the registry in which the head has every variant that applies, and what the command printed."""
    folder = tmp_path_factory.mktemp("compressed") / "registry"
    shutil.copytree(original.folder, folder)
    printed = document(compress(folder, data, "--dominated"))
    registry = Registry(FolderStore(folder))
    version = registry.resolve("network")
    published = replace(
        original,
        folder=folder,
        registry=registry,
        bundle=version.bundle,
        version=version.version,
        digest=version.digest,
    )
    return published, printed


@pytest.fixture(scope="module")
def subject(original: Published, tmp_path_factory: pytest.TempPathFactory) -> HeadSubject:
    return subject_of(original, CUT, (1, 3, 12, 12), tmp_path_factory.mktemp("subject"))


def subject_of(published: Published, cut: str, shape: tuple[int, ...], folder: Path, count: int = 40) -> HeadSubject:
    arrays = np.random.default_rng(4).standard_normal((count, *shape)).astype(np.float32)
    samples = store_samples((CalibrationInput("file", {"x": each}) for each in arrays), folder)
    segment, tail = head_boundary(published.bundle, cut)
    with cache_of(published, folder / "cache").locate(published.digest, segment.id) as located:
        graph = standalone(located.path, folder / "segment.onnx")
    executor = executor_of(published, folder / "cache")
    return HeadSubject(executor, segment, tail, graph, samples, Measure("top1", "scores"))


def subject_node(subject: HeadSubject, output: str) -> str:
    """The name of the node that computes a value."""
    nodes = EditableGraph(subject.graph).model.graph
    return next(str(node.name) for node in nodes if node.outputs[0].name == output)


def compress(registry: Path, data: Path, *options: object) -> Any:
    return isthmus(
        *("compress", "network", "--data", data, "--registry", registry, "--classes", "scores", "--inputs", 64),
        *("--json", *options),
    )


def variant(
    name: str, seconds: float = 0.01, size: int = 1000, agreement: float = 1.0, ratio: float = 0.5
) -> SegmentVariant:
    segment = Segment(SegmentId("", CUT, name), Blob("sha256:" + "0" * 64, size), (), (), ())
    return SegmentVariant(segment, "test", agreement, 100, seconds_ratio=ratio, seconds=seconds)


def test_a_variant_is_published_with_its_figures_and_passes_verification(compressed: tuple[Published, Any]) -> None:
    published, printed = compressed
    row = next(each for each in printed["variants"] if each["name"] == "int8")
    stored = next(each for each in published.bundle.variants if each.name == "int8")
    assert row["published"]
    assert stored.segment.weights == ()
    assert (stored.agreement, stored.inputs) == (row["agreement"], 32)
    assert stored.low <= stored.agreement <= stored.high
    assert 0 < stored.error < 0.1
    assert stored.memory_bytes > stored.segment.graph.size
    assert stored.seconds > 0
    assert isthmus("verify", "network", "--registry", published.folder).exit_code == 0
    assert (
        INT8
        in document(isthmus("diff", "network:1", "network:2", "--registry", published.folder, "--json"))["segments"][
            "added"
        ]
    )


def test_a_function_serves_a_variant_as_its_own_graph_computes(
    compressed: tuple[Published, Any], tmp_path: Path
) -> None:
    published, _ = compressed
    with create_segment_app(segment_settings(published, tmp_path / "cache")).test_client() as client:
        reply = client.post("/", data=framed(published, INT8))
        plain = client.post("/", data=framed(published, f"..{CUT}"))
    assert reply.status_code == 200, reply.get_data(as_text=True)
    segment = published.bundle.segment(INT8)
    graph = published.registry.blob(segment.graph)
    own = OrtRunner(graph, segment, providers=("CPUExecutionProvider",), threads=1).run(published.inputs)
    served = frames.decode(reply.data, max_bytes=2**20).tensors
    assert {n: a.tobytes() for n, a in served.items()} == {n: a.tobytes() for n, a in own.items()}
    boundary = frames.decode(plain.data, max_bytes=2**20).tensors
    assert {n: a.shape for n, a in served.items()} == {n: a.shape for n, a in boundary.items()}
    assert any(served[n].tobytes() != boundary[n].tobytes() for n in served)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "zip"], "'zip' is no method of compression"),
        (["--target", "fast"], "'fast' is no target"),
        (["--target", "5"], "'5' is no target"),
        (["--keep", "1.5"], "between 5% and 100%"),
        (["--method", "weights-int8"], "no linear layers"),
        (["--cut", CUT, "--whole"], "--whole compresses the whole model"),
        (["--inputs", "16", "--method", "int8", "--target", "1B"], "no variant meets 1B; nearest is int8"),
    ],
)
def test_what_cannot_be_is_refused_with_its_reason(
    original: Published, data: Path, options: list[str], message: str
) -> None:
    assert message in refusal(compress(original.folder, data, *options))["error"]


def test_inputs_that_are_not_finite_are_refused_by_the_name_of_their_file(original: Published, tmp_path: Path) -> None:
    folder = write_inputs(tmp_path / "data")
    broken = np.full((8, 1, 3, 12, 12), np.nan, np.float32)
    for file in folder.iterdir():
        np.savez(file, x=broken)
    error = refusal(compress(original.folder, folder))
    assert "holds NaN or infinite values in x" in error["error"]
    assert error["facts"]["file"].endswith(".npz")


def test_too_few_inputs_are_refused(original: Published, tmp_path: Path) -> None:
    folder = write_inputs(tmp_path / "data", files=2, rows=3)
    assert "3 inputs to calibrate with; 8 are the least" in refusal(compress(original.folder, folder))["error"]


def test_a_target_that_the_head_itself_meets_publishes_nothing_slower_and_larger(
    original: Published, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whether it is slower depends on the machine.
    module = sys.modules["isthmus_tools.usecases.compress"]
    monkeypatch.setattr(module, "dominated_by", lambda *_: THE_SEGMENT)
    options = ("--inputs", "16", "--method", "int8", "--target", "1s", "--json")
    told = document(compress(original.folder, data, *options))
    assert (told["version"], [each["published"] for each in told["variants"]]) == ("", [False])


def test_targets_choose_the_fastest_that_agrees_or_the_one_that_agrees_most_in_time() -> None:
    exact, quick = variant("exact", 0.008, 3000, 0.995), variant("quick", 0.002, 1000, 0.90)
    assert choose_variant([exact, quick], [parse_target("99%")]) is exact
    assert choose_variant([exact, quick], [parse_target("10ms")]) is exact
    assert choose_variant([exact, quick], [parse_target("5ms")]) is quick
    assert choose_variant([exact, quick], [parse_target("1kB"), parse_target("80%")]) is quick
    with pytest.raises(CalibrationError, match="no variant meets 5ms, 99%; nearest is exact"):
        choose_variant([exact, quick], [parse_target("5ms"), parse_target("99%")])


@pytest.mark.parametrize("text", ["0%", "101%", "0ms", "-1MB", "", "fast", "2"])
def test_a_target_is_a_time_a_size_or_a_share(text: str) -> None:
    with pytest.raises(RequestMalformed):
        parse_target(text)


def test_a_variant_that_another_or_the_segment_beats_in_everything_is_dominated() -> None:
    plain = PlainFigures(2000, 0.01, 0)
    best, worse = variant("best", size=900), variant("worse", agreement=0.9, size=1000)
    assert dominated_by(worse, [best, worse], plain) == "best"
    assert dominated_by(best, [best, worse], plain) == ""
    assert dominated_by(variant("other", size=910), [best], plain) == ""
    assert dominated_by(variant("slow", ratio=1.1, size=2000), [], plain) == "the segment itself"
    assert dominated_by(variant("slow", ratio=1.1, size=1000), [], plain) == ""
    assert dominated_by(variant("other", agreement=0.4, size=100), [], plain) == "the segment itself in agreement"


def test_sums_of_products_saturate_on_x86_without_vnni(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    cpuinfo.write_text("flags : avx2 avx512f")
    assert saturates(cpuinfo)
    cpuinfo.write_text("flags : avx2 avx512f avx512_vnni")
    assert not saturates(cpuinfo)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert not saturates(cpuinfo)


def test_repair_is_the_least_squares_fit_of_numpy() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((200, 12)), rng.standard_normal((200, 5))
    start, ridge = rng.standard_normal((12, 5)), 0.3
    sums = GramSums.empty(12, 5)
    for rows in (slice(0, 70), slice(70, 200)):
        sums.add(x[rows], y[rows])
    # min |xW - y|² + λ|W - W₀|² as one system of more rows.
    root = np.sqrt(ridge * np.square(x).sum() / 12)
    oracle = np.linalg.lstsq(np.vstack([x, root * np.eye(12)]), np.vstack([y, root * start]), rcond=None)[0]
    np.testing.assert_allclose(refit(sums, start, ridge), oracle, atol=1e-10)
    assert sums.loss(oracle) == pytest.approx(float(np.square(x @ oracle - y).sum()))


def test_the_loss_of_removed_channels_is_that_of_the_best_fit_of_the_others() -> None:
    rng = np.random.default_rng(1)
    # Two features a channel, and a constant one for the bias.
    x = np.hstack([rng.standard_normal((400, 20)) @ rng.standard_normal((20, 20)), np.ones((400, 1))])
    weights = rng.standard_normal((20, 3))
    y = x[:, :20] @ weights + 2
    sums = GramSums.empty(21, 3)
    sums.add(x, y)
    removed = eliminate([ReadingLayer(weights, 2, sums)], channels=10, least=4)
    rows = [2 * c + i for c in range(10) if c not in removed.order for i in (0, 1)]
    fitted = x[:, [*rows, 20]] @ np.linalg.lstsq(x[:, [*rows, 20]], y, rcond=None)[0]
    assert removed.losses[-1] == pytest.approx(float(np.square(fitted - y).sum()) / sums.variance, rel=0.02)
    assert sorted(removed.losses) == list(removed.losses)


def test_channels_that_repeat_others_go_without_a_loss_and_without_repair_they_are_missed(
    subject: HeadSubject, tmp_path: Path
) -> None:
    pruner = ChannelPruner(subject)
    (group,) = pruner.groups
    assert (group.channels, group.producers) == (32, (subject_node(subject, "c2"),))
    with_repair = pruner.prune(0.65, tmp_path / "repaired.onnx")
    without = pruner.prune(0.65, tmp_path / "cut.onnx", repair=False)
    assert (with_repair.kept, with_repair.channels) == (16, 32)
    assert with_repair.path.stat().st_size < subject.graph.stat().st_size
    inputs = {"x": np.random.default_rng(5).standard_normal((1, 3, 12, 12)).astype(np.float32)}
    whole, repaired, cut = (
        subject.runner(path).run(inputs) for path in (subject.graph, with_repair.path, without.path)
    )
    assert {n: (a.shape, a.dtype) for n, a in whole.items()} == {n: (a.shape, a.dtype) for n, a in repaired.items()}
    np.testing.assert_allclose(repaired["a6"], whole["a6"], atol=1e-3)
    assert np.abs(cut["a6"] - whole["a6"]).max() > 0.05


def test_less_work_than_pruning_can_leave_is_refused(subject: HeadSubject, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"pruning leaves .* of the work at least, and 10% is asked for"):
        ChannelPruner(subject).prune(0.1, tmp_path / "small.onnx")


def test_a_head_without_channels_between_two_layers_is_refused(original: Published, data: Path, tmp_path: Path) -> None:
    weights = [weight("w", 32, 32)]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Relu", ["m"], ["y"])]
    model = save(tmp_path / "plain.onnx", nodes, [value("x", 1, 32)], [value("y", 1, 32)], weights)
    publish(tmp_path, model, {})
    folder = tmp_path / "inputs"
    folder.mkdir()
    for index in range(2):
        np.savez(folder / f"{index}.npz", x=np.random.default_rng(index).standard_normal((10, 1, 32)).astype("f4"))
    options = ("--data", folder, "--registry", tmp_path / "registry", "--whole", "--json")
    refused = refusal(isthmus("compress", "plain", "--method", "prune", *options))["error"]
    assert "no channels of .. can be removed" in refused
    made = document(isthmus("compress", "plain", "--method", "weights-int8", "--dominated", *options))
    assert made["variants"][0]["method"].startswith("weights of 1 linear layers in int8")
    assert made["variants"][0]["error"] < 0.02


@pytest.mark.parametrize(
    ("geometry", "shape"),
    [((3, 3, 1, 1, 1), (9, 7)), ((3, 3, 2, 0, 1), (9, 7)), ((1, 1, 1, 0, 1), (5, 5)), ((3, 3, 1, 2, 2), (8, 8))],
)
def test_sampled_features_times_the_weights_are_what_the_convolution_gives(
    geometry: tuple[int, ...], shape: tuple[int, int], tmp_path: Path
) -> None:
    height, width, stride, pad, dilation = geometry
    rng = np.random.default_rng(3)
    kernel, bias = rng.standard_normal((5, 4, height, width)), rng.standard_normal(5)
    source = rng.standard_normal((2, 4, *shape)).astype(np.float32)
    attributes = {"strides": [stride] * 2, "pads": [pad] * 4, "dilations": [dilation] * 2}
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], **attributes)
    weights = [numpy_helper.from_array(a.astype(np.float32), n) for n, a in (("w", kernel), ("b", bias))]
    ends = [value("x", 2, 4, *shape)], [value("y", 2, 5, "h", "v")]
    target = run_whole(save(tmp_path / "conv.onnx", [node], *ends, weights), [{"x": source}])[0]["y"]
    layer = LayerWeights(
        kernel.reshape(5, -1).T,
        bias,
        height * width,
        LayerGeometry((height, width), (stride,) * 2, (pad,) * 2, (dilation,) * 2),
    )
    x, y = sampled(source, target, layer, 10_000, (0, 0))
    assert len(x) == 2 * np.prod(target.shape[2:])
    np.testing.assert_allclose(x @ np.vstack([layer.matrix, bias]), y, atol=1e-4)


def test_hard_swishes_with_their_scales_become_two_operators_that_compute_the_same(tmp_path: Path) -> None:
    constants = {"three": 3.0, "six": 6.0, "zero": 0.0, "a": 1.7, "b": -0.4, "s": 0.6, "t": 0.3}
    numbers = [
        numpy_helper.from_array(np.array([n] if len(name) == 1 else n, "f4"), name) for name, n in constants.items()
    ]
    chain = [
        ("Conv", ["x", "w"], "c"),
        ("Mul", ["a", "c"], "m"),
        ("Add", ["m", "b"], "u"),
        ("Add", ["u", "three"], "v"),
        ("Clip", ["v", "zero", "six"], "k"),
        ("Mul", ["u", "k"], "p"),
        ("Div", ["p", "six"], "q"),
        ("Mul", ["s", "q"], "r"),
        ("Add", ["r", "t"], "y"),
    ]
    nodes = [helper.make_node(kind, inputs, [output], name=f"node_{output}") for kind, inputs, output in chain]
    ends = [value("x", 1, 3, 6, 6)], [value("y", 1, 4, 6, 6)]
    path = save(tmp_path / "swish.onnx", nodes, *ends, [*numbers, weight("w", 4, 3, 1, 1)])
    inputs = [{"x": 4 * np.random.default_rng(8).standard_normal((1, 3, 6, 6)).astype(np.float32)}]
    before = run_whole(path, inputs)[0]["y"]
    assert fuse_hard_swishes(path) == 1
    assert [node.op_type for node in EditableGraph(path).model.graph] == ["Conv", "HardSigmoid", "Mul", "Add"]
    np.testing.assert_allclose(run_whole(path, inputs)[0]["y"], before, atol=1e-5)
    assert fuse_hard_swishes(path) == 0


def test_a_gate_loses_its_channels_with_those_that_it_scales(tmp_path: Path) -> None:
    def conv(number: int, source: str, output: str) -> Any:
        return helper.make_node("Conv", [source, f"w{number}"], [output])

    nodes = [
        conv(0, "x", "c"),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        conv(1, "p", "s"),
        helper.make_node("Relu", ["s"], ["t"]),
        conv(2, "t", "u"),
        helper.make_node("Sigmoid", ["u"], ["g"]),
        helper.make_node("Mul", ["r", "g"], ["m"]),
        conv(3, "m", "y"),
    ]
    shapes = {"w0": (32, 4, 1, 1), "w1": (16, 32, 1, 1), "w2": (32, 16, 1, 1), "w3": (4, 32, 1, 1)}
    weights = [weight(name, *shape) for name, shape in shapes.items()]
    model = save(tmp_path / "gated.onnx", nodes, [value("x", 1, 4, 6, 6)], [value("y", 1, 4, 6, 6)], weights)
    folder = tmp_path / "subject"
    folder.mkdir()
    subject = subject_of(publish(tmp_path, model, {}), "", (1, 4, 6, 6), folder)
    pruner = ChannelPruner(subject)
    assert [(group.channels, len(group.producers)) for group in pruner.groups] == [(32, 2), (16, 1)]
    repaired = pruner.prune(0.7, tmp_path / "repaired.onnx")
    cut = pruner.prune(0.7, tmp_path / "cut.onnx", repair=False)
    assert repaired.kept < 48
    inputs = {"x": np.random.default_rng(7).standard_normal((1, 4, 6, 6)).astype(np.float32)}
    whole, near, far = (subject.runner(path).run(inputs)["y"] for path in (subject.graph, repaired.path, cut.path))
    assert np.square(near - whole).sum() < 0.8 * np.square(far - whole).sum()


def test_distillation_lowers_the_error_at_the_cut_on_inputs_that_it_has_not_seen(
    original: Published, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    many = subject_of(original, CUT, (1, 3, 12, 12), tmp_path, count=240)
    pruned = ChannelPruner(training_part(many)).prune(0.45, tmp_path / "pruned.onnx")
    result = distil(many, pruned.path, tmp_path / "distilled.onnx", steps=20)
    again = distil(many, pruned.path, tmp_path / "again.onnx", steps=20)
    unseen = np.random.default_rng(6).standard_normal((40, 1, 3, 12, 12)).astype(np.float32)
    graphs = (many.graph, pruned.path, result.path)
    whole, before, after = (np.stack([many.runner(p).run({"x": x})["a6"] for x in unseen]) for p in graphs)
    assert result.gains
    assert np.square(after - whole).sum() < 0.9 * np.square(before - whole).sum()
    assert again.path.read_bytes() == result.path.read_bytes()
    assert distil(many, pruned.path, tmp_path / "hurried.onnx", steps=10**6, cpu_s=1e-3).steps <= 1


def test_a_distilled_head_that_gains_nothing_is_no_variant_and_its_figures_are_told(
    original: Published, data: Path
) -> None:
    pytest.importorskip("torch")
    # Half of the channels only repeat others: least squares leave nothing to train.
    error = refusal(compress(original.folder, data, "--method", "distil", "--keep", "0.7"))["error"]
    assert "prune-70-distilled: distillation gained nothing: on 6 inputs that did not train error" in error
    assert error.count("agreement 100.0%") == 2


@pytest.mark.parametrize(
    ("steps", "error", "same", "gains"), [(9, 0.1, 8, True), (0, 0.2, 8, False), (9, 0.3, 9, False), (9, 0.1, 7, False)]
)
def test_a_gain_is_worse_in_neither_error_nor_agreement(steps: int, error: float, same: int, gains: bool) -> None:
    result = Distillation(Path("distilled.onnx"), steps, HeadFigures(0.2, 8, 10), HeadFigures(error, same, 10))
    assert result.gains == gains


def test_operators_that_distillation_does_not_know_are_named(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    nodes = [helper.make_node("Softmax", ["x"], ["s"]), helper.make_node("Sin", ["s"], ["y"])]
    model = save(tmp_path / "odd.onnx", nodes, [value("x", 1, 4)], [value("y", 1, 4)], [])
    with pytest.raises(ModelError, match="does not know the operators Sin, Softmax"):
        TorchGraph(EditableGraph(model).model)
