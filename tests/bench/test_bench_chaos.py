"""How bench/chaos.py judges: when routes to the cloud are back, and around which fault a request counts."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest

from support.paths import ROOT


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("chaos"), importlib.import_module("traffic")


def outcome(traffic: ModuleType, routes: str, start: float = 100.0) -> Any:
    """An exchange a second; c and e are routes to the cloud and at the edge."""
    names = {"c": "cloud-photo", "e": "edge-float"}
    exchanges = [
        traffic.Exchange(0, start + i, start + i, start + i + 0.1, 200, names[letter])
        for i, letter in enumerate(routes)
    ]
    return traffic.Outcome(exchanges, float(len(routes)))


@pytest.mark.parametrize(
    ("routes", "back_s"),
    [
        ("ccccccccc", 0.0),
        ("eeccccccccc", 2.0),
        ("eceeeeeecccccccc", 8.0),
        ("ceccccccc", 0.0),
        ("eeeeeee", float("inf")),
    ],
)
def test_routes_are_back_once_they_have_most_of_the_requests_that_follow(
    bench: Any, routes: str, back_s: float
) -> None:
    chaos, traffic = bench
    nothing = traffic.Outcome([], 1.0)
    judged = chaos.Judged(chaos.Fault("killed", 90.0, 100.0), nothing, nothing, outcome(traffic, routes))
    assert judged.back_s == back_s


def test_requests_count_before_during_and_after_a_fault(bench: Any) -> None:
    chaos, traffic = bench
    taken = [chaos.Fault("killed", 105.0, 108.0), chaos.Fault("stopped", 112.0, 115.0)]
    first, second = chaos._judge(outcome(traffic, "c" * 20), taken)
    assert [len(part) for part in (first.before, first.during, first.after)] == [5, 3, 4]
    assert [len(part) for part in (second.before, second.during, second.after)] == [4, 3, 4]
