"""Closer looks from calibration to plans: a small real model is calibrated, served and planned for."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from flask.testing import FlaskClient
from typer.testing import CliRunner

from isthmus.artifacts.agreement import Measure
from isthmus.artifacts.conditions import Conditions
from isthmus.artifacts.fidelity import Entry
from isthmus.artifacts.fidelity_document import from_json, to_json
from isthmus.artifacts.plan import Candidate, CloserLooks, Coding, Error
from isthmus.artifacts.plan_document import from_json as read_plan
from isthmus.artifacts.plan_document import to_json as plan_json
from isthmus.context import Context
from isthmus.pipeline import LooksTaken, Result, execute, planned_route
from isthmus.processing.image import MAX_PIXELS
from isthmus.runtime.tables import Tables
from isthmus.serving import create_router_app, create_segment_app
from isthmus_tools.cli import app
from isthmus_tools.figures.fidelity import draw
from isthmus_tools.planner import costs
from isthmus_tools.planner.candidates import CandidateSet
from isthmus_tools.planner.choice import over_link
from isthmus_tools.planner.evaluation import Evaluator
from isthmus_tools.planner.offered import offered_codecs, short_name
from isthmus_tools.planner.segment_pool import SegmentPool, codec_tables
from support.bundles import Published, cache_of, photo, ready, router_settings, segment_settings, served
from support.bundles import photos as photos
from support.calibrated_photos import QUALITIES, Known, calibrated, no_variant, remote, shown
from support.calibrated_photos import known as known
from support.plans import SCHEMA, plan_for
from test_plan_draft import LINK, drafted

# Calibration and its commands


def isthmus(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_calibration_measures_closer_looks_that_the_document_keeps(known: Known) -> None:
    entry = known.chain
    assert entry.low <= entry.measured <= entry.high
    assert 1 > entry.shares[0] > entry.shares[1] > 0
    plain = {e.choice: e for e in known.fidelity.entries}
    finest = plain[entry.choice.last]
    assert plain[entry.choice.once].agreement < entry.agreement <= finest.agreement
    assert entry.bits < 0.9 * finest.bits
    assert from_json(to_json(known.fidelity)) == known.fidelity


def test_answers_that_are_no_classes_get_none(photos: Published, tmp_path: Path) -> None:
    found = calibrated(photos, tmp_path, Measure("close")).fidelity
    assert not any(e.looks or e.shares for e in found.entries)
    assert {e.quality for e in found.entries if e.codec == "transform/4"} == set(QUALITIES)


def test_the_codec_command_names_them(known: Known, tmp_path: Path) -> None:
    where = ("--registry", known.published.folder)
    said = json.loads(isthmus("codec", "photos", "--at", 6, "--agreement", known.chain.agreement, *where, "--json"))
    looks = [{"quality": look.quality, "margin": look.margin} for look in known.chain.looks]
    assert (looks, list(known.chain.shares)) in [(e.get("looks"), e.get("shares")) for e in said["entries"]]
    picture = tmp_path / "curves.svg"
    table = isthmus("codec", "photos", "--at", 6, "--picture", picture, *where)
    (line,) = [x for x in table.splitlines() if str(known.chain.choice) in x]
    assert "looks " + " ".join(f"{share:.0%}" for share in known.chain.shares) in line
    assert table.count(", looks ") == sum(bool(e.looks) for e in known.fidelity.entries)
    assert draw(known.fidelity, ["6"], "photos:2").startswith(b"\x89PNG")


def test_a_router_serves_what_the_codec_command_writes_with_the_calibrations_own_classes(
    known: Known, tmp_path: Path
) -> None:
    published = known.published
    with served(create_segment_app(segment_settings(published, tmp_path / "tail"))) as url:

        def router(codec: str) -> FlaskClient:
            settings = router_settings(
                published, tmp_path / "router", ("local", url), codec=codec, cuts="6", guard_share=0.0
            )
            return ready(create_router_app(settings).test_client())

        closer, coarse = router(str(known.chain.choice)), router(str(known.chain.choice.once))
        taken = set()
        for seed in range(40):
            found, first = (client.post("/", data=photo(seed=seed)).json for client in (closer, coarse))
            route = found["route"]
            assert all(s["codecs"] == {"p6": "transform/4"} for s in route["segments"][1:])
            assert (found["classes"] == first["classes"]) or route["looks"]
            taken.add(route["looks"])
        assert {0, 2} <= taken <= {0, 1, 2}


# Plans


@pytest.fixture(scope="module")
def draft(known: Known) -> Iterator[CandidateSet]:
    with drafted(known.published, examples=shown(known), kind="photo", max_cuts=1) as made:
        yield made


def closer_looks(entry: Entry) -> CloserLooks:
    return CloserLooks("logits", entry.looks, entry.shares)


def planned(known: Known, draft: CandidateSet, link: Conditions = LINK) -> dict[str, Candidate]:
    found = {c.name: c for c in draft.predict(link)}
    return {"closer": found[f"split-6-{short_name(known.chain.choice)}"], "raw": found["split-6-raw"]}


def test_each_number_of_looks_that_saves_bytes_is_a_candidate(known: Known, draft: CandidateSet) -> None:
    chosen = [c for c in offered_codecs(known.fidelity, "6") if c.codec == "transform/4"]
    looks = [len(c.looks) for c in chosen]
    assert looks == sorted(set(looks))
    assert (looks[0], looks[-1]) == (0, 2)
    sizes = [e.bytes for c in chosen for e in known.fidelity.entries if e.choice == c]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(chosen)
    names = [c.name for c in draft.predict(LINK)]
    assert [n for n in names if "transform" in n] == [f"split-6-{short_name(c)}" for c in chosen]
    assert "split-6-transform-60-80-100" in names


def test_a_candidate_takes_what_the_first_send_and_the_shares_of_the_looks_take(
    known: Known, draft: CandidateSet, tmp_path: Path
) -> None:
    published, chain = known.published, known.chain
    link = Conditions(1e6, 2e6, 0.02)
    found = planned(known, draft, link)
    made = found["closer"]
    assert made.looks == closer_looks(chain)
    assert made.codecs == {"p6": Coding("transform/4", chain.quality)}
    assert made.error == Error(chain.error, known.fidelity.inputs.held_out, 1 - chain.agreement, calibrated=True)

    # What a hop is really sent, when every look is taken.
    tables = Tables(published.registry.bundle, published.registry.blob, MAX_PIXELS)
    with served(create_segment_app(segment_settings(published, tmp_path))) as url:
        hops = remote(url, url)
        route = planned_route(made, published.digest, published.bundle, hops, tables, no_variant)
        assert route.looks is not None
        always = tuple(replace(look, margin=math.inf) for look in chain.looks)
        route = replace(route, looks=replace(route.looks, looks=always))
        answers = [execute(route, e.arrays, Context.from_headers({}, longest_s=60.0)) for e in shown(known)]
        for hop in hops:
            hop.close()
    assert {answer.closer_looks for answer in answers} == {LooksTaken("last", 2)}
    stages = [answer.runs[1:] for answer in answers]
    sent, received = (
        [statistics.median_low(each) for each in zip(*([getattr(s, way) for s in ss] for ss in stages), strict=True)]
        for way in ("sent_bytes", "received_bytes")
    )
    shares = (1.0, *chain.shares)
    assert made.up_bytes == round(sum(s * n for s, n in zip(shares, sent, strict=True)))
    assert made.down_bytes == round(sum(s * n for s, n in zip(shares, received, strict=True)))

    terms, raw, calls = made.predicted, found["raw"].predicted, sum(shares)
    assert made.calls == pytest.approx(calls)
    assert terms.rtt == pytest.approx(calls * 0.02)
    assert terms.cloud_run == pytest.approx(calls * raw.cloud_run)
    assert terms.edge_run == raw.edge_run
    assert terms.up == pytest.approx((made.up_bytes + calls * costs.HEADERS_UP) * 8 / 1e6)
    assert terms.down == pytest.approx((made.down_bytes + calls * costs.HEADERS_DOWN) * 8 / 2e6)
    hop = draft.profiles["cloud"].hop
    assert hop is not None
    bytes_s = hop.up_byte_s * made.up_bytes + hop.down_byte_s * made.down_bytes
    assert terms.cloud_hop == pytest.approx(calls * hop.fixed_s + bytes_s)


@pytest.fixture
def evaluator(known: Known, tmp_path: Path) -> Iterator[Evaluator]:
    published = known.published
    with contextlib.closing(SegmentPool(published.bundle, published.digest, {}, cache_of(published, tmp_path))) as pool:
        yield Evaluator(published.bundle, published.digest, pool, shown(known), codec_tables(published.registry))


def test_encoding_and_decoding_count_by_the_shares_of_the_looks(
    known: Known, evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_the_clock(*given: Any) -> Result:
        result = execute(*given)
        runs = tuple(r._replace(encode_s=10.0**n, decode_s=2 * 10.0**n) for n, r in enumerate(result.runs))
        return replace(result, runs=runs)

    monkeypatch.setattr("isthmus_tools.planner.evaluation.execute", by_the_clock)
    looks = replace(closer_looks(known.chain), shares=(0.5, 0.25))
    made = evaluator.closer_looks("6", known.chain.choice, looks, Error(0.0, 1))
    assert made is not None
    assert made.encode_s == 1 + 5 + 25
    assert made.decode_s == 2 * made.encode_s


def test_what_cannot_be_sent_finer_is_no_candidate(known: Known, evaluator: Evaluator) -> None:
    assert evaluator.closer_looks("3", known.chain.choice, closer_looks(known.chain), Error(0.0, 1)) is None


def test_over_another_link_it_is_as_if_it_had_been_predicted_there(known: Known, draft: CandidateSet) -> None:
    there = Conditions(3e5, 7e5, 0.08)
    for name, made in planned(known, draft).items():
        expected = planned(known, draft, there)[name].predicted
        assert over_link(made, there).predicted.seconds == pytest.approx(expected.seconds)


def test_its_plan_keeps_to_the_schema_and_comes_back_as_it_was(known: Known, draft: CandidateSet) -> None:
    found = planned(known, draft)
    made = plan_for(known.published.bundle, found["closer"], candidates=tuple(found.values()))
    doc = json.loads(plan_json(made))
    jsonschema.validate(doc, SCHEMA)
    assert read_plan(plan_json(made)) == made
    assert ["closer_looks" in c for c in doc["candidates"]] == [True, False]
    assert not any("looks" in c for c in doc["candidates"])
    doc["candidates"][0].pop("closer_looks")
    assert read_plan(json.dumps(doc).encode()).choice == replace(found["closer"], looks=None)
