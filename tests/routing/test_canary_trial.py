"""The verdict on a canary, by what the requests of its two versions show."""

from __future__ import annotations

from typing import Any

import pytest

from isthmus.artifacts.canary import Canary, CanaryRule
from isthmus.routing.canary_trial import CANARY, STABLE, CanaryTrial

RULE = CanaryRule(min_requests=20)


def trial(rule: CanaryRule = RULE) -> CanaryTrial:
    unused: Any = None
    return CanaryTrial(unused, Canary(2, "sha256:" + "0" * 64, 0.5, 1, rule), unused, unused)


def add(made: CanaryTrial, release: str, count: int, *, errors: int = 0, seconds: float = 0.1) -> None:
    for i in range(count):
        made.answered(release, seconds, is_error=i < errors)


def test_equal_versions_stay_on_trial() -> None:
    made = trial()
    for release in (STABLE, CANARY):
        add(made, release, 400, errors=4)
    for i in range(400):
        made.compared(agreed=i % 20 > 0)
    assert made.verdict() == ""


def test_errors_beyond_the_stable_versions_break_the_rule_from_enough_requests_on() -> None:
    made = trial()
    add(made, CANARY, 19, errors=19)
    assert made.verdict() == ""
    add(made, CANARY, 1, errors=1)
    assert made.verdict() == "errors"


def test_a_hop_that_is_away_for_both_versions_is_no_fault_of_the_canary() -> None:
    made = trial()
    for release in (STABLE, CANARY):
        add(made, release, 100, errors=60)
    assert made.verdict() == ""


def test_predictions_that_differ_beyond_chance_break_the_rule_from_enough_comparisons_on() -> None:
    made = trial()
    for i in range(19):
        made.compared(agreed=i % 2 == 0)
    assert made.verdict() == "", "one caller may have repeated one request"
    made.compared(agreed=False)
    assert made.verdict() == "disagreement"


def test_differences_within_chance_do_not_break_the_rule() -> None:
    made = trial()
    for i in range(40):
        made.compared(agreed=i % 8 > 0)
    assert made.verdict() == "", "5 of 40, where 4 are allowed"


def test_a_comparison_that_a_hop_prevented_shows_nothing() -> None:
    made = trial()
    for _ in range(50):
        made.compared(None)
    assert made.verdict() == ""


@pytest.mark.parametrize(("seconds", "verdict"), [(0.19, ""), (0.21, "latency")])
def test_a_median_beyond_the_ratio_breaks_the_rule(seconds: float, verdict: str) -> None:
    made = trial()
    add(made, STABLE, 20)
    add(made, CANARY, 20, seconds=seconds)
    assert made.verdict() == verdict


def test_a_fault_that_begins_late_shows() -> None:
    made = trial()
    add(made, STABLE, 100)
    add(made, CANARY, 2000)
    assert made.verdict() == ""
    add(made, CANARY, 60, errors=60)
    assert made.verdict() == "errors"
