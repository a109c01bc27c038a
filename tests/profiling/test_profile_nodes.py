"""Times of the runtime's kernels become times of the model's nodes, whatever it fused, renamed or laid out anew."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import pytest

from isthmus.artifacts.segment_id import WHOLE
from isthmus.errors import ModelError
from isthmus.runtime.kernel_profile import KernelProfile, OrtObserver, midmean, read_trace
from isthmus_tools.graph import Model, build, cuts, open_model
from isthmus_tools.graph.load import OptimisedNode, read_optimised
from isthmus_tools.profiling.cuts import spread_cuts
from isthmus_tools.profiling.nodes import node_seconds
from support.models import REAL

RUNS = 9  # of each kernel, the two longest times but the first do not count: the machine may pause in one
MODELS = ["efficientnet-lite0", "ocr-detector", "minilm", "silero", "silero-in-if"]


@cache
def observed(name: str) -> tuple[Model, KernelProfile]:
    """A real model as its bundle holds it, and what onnxruntime says of RUNS runs of it."""
    real = REAL[name]
    with tempfile.TemporaryDirectory() as folder:
        bundle, files = build(str(real.path()), name, folder, **real.open_arguments())
        whole = bundle.segment(WHOLE)
        given = real.inputs()[0]
        inputs = {spec.name: given[spec.name] for spec in whole.inputs}
        scratch = Path(folder, "scratch")
        scratch.mkdir()
        observer = OrtObserver(
            files[whole.graph.digest], whole, providers=("CPUExecutionProvider",), threads=1, folder=scratch
        )
        for _ in range(RUNS):
            observer.run(inputs)
        seen = observer.finish(RUNS, 0)
        return open_model(files[whole.graph.digest], examples=inputs, normalise=False), seen


@pytest.mark.parametrize("name", MODELS)
def test_the_nodes_take_exactly_what_the_model_takes(name: str) -> None:
    model, seen = observed(name)
    kernels = {k.name: k.seconds for k in seen.kernels}
    found = node_seconds(model, read_optimised(seen.graph), kernels, 0.125)
    assert len(found) == len(model.nodes)
    assert sum(found) == pytest.approx(0.125)
    assert all(s >= 0 for s in found)
    assert all(s == 0 for s, dynamic in zip(found, model.dynamic, strict=True) if not dynamic)


def test_the_convolutions_of_a_convolutional_net_take_most_of_its_time() -> None:
    # onnxruntime fuses them with what follows, and lays nearly all of them out in blocks of channels.
    model, seen = observed("efficientnet-lite0")
    found = node_seconds(model, read_optimised(seen.graph), {k.name: k.seconds for k in seen.kernels}, 1.0)
    share = sum(s for s, node in zip(found, model.nodes, strict=True) if node.op_type == "Conv")
    assert share > 0.6


def test_the_bodies_of_an_if_are_in_the_time_of_the_if() -> None:
    _, seen = observed("silero-in-if")
    assert {k.name for k in seen.kernels} <= {node.name for node in read_optimised(seen.graph)}


def test_the_arena_of_the_runtime_tells_the_memory() -> None:
    _, seen = observed("efficientnet-lite0")
    # Its widest tensors are 96 channels of 112 x 112 and the 16 that they are made of.
    assert seen.memory.activation_bytes >= (96 + 16) * 112 * 112 * 4
    assert seen.memory.arena_bytes >= seen.memory.packed_bytes + seen.memory.activation_bytes - 1


def test_no_weights_are_written_beside_the_optimised_graph() -> None:
    _, seen = observed("efficientnet-lite0")
    assert len(seen.graph) < 200_000


def test_a_kernel_without_a_known_value_belongs_to_what_reads_it() -> None:
    model, _ = observed("efficientnet-lite0")
    last = model.nodes[-1]
    optimised = [
        OptimisedNode("reorder", "ReorderInput", ("image",), ("token",)),
        OptimisedNode("all", "Everything", ("token",), (str(last.outputs[0].name),)),
    ]
    both = node_seconds(model, optimised, {"reorder": 1.0, "all": 3.0}, 8.0)
    one = node_seconds(model, optimised, {"all": 4.0}, 8.0)
    assert both == pytest.approx(one)


def test_without_kernels_the_work_is_what_counts() -> None:
    model, _ = observed("efficientnet-lite0")
    found = node_seconds(model, (), {}, 2.0)
    assert sum(found) == pytest.approx(2.0)
    assert max(range(len(found)), key=found.__getitem__) in [
        i for i, node in enumerate(model.nodes) if node.op_type in ("Conv", "Gemm")
    ]


def test_a_trace_without_kernels_is_none() -> None:
    with pytest.raises(ValueError, match="no kernel"):
        read_trace(b"[]", graph=b"", runs=1, weights_bytes=0)


def test_what_is_no_optimised_graph_is_refused() -> None:
    with pytest.raises(ModelError, match="not an ONNX model"):
        read_optimised(b"\xff" * 10)


def test_the_middle_bears_outliers_and_resolves_whole_microseconds() -> None:
    assert midmean([1, 2, 1, 2, 900]) == pytest.approx(5 / 3)
    assert midmean([7]) == 7


@pytest.mark.parametrize("name", MODELS)
def test_cuts_to_measure_are_few_in_order_and_hold_the_narrowest(name: str) -> None:
    model, _ = observed(name)
    chosen = spread_cuts(model, 16)
    assert 1 <= len(chosen) <= 16
    places = [c.position for c in chosen]
    assert places == sorted(set(places), key=lambda p: p or 0)
    assert min(c.bytes for c in cuts(model)) in {c.bytes for c in chosen}
