"""Splits with an exit, and with a compressed head: what they cost, and what they may change."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from isthmus.artifacts.conditions import Conditions, Constraints
from isthmus.artifacts.plan import Candidate, CloserLooks, Error, PlannedExit, from_json, to_json
from isthmus.serving import create_segment_app
from isthmus_tools.planner import costs
from isthmus_tools.planner.candidates import CandidateSet
from isthmus_tools.planner.choice import build_plan, over_link, violations
from isthmus_tools.planner.costs import CallBytes
from isthmus_tools.planner.evaluation import Evaluation, TransferCosts
from isthmus_tools.planner.exit_trials import ExitTrial
from isthmus_tools.planner.inputs import from_photos, random_inputs
from isthmus_tools.planner.measurement import contenders, requester
from isthmus_tools.planner.segment_pool import codec_tables
from isthmus_tools.planner.throughput import stage_seconds
from isthmus_tools.usecases.explain import in_words
from support.bundles import photo, publish_photos, segment_settings, served
from support.calibrated_photos import no_variant, remote
from support.candidate_sets import LINK, evaluated
from support.closer_looks import LOOKED
from support.edge_extras import BOUND, with_served_exit, with_variants
from support.exits import gate_of
from support.patience import least
from support.plans import candidate

THERE = Conditions(3e5, 7e5, 0.08)


@pytest.fixture(scope="module")
def candidate_set(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CandidateSet]:
    folder = tmp_path_factory.mktemp("extras")
    published = with_variants(with_served_exit(publish_photos(folder), folder), folder)
    with evaluated(published, examples=random_inputs(published.bundle, 3), kind="random", max_cuts=1) as made:
        yield made


def planned(candidate_set: CandidateSet, link: Conditions = LINK) -> dict[str, Candidate]:
    return {c.name: c for c in candidate_set.predict(link)}


def test_what_lies_behind_an_exit_counts_by_the_share_that_travels(candidate_set: CandidateSet) -> None:
    found = planned(candidate_set, THERE)
    early, split = found["split-6-half-exit"], found["split-6-half"]
    assert early.exit is not None
    assert (early.exit.share, early.exit.inputs, early.exit.examples) == (0.75, 400, False)
    assert (early.cuts, early.codecs, early.head) == (("6",), split.codecs, "")
    assert early.calls == 0.25
    assert (early.up_bytes, early.down_bytes) == (round(split.up_bytes / 4), round(split.down_bytes / 4))
    t, whole = early.predicted, split.predicted
    for term in ("rtt", "unpack", "cloud_run", "pack"):
        assert getattr(t, term) == pytest.approx(getattr(whole, term) / 4)
    assert t.up == pytest.approx((early.up_bytes + costs.HEADERS_UP / 4) * THERE.up_byte_s)
    assert t.down == pytest.approx((early.down_bytes + costs.HEADERS_DOWN / 4) * THERE.down_byte_s)
    assert t.cloud_hop == pytest.approx(whole.cloud_hop / 4, rel=0.01)
    # The branch runs for every request.
    assert t.edge_run > whole.edge_run
    assert early.edge_memory_bytes > split.edge_memory_bytes
    assert early.cloud_memory_bytes == split.cloud_memory_bytes


def test_stages_prices_and_joules_behind_an_exit_count_by_the_share_that_travels(candidate_set: CandidateSet) -> None:
    tier = costs.TierPrices(cpu_second=0.0, active_watts=0.0, idle_watts=0.0)
    cloud = costs.TierPrices(cpu_second=1.0, active_watts=1.0, idle_watts=0.0)
    prices = costs.Prices(tier, cloud, costs.LinkPrices(gb_up=0.0, gb_down=0.0, joules_per_byte=0.0))
    found = {c.name: c for c in candidate_set.predict(LINK, prices)}
    early, split = found["split-6-half-exit"], found["split-6-half"]
    assert (early.price, early.energy_j) == (pytest.approx((split.price or 0) / 4), pytest.approx(early.price))
    stages, whole = stage_seconds(early), stage_seconds(split)
    assert stages.cloud == pytest.approx(whole.cloud / 4, rel=0.01)
    assert stages.uplink == pytest.approx(whole.uplink / 4, rel=0.01)
    assert stages.edge > whole.edge - split.predicted.pack
    throughput = build_plan(candidate_set, [early, found["cloud-raw"]], LINK, "throughput", Constraints())
    assert throughput.mix is not None
    assert throughput.mix.rate >= throughput.mix.alone * 0.999


def test_moving_an_exit_to_another_link_equals_a_prediction_there(candidate_set: CandidateSet) -> None:
    there = planned(candidate_set, THERE)
    for name, made in planned(candidate_set).items():
        assert over_link(made, THERE).predicted.seconds == pytest.approx(there[name].predicted.seconds)


def test_the_error_of_an_exit_is_its_bound_beside_that_of_the_codec(candidate_set: CandidateSet) -> None:
    found = planned(candidate_set)
    early = found["split-6-raw-exit"]
    assert early.error.calibrated
    assert early.error.inputs == 400
    assert early.error.disagreement == BOUND
    assert not violations(early, Constraints(max_disagreement=0.02))
    assert [v.constraint for v in violations(early, Constraints(max_disagreement=0.01))] == ["max-disagreement"]
    # A codec that was not calibrated is judged as without an exit.
    half = replace(found["split-6-half-exit"], error=replace(found["split-6-half"].error, relative=0.2))
    assert [v.constraint for v in violations(half, Constraints())] == ["max-error"]


def test_a_bound_on_the_outputs_holds_for_the_scores_of_an_exit(candidate_set: CandidateSet) -> None:
    early = planned(candidate_set)["split-6-raw-exit"]
    assert early.exit is not None
    assert early.exit.error == pytest.approx(0, abs=1e-5)
    other = replace(early, exit=replace(early.exit, error=0.4))
    assert not violations(early, Constraints(max_error=0.1))
    assert not violations(other, Constraints())
    assert [v.value for v in violations(other, Constraints(max_error=0.1))] == [0.4]


def test_enough_inputs_of_the_planner_tell_the_share_that_exits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus_tools.planner.exit_trials.MIN_INPUTS", 12)
    published = with_served_exit(publish_photos(tmp_path), tmp_path, 0.999, wrong=True)
    inputs = random_inputs(published.bundle, 12)
    with evaluated(published, examples=inputs, kind="random", max_cuts=1) as made:
        early = planned(made)["split-6-raw-exit"]
    assert early.exit is not None
    assert (early.exit.inputs, early.exit.examples) == (12, True)
    assert 0 < early.exit.share < 1
    assert early.exit.share * 12 == pytest.approx(round(early.exit.share * 12))
    # Other weights than the model's: the scores are none of its own.
    assert early.exit.error > 0.1


def test_photos_of_the_user_tell_the_share_that_exits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus_tools.planner.exit_trials.MIN_INPUTS", 12)
    published = with_served_exit(publish_photos(tmp_path), tmp_path, 0.999)
    examples, further = from_photos(published.bundle, [photo()]), [photo(seed=seed) for seed in range(1, 12)]
    with evaluated(
        published, examples=examples, kind="photo", jpeg_photos=further, own_photos=True, max_cuts=1
    ) as made:
        early = planned(made)["split-6-raw-exit"].exit
    assert early is not None
    assert (early.inputs, early.examples) == (12, True)


def test_a_compressed_head_is_a_candidate_with_each_codec_and_the_agreement_of_its_own(
    candidate_set: CandidateSet,
) -> None:
    found = planned(candidate_set)
    variant, plain = found["split-6~small-half"], found["split-6-half"]
    assert (variant.head, variant.cuts, variant.codecs) == ("small", ("6",), plain.codecs)
    assert variant.predicted.sources.edge == "scaled"
    assert variant.predicted.cloud_run == plain.predicted.cloud_run
    assert variant.error.calibrated
    assert variant.error.inputs == 200
    assert variant.error.disagreement == pytest.approx(0.005)
    assert 0 < variant.error.relative < 0.5
    assert variant.exit is None
    whole = found["edge-small"]
    assert (whole.kind, whole.head, whole.cuts, whole.up_bytes) == ("edge", "small", (), 0)
    assert whole.edge_memory_bytes > variant.edge_memory_bytes
    assert not [name for name in found if "~small" in name and "exit" in name]


def test_a_head_that_agrees_too_rarely_is_refused_with_the_figure(tmp_path: Path) -> None:
    published = with_variants(publish_photos(tmp_path), tmp_path, agreement=0.9, memory_bytes=777)
    with evaluated(published, max_cuts=1) as made:
        found = planned(made)
    assert found["edge-small"].edge_memory_bytes == 777
    for name in ("split-6~small-raw", "edge-small"):
        assert found[name].refused == "90.0% of 200 predictions agree, of 99.0%"


def test_closer_looks_behind_an_exit_are_no_more_than_travel() -> None:
    looks = CloserLooks.of("logits", LOOKED.looks, (0.4,))
    sent = (TransferCosts(1000, 100, 1.0, 2.0), TransferCosts(2000, 100, 3.0, 4.0))
    split = Evaluation(error=Error(0.1, 200, 0.007, calibrated=True), looks=looks, transfers=sent)
    trial = ExitTrial(gate_of(0.5, inputs=400), PlannedExit(0.75, 400), 0.01, CallBytes(1, 2), 0.5)
    early = trial.applied(split.weighted((1.0, 0.4)))
    assert early.looks is not None
    assert early.looks.shares == (0.25,)
    assert early.far == CallBytes(750, 50)
    assert (early.encode_s, early.decode_s) == (1.0, 1.5)
    assert early.error == Error(0.1, 400, 0.017, calibrated=True)


def test_the_plan_says_what_exits_and_of_which_inputs_that_is_known(candidate_set: CandidateSet) -> None:
    slow = Conditions(5e4, 5e4, 0.2)
    splits = [c for c in candidate_set.predict(slow) if c.cuts == ("6",)]
    plan = build_plan(candidate_set, splits, slow, "latency", Constraints())
    assert plan.choice.exit is not None
    assert in_words(plan.choice).startswith("a split at 6, ")
    assert in_words(plan.choice).endswith(", 75% exit at the edge")
    assert "75.0% of 400 held-out inputs exit at 6: bytes and times behind count for the rest alone" in plan.why
    assert from_json(to_json(plan)) == plan
    assert in_words(next(c for c in splits if c.head)) == "a split at 6 with the head small, raw"


def test_the_best_split_with_an_exit_is_measured_beside_the_best_without(candidate_set: CandidateSet) -> None:
    fast = Conditions(1e9, 1e9, 0.0)
    found = contenders(candidate_set.predict(fast), "latency", Constraints(), max_contenders=1)
    assert [c.exit is not None for c in found if c.kind == "split"].count(True) == 1
    assert [c.exit is None for c in found if c.kind == "split"].count(True) >= 2


def test_a_measurement_goes_both_ways_and_weights_them_by_the_share_that_exits(tmp_path: Path) -> None:
    published, pause_s, calls = with_served_exit(publish_photos(tmp_path), tmp_path), 0.2, list[int]()
    app = create_segment_app(segment_settings(published, tmp_path / "cache"))

    def slow(environ: Any, start_response: Any) -> Any:
        calls.append(1)
        time.sleep(pause_s)
        return app.wsgi_app(environ, start_response)

    early = candidate("s", "split", cuts=("6",), exit=PlannedExit(0.75, 400))
    tables = codec_tables(published.registry)
    with served(app) as head, served(slow) as tail:
        hops = remote(head, tail)
        inputs = random_inputs(published.bundle, 2)
        ask = requester(early, published.digest, published.bundle, hops, inputs, tables, no_variant)
        ask(0)
        assert len(calls) == 1
        found: dict[str, float] = {}

        def cloud() -> float:
            found.update(ask(1))
            return found["cloud"]

        assert pause_s / 4 <= least(cloud, 0.45 * pause_s) < 0.45 * pause_s
        assert found["total"] >= found["edge"] + found["cloud"]
        for hop in hops:
            hop.close()
