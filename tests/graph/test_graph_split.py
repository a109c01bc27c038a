"""A partition's segments compute the whole model's predictions: real models, and any cut of random graphs."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus.artifacts.bundle import Bundle, Segment
from isthmus.artifacts.segment_id import WHOLE
from isthmus_tools.graph import CutInfo, Model, build, cut_at, cuts, open_model
from isthmus_tools.graph.cuts import ancestors, boundary_values
from support.models import REAL, RealModel
from support.random_graphs import graphs
from support.segments import difference, run_partition, run_whole

TOLERANCE = 1e-4
CUTS = 12


@dataclass(frozen=True)
class Built:
    real: RealModel
    model: Model
    cuts: list[CutInfo]
    bundle: Bundle
    files: dict[str, Path]
    inputs: list[dict[str, Any]]
    whole: list[dict[str, Any]]
    shares: list[float] = field(default_factory=list)


@pytest.fixture(scope="module", params=list(REAL))
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    real = REAL[request.param]
    path = real.path()
    model = open_model(path, **real.open_arguments())
    every = cuts(model)
    count = min(CUTS, len(every))
    spread = [every[i * (len(every) - 1) // max(1, count - 1)] for i in range(count)]
    spread.append(max(every, key=lambda c: len(c.tensors)))
    chosen = sorted({c.name: c for c in spread}.values(), key=lambda c: c.position or 0)
    partitions = [[c] for c in chosen]
    partitions.append([chosen[len(chosen) // 3], chosen[2 * len(chosen) // 3]])
    bundle, files = build(model, real.name, tmp_path_factory.mktemp(real.name), partitions=partitions)
    inputs = real.inputs()
    return Built(real, model, chosen, bundle, files, inputs, run_whole(path, inputs))


def test_split_is_the_whole_at_cuts_spread_over_the_graph(built: Built) -> None:
    if len(cuts(built.model)) >= 10:
        assert len(built.cuts) >= 10
        assert any(len(c.tensors) > 1 for c in built.cuts)
    worst = 0.0
    for cut in built.cuts:
        worst = max(worst, _compare(built, [cut.name]))
    print(f"{built.real.name}: {len(built.cuts)} cuts, largest difference {worst:.1e}")  # noqa: T201


def test_split_is_the_whole_at_three_segments(built: Built) -> None:
    first, second = (built.cuts[n * len(built.cuts) // 3].name for n in (1, 2))
    print(f"{built.real.name}: three segments, largest difference {_compare(built, [first, second]):.1e}")  # noqa: T201


def test_the_uncut_segment_is_the_whole(built: Built) -> None:
    print(f"{built.real.name}: uncut, largest difference {_compare(built, []):.1e}")  # noqa: T201


def test_two_segments_weigh_what_the_model_weighs_and_what_they_share(built: Built) -> None:
    whole = _weight(built.bundle, built.bundle.segment(WHOLE))
    for cut in built.cuts:
        head, tail = built.bundle.partition([cut.name])
        both = {t.name for t in built.bundle.weight_ranges(head)} & {t.name for t in built.bundle.weight_ranges(tail)}
        shared = sum(t.length for t in built.bundle.weights.tensors if t.name in both)
        together = _weight(built.bundle, head) + _weight(built.bundle, tail)
        assert together - shared <= 1.02 * whole, (cut.name, together, shared, whole)
        built.shares.append((together - shared) / whole)
    print(f"{built.real.name}: two segments weigh up to {max(built.shares):.4f} of the model and what they share")  # noqa: T201


def test_a_heads_weights_are_a_prefix_and_a_tails_a_suffix(built: Built) -> None:
    count = len(built.bundle.weights.tensors)
    for cut in built.cuts:
        head, tail = built.bundle.partition([cut.name])
        assert not head.weights or (len(head.weights) == 1 and head.weights[0][0] == 0)
        end = head.weights[0][1] if head.weights else 0
        assert {i for a, b in tail.weights for i in range(a, b)} >= set(range(end, count))


def test_the_macs_of_the_segments_add_up(built: Built) -> None:
    for cut in built.cuts:
        head, tail = built.bundle.partition([cut.name])
        assert head.macs + tail.macs == built.bundle.segment(WHOLE).macs
        if built.model.total_macs:
            assert head.macs == round(cut.macs_before * built.model.total_macs)


def _compare(built: Built, names: list[str]) -> float:
    worst = 0.0
    for whole, split in zip(built.whole, run_partition(built.bundle, built.files, names, built.inputs), strict=True):
        worst = max(worst, difference(whole, split))
        first = built.bundle.outputs[0].name
        assert (built.real.answer(whole[first]) == built.real.answer(split[first])).all(), names
    assert worst < TOLERANCE, names
    return worst


def _weight(bundle: Bundle, segment: Segment) -> int:
    return segment.graph.size + sum(t.length for t in bundle.weight_ranges(segment))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(graphs(), st.data())
def test_any_cut_of_any_graph_is_the_whole(proto: onnx.ModelProto, data: st.DataObject) -> None:
    inputs = [{"x": np.array([0.3], np.float32), "z": np.array([-0.7], np.float32)}]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.onnx"
        onnx.save(proto, path)
        model = open_model(path)
        every = cuts(model)
        partitions = [[c] for c in every[::3]]
        if len(every) > 1:
            partitions.append([every[0], every[-1]])
        made = [v for node, keep in zip(model.nodes, model.dynamic, strict=True) if keep for v in node.outputs]
        if made:
            upstream = ancestors(model, [data.draw(st.sampled_from(made))])
            crossing = boundary_values(model, upstream)
            if crossing and ancestors(model, crossing) == upstream:
                partitions.append([cut_at(model, [str(v.name) for v in crossing], "drawn")])
        bundle, files = build(model, "random", folder, partitions=partitions)
        whole = run_whole(path, inputs)[0]
        for partition in [[], *partitions]:
            split = run_partition(bundle, files, [c.name for c in partition], inputs)[0]
            assert difference(whole, split) < 1e-6
