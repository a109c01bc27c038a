"""The map of where splitting pays: regions by edge slowdown and bandwidth."""

from __future__ import annotations

import math
from typing import Any

import pytest
from msgspec.structs import replace

from isthmus.artifacts.conditions import Conditions, Constraints
from isthmus.artifacts.plan import Candidate, Error, Measured, Plan, Terms
from isthmus_tools.planner.regions import REGIONS, cell_candidates, planned_slowdown, region_map, slower_edge
from support.bundles import Published
from support.bundles import photos as photos
from support.plans import candidate, plan_for

EDGE = candidate("edge-float", predicted=Terms(preprocess=0.004, edge_run=0.04))
CLOUD = candidate("cloud-raw", "cloud", predicted=Terms(preprocess=0.004, cloud_run=0.01), up_bytes=20_000)
SPLIT = candidate(
    "split-3-int8",
    "split",
    cuts=("3",),
    predicted=Terms(preprocess=0.004, edge_run=0.01, pack=0.002, cloud_run=0.0075),
    up_bytes=2_000,
)


def plan_of(published: Published, *candidates: Candidate, **changes: Any) -> Plan:
    changes = {"conditions": Conditions(1e6, 1e6, 0.01), "chosen": candidates[0].name} | changes
    return plan_for(published.bundle, candidates[0], candidates=candidates, **changes)


def test_a_fast_edge_keeps_the_model_and_a_slow_one_splits_or_sends_by_the_link(photos: Published) -> None:
    found = region_map(plan_of(photos, EDGE, CLOUD, SPLIT), slowdowns=(1, 16), rates=(0.1e6, 2e6, 100e6))
    assert [[c.region for c in row] for row in found.cells] == [["edge", "edge", "edge"], ["edge", "split", "cloud"]]
    assert found.counts == {"edge": 4, "cloud": 1, "split": 1}
    assert (found.planned, found.over_cloud) == (4.0, True)
    # 16 is four times the plan's edge: all of the edge's work takes four times as long.
    cell = found.cells[1][1]
    assert cell.best == "split-3-int8"
    seconds = 4 * 0.016 + 0.0075 + (2_000 + 340) * 8 / 2e6 + 420 * 8 / 2e6 + 0.01
    assert cell.seconds == pytest.approx(seconds)
    cloud = 4 * 0.004 + 0.01 + (20_000 + 340) * 8 / 2e6 + 420 * 8 / 2e6 + 0.01
    assert (cell.other, cell.lead) == ("cloud-raw", pytest.approx(cloud / seconds - 1))


def test_the_candidates_of_a_cell_have_its_edge_and_link(photos: Published) -> None:
    plan = plan_of(photos, EDGE, CLOUD, replace(SPLIT, measured=Measured(9.0, 9.0, 9.0, 3)))
    found = region_map(plan, slowdowns=(16,), rates=(2e6,), planned=8.0)
    cell = found.cells[0][0]
    assert found.planned == 8.0
    best, other = cell_candidates(plan, found, cell)
    assert (best.name, other.name) == (cell.best, cell.other)
    assert best.predicted.total == pytest.approx(cell.seconds)
    assert other.predicted.total == pytest.approx(cell.seconds * (1 + (cell.lead or 0)))
    assert best.measured is None


def test_the_requested_cell_is_the_nearest_to_the_plans_edge_and_link(photos: Published) -> None:
    plan = plan_of(photos, EDGE, CLOUD, conditions=Conditions(1.2e6, 0.3e6, 0.01))
    found = region_map(plan)
    requested = found.requested()
    assert requested is not None
    assert (requested.slowdown, requested.conditions.up_bps) == (4.0, 1e6)
    assert requested.conditions.down_bps == pytest.approx(0.25e6)
    assert found.document()["requested"] == {"edge_slowdown": 4.0, "bandwidth_bps": 1.2e6}
    unlimited = region_map(plan_of(photos, EDGE, CLOUD, conditions=Conditions()))
    assert unlimited.requested() is None
    assert unlimited.document()["requested"]["bandwidth_bps"] is None


def test_without_cloud_only_slowdowns_are_over_the_planned_edge(photos: Published) -> None:
    found = region_map(plan_of(photos, EDGE, SPLIT), slowdowns=(1,), rates=(0.1e6,))
    assert (found.planned, found.over_cloud) == (1.0, False)
    assert found.cells[0][0].seconds == EDGE.seconds
    assert planned_slowdown([EDGE]) is None


def test_what_is_refused_on_every_link_is_in_no_cell_and_constraints_hold(photos: Published) -> None:
    failed = replace(SPLIT, refused="it failed: no route")
    wrong = replace(SPLIT, name="split-3-int4", error=Error(0.5, 3))
    late = replace(EDGE, refused="it takes 44 ms, of 10 ms")
    plan = plan_of(photos, CLOUD, failed, wrong, late, constraints=Constraints(latency_s=0.03), chosen="cloud-raw")
    found = region_map(plan, slowdowns=(1, 3, 16), rates=(0.1e6, 100e6))
    assert [[c.best for c in row] for row in found.cells] == [
        ["edge-float", "edge-float"],
        ["", "cloud-raw"],
        ["", ""],
    ]
    assert found.counts == {"edge": 2, "cloud": 1, "split": 0}
    assert set(found.counts) == set(REGIONS)


def test_throughput_maps_the_slowest_stage_and_prices_map_latency(photos: Published) -> None:
    plan = plan_of(photos, EDGE, CLOUD, objective="throughput")
    assert region_map(plan, slowdowns=(4,), rates=(1e9,)).cells[0][0].seconds == pytest.approx(0.01)
    assert region_map(replace(plan, objective="cost")).objective == "latency"


def test_a_slower_edge_leaves_link_and_cloud_as_they_are() -> None:
    terms = Terms(1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    slowed = slower_edge(replace(SPLIT, predicted=terms), 10).predicted
    assert list(slowed.seconds.values()) == [10, 20, 30, 40, 5, 6, 7, 8, 9, 10]
    assert math.isclose(slowed.total, sum(slowed.seconds.values()))
