"""Plans as documents: the schema, what is refused, and the one bundle that a plan may serve."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from isthmus.artifacts.bundle import Blob, subject_digest
from isthmus.artifacts.conditions import Conditions
from isthmus.artifacts.plan import Plan, PlannedExit, from_json, read_plan, to_json
from isthmus.errors import PlanMalformed, PlanMismatch
from isthmus_tools.planner.publishing import publish_plan
from support.bundles import publish_photos
from support.plans import DIGEST, SCHEMA, candidate, full_plan, plan_for


def document(plan: Plan) -> Any:
    return json.loads(to_json(plan))


def test_a_plan_survives_its_document() -> None:
    plan = full_plan()
    assert from_json(to_json(plan)) == plan
    assert plan.choice.seconds == 0.07
    assert plan.choice.relative_gap == pytest.approx(0.07 / plan.choice.predicted.total - 1)
    assert plan.measured


def test_every_plan_keeps_to_the_schema() -> None:
    for plan in (full_plan(), replace(full_plan(), conditions=Conditions(), chosen="cloud-photo")):
        jsonschema.validate(document(plan), SCHEMA)


def test_plans_without_exits_and_variants_have_the_keys_of_plans_before_these() -> None:
    assert not [c for c in document(full_plan())["candidates"] if c.keys() & {"exit", "head"}]
    early = replace(full_plan().choice, name="early", exit=PlannedExit(0.75, 400))
    small = replace(full_plan().choice, name="small", head="int8")
    doc = document(replace(full_plan(), candidates=(early, small), chosen="early"))
    jsonschema.validate(doc, SCHEMA)
    assert [c.keys() & {"exit", "head"} for c in doc["candidates"]] == [{"exit"}, {"head"}]
    assert from_json(json.dumps(doc).encode()).candidates == (early, small)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda d: d.pop("subject"), "subject"),
        (lambda d: d.update(format="isthmus.profile/1"), "format"),
        (lambda d: d.update(extra=1), "extra"),
        (lambda d: d.update(objective="joy"), "objective"),
        (lambda d: d.update(subject="sha256:0"), "subject"),
        (lambda d: d.update(chosen="nobody"), "chosen"),
        (lambda d: d.update(chosen="edge-int8"), "refused"),
        (lambda d: d.update(candidates=[]), "chosen"),
        (lambda d: d["candidates"].append(d["candidates"][0]), "one name"),
        (lambda d: d["candidates"][0].update(kind="sideways"), "kind"),
        (lambda d: d["candidates"][0].update(cuts=["../.."]), "cuts"),
        (lambda d: d["candidates"][0].update(cuts=[]), "split"),
        (lambda d: d["candidates"][0].update(up_bytes=-1), "up_bytes"),
        (lambda d: d["candidates"][0].update(up_bytes=1.5), "up_bytes"),
        (lambda d: d["candidates"][0].update(price=10**400), "price"),
        (lambda d: d["candidates"][0]["codecs"]["r3"].update(codec="layers/2"), "codec"),
        (lambda d: d["candidates"][0]["codecs"]["r3"].update(codec="zip"), "codec"),
        (lambda d: d["candidates"][0]["predicted"].update(up=-0.1), "up"),
        (lambda d: d["candidates"][0]["predicted"].update(up=True), "up"),
        (lambda d: d["candidates"][0]["measured"].update(runs=0.5), "runs"),
        (lambda d: d["candidates"][1].update(exit={"share": 0.5, "inputs": 9}), "exit"),
        (lambda d: d["candidates"][0].update(exit={"share": 1.5, "inputs": 9}), "share"),
        (lambda d: d["candidates"][0].update(exit={"share": 0.5, "inputs": 9}, head="int8"), "another head"),
        (lambda d: d["candidates"][0].update(head="../.."), "variant"),
        (lambda d: d["candidates"][1].update(head="int8"), "at the edge"),
        (lambda d: d["candidates"][2].update(head="int8"), "at the edge"),
        (lambda d: d["conditions"].update(uplink_bps=0), "uplink_bps"),
        (lambda d: d["constraints"].update(private_depth=-1), "private_depth"),
        (lambda d: d["why"].append("x" * 5000), "why"),
    ],
)
def test_a_document_that_departs_from_the_format_is_refused_by_name(change: Callable[[Any], Any], where: str) -> None:
    doc = document(full_plan())
    change(doc)
    with pytest.raises(PlanMalformed, match=where):
        from_json(json.dumps(doc).encode())


def test_a_plan_of_another_version_says_so_and_to_plan_again() -> None:
    doc = document(full_plan()) | {"format": "isthmus.plan/1"}
    doc["candidates"][0]["codecs"]["r3"].update(codec="transform/1")
    with pytest.raises(PlanMalformed, match="another version") as e:
        from_json(json.dumps(doc).encode())
    assert e.value.facts["where"] == "plan.format"
    assert "isthmus plan" in e.value.hint


def test_a_plan_that_names_a_codec_with_a_successor_serves_the_successor() -> None:
    doc = document(full_plan())
    doc["candidates"][0]["codecs"]["r3"].update(codec="transform/3")
    found = from_json(json.dumps(doc).encode())
    assert found.candidates[0].codecs["r3"].codec == "transform/4"


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"null", b'{"format": NaN}', b"[" * 10**5])
def test_what_is_no_object_is_no_plan(text: bytes) -> None:
    with pytest.raises(PlanMalformed):
        from_json(text)


def test_a_plan_beyond_the_bound_is_not_parsed() -> None:
    with pytest.raises(PlanMalformed, match="at most"):
        from_json(b" " * (4 * 2**20 + 1))


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(), lambda s: st.lists(s) | st.dictionaries(st.text(), s)
    )
)
def test_any_other_json_is_refused_and_nothing_else_happens(value: Any) -> None:
    with pytest.raises(PlanMalformed):
        from_json(json.dumps(value).encode())


def test_a_plan_is_published_in_the_bundle_that_it_is_for(tmp_path: Path) -> None:
    published = publish_photos(tmp_path)
    plan = plan_for(published.bundle, candidate())
    version = publish_plan(published.registry, published.bundle, {}, plan, alias="prod")
    found = published.registry.resolve("photos").bundle
    assert version.version == "2"
    assert read_plan(found, published.registry.blob) == plan
    assert subject_digest(found) == subject_digest(published.bundle) == plan.subject
    assert publish_plan(published.registry, published.bundle, {}, plan).version == "2"


def test_a_plan_never_goes_into_another_bundle(tmp_path: Path) -> None:
    published = publish_photos(tmp_path)
    plan = plan_for(published.bundle, candidate(), subject=DIGEST)
    with pytest.raises(PlanMismatch) as e:
        publish_plan(published.registry, published.bundle, {}, plan)
    assert e.value.facts == {"subject": DIGEST, "expected": subject_digest(published.bundle)}


def test_a_plan_of_another_bundle_is_not_read(tmp_path: Path) -> None:
    published = publish_photos(tmp_path)
    plan = plan_for(published.bundle, candidate())
    publish_plan(published.registry, published.bundle, {}, plan, alias="prod")
    planned = published.registry.resolve("photos").bundle
    other = replace(planned, default_cuts=("3",))
    with pytest.raises(PlanMismatch, match="was made for photos"):
        read_plan(other, published.registry.blob)
    with pytest.raises(PlanMalformed, match="at most"):
        read_plan(replace(planned, plan=Blob(DIGEST, 2**30)), published.registry.blob)
    assert read_plan(published.bundle, published.registry.blob) is None
