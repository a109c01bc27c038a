"""A plan after a calibration that learned new tables: renewed at its quality, at a finer one, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from isthmus.artifacts.bundle import Blob, digest_of, subject_digest
from isthmus.artifacts.conditions import Constraints
from isthmus.artifacts.fidelity import Fidelity
from isthmus.artifacts.plan import Coding, Measured, Plan
from isthmus_tools.planner.publishing import renew
from support.bundles import Published, publish_photos
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
