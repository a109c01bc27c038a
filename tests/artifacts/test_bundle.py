"""The manifest: what it writes it reads, what it must not believe it refuses, and what a plan is bound to."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec.structs import replace

from isthmus.artifacts.bundle import Blob, Bundle, Cut, Segment, Weights, from_json, subject_digest, to_json
from isthmus.artifacts.segment_id import SegmentId
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
