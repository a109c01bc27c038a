"""Costs, constraints and the choice: arithmetic on made-up candidates."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from isthmus.artifacts.conditions import Conditions, Constraints, check_objective
from isthmus.artifacts.plan import Error, Measured, Terms
from isthmus.errors import ConstraintMalformed, Infeasible
from isthmus_tools.planner.choice import check_prices, choose, grid, over_link, violations
from isthmus_tools.planner.costs import (
    HEADERS_DOWN,
    HEADERS_UP,
    CallBytes,
    LinkPrices,
    Prices,
    RunTime,
    TierPrices,
    Workload,
    read_prices,
    terms,
    with_prices,
)
from isthmus_tools.planner.measurement import contenders
from support.plans import HOP, candidate

CPUS = {"edge": 2, "cloud": 4}
PRICES = Prices(TierPrices(1e-5, 10.0, 2.0), TierPrices(3e-5, 100.0, 0.0), LinkPrices(0.1, 0.0, 1e-7), "EUR")
PRICES_TOML = """
currency = "EUR"
[edge]
cpu_second = 1e-5
active_watts = 10
idle_watts = 2
[cloud]
cpu_second = 3e-5
active_watts = 100
idle_watts = 0
[link]
gb_up = 0.1
gb_down = 0
joules_per_byte = 1e-7
"""


def test_the_terms_of_a_split_are_what_each_part_takes() -> None:
    load = Workload(
        near=CallBytes(1000, 2000),
        far=CallBytes(10_000 - HEADERS_UP, 1000 - HEADERS_DOWN),
        edge=RunTime(0.01, "measured"),
        cloud=RunTime(0.004, "predicted"),
        preprocess_s=0.003,
        encode_s=0.001,
        decode_s=0.0005,
    )
    found = terms(load, HOP, HOP, Conditions(1e6, 2e6, 0.02))
    assert found.up == pytest.approx(10_000 * 8 / 1e6)
    assert found.down == pytest.approx(1000 * 8 / 2e6)
    assert found.rtt == 0.02
    assert found.edge_hop == pytest.approx(0.001 + 3000e-9)
    assert found.total == pytest.approx(sum(found.seconds.values()))
    assert found.edge_busy == pytest.approx(0.014)


def test_an_edge_candidate_pays_no_link() -> None:
    found = terms(
        Workload(near=CallBytes(1000, 10), edge=RunTime(0.01, "measured")), HOP, HOP, Conditions(1e3, 1e3, 1.0)
    )
    assert found.up == found.down == found.rtt == found.cloud_hop == 0
    assert found.total < 0.02


def test_the_fastest_candidate_that_may_serve_is_chosen_and_the_next_is_named() -> None:
    every, best, why = choose(
        [candidate("a", seconds=0.05), candidate("b", seconds=0.04), candidate("c", seconds=0.01, refused="broken")],
        "latency",
        Constraints(),
    )
    assert best.name == "b"
    assert "predicted only" in why[0]
    assert "the next is a, 25.0% worse" in why[1]
    assert [c.name for c in every] == ["a", "b", "c"]


def test_a_candidate_of_twice_the_value_is_a_multiple_and_no_percentage() -> None:
    _, _, why = choose([candidate("a", seconds=0.05), candidate("b", seconds=0.01)], "latency", Constraints())
    assert "the next is a, 5.0 times as much" in why[1]


def test_a_prediction_never_beats_a_measurement() -> None:
    measured = candidate("slow", seconds=0.05, measured=Measured(0.06, 0.05, 0.07, 5))
    _, best, why = choose([measured, candidate("hopeful", seconds=0.001)], "latency", Constraints())
    assert best.name == "slow"
    assert "measured" in why[0]


@pytest.mark.parametrize(
    ("constraints", "names", "said"),
    [
        (Constraints(edge_memory_bytes=10**6), "edge-memory", "2.0 MB at the edge, of 1.0 MB"),
        (Constraints(latency_s=0.01), "latency", "40 ms, of 10 ms"),
        (Constraints(max_error=0.001), "max-error", "error is 0.01"),
        (Constraints(max_error=1.0, max_disagreement=0.1), "max-disagreement", "20.0% of its answers differ"),
    ],
)
def test_a_constraint_that_nothing_keeps_is_named_with_the_nearest(
    constraints: Constraints, names: str, said: str
) -> None:
    near = candidate("near", seconds=0.04, edge_memory_bytes=2 * 10**6, error=Error(0.01, 5, 0.2))
    far = candidate("far", seconds=0.08, edge_memory_bytes=3 * 10**6, error=Error(0.02, 5, 0.4))
    with pytest.raises(Infeasible, match=said) as e:
        choose([far, near], "latency", constraints)
    assert e.value.facts["constraint"] == names
    assert e.value.facts["nearest"] == "near"
    assert e.value.facts["by"] == pytest.approx(e.value.facts["value"] - e.value.facts["limit"])


def test_constraints_that_only_contradict_each_other_are_named_together() -> None:
    small = candidate("small", seconds=0.08, edge_memory_bytes=10**6)
    quick = candidate("quick", seconds=0.01, edge_memory_bytes=10**8)
    with pytest.raises(Infeasible, match="edge-memory and latency at once"):
        choose([small, quick], "latency", Constraints(edge_memory_bytes=10**7, latency_s=0.05))


def test_calibrated_errors_have_no_default_limit() -> None:
    offered = candidate("offered", error=Error(0.2, 300, 0.003, calibrated=True))
    tried = candidate("tried", error=Error(0.2, 5))
    assert not violations(offered, Constraints())
    assert [b.constraint for b in violations(offered, Constraints(max_error=0.1))] == ["max-error"]
    assert [b.limit for b in violations(tried, Constraints())] == [0.05]


def test_a_refusal_says_every_constraint_that_is_broken() -> None:
    bad = candidate("bad", seconds=1.0, error=Error(0.5, 1), edge_memory_bytes=10**9)
    limits = Constraints(edge_memory_bytes=1, latency_s=0.1)
    assert [b.constraint for b in violations(bad, limits)] == ["edge-memory", "latency", "max-error"]
    every, _, _ = choose([bad, candidate("good", seconds=0.01)], "latency", limits)
    assert every[0].refused.count(";") == 2


@pytest.mark.parametrize(
    "arguments",
    [
        {"edge_memory_bytes": -1},
        {"edge_memory_bytes": 0},
        {"private_depth": -1},
        {"latency_s": 0},
        {"latency_s": math.nan},
        {"max_error": -0.1},
        {"max_disagreement": math.inf},
    ],
    ids=str,
)
def test_constraints_that_cannot_be_meant_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ConstraintMalformed) as e:
        Constraints(**arguments)  # type: ignore[arg-type]
    assert e.value.facts["what"] == next(iter(arguments))


@pytest.mark.parametrize("arguments", [(0,), (-1e6,), (math.nan,), (1e6, 0), (1e6, 1e6, -0.1), (1e6, 1e6, math.inf)])
def test_links_that_cannot_be_are_refused(arguments: tuple[float, ...]) -> None:
    with pytest.raises(ConstraintMalformed):
        Conditions(*arguments)


def test_an_objective_is_one_that_there_is() -> None:
    assert check_objective("energy") == "energy"
    with pytest.raises(ConstraintMalformed, match="latency, throughput, cost, energy"):
        check_objective("joy")


def test_money_and_joules_need_their_prices() -> None:
    with pytest.raises(ConstraintMalformed, match=r"edge\.cpu_second") as e:
        check_prices("cost", Constraints(latency_s=0.05), None)
    assert "another --objective" in e.value.hint
    with pytest.raises(ConstraintMalformed, match="joules_per_byte"):
        check_prices("energy", Constraints(), replace(PRICES, link=LinkPrices(0.1, 0.0)))
    check_prices("cost", Constraints(), PRICES)
    check_prices("latency", Constraints(), None)


def test_a_candidate_costs_what_its_seconds_and_bytes_cost() -> None:
    busy = Terms(preprocess=0.1, edge_run=0.3, pack=0.1, up=1.0, unpack=0.05, cloud_run=0.15)
    found = with_prices(candidate("c", "split", predicted=busy, cuts=("1",), up_bytes=10**6), PRICES, CPUS)
    assert found.price == pytest.approx(0.5 * 2 * 1e-5 + 0.2 * 4 * 3e-5 + 1e6 / 1e9 * 0.1)
    assert found.energy_j == pytest.approx(0.5 * 10 + 1.2 * 2 + 0.2 * 100 + 1e6 * 1e-7)


def test_the_cheapest_that_meets_a_latency_is_chosen() -> None:
    quick = candidate("quick", "cloud", predicted=Terms(cloud_run=0.01), up_bytes=10**6)
    frugal = candidate("frugal", "edge", predicted=Terms(edge_run=0.04))
    late = candidate("late", "edge", predicted=Terms(edge_run=0.0001, up=1.0))
    every = [with_prices(c, PRICES, CPUS) for c in (quick, frugal, late)]
    assert choose(every, "cost", Constraints(latency_s=0.05))[1].name == "frugal"
    assert choose(every, "cost", Constraints(latency_s=0.03))[1].name == "quick"


def test_throughput_is_the_slowest_stage() -> None:
    serial = candidate("serial", predicted=Terms(edge_run=0.05))
    parallel = candidate("parallel", "split", predicted=Terms(edge_run=0.03, up=0.03, cloud_run=0.03), cuts=("1",))
    assert choose([serial, parallel], "latency", Constraints())[1].name == "serial"
    assert choose([serial, parallel], "throughput", Constraints())[1].name == "parallel"


def test_prices_are_read_from_toml(tmp_path: Path) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(PRICES_TOML)
    assert read_prices(path) == PRICES


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[edge]\ncpu_second = -1", "edge.cpu_second is -1"),
        ("[edge]\ncpu_second = true", "edge.cpu_second"),
        ("[edge]\ncpu_second = inf", "edge.cpu_second"),
        ("[edge]\nprice = 1", "price"),
        ("[fog]\ncpu_second = 1", "fog"),
        ("edge = 1", "table"),
        ("currency = 7", "currency"),
        ("[edge", "cannot be read"),
    ],
)
def test_prices_that_cannot_be_read_are_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(text)
    with pytest.raises(ConstraintMalformed, match=said):
        read_prices(path)
    with pytest.raises(ConstraintMalformed, match="cannot be read"):
        read_prices(tmp_path / "none.toml")


def test_a_measurement_moves_to_another_link_by_its_bytes() -> None:
    here = candidate(
        "c", "cloud", predicted=Terms(cloud_run=0.01, up=0.1, rtt=0.02), up_bytes=125_000 - HEADERS_UP,
        measured=Measured(0.14, 0.13, 0.15, 5),
    )  # fmt: skip
    there = over_link(here, Conditions(1e6, math.inf, 0.001))
    assert there.predicted.up == pytest.approx(1.0)
    assert there.seconds == pytest.approx(0.14 + 0.9 - 0.019)
    stays = candidate("e", measured=Measured(0.05, 0.05, 0.05, 5))
    assert over_link(stays, Conditions(1e3)).seconds == 0.05


def test_the_grid_has_the_best_of_every_link() -> None:
    edge = candidate("edge-float", seconds=0.05)
    cloud = candidate("cloud-raw", "cloud", predicted=Terms(cloud_run=0.01), up_bytes=100_000)
    rows = grid([edge, cloud], "latency", Constraints(), rates=(1e6, 100e6), round_trips=(0.001, 0.08))
    assert [[cell.best for cell in row] for row in rows] == [["edge-float", "cloud-raw"], ["edge-float", "edge-float"]]
    nobody = grid([edge], "latency", Constraints(latency_s=0.01), rates=(1e6,), round_trips=(0.001,))
    assert nobody[0][0].best == ""


def test_promising_candidates_are_measured_and_the_baselines_always() -> None:
    splits = [candidate(f"split-{i}-raw", "split", seconds=0.02 + i / 1000, cuts=(str(i),)) for i in range(20)]
    baselines = [candidate("edge-float", seconds=0.5), candidate("cloud-raw", "cloud", seconds=2.0)]
    wrong = candidate("split-9-int4", "split", seconds=0.001, cuts=("9",), error=Error(0.5, 3))
    names = [c.name for c in contenders([*splits, wrong, *baselines], "latency", Constraints())]
    assert {"edge-float", "cloud-raw", "split-0-raw"} <= set(names)
    assert "split-9-int4" not in names
    assert "split-19-raw" not in names
    assert len(names) <= 12
