"""Cells of the map measured: the requested one, borders and centres, each with the best and its rival."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from isthmus.artifacts.conditions import Conditions
from isthmus.artifacts.plan import Measured, Terms
from isthmus.errors import RequestMalformed
from isthmus.serving import create_segment_app
from isthmus.settings import RegistrySettings
from isthmus_tools.budget import Budget
from isthmus_tools.planner.regions import RegionCell, RegionMap, region_map
from isthmus_tools.profiling import profiles, slow_edge
from isthmus_tools.profiling.slow_edge import SlowEdge
from isthmus_tools.usecases.function_urls import FunctionUrls
from isthmus_tools.usecases.map_check import CheckedCell, cells_to_check, check_map
from isthmus_tools.usecases.plan import PlanRequest, plan
from support.bundles import publish_photos, segment_settings, served
from support.plans import candidate, profile_of

LEADS = ((0.5, 0.02, None), (0.01, 0.3, 0.9))
CELLS = tuple(
    tuple(
        RegionCell(float(s + 1), Conditions(10.0**n, 10.0**n), region, f"{region}-{s}{n}", 1.0, lead, "x")
        for n, (region, lead) in enumerate(zip(("edge", "split", "cloud"), row, strict=True))
    )
    for s, row in enumerate(LEADS)
)


def test_the_requested_cell_goes_first_then_borders_and_centres_by_turns() -> None:
    regions = RegionMap("latency", 0.02, 1.0, 1.0, True, CELLS)
    names = [cell.best for cell in cells_to_check(regions, 9)]
    # The one without a rival is left out; the edge's centre is the requested cell.
    assert names == ["edge-00", "edge-10", "split-01", "cloud-12", "split-11"]
    assert [cell.best for cell in cells_to_check(regions, 2)] == names[:2]
    unlimited = replace(regions, uplink_bps=float("inf"))
    assert cells_to_check(unlimited, 1)[0].best == "edge-10"


def test_a_cell_is_as_predicted_where_its_best_is_measured_best() -> None:
    def measured(name: str, seconds: float | None) -> CheckedCell:
        other = None if seconds is None else Measured(seconds, seconds, seconds, 3)
        first = candidate("edge-00", predicted=Terms(edge_run=0.2), measured=Measured(0.25, 0.2, 0.3, 3))
        rival = candidate(name, "split", cuts=("6",), predicted=Terms(edge_run=0.4), measured=other)
        return CheckedCell(CELLS[0][0], "latency", (first, rival))

    assert (measured("x", 0.3).measured_best, measured("x", 0.3).as_predicted) == ("edge-00", True)
    assert (measured("x", 0.2).measured_best, measured("x", 0.2).as_predicted) == ("x", False)
    assert (measured("x", None).measured_best, measured("x", None).as_predicted) == ("", False)
    assert measured("x", 0.2).gaps == pytest.approx([0.25, -0.5])
    assert measured("x", None).document()["candidates"][1] == {"name": "x", "predicted_s": 0.4, "measured_s": None}


def test_cells_are_measured_with_their_own_edge_and_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = publish_photos(tmp_path)
    for tier, seconds in (("edge", 0.004), ("cloud", 0.001)):
        profiles.put(published.registry, profile_of(published, tier, seconds))
    # This process holds both functions and never waits.
    monkeypatch.setattr(slow_edge, "_MAX_WAITS", 0)
    apps = [create_segment_app(segment_settings(published, tmp_path / name)) for name in ("head", "tail")]
    with served(apps[0]) as head, served(apps[1]) as tail:
        request = PlanRequest(
            model="photos",
            registry=RegistrySettings(registry=str(published.folder), cache_dir=str(tmp_path / "cache")),
            conditions=Conditions(10e6, 10e6, 0.01),
            functions=FunctionUrls(head, tail, edge=SlowEdge(4.0, [os.getpid()])),
            predict_only=True,
            int8=False,
        )
        with plan(request) as result:
            regions = region_map(result.plan, rates=(1e6, 100e6), slowdowns=(1, 64))
            (checked,) = check_map(request, result, regions, 1)
            assert check_map(replace(request, budget=Budget(0.0)), result, regions, 1) == []
            predicted_only = replace(request, functions=FunctionUrls(head, tail))
            with pytest.raises(RequestMalformed, match="--local --edge-slowdown N"):
                check_map(predicted_only, result, regions, 1)
    assert [c.name for c in checked.candidates] == [checked.cell.best, checked.cell.other]
    for c in checked.candidates:
        assert c.measured is not None
        assert c.measured.runs == 7
        if c.kind != "edge":
            link = checked.cell.conditions
            assert c.measured.median >= link.rtt_s + c.up_bytes * link.up_byte_s
