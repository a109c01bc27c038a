"""A plan after a calibration that learned new tables, or after a new exit: renewed, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from isthmus.artifacts.bundle import Blob, digest_of, subject_digest
from isthmus.artifacts.conditions import Constraints
from isthmus.artifacts.fidelity import Fidelity
from isthmus.artifacts.plan import Coding, Error, Measured, Plan, PlannedExit, Sources, Terms
from isthmus_tools.planner.publishing import carry_over, renew, renew_exit
from support.bundles import Published, publish_photos
from support.edge_extras import BOUND, with_served_exit, with_variants
from support.fidelities import entry, fidelity
from support.plans import candidate, plan_for

MEASURED = Measured(0.07, 0.065, 0.08, 12)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return publish_photos(tmp_path_factory.mktemp("photos"))


def planned(photos: Published, **changes: Any) -> Plan:
    codecs = {"r3": Coding("transform/4", 0.5)}
    split = candidate("split-3-transform-50", "split", cuts=("3",), codecs=codecs, up_bytes=900, measured=MEASURED)
    return plan_for(photos.bundle, split, **changes)


def measured(photos: Published, *entries: Any) -> Fidelity:
    return structs.replace(fidelity(subject_digest(photos.bundle)), entries=entries)


def test_the_quality_stays_where_it_is_on_offer_and_bytes_follow_the_new_tables(photos: Published) -> None:
    after = structs.replace(photos.bundle, tables={"r3": Blob(digest_of(b"new"), 3)})
    earlier = measured(photos, entry("transform/4", 0.5, 400))
    later = measured(photos, entry("transform/4", 0.5, 450, agreement=0.995), entry("transform/4", 0.6, 500))
    renewed = renew(planned(photos), photos.bundle, after, earlier, later)
    assert renewed is not None
    assert renewed.subject == subject_digest(after)
    choice = renewed.choice
    assert (choice.name, choice.codecs, choice.up_bytes) == (
        "split-3-transform-50",
        {"r3": Coding("transform/4", 0.5)},
        950,
    )
    assert choice.measured == MEASURED
    assert choice.error.disagreement == pytest.approx(0.005)
    assert choice.error.calibrated


def test_a_finer_quality_takes_the_place_of_one_no_longer_on_offer_unmeasured(photos: Published) -> None:
    later = measured(
        photos,
        entry("transform/4", 0.5, 450, agreement=0.9, offered=False),
        entry("transform/4", 0.8, 700),
        entry("transform/4", 0.6, 500),
        entry("transform/4", 0.4, 300),
    )
    renewed = renew(planned(photos), photos.bundle, photos.bundle, None, later)
    assert renewed is not None
    assert (renewed.chosen, renewed.choice.codecs["r3"].quality) == ("split-3-transform-60", 0.6)
    assert renewed.choice.measured is None
    assert "0.5 is no longer on offer" in renewed.why[-1]


@pytest.mark.parametrize("why", ["coarser alone", "constraint", "other weights", "other processing", "no table needed"])
def test_a_plan_without_a_successor_is_not_renewed(photos: Published, why: str, tmp_path: Path) -> None:
    plan, after = planned(photos), photos.bundle
    later = measured(photos, entry("transform/4", 0.6, 500, agreement=0.991))
    assert renew(plan, photos.bundle, after, None, later) is not None
    if why == "coarser alone":
        later = measured(photos, entry("transform/4", 0.4, 300))
    elif why == "constraint":
        plan = planned(photos, constraints=Constraints(max_disagreement=0.001))
    elif why == "other weights":
        after = publish_photos(tmp_path, seed=1).bundle
    elif why == "other processing":
        after = structs.replace(after, postprocess=None)
    else:
        plan = plan_for(photos.bundle, candidate("s", "split", cuts=("3",), codecs={"r3": Coding("int8/1")}))
    assert renew(plan, photos.bundle, after, None, later) is None


TERMS = Terms(0.001, 0.01, 0.002, 0.0002, 0.02, 0.02, 0.004, 0.0002, 0.004, 0.002, Sources("measured", "measured"))


def early(published: Published, **changes: Any) -> Plan:
    """A plan of a split at 6 with its exit, of which three in four requests go no further."""
    error = Error(0.1, 400, BOUND + 0.005, calibrated=True)
    facts: dict[str, Any] = {"cuts": ("6",), "predicted": TERMS, "up_bytes": 100, "error": error, "measured": MEASURED}
    return plan_for(
        published.bundle, candidate(**{"name": "s", "kind": "split", "exit": PlannedExit(0.75, 400)} | facts | changes)
    )


def test_an_exit_fitted_anew_renews_the_plan_by_its_own_share(photos: Published, tmp_path: Path) -> None:
    before = with_served_exit(photos, tmp_path)
    after = with_served_exit(photos, tmp_path, exiting=200, bound=0.01, wrong=True)
    plan = early(before)
    assert carry_over(plan, before.bundle, before.bundle, None) == plan
    assert carry_over(plan, before.bundle, after.bundle, None) is None
    renewed = renew_exit(plan, before.bundle, after.bundle)
    assert renewed is not None
    assert renewed.subject == subject_digest(after.bundle)
    choice = renewed.choice
    assert choice.exit == PlannedExit(0.5, 400)
    # Twice as many requests travel.
    assert choice.up_bytes == 200
    assert (choice.predicted.rtt, choice.predicted.cloud_run) == (2 * TERMS.rtt, 2 * TERMS.cloud_run)
    assert choice.predicted.edge_run == TERMS.edge_run
    assert choice.error.disagreement == pytest.approx(0.015)
    assert choice.measured is None
    assert "50.0% of 400 held-out inputs exit; unmeasured" in renewed.why[-1]


def test_a_plan_whose_exit_is_gone_or_breaks_a_bound_has_no_successor(photos: Published, tmp_path: Path) -> None:
    before, worse = with_served_exit(photos, tmp_path), with_served_exit(photos, tmp_path, bound=0.05, wrong=True)
    plan = early(before)
    assert carry_over(plan, before.bundle, photos.bundle, None) is None
    assert renew_exit(plan, before.bundle, photos.bundle) is None
    assert renew_exit(plan, before.bundle, worse.bundle) is not None
    bounded = structs.replace(plan, constraints=Constraints(max_disagreement=0.03))
    assert renew_exit(bounded, before.bundle, worse.bundle) is None
    # A new exit leaves a split without one as it was.
    split = plan_for(before.bundle, candidate("s", "split", cuts=("6",)))
    assert carry_over(split, before.bundle, worse.bundle, None) is not None


def test_tables_learned_anew_renew_an_exit_with_its_bound_beside_the_codecs(photos: Published, tmp_path: Path) -> None:
    before = with_served_exit(photos, tmp_path)
    plan = early(before, codecs={"p6": Coding("transform/4", 0.5)}, name="split-6-transform-50-exit")
    later = structs.replace(
        fidelity(subject_digest(before.bundle)),
        entries=tuple(structs.replace(entry("transform/4", q, 500, agreement=0.995), cut="6") for q in (0.6,)),
    )
    renewed = renew(plan, before.bundle, before.bundle, None, later)
    assert renewed is not None
    assert renewed.chosen == "split-6-transform-60-exit"
    assert renewed.choice.error.disagreement == pytest.approx(0.005 + BOUND)
    assert renewed.choice.exit == plan.choice.exit


def test_a_plan_of_a_compressed_head_stays_with_that_head_alone(photos: Published, tmp_path: Path) -> None:
    before, other = with_variants(photos, tmp_path), with_variants(photos, tmp_path, "other")
    for small in (candidate("s", "split", cuts=("6",), head="small"), candidate("e", head="small")):
        plan = plan_for(before.bundle, small)
        assert carry_over(plan, before.bundle, before.bundle, None) is not None
        assert carry_over(plan, before.bundle, other.bundle, None) is None
