"""Throughput: the stages of a candidate, the division of requests in a plan, and the candidates measured for it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec.structs import replace

from isthmus.artifacts.conditions import Constraints
from isthmus.artifacts.plan import Candidate, Error, Measured, Plan, Terms, from_json, to_json
from isthmus.errors import PlanMalformed
from isthmus_tools.cli import plan_text
from isthmus_tools.planner.measurement import contenders
from isthmus_tools.planner.throughput import mix_reason, planned_mix, slowest_stage, stage_seconds
from support.bundles import Published
from support.bundles import photos as photos
from support.plans import DIGEST, candidate, plan_for

EDGE = candidate("edge-float", predicted=Terms(edge_run=0.1))
PHOTO = candidate(
    "cloud-photo", "cloud", input="photo", predicted=Terms(up=0.1, rtt=0.02, cloud_run=0.01), up_bytes=10**5
)
SPLIT = candidate("split-3-raw", "split", predicted=Terms(edge_run=0.08, up=0.08, cloud_run=0.01), cuts=("3",))


def plan_of(photos: Published, *candidates: Candidate, **changes: Any) -> Plan:
    plan = plan_for(photos.bundle, candidates[0], objective="throughput", **changes)
    return replace(plan, candidates=candidates)


def test_a_stage_has_its_hop_and_measured_computing_where_there_is_some() -> None:
    terms = Terms(0.001, 0.01, 0.002, 0.0003, 0.02, 0.02, 0.004, 0.0002, 0.005, 0.002)
    predicted = candidate(kind="split", predicted=terms, cuts=("3",))
    assert stage_seconds(predicted) == pytest.approx((0.0133, 0.02, 0.004, 0.0072))
    assert slowest_stage(predicted) == 0.02
    parts = {"preprocess": 0.002, "pack": 0.001, "edge": 0.03, "cloud": 0.06, "cloud_run": 0.01}
    measured = replace(predicted, measured=Measured(0.1, 0.1, 0.1, 3, parts))
    # The call to the cloud less the link: 60 - 20 - 4 - 20 ms.
    assert stage_seconds(measured) == pytest.approx((0.033, 0.02, 0.004, 0.016))


def test_a_plan_divides_requests_over_routes_with_different_bottlenecks(photos: Published) -> None:
    mix = planned_mix(plan_of(photos, EDGE, PHOTO, SPLIT))
    assert mix is not None
    assert mix.shares == pytest.approx({"edge-float": 0.5, "cloud-photo": 0.5})
    assert (mix.alone, mix.rate) == pytest.approx((10, 20))
    assert mix.used == pytest.approx({"edge": 1, "uplink": 1, "downlink": 0, "cloud": 0.1})
    # A hundredth more of the edge takes a hundredth more of its 10 requests a second.
    assert mix.prices == pytest.approx({"edge": 0.1, "uplink": 0.1, "downlink": 0, "cloud": 0})
    assert mix_reason(mix) == (
        "alone the choice serves 10.0 requests a second, 50% edge-float, 50% cloud-photo together 20.0: full are edge"
        " and uplink"
    )


def test_a_plan_without_a_second_bottleneck_says_so(photos: Published) -> None:
    mix = planned_mix(plan_of(photos, EDGE))
    assert mix is not None
    assert mix.shares == {"edge-float": 1}
    assert mix_reason(mix).endswith("and no division over several routes more: the edge is its limit")


def test_refused_and_degraded_candidates_have_no_share(photos: Published) -> None:
    int8 = candidate("edge-int8", predicted=Terms(edge_run=0.01), variant=DIGEST, error=Error(0.02, 5))
    refused = replace(PHOTO, refused="its error is 0.3, of 0.05")
    mix = planned_mix(plan_of(photos, EDGE, int8, refused))
    assert mix is not None
    assert set(mix.shares) == {"edge-float"}


def test_where_some_were_measured_the_others_have_no_share(photos: Published) -> None:
    measured = replace(EDGE, measured=Measured(0.1, 0.1, 0.1, 3, {"edge": 0.1}))
    mix = planned_mix(plan_of(photos, measured, PHOTO))
    assert mix is not None
    assert set(mix.shares) == {"edge-float"}


def test_the_candidates_of_the_best_division_are_measured() -> None:
    # Each alone is far behind the best, and a baseline has another name.
    splits = [
        candidate(f"split-{i}-raw", "split", cuts=(str(i),), predicted=Terms(edge_run=0.01 + i / 1e4, cloud_run=0.01))
        for i in range(12)
    ]
    other = candidate("cloud-jpeg-85", "cloud", input="photo", predicted=Terms(up=0.05, cloud_run=1e-4))
    names = {c.name for c in contenders([*splits, other], "throughput", Constraints())}
    assert "cloud-jpeg-85" in names
    assert "cloud-jpeg-85" not in {c.name for c in contenders([*splits, other], "latency", Constraints())}


def test_the_document_has_a_mix_only_where_the_plan_has_one(photos: Published) -> None:
    plain = plan_of(photos, EDGE, PHOTO)
    assert "mix" not in json.loads(to_json(plain))
    mixed = replace(plain, mix=planned_mix(plain))
    assert from_json(to_json(mixed)).mix == mixed.mix
    doc = json.loads(to_json(mixed))
    doc["mix"]["shares"] = {"split-9": 1.0}
    with pytest.raises(PlanMalformed, match="a mix with 'split-9', which is no candidate"):
        from_json(json.dumps(doc).encode())


def test_the_table_has_each_routes_requests_and_what_is_used(
    photos: Published, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(photos, EDGE, PHOTO)
    plan_text.show(replace(plan, mix=planned_mix(plan)))
    out = capsys.readouterr().out
    assert "the most requests a second, by several routes" in out
    rows = {cells[0]: cells for line in out.splitlines() if (cells := line.replace("│", " ").split())}
    assert rows["used"][1:] == ["100%", "20.0", "100%", "100%", "0%", "10%"]
    assert rows["cloud-photo"][1:3] == ["50%", "10.0"]
