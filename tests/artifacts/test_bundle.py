"""The manifest: what it writes it reads, what it must not believe it refuses, and what a plan is bound to."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec.structs import replace

from isthmus.artifacts.bundle import (
    Blob,
    Bundle,
    Cut,
    Exit,
    Segment,
    SegmentVariant,
    TextEmbedding,
    Weights,
    from_json,
    subject_digest,
    to_json,
)
from isthmus.artifacts.fusion import Fusion, FusionGain
from isthmus.artifacts.gate import EXIT_CONFIDENCE, EXIT_SCORES, Gate
from isthmus.artifacts.segment_id import SegmentId
from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import RegistryError

BLOB = Blob("sha256:" + "0" * 64, 1)
BUNDLE = Bundle(
    name="m",
    inputs=(),
    outputs=(),
    weights=Weights(BLOB, ()),
    segment_list=tuple(Segment(SegmentId.parse(s), BLOB, (), (), ()) for s in ("..", "..a", "a..")),
    cut_list=(Cut("a", (), 0, 0.5),),
    default_cuts=("a",),
)


CUT = {"name": "a", "tensors": [], "bytes": 0, "macs_before": 0.5, "position": None}


def broken(**changes: Any) -> bytes:
    return json.dumps({**json.loads(to_json(BUNDLE)), **changes}).encode()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"[]", "bundle is a list of 0; it is an object"),
        (b"{", "is not JSON"),
        (broken(format="isthmus.bundle/9"), "this version reads"),
        (broken(name="../m"), r"bundle\.name is \"../m\"; it matches"),
        (broken(cuts=[CUT | {"name": "../a"}]), r"cuts\[0\]\.name is \"../a\""),
        (broken(cuts=[CUT | {"bytes": -1}]), r"bundle\.cuts\[0\]\.bytes is -1; it is at least 0"),
        (broken(cuts=[CUT, CUT]), "two cuts of one name"),
        (broken(cuts=[]), "does not lie between"),
        (broken(default_cuts=["b"]), "default cut 'b'"),
        (broken(tables={"x": {"digest": "sha256:1", "size": 1}}), r"tables\[\.\.\.\]\.digest .* it matches \^sha256"),
        (broken(tables=[]), "tables is a list of 0; it is an object"),
        (broken(plan=3), "plan is 3; it is an object or null"),
        (broken(more=1), "unknown key: 'more'"),
    ],
)
def test_a_manifest_that_is_none_is_refused_by_what_is_wrong(data: bytes, says: str) -> None:
    with pytest.raises(RegistryError, match=says):
        from_json(data)


def test_tables_fidelity_and_plan_survive_the_manifest_and_are_among_its_blobs() -> None:
    other = Blob("sha256:" + "1" * 64, 2)
    full = replace(BUNDLE, tables={"x": other}, fidelity=other, plan=other)
    assert from_json(to_json(full)) == full
    assert other.digest in full.blobs()


def test_a_bundle_without_them_is_written_as_before_they_were_known() -> None:
    assert not {"tables", "fidelity", "plan"} & json.loads(to_json(BUNDLE)).keys()


def test_a_plan_is_made_for_everything_but_the_plan_itself() -> None:
    subject = subject_digest(BUNDLE)
    assert subject_digest(replace(BUNDLE, plan=BLOB)) == subject
    assert subject_digest(replace(BUNDLE, tables={"x": BLOB})) != subject
    assert subject_digest(replace(BUNDLE, default_cuts=())) != subject


ROWS = ("batch", "tokens")
ENCODER = replace(
    BUNDLE,
    inputs=(TensorSpec("ids", "int64", ROWS), TensorSpec("mask", "int64", ROWS)),
    outputs=(TensorSpec("vector", "float32", ("batch", 4)),),
    embedding=TextEmbedding(Blob("sha256:" + "2" * 64, 3), "ids", "mask", "vector", max_tokens=8, pooling="cls"),
)


def test_an_embedding_survives_the_manifest_and_is_absent_from_others() -> None:
    assert from_json(to_json(ENCODER)) == ENCODER
    assert "sha256:" + "2" * 64 in ENCODER.blobs()
    # Bundles of before the key keep their digests.
    assert "embedding" not in json.loads(to_json(BUNDLE))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"inputs": (*ENCODER.inputs, TensorSpec("kinds", "int64", ROWS))}, "other inputs than its ids and its mask"),
        ({"inputs": (ENCODER.inputs[0], TensorSpec("mask", "float32", ROWS))}, "mask as int64"),
        ({"outputs": (TensorSpec("vector", "float32", ("batch", "width")),)}, "no output of float32"),
        ({"outputs": (TensorSpec("vector", "float32", (*ROWS, 4)),)}, "no output of float32"),
        ({"outputs": (TensorSpec("other", "float32", ("batch", 4)),)}, "by 'vector', no output"),
    ],
)
def test_an_embedding_of_other_tensors_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(RegistryError, match=says):
        from_json(to_json(replace(ENCODER, **changes)))


SCORES = TensorSpec("scores", "float32", ("batch", 3))
BRANCH = Segment(
    SegmentId("a", "a"),
    Blob("sha256:" + "3" * 64, 4),
    (),
    (replace(SCORES, name=EXIT_SCORES), TensorSpec(EXIT_CONFIDENCE, "float32", ("batch",))),
    (),
)
GATE = Gate("scores", 1.5, "disagreement", limit=0.01, confidence=0.9, inputs=1000, exiting=900, failing=4, bound=0.009)
GRID = replace(SCORES, shape=("batch", 3, 7))
GRID_BRANCH = replace(BRANCH, outputs=(replace(GRID, name=EXIT_SCORES), BRANCH.outputs[1]))
VARIANT = SegmentVariant(
    Segment(SegmentId("", "a", "int8"), Blob("sha256:" + "4" * 64, 5), (), (), ()), "static int8", 0.99, 200
)
GAIN = FusionGain(inputs=500, alone=0.8, fused=0.84, better=24, worse=4, low=0.019, high=0.054)
FUSION = Fusion(
    cut="a",
    output="scores",
    kind="log_odds",
    output_kind="logits",
    exit_weights=(0.25,),
    model_weights=(0.75,),
    scale=4.0,
    target="labels",
    codec="raw",
    penalty=0.1,
    gain=GAIN,
)
LEARNT = replace(BUNDLE, outputs=(SCORES,), exits=(Exit(BRANCH, 0.97, GATE),), variants=(VARIANT,), fusion=FUSION)


def test_exits_variants_and_fusion_survive_the_manifest_and_their_graphs_are_its_content() -> None:
    assert from_json(to_json(LEARNT)) == LEARNT
    assert {BRANCH.graph.digest, VARIANT.segment.graph.digest} <= LEARNT.blobs()
    assert LEARNT.segment("a..a") == BRANCH
    assert LEARNT.segment("..a~int8") == VARIANT.segment
    assert GATE.share == 0.9


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"exits": (Exit(BRANCH, 0.9, replace(GATE, output="other")),)}, "exit of the output 'other'"),
        ({"exits": (Exit(replace(BRANCH, outputs=(SCORES,)), 0.9, GATE),)}, "other outputs than exit_scores"),
        ({"exits": (Exit(BRANCH, 0.9),)}, "which is no classifier's"),
        ({"fusion": replace(FUSION, output="other")}, "fusion of the output 'other', and its exit is of 'scores'"),
        ({"fusion": replace(FUSION, model_weights=(0.5, 0.5, 0.5))}, "fusion of 1 and 3 weights for 3 classes"),
        ({"fusion": replace(FUSION, exit_weights=(1.0, 1.0), model_weights=(1.0, 1.0))}, "2 and 2 weights for 3"),
        ({"outputs": (GRID,), "exits": (Exit(GRID_BRANCH, 0.97, GATE),)}, "which is no table of scores"),
        ({"fusion": replace(FUSION, gain=replace(GAIN, better=600))}, "turned more predictions than"),
        ({"variants": (VARIANT, VARIANT)}, "two variants of one name"),
        ({"variants": (replace(VARIANT, segment=BUNDLE.segment_list[0]),)}, "is no variant of"),
        ({"segment_list": (*BUNDLE.segment_list, VARIANT.segment)}, "does not lie between"),
    ],
)
def test_what_was_learnt_fits_the_bundle_or_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(RegistryError, match=says):
        from_json(to_json(replace(LEARNT, **changes)))
