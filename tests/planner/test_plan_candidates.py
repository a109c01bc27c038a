"""Candidate sets: cuts searched, evaluated and predicted on a small real model, with invented profiles."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from msgspec.structs import replace
from onnx import helper

from isthmus.artifacts.bundle import subject_digest
from isthmus.artifacts.conditions import Conditions, Constraints
from isthmus.artifacts.plan import Coding, Error, from_json, to_json
from isthmus.artifacts.profile import SegmentCost, Timing
from isthmus.errors import ConstraintMalformed, Infeasible, PlanMismatch, RequestMalformed
from isthmus.processing.image_spec import made_shape
from isthmus_tools.figures.plan import GraphCurves
from isthmus_tools.planner import offered
from isthmus_tools.planner.choice import build_plan, choose, violations
from isthmus_tools.planner.evaluation import Evaluator
from isthmus_tools.planner.inputs import from_photos, random_inputs
from isthmus_tools.planner.memory import MemoryModel, peak_bytes
from isthmus_tools.usecases.sources import example_requests
from support.bundles import Published, cache_of, pair_model, photo, publish, publish_photos, save, value, weight
from support.bundles import photos as photos
from support.candidate_sets import FAST, LINK, SLOW, evaluated
from support.fidelities import fidelity
from support.plans import candidate, plan_for, profile_of, whole_model


def widening(path: Path) -> Path:
    """A chain whose every cut lets more cross than the input weighs."""
    names = ["x", "m0", "m1", "m2"]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(3)]
    weights = [weight(f"w{i}", n, m) for i, (n, m) in enumerate([(4, 64), (64, 64), (64, 2)])]
    return save(path, nodes, [value("x", 1, 4)], [value("m2", 1, 2)], weights)


def single(path: Path) -> Path:
    node = helper.make_node("MatMul", ["x", "w0"], ["y"])
    return save(path, [node], [value("x", 1, 8)], [value("y", 1, 4)], [weight("w0", 8, 4)])


def test_every_kind_of_candidate_is_evaluated_and_predicts_as_the_model_does(photos: Published) -> None:
    examples = from_photos(photos.bundle, [photo(seed=n) for n in range(3)])
    with evaluated(photos, examples=examples, kind="photo") as candidate_set:
        found = {c.name: c for c in candidate_set.predict(LINK)}
        assert {"edge-float", "cloud-photo", "cloud-raw", "cloud-half"} <= found.keys()
        splits = [c for c in found.values() if c.kind == "split"]
        assert splits
        assert all(set(c.cuts) <= candidate_set.bundle.cuts.keys() for c in splits)
        for c in found.values():
            assert c.error.inputs == 3
            if c.name.endswith(("-raw", "-float", "-photo", "-lossless")):
                assert c.error.relative < 1e-5
            assert c.predicted.total == pytest.approx(sum(c.predicted.seconds.values()))
        assert 0 < found["cloud-half"].up_bytes < found["cloud-raw"].up_bytes
        assert found["cloud-photo"].predicted.preprocess == 0 < found["cloud-photo"].predicted.unpack
        assert found["edge-float"].predicted.preprocess > 0
        raw = next(c for c in splits if c.name.endswith("-raw"))
        crossing = candidate_set.bundle.cuts[raw.cuts[0]].bytes
        assert crossing < raw.up_bytes < crossing + 1200


def test_a_jpeg_of_the_photo_is_a_candidate_with_the_error_that_the_photos_show(photos: Published) -> None:
    examples, further = [from_photos(photos.bundle, [photo((90, 60), seed=n) for n in some]) for some in ([0], [1, 2])]
    jpeg_photos = [i.photo or b"" for i in further]
    with evaluated(photos, examples=examples, kind="photo", jpeg_photos=jpeg_photos) as candidate_set:
        found = {c.name: c for c in candidate_set.predict(LINK)}
        coarse, fine = found["cloud-jpeg-85"], found["cloud-jpeg-95"]
        assert (coarse.kind, coarse.input, coarse.codecs) == ("cloud", "photo", {"x": Coding("photo/1", 0.85)})
        assert (coarse.error.inputs, coarse.error.calibrated) == (2, False)
        assert coarse.error.relative > fine.error.relative > 0
        assert coarse.up_bytes < fine.up_bytes < found["cloud-photo"].up_bytes
        # The edge decodes, resizes and compresses.
        assert coarse.predicted.preprocess > 0 == found["cloud-photo"].predicted.preprocess
        refused, _, _ = choose(list(found.values()), "latency", Constraints(max_error=coarse.error.relative / 2))
        assert "its error is" in next(c.refused for c in refused if c.name == "cloud-jpeg-85")


@pytest.mark.parametrize(("limit", "refused"), [(0.0, ""), (1.0, "0.0% of 1 photos agree, of 100.0%")])
def test_a_jpeg_of_a_calibrated_model_is_held_to_the_limit_of_its_codecs(
    photos: Published, monkeypatch: pytest.MonkeyPatch, limit: float, refused: str
) -> None:
    monkeypatch.setattr(
        offered, "read_fidelity", lambda *_: replace(fidelity(subject_digest(photos.bundle)), limit=limit)
    )
    error = Error(0.5, 1, 1.0)
    monkeypatch.setattr(Evaluator, "photo_error", lambda *_: error)
    examples = from_photos(photos.bundle, [photo()])
    with evaluated(photos, examples=examples, kind="photo", jpeg_photos=[photo()], max_cuts=1) as candidate_set:
        found = [c for c in candidate_set.predict(LINK) if c.name.startswith("cloud-jpeg")]
    assert [(c.refused, c.error) for c in found] == [(refused, replace(error, calibrated=True))] * 2
    assert not violations(found[0], Constraints())


def test_the_search_finds_the_cut_that_trying_all_of_them_finds(photos: Published) -> None:
    """With made-up times the best cut of all 8 is known; the candidates hold it, on every link."""
    from isthmus_tools.graph import cuts

    model = whole_model(photos)
    edge, cloud = (profile_of(photos, tier, s) for tier, s in (("edge", SLOW), ("cloud", FAST)))
    for rate in (1e5, 1e6, 1e7, 1e8):
        link = Conditions(rate, rate, 0.001)

        def seconds(cut: Any, link: Conditions = link) -> float:
            at = cut.position + 1
            return sum(edge.nodes[:at]) + sum(cloud.nodes[at:]) + cut.bytes * link.up_byte_s

        best = min((c for c in cuts(model) if c.position < len(model.nodes) - 1), key=seconds)
        with evaluated(photos, link=link, max_cuts=3) as candidate_set:
            raw = [c for c in candidate_set.predict(link) if c.kind == "split" and c.name.endswith("-raw")]
            assert best.name in {c.cuts[0] for c in raw}


def test_a_narrow_slow_link_keeps_the_model_at_the_edge_and_a_wide_one_does_not(photos: Published) -> None:
    with evaluated(photos, edge_s=0.02) as candidate_set:
        chosen = [
            choose(candidate_set.predict(link), "latency", Constraints())[1].kind
            for link in (Conditions(1e4, 1e4, 0.2), Conditions(1e9, 1e9, 0.0))
        ]
    assert chosen[0] == "edge"
    assert chosen[1] in ("cloud", "split")


def test_a_measured_segment_is_preferred_to_the_sum_of_its_nodes(photos: Published) -> None:
    edge = profile_of(photos, "edge", SLOW)
    timed = SegmentCost(Timing(0.123, 0.12, 0.13, 5), 0, 0, 1, 1, 10, 20, 777)
    edge = replace(edge, segments={**edge.segments, "..6": timed})
    with evaluated(photos, profiles={"edge": edge}, all_prefixes=True) as candidate_set:
        found = {c.name: c for c in candidate_set.predict(LINK)}
    known = [c for c in found.values() if c.cuts == ("6",)]
    assert known
    assert all((c.predicted.edge_run, c.predicted.sources.edge) == (0.123, "measured") for c in known)
    assert all(c.edge_memory_bytes == 777 for c in known)
    assert found["edge-float"].predicted.sources.edge == "measured"
    others = [c for c in found.values() if c.kind == "split" and c.cuts != ("6",)]
    assert {c.predicted.sources.edge for c in others} <= {"predicted"}


def test_a_profile_of_another_model_is_refused_by_name(photos: Published, tmp_path: Path) -> None:
    other = publish_photos(tmp_path, seed=5)
    with (
        pytest.raises(PlanMismatch, match="not of photos") as e,
        evaluated(photos, profiles={"edge": profile_of(other, "edge", SLOW)}),
    ):
        pass
    assert "isthmus profile photos" in e.value.hint


@pytest.mark.parametrize("depth", [1, 4, 8, 9])
def test_a_private_depth_keeps_the_first_nodes_and_the_input_at_the_edge(photos: Published, depth: int) -> None:
    with evaluated(photos, private_depth=depth) as candidate_set:
        found = candidate_set.predict(LINK)
        notes = " ".join(candidate_set.notes)
    assert "cloud-only is no candidate" in notes
    assert {c.kind for c in found} <= {"edge", "split"}
    for c in found:
        for name in c.cuts:
            assert (candidate_set.bundle.cuts[name].position or 0) + 1 >= depth
    assert ("split" in {c.kind for c in found}) == (depth < 9)


def test_no_input_crosses_where_a_private_depth_is_asked_for(tmp_path: Path) -> None:
    """The mask is read by the last node alone, so that every cut before it lets the mask cross."""
    inputs = {"x": np.ones((1, 32), np.float32), "mask": np.ones((1, 32), np.float32)}
    published = publish(tmp_path, pair_model(tmp_path / "pair.onnx"), inputs)
    with evaluated(published) as candidate_set:
        assert any(c.kind == "split" for c in candidate_set.predict(LINK))
    with evaluated(published, private_depth=1) as candidate_set:
        assert [c.kind for c in candidate_set.predict(LINK)] == ["edge"]


def test_a_private_depth_beyond_the_model_is_refused(photos: Published) -> None:
    with pytest.raises(ConstraintMalformed, match="the model has 9 nodes"), evaluated(photos, private_depth=10):
        pass


def test_too_little_memory_at_the_edge_leaves_the_cloud_or_says_by_how_much(photos: Published) -> None:
    with evaluated(photos) as candidate_set:
        found = candidate_set.predict(LINK)
    _, best, _ = choose(found, "latency", Constraints(edge_memory_bytes=1000))
    assert best.kind == "cloud"
    with pytest.raises(Infeasible, match="edge-memory"):
        choose([c for c in found if c.kind != "cloud"], "latency", Constraints(edge_memory_bytes=1000))


def test_a_head_beyond_the_edges_memory_is_not_searched(photos: Published) -> None:
    edge = profile_of(photos, "edge", SLOW)
    sizes = MemoryModel(whole_model(photos), photos.bundle, edge, lambda segment: False).heads()
    assert list(sizes) == list(range(9))
    assert sorted(sizes.values()) == list(sizes.values())
    with evaluated(photos, edge_memory_bytes=sizes[2], all_prefixes=True) as candidate_set:
        found = candidate_set.predict(LINK)
        places = {candidate_set.bundle.cuts[c.cuts[0]].position for c in found if c.kind == "split"}
    assert places == {position for position, size in sizes.items() if size <= sizes[2]}
    splits = [c for c in found if c.kind == "split"]
    assert all(c.edge_memory_bytes <= sizes[2] for c in splits)


def test_a_model_of_one_node_is_planned_without_a_cut(tmp_path: Path) -> None:
    published = publish(tmp_path, single(tmp_path / "single.onnx"), {"x": np.ones((1, 8), np.float32)})
    with evaluated(published) as candidate_set:
        assert not candidate_set.files
        candidates = candidate_set.predict(LINK)
        plan = build_plan(candidate_set, candidates, LINK, "latency", Constraints())
    assert {c.kind for c in candidates} == {"edge", "cloud"}
    assert "no cut is a candidate: one side of the link takes everything" in plan.why
    assert plan.subject == subject_digest(published.bundle)


def test_a_graph_that_only_widens_is_not_split_and_the_plan_says_why(tmp_path: Path) -> None:
    published = publish(tmp_path, widening(tmp_path / "widening.onnx"), {"x": np.ones((1, 4), np.float32)})
    with evaluated(published, edge_s=0.02, cloud_s=0.0001, link=Conditions(1e5, 1e5, 0.0)) as candidate_set:
        plan = build_plan(
            candidate_set, candidate_set.predict(Conditions(1e5, 1e5)), Conditions(1e5, 1e5), "latency", Constraints()
        )
    assert plan.choice.kind in ("edge", "cloud")
    assert any("every cut lets" in sentence and "the input has 16" in sentence for sentence in plan.why)


def test_a_plan_without_measurements_says_so(photos: Published) -> None:
    with evaluated(photos, examples=random_inputs(photos.bundle, 2), kind="random") as candidate_set:
        plan = build_plan(candidate_set, candidate_set.predict(LINK), LINK, "latency", Constraints())
    assert not plan.measured
    assert plan.typical_gap is None
    assert any(sentence.startswith("predicted only") for sentence in plan.why)
    assert any("random inputs" in sentence for sentence in plan.why)
    assert from_json(to_json(plan)) == plan


def test_staging_uploads_the_cuts_without_a_plan_and_without_a_version(photos: Published) -> None:
    before = photos.registry.versions("photos")
    with evaluated(photos) as candidate_set:
        digest = candidate_set.stage(photos.registry)
        assert candidate_set.stage(photos.registry) == digest
        found = photos.registry.bundle(digest)
    assert found.plan is None
    assert subject_digest(found) == candidate_set.subject
    assert photos.registry.versions("photos") == before
    assert photos.registry.aliases("photos")["prod"] == "1"


def test_the_int8_variant_is_a_bundle_of_its_own_and_made_once(tmp_path: Path) -> None:
    published = publish_photos(tmp_path)
    examples = from_photos(published.bundle, [photo(seed=n) for n in range(2)])
    digests = []
    for _ in range(2):
        with evaluated(published, examples=examples, kind="photo", int8=True) as candidate_set:
            assert not candidate_set.notes
            found = next(c for c in candidate_set.predict(LINK) if c.name == "edge-int8")
            assert candidate_set.variant is not None
            published.registry.publish(candidate_set.variant.bundle, candidate_set.variant.files)
            digests.append(found.variant)
    variant = published.registry.resolve("photos-int8")
    assert digests == [variant.digest] * 2
    assert (variant.bundle.inputs, variant.bundle.outputs) == (published.bundle.inputs, published.bundle.outputs)
    assert 0 < found.error.relative < 0.5
    assert found.predicted.sources.edge == "scaled"
    assert not variant.bundle.cuts


def asking(path: Path) -> Path:
    """x · w in as many rows as the input `rows` says, which must divide 8: without a value of it nothing runs."""
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["m"]),
        helper.make_node("Relu", ["m"], ["r"]),
        helper.make_node("Reshape", ["r", "rows"], ["s"], allowzero=1),
        helper.make_node("ReduceMean", ["s"], ["y"], axes=[1]),
    ]
    inputs = [value("x", 1, 64), value("rows", 2, dtype=onnx.TensorProto.INT64)]
    return save(path, nodes, inputs, [value("y", "a", "b")], [weight("w0", 64, 8)])


def test_a_model_that_needs_certain_values_has_its_int8_variant_and_its_picture(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((1, 64)).astype(np.float32)
    given = {"x": x, "rows": np.array([4, 2], np.int64)}
    published = publish(tmp_path, asking(tmp_path / "asking.onnx"), given, examples={"rows": given["rows"]})
    with evaluated(published, examples=random_inputs(published.bundle, 2), kind="random", int8=True) as candidate_set:
        assert not [note for note in candidate_set.notes if "int8" in note]
        assert "edge-int8" in {c.name for c in candidate_set.predict(LINK)}
        along = GraphCurves.of(candidate_set)
        plan = plan_for(published.bundle, candidate())
    found = published.registry.resolve("asking")
    shown = GraphCurves.published(plan, found, published.registry, cache_of(published, tmp_path / "cache"))
    assert shown.bytes == along.bytes


def test_a_model_that_cannot_be_quantised_has_no_variant_and_the_plan_says_why(tmp_path: Path) -> None:
    node = helper.make_node("Cast", ["x"], ["c"], to=onnx.TensorProto.DOUBLE)
    twice = helper.make_node("MatMul", ["c", "w"], ["y"])
    weights = [onnx.numpy_helper.from_array(np.ones((4, 4)), "w")]
    path = save(tmp_path / "doubles.onnx", [node, twice], [value("x", 1, 4)], [value("y", 1, 4, dtype=11)], weights)
    published = publish(tmp_path, path, {"x": np.ones((1, 4), np.float32)})
    with evaluated(published, int8=True) as candidate_set:
        names = {c.name for c in candidate_set.predict(LINK)}
    assert ("edge-int8" in names) != any(note.startswith("edge-int8 was left out") for note in candidate_set.notes)


def test_peak_bytes_are_the_most_that_lives_at_once(photos: Published) -> None:
    model = whole_model(photos)
    pixels, maps = 3 * 64 * 4, 16 * 64 * 4
    assert peak_bytes(model, [0]) == pixels + maps
    # The residual keeps node 1's output while nodes 2 to 5 run.
    assert peak_bytes(model, range(9)) == 3 * maps
    assert peak_bytes(model, []) == 0


@pytest.mark.parametrize(
    ("steps", "shape"),
    [
        ([{"op": "resize", "size": [8, 6]}, {"op": "layout", "to": "NCHW"}], (1, 3, 8, 6)),
        (
            [{"op": "resize", "short_side": 9}, {"op": "center_crop", "size": [4, 5]}, {"op": "layout", "to": "NHWC"}],
            (1, 4, 5, 3),
        ),
        ([{"op": "resize", "short_side": 9}, {"op": "layout", "to": "NCHW"}], None),
        ([{"op": "layout", "to": "NCHW"}], None),
    ],
)
def test_the_shape_that_a_photo_becomes_is_known_where_it_is_fixed(steps: Any, shape: Any) -> None:
    assert made_shape({"steps": steps}) == shape


def test_no_link_is_infinitely_fast_or_a_number_that_is_none(photos: Published) -> None:
    with evaluated(photos, link=Conditions()) as candidate_set:
        assert all(math.isfinite(c.predicted.total) for c in candidate_set.predict(Conditions()))


def test_example_requests_are_photos_of_all_folders_of_a_folder_by_class(tmp_path: Path) -> None:
    bundle = publish_photos(tmp_path / "model").bundle
    for i, name in enumerate(["cats", "dogs"]):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "1.png").write_bytes(photo(seed=i))
    kind, requests = example_requests(bundle, [tmp_path / "data"], {}, random=1)
    assert (kind, len(requests)) == ("photo", 2)
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    with pytest.raises(RequestMalformed, match="holds no files") as refused:
        example_requests(bundle, [tmp_path / "empty"], {}, random=1)
    assert "--input" in refused.value.hint
