"""Successive elimination on made-up timings, and the time budget of long work."""

from __future__ import annotations

import pytest

from isthmus.errors import HopUnavailable, IsthmusError
from isthmus_tools.budget import Budget, Pace
from isthmus_tools.planner.elimination import successive_elimination


def test_dominated_candidates_stop_early_and_leaders_run_every_round() -> None:
    took = {"best": 0.010, "close": 0.0101, "behind": 0.013, "hopeless": 0.05}
    runs = {name: lambda n, s=s: {"total": s * (1 + n % 3 / 20), "edge": s / 2} for name, s in took.items()}
    found = successive_elimination(runs, rounds=12)
    assert found["hopeless"].runs == 1
    assert 1 < found["behind"].runs < 12
    assert found["best"].runs == found["close"].runs == 12
    assert found["best"].low <= found["best"].median <= found["best"].high
    assert found["best"].parts["edge"] == pytest.approx(0.005)


def test_a_single_slow_request_eliminates_no_candidate_predicted_near_the_best() -> None:
    def run(name: str, seconds: float, n: int) -> dict[str, float]:
        return {"total": seconds * (3 if name == "unlucky" and n == 0 else 1)}

    took = {"best": 0.010, "unlucky": 0.009, "hopeless": 0.05}
    runs = {name: lambda n, name=name, s=s: run(name, s, n) for name, s in took.items()}
    found = successive_elimination(runs, expected={"best": 0.010, "unlucky": 0.011, "hopeless": 0.06}, rounds=10)
    assert found["unlucky"].median == 0.009
    assert found["unlucky"].runs > 3
    assert found["hopeless"].runs == 1
    assert successive_elimination(runs, rounds=10)["unlucky"].runs == 1


def test_an_excluded_candidate_eliminates_no_other() -> None:
    took = {"best": 0.010, "close": 0.0102, "quick but wrong": 0.001}
    runs = {name: lambda n, s=s: {"total": s * (1 + n % 3 / 20)} for name, s in took.items()}
    found = successive_elimination(runs, rounds=8, excluded={"quick but wrong"})
    assert found["quick but wrong"].runs == 3
    assert found["best"].runs == found["close"].runs == 8
    assert successive_elimination({"only": runs["best"]}, rounds=8, excluded={"only"})["only"].runs == 3


def test_without_elimination_every_candidate_runs_every_round() -> None:
    order: list[str] = []

    def run(name: str, seconds: float) -> dict[str, float]:
        order.append(name)
        return {"total": seconds}

    runs = {"a": lambda n: run("a", 1.0), "b": lambda n: run("b", 9.0)}
    found = successive_elimination(runs, rounds=4, eliminate=False)
    assert [m.runs for m in found.values()] == [4, 4]
    assert all(set(order[i : i + 2]) == {"a", "b"} for i in range(0, 8, 2))


def test_a_candidate_that_fails_stops_and_the_others_go_on() -> None:
    def run(n: int) -> dict[str, float]:
        if n == 2:
            raise HopUnavailable("away", hop="tail")
        return {"total": 1.0}

    failed: dict[str, IsthmusError] = {}
    found = successive_elimination({"a": lambda n: {"total": 1.0}, "b": run}, rounds=4, eliminate=False, failed=failed)
    assert {name: m.runs for name, m in found.items()} == {"a": 4}
    assert {name: str(e) for name, e in failed.items()} == {"b": "away"}
    with pytest.raises(HopUnavailable):
        successive_elimination({"b": run}, rounds=4)


class Clock:
    """Seconds that pass when something takes them."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def takes(self, seconds: float) -> None:
        self.now += seconds


def test_elimination_ends_with_its_budget_after_measuring_the_most_promising() -> None:
    clock = Clock()

    def run(name: str, n: int) -> dict[str, float]:
        clock.takes(10)
        return {"total": 1.0}

    expected = {"c": 3.0, "a": 1.0, "b": 2.0}
    runs = {name: lambda n, name=name: run(name, n) for name in expected}
    found = successive_elimination(runs, expected=expected, budget=Budget(15, clock))
    assert set(found) == {"a", "b"}
    assert clock.now == 120
    assert set(successive_elimination(runs, expected=expected, budget=Budget(0, clock))) == {"a"}, (
        "one is measured in any case"
    )


def test_a_budget_has_shares_and_a_pace_says_what_is_left() -> None:
    clock = Clock()
    budget, pace = Budget(100, clock), Pace(10, clock)
    assert pace.left(0) == ""
    clock.takes(41)
    assert budget.share(0.4).spent
    assert not budget.share(0.7).spent
    assert pace.left(4) == ", about 62 s left"
    assert pace.left(1) == ", about 6 min left"
    assert pace.left(10) == ""
    assert not Budget(clock=clock).spent
