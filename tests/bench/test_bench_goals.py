"""The codec benchmark states a goal in a quick run only where the number of inputs decides it."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from support.paths import ROOT

BENCH = ROOT / "bench"


@pytest.fixture
def curves(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("codec_curves")


def comparison(curves: Any, share: float, goal: float) -> Any:
    """Ours takes 100 to 10,000 bytes as shares rise from 50% to 100%, the peer twice as many."""
    shares = [0.5 + n / 100 for n in range(51)]
    points = [curves.Point("ours", 100 * 100 ** ((s - 0.5) / 0.5), 1, s, s, s, 0, 1, 1) for s in shares]
    return curves.Comparison("c", share, goal, points, lambda share: 2 * curves.bytes_at(points, share))


@pytest.mark.parametrize(
    ("share", "inputs", "decided"),
    [(0.95, 64, False), (0.95, 199, False), (0.95, 200, True), (0.99, 597, False), (0.99, 1000, True), (0.7, 64, True)],
)
def test_a_share_is_decided_that_ten_inputs_may_miss(curves: Any, share: float, inputs: int, decided: bool) -> None:
    assert comparison(curves, share, 1.9).decided(inputs) is decided
    assert comparison(curves, share, 2.1).decided(inputs) is decided


def test_a_goal_that_is_met_at_one_end_of_the_interval_only_is_not_decided(curves: Any) -> None:
    fixed = curves.Comparison("c", 0.7, 8, comparison(curves, 0.7, 8).ours, lambda _: 8 * 631.0)
    assert fixed.times_fewer(0.7) == pytest.approx(8, rel=0.01)
    assert not fixed.decided(64)
    assert not fixed.decided(1000)
    assert curves.Comparison("c", 0.7, 1, fixed.ours, fixed.theirs).decided(64)


def test_a_curve_that_never_keeps_so_many_counts_as_no_gain(curves: Any) -> None:
    never = curves.Comparison("c", 0.9, 1.5, [], lambda _: 100.0)
    assert never.times_fewer(0.9) == 0
    assert never.decided(200)
