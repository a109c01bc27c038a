"""The manifest: what it writes it reads, what it must not believe it refuses, and what a plan is bound to."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from isthmus.artifacts.bundle import Blob, Bundle, Cut, Segment, Weights, from_json, subject_digest, to_json
from isthmus.errors import RegistryError

BLOB = Blob("sha256:" + "0" * 64, 1)
BUNDLE = Bundle(
    name="m",
    inputs=(),
    outputs=(),
    weights=Weights(BLOB, ()),
    segments={s: Segment(s, BLOB, (), (), ()) for s in ("..", "..a", "a..")},
    cuts={"a": Cut("a", (), 0, 0.5)},
    default_cuts=("a",),
)


def broken(**changes: Any) -> bytes:
    return json.dumps({**json.loads(to_json(BUNDLE)), **changes}).encode()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"[]", "TypeError"),
        (b"{", "JSONDecodeError"),
        (broken(format="isthmus.bundle/9"), "this version reads"),
        (broken(name="../m"), "cannot name a model"),
        (broken(cuts=[{"name": "../a", "tensors": [], "bytes": 0, "macs_before": 0, "position": None}]), "name a cut"),
        (broken(cuts=[]), "does not lie between"),
        (broken(default_cuts=["b"]), "default cut 'b'"),
        (broken(tables={"x": {"digest": "sha256:1", "size": 1}}), "is not a sha256 digest"),
        (broken(tables=[]), "no object"),
        (broken(plan=3), "TypeError"),
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
