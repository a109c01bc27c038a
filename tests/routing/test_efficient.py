"""The candidates of a plan that a router chooses from."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.conditions import Constraints
from isthmus.artifacts.plan import Candidate, Coding, Error, Measured, Plan, Terms
from isthmus.routing.efficient import MAX_CANDIDATES, degradation_of, efficient_candidates
from support.bundles import Published, photos  # noqa: F401 - a fixture
from support.plans import DIGEST, plan_for

EDGE = Candidate("edge-float", "edge", Terms(edge_run=0.1))
INT8 = Candidate("edge-int8", "edge", Terms(edge_run=0.04), variant=DIGEST, error=Error(0.2, 50, 0.04))
PHOTO = Candidate(
    "cloud-photo", "cloud", Terms(cloud_run=0.02), input="photo", codecs={"x": Coding("photo/1")}, up_bytes=90_000
)


def split(cut: str, edge_s: float, up_bytes: int, error: Error | None = None, **facts: Any) -> Candidate:
    terms = Terms(edge_run=edge_s, cloud_run=0.01)
    return Candidate(f"split-{cut}", "split", terms, (cut,), up_bytes=up_bytes, error=error or Error(0, 5), **facts)


@pytest.fixture
def bundle(photos: Published) -> Bundle:  # noqa: F811
    return photos.bundle


def plan(bundle: Bundle, *candidates: Candidate, **changes: Any) -> Plan:
    return plan_for(bundle, candidates[0], candidates=candidates, **changes)


def kept(bundle: Bundle, *candidates: Candidate, **changes: Any) -> list[str]:
    return [c.name for c in efficient_candidates(plan(bundle, *candidates, **changes))]


def test_the_choice_is_first_and_edge_int8_and_photo_are_always_candidates(bundle: Bundle) -> None:
    assert kept(bundle, split("1", 0.02, 5000), PHOTO, EDGE, INT8) == [
        "split-1",
        "cloud-photo",
        "edge-float",
        "edge-int8",
    ]


def test_a_refused_candidate_is_never_one(bundle: Bundle) -> None:
    assert kept(bundle, EDGE, replace(PHOTO, refused="its error is 0.3"), replace(INT8, refused="it failed")) == [
        "edge-float"
    ]


def test_no_photo_leaves_the_edge_under_a_private_depth(bundle: Bundle) -> None:
    private = Constraints(private_depth=2)
    assert kept(bundle, EDGE, PHOTO, split("3", 0.05, 4000), constraints=private) == ["edge-float", "split-3"]


def test_a_dominated_candidate_is_left_out(bundle: Bundle) -> None:
    better, worse = split("1", 0.02, 5000), split("3", 0.03, 6000)
    assert kept(bundle, EDGE, worse, better) == ["edge-float", "split-1"]


def test_a_candidate_that_costs_more_and_errs_less_is_no_worse(bundle: Bundle) -> None:
    coarse, fine = split("1", 0.02, 5000, Error(0.1, 5)), split("3", 0.03, 6000, Error(0.01, 5))
    assert {"split-3", "split-1"} <= set(kept(bundle, EDGE, fine, coarse))


def test_candidates_that_tie_are_not_left_out_together(bundle: Bundle) -> None:
    ties = [split(str(i), 0.02 + 0.0001 * i, 5000 - 20 * i) for i in range(3)]
    assert {"split-0", "split-1", "split-2"} <= set(kept(bundle, EDGE, *ties))


def test_of_many_efficient_candidates_measured_ones_and_the_best_for_some_link_stay(bundle: Bundle) -> None:
    many = [split(str(i), 0.001 * 1.1**i, int(2**20 * 0.8**i)) for i in range(40)]
    many[17] = replace(many[17], measured=Measured(0.1, 0.1, 0.1, 5))
    names = kept(bundle, EDGE, *many)
    assert len(names) == MAX_CANDIDATES
    # A narrow link takes the fewest bytes.
    assert {"edge-float", "split-17", "split-38"} <= set(names)


def test_rounding_is_no_degradation(bundle: Bundle) -> None:
    rounded = split("1", 0.02, 5000, Error(1e-6, 5))
    assert degradation_of(rounded, plan(bundle, EDGE, rounded)) == ""


def test_a_candidate_further_from_the_model_than_the_choice_is_degraded(bundle: Bundle) -> None:
    coarse = split("1", 0.02, 5000, Error(0.02, 5))
    assert degradation_of(coarse, plan(bundle, EDGE, coarse)) == "outputs within 2.00% of the model's"
    assert degradation_of(EDGE, plan(bundle, coarse, EDGE)) == ""


def test_what_calibration_or_a_constraint_allows_is_not_degraded(bundle: Bundle) -> None:
    calibrated = split("1", 0.02, 5000, Error(0.02, 200, 0.005, calibrated=True))
    assert degradation_of(calibrated, plan(bundle, EDGE, calibrated)) == ""
    trial = split("3", 0.02, 5000, Error(0.02, 5))
    assert degradation_of(trial, plan(bundle, EDGE, trial, constraints=Constraints(max_error=0.03))) == ""


def test_the_int8_variant_is_degraded_wherever_it_is_not_the_choice(bundle: Bundle) -> None:
    allowed = Constraints(max_disagreement=0.05)
    text = degradation_of(INT8, plan(bundle, EDGE, INT8, constraints=allowed))
    assert text == "96.0% of 50 inputs have the model's prediction"
    assert degradation_of(INT8, plan(bundle, INT8, EDGE)) == ""
