"""The plan benchmark says in how many cells a split is measured best, and beside what."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from isthmus.artifacts.conditions import Conditions
from isthmus.artifacts.plan import Measured
from support.paths import ROOT
from support.plans import candidate


@pytest.fixture
def plan_bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("plan")


def duel(plan_bench: Any, predicted: str, **seconds: float) -> Any:
    best = {
        kind: candidate(
            f"{kind}-x",
            kind,
            cuts=("6",) if kind == "split" else (),
            measured=Measured(s, s, s, 3, {"cloud_run": 0.002 if kind == "split" else 0.005}),
        )
        for kind, s in seconds.items()
    }
    return plan_bench.Rivals("m", 8.0, Conditions(1e6, 1e6, 0.02), best, predicted)


def test_a_split_gains_over_the_best_of_the_rest_and_over_the_edge_where_inputs_stay(plan_bench: Any) -> None:
    behind = duel(plan_bench, "split", split=0.2, edge=0.25, cloud=0.1)
    assert (behind.kind, behind.gain, behind.private_gain) == ("cloud", pytest.approx(-0.5), pytest.approx(0.25))
    ahead = duel(plan_bench, "split", split=0.2, edge=0.25, cloud=0.3)
    assert (ahead.kind, ahead.gain) == ("split", pytest.approx(0.25))
    alone = duel(plan_bench, "split", split=0.2)
    assert (alone.kind, alone.gain, alone.private_gain) == ("", None, None)
    (row,) = plan_bench._counts([behind, ahead, duel(plan_bench, "edge", split=0.3, edge=0.1)])
    expected = {"cells": 3, "split best in": 1, "private split best in": 2, "best as predicted in": 2}
    assert {name: row[name] for name in expected} == expected
    assert row["median gain %"] == pytest.approx(25)


def test_what_else_differs_has_a_row_for_each_kind(plan_bench: Any) -> None:
    rows = plan_bench._other_reasons([duel(plan_bench, "split", split=0.2, edge=0.25, cloud=0.1)])
    assert [(row["kind"], row["cloud run ms"]) for row in rows] == [("split", 2.0), ("edge", 5.0), ("cloud", 5.0)]
