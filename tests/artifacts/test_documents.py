"""Documents as published by earlier releases, their JSON Schemas, and the sentences of refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from isthmus.artifacts.bundle import BUNDLE, digest_of, subject_digest
from isthmus.artifacts.bundle import to_json as bundle_json
from isthmus.artifacts.fidelity import FIDELITY, model_digest
from isthmus.artifacts.fidelity import to_json as fidelity_json
from isthmus.artifacts.json_documents import DocumentKind, schema
from isthmus.artifacts.plan import PLAN
from isthmus.artifacts.plan import to_json as plan_json
from isthmus.artifacts.profile import PROFILE, content_of
from isthmus.artifacts.profile import to_json as profile_json
from isthmus.artifacts.segment_id import SegmentId
from isthmus.errors import IsthmusError
from support.paths import ROOT

DATA = Path(__file__).parent / "data"
"""Written by the release before documents were structs, and never again."""
DIGESTS = json.loads((DATA / "digests.json").read_text())
KINDS: list[DocumentKind[Any]] = [BUNDLE, PLAN, PROFILE, FIDELITY]


def stored(name: str) -> bytes:
    return (DATA / f"{name}.json").read_bytes()


@pytest.mark.parametrize("name", ["bundle", "plain-bundle"])
def test_a_published_bundle_is_read_and_written_to_the_same_bytes(name: str) -> None:
    bundle = BUNDLE.decode(stored(name))
    assert bundle_json(bundle) == stored(name)


def test_the_digests_of_a_published_bundle_are_those_it_was_published_with() -> None:
    bundle = BUNDLE.decode(stored("bundle"))
    assert {
        "bundle": digest_of(bundle_json(bundle)),
        "subject": subject_digest(bundle),
        "model": model_digest(bundle),
        "content": content_of(bundle),
        "device": PROFILE.decode(stored("profile")).device.id,
    } == DIGESTS


def test_published_plans_profiles_and_fidelities_are_read_and_written_alike() -> None:
    assert json.loads(plan_json(PLAN.decode(stored("plan")))) == json.loads(stored("plan"))
    assert profile_json(PROFILE.decode(stored("profile"))) == stored("profile")
    assert fidelity_json(FIDELITY.decode(stored("fidelity"))) == stored("fidelity")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_schemas_are_those_that_the_structs_give(kind: DocumentKind[Any]) -> None:
    written = json.loads((ROOT / "docs" / "schemas" / f"{kind.name}.schema.json").read_text())
    assert written == json.loads(json.dumps(schema(kind))), "write them: make schemas"
    jsonschema.validate(json.loads(stored(kind.name)), written)


@pytest.mark.parametrize("text", ["..", "..65", "20..65", "65..", "65..65", "..~int8", "..65~int8-2", "20..65~p_50"])
def test_the_schema_of_bundles_takes_the_ids_of_segments_and_variants(text: str) -> None:
    assert SegmentId.parse(text) == text
    jsonschema.validate(text, schema(BUNDLE)["$defs"]["Segment"]["properties"]["id"])


@pytest.mark.parametrize("text", ["65", "", "..65~", "..~", "..65~-a", "..65~a~b", "~a..65", "..65~a.b"])
def test_the_schema_of_bundles_refuses_what_is_no_segments_id(text: str) -> None:
    with pytest.raises(ValueError, match=r"segment id|variant|name a cut"):
        SegmentId.parse(text)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(text, schema(BUNDLE)["$defs"]["Segment"]["properties"]["id"])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("key", ["format", "more"])
def test_the_schemas_refuse_another_format_and_unknown_keys(kind: DocumentKind[Any], key: str) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(json.loads(stored(kind.name)) | {key: "isthmus.other/1"}, schema(kind))


@pytest.mark.parametrize(
    ("kind", "path", "value", "sentence"),
    [
        (PLAN, ("candidates", 3, "up_bytes"), -1, "plan.candidates[3].up_bytes is -1; it is at least 0"),
        (PLAN, ("candidates", 0, "kind"), "all", 'plan.candidates[0].kind is "all"; it is one of edge, cloud, split'),
        (PLAN, ("conditions", "uplink_bps"), 0, "plan.conditions.uplink_bps is 0; it is above 0"),
        (PLAN, ("constraints", "latency_s"), 0, "plan cannot be: the constraint latency_s is 0; nothing runs in that"),
        (PLAN, ("why",), "so", 'plan.why is "so"; it is a list'),
        (PROFILE, ("device", "cpus"), 1.5, "profile.device.cpus is 1.5; it is a whole number"),
        (PROFILE, ("nodes", 1), True, "profile.nodes[1] is true; it is a number"),
        (PROFILE, ("tier",), "x" * 501, f'profile.tier is "{"x" * 79}; it has at most 500 characters'),
        (FIDELITY, ("limit",), 1.5, "fidelity.limit is 1.5; it is at most 1.0"),
        (FIDELITY, ("entries", 0, "more"), 1, "fidelity.entries[0] has an unknown key: 'more'"),
        (BUNDLE, ("weights", "tensors", 0), ["a", 1], "bundle.weights.tensors[0] is a list of 2; it has 4 items"),
        (BUNDLE, ("segments", 0, "id"), "a", "bundle.segments[0].id 'a' is no segment id"),
    ],
)
def test_a_refusal_names_the_field_and_the_rule(
    kind: DocumentKind[Any], path: tuple[Any, ...], value: Any, sentence: str
) -> None:
    doc = json.loads(stored(kind.name))
    parent = doc
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    with pytest.raises(kind.error) as e:
        kind.decode(json.dumps(doc).encode())
    assert isinstance(e.value, IsthmusError)
    assert e.value.message.startswith(sentence)
    assert e.value.facts["where"].startswith(kind.name)
