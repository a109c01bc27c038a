"""Closer looks in documents, of fidelity and of plans: what was written is read, and anything else is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import jsonschema
import numpy as np
import pytest
from msgspec.structs import replace

from isthmus.artifacts.choice import MAX_LOOKS, Look
from isthmus.artifacts.fidelity import from_json, to_json
from isthmus.artifacts.plan import CloserLooks, Coding
from isthmus.artifacts.plan import from_json as read_plan
from isthmus.artifacts.plan import to_json as plan_json
from isthmus.codecs import Encoding
from isthmus.errors import CalibrationError, PlanMalformed
from isthmus.pipeline import planned_route
from support.bundles import Published
from support.bundles import photos as photos
from support.calibrated_photos import no_variant, remote
from support.closer_looks import FIDELITY
from support.plans import SCHEMA, candidate, plan_for

# The fidelity document


def changed(**changes: Any) -> bytes:
    doc = json.loads(to_json(FIDELITY))
    doc["entries"][-1] |= changes
    return json.dumps(doc).encode()


def test_a_document_gives_back_the_looks_that_it_was_made_of() -> None:
    data = to_json(FIDELITY)
    assert from_json(data) == FIDELITY
    assert to_json(from_json(data)) == data
    assert b'"looks":[{"margin":1.5,"quality":0.4},{"margin":0.7,"quality":0.6}]' in data
    assert from_json(changed(shares=[0.5])) != FIDELITY
    most = [{"quality": 0.5 + n / 10, "margin": 1.0} for n in range(MAX_LOOKS)]
    found = from_json(changed(looks=most, shares=[0.5] * MAX_LOOKS)).entries[-1]
    assert len(found.looks) == len(found.shares) == MAX_LOOKS


def test_entries_that_say_nothing_of_looks_have_none() -> None:
    doc = json.loads(to_json(FIDELITY))
    doc["entries"] = [{k: v for k, v in e.items() if k not in ("looks", "shares")} for e in doc["entries"][:3]]
    assert from_json(json.dumps(doc).encode()) == replace(FIDELITY, entries=FIDELITY.entries[:3])


def look(**changes: Any) -> dict[str, Any]:
    return {"looks": [{"quality": 0.6, "margin": 0.2} | changes]}


QUALITIES_OF_NONE: list[Any] = [1.1, 0.4, 0.3, "0.6", -0.6, None, True, math.nan, [0.6], {}, 10**400]
MARGINS_OF_NONE: list[Any] = [-0.1, 0, 1e9, math.inf, math.nan, True, "0.2", None, [0.2], 10**400]
NO_LISTS: list[Any] = ["", {}, None, 0, 1.5, True, "looks", {"quality": 0.6, "margin": 0.2}, []]
NOTHING: list[Any] = ["", {}, None]
NO_LOOKS: list[Any] = [0.6, None, [], {}, "0.6", [0.6, 0.2], {"quality": 0.6}, {"margin": 0.2}]
NO_SHARES: list[Any] = [1.5, -0.1, None, True, "0.25", [0.25], {}, math.nan, 10**400]
BROKEN: list[dict[str, Any]] = [
    *(look(quality=quality) for quality in QUALITIES_OF_NONE),
    *(look(margin=margin) for margin in MARGINS_OF_NONE),
    look(more=1),
    *({"looks": looks} for looks in NO_LISTS),
    *({"looks": [each]} for each in NO_LOOKS),
    *({"shares": shares} for shares in [*NO_LISTS, [0.25, 0.1]]),
    *({"shares": [each]} for each in NO_SHARES),
    {"looks": [], "shares": [0.25]},
    *({"looks": nothing, "shares": []} for nothing in NOTHING),
    *({"looks": [], "shares": nothing} for nothing in NOTHING),
    {"looks": [{"quality": 0.6, "margin": 0.2}] * 2, "shares": [0.2, 0.1]},
    {"looks": [{"quality": 0.5 + n / 20, "margin": 1} for n in range(MAX_LOOKS + 1)], "shares": [0.1] * 5},
    {"looks": [{"quality": 0.6, "margin": 0.2}] * 10_000},
    {"shares": [0.1] * 100_000},
    {"looks": [[[[[[]]]]]] * 1000},
    {"again_quality": 0.8, "again_margin": 0.2, "asked_again": 0.1},
    {"codec": "int8/1"},
    {"quality": 0.9},
    {"quality": 0.6},
]


@pytest.mark.parametrize("changes", BROKEN, ids=lambda changes: str(changes)[:60])
def test_an_entry_whose_looks_are_none_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CalibrationError, match=r"^fidelity.*(looks|shares|unknown key|is not JSON)"):
        from_json(changed(**changes))


# Plans


LOOKS = CloserLooks.of("logits", (Look(0.5, 0.4), Look(0.7, 0.2)), (0.5, 0.25))
CODECS = {"p6": Coding("transform/4", 0.3), "mask": Coding("lossless/3")}


def looks_document(photos: Published) -> Any:
    chosen = candidate("split-6-t", "split", cuts=("6",), codecs=CODECS, looks=LOOKS)
    made = plan_for(photos.bundle, chosen)
    doc = json.loads(plan_json(made))
    assert read_plan(json.dumps(doc).encode()) == made
    jsonschema.validate(doc, SCHEMA)
    return doc


@pytest.mark.parametrize(
    "change",
    [
        {"share": 0.51},
        {"share": -0.1},
        {"share": None},
        {"quality": 0.5},
        {"quality": 0.3},
        {"quality": 1.01},
        {"quality": True},
        {"margin": 0},
        {"margin": -1},
        {"margin": 1001},
        {"margin": 10**400},
        {"margin": "wide"},
        {"more": 1},
    ],
)
def test_a_plan_with_a_look_that_is_none_is_refused(photos: Published, change: dict[str, Any]) -> None:
    doc = looks_document(photos)
    doc["candidates"][0]["closer_looks"]["looks"][1] |= change
    with pytest.raises(PlanMalformed, match=r"closer_looks"):
        read_plan(json.dumps(doc).encode())


@pytest.mark.parametrize(
    "change",
    [
        {"output": 3},
        {"output": "y" * 5000},
        {"looks": []},
        {"looks": {}},
        {"looks": [0.5]},
        {"looks": [{"quality": 0.3 + n / 10, "margin": 1.0, "share": 0.5} for n in range(1, 6)]},
        {"looks": [{"quality": 0.5, "margin": 1.0, "share": 1.01}]},
        {"looks": [{"quality": 0.2, "margin": 1.0, "share": 0.5}]},
        {"looks": [{"quality": 0.5, "share": 0.5}]},
        {"shares": [0.5]},
    ],
)
def test_a_plan_with_closer_looks_that_are_none_is_refused(photos: Published, change: dict[str, Any]) -> None:
    doc = looks_document(photos)
    doc["candidates"][0]["closer_looks"] |= change
    with pytest.raises(PlanMalformed, match=r"closer_looks") as e:
        read_plan(json.dumps(doc).encode())
    assert len(str(e.value)) < 400


def test_a_plan_with_a_second_look_as_it_once_was_is_refused(photos: Published) -> None:
    doc = looks_document(photos)
    doc["candidates"][0].pop("closer_looks")
    doc["candidates"][0]["second_look"] = {"quality": 0.8, "margin": 0.2, "output": "logits", "share": 0.25}
    with pytest.raises(PlanMalformed, match="unknown key: 'second_look'"):
        read_plan(json.dumps(doc).encode())


@pytest.mark.parametrize(
    ("kind", "cuts", "codecs", "why"),
    [
        ("cloud", (), CODECS, "no cut"),
        ("split", ("6",), {}, "no tensor that they could send finer"),
        ("split", ("6",), {"p6": Coding("int8/1")}, "no tensor that they could send finer"),
        ("split", ("6",), {"p6": Coding("layers/2", 0.3)}, r"codec .* it is one of raw"),
        ("split", ("6",), CODECS | {"q": Coding("transform/4", 0.5)}, "transform/4@0.5"),
    ],
)
def test_nothing_is_looked_at_closer_where_nothing_could_be_sent_finer(
    photos: Published, kind: str, cuts: tuple[str, ...], codecs: dict[str, Coding], why: str
) -> None:
    chosen = candidate("t", kind, cuts=cuts, codecs=codecs, looks=LOOKS)
    with pytest.raises(PlanMalformed, match=why):
        read_plan(plan_json(plan_for(photos.bundle, chosen)))


def test_the_route_of_a_plan_takes_the_closer_looks(photos: Published) -> None:
    chosen = candidate("split-6-t", "split", cuts=("6",), codecs={"p6": Coding("transform/4", 0.3)}, looks=LOOKS)
    hops = remote("http://127.0.0.1:9", "http://127.0.0.1:9")
    route = planned_route(chosen, photos.digest, photos.bundle, hops, lambda *_: None, no_variant)
    assert route.looks is not None
    assert route.looks.looks == LOOKS.looks
    assert route.looks.margin_of({"logits": np.array([[1.0, 3.5]])}) == 2.5
    assert route.encodings == ({}, {"p6": Encoding("transform/4", 0.3)})
    assert route.finer(0.7).encodings == ({}, {"p6": Encoding("transform/4", 0.7)})
    elsewhere = replace(chosen, looks=replace(LOOKS, output="p6"))
    with pytest.raises(PlanMalformed, match="'p6', no output of photos"):
        planned_route(elsewhere, photos.digest, photos.bundle, hops, lambda *_: None, no_variant)
