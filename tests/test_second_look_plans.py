"""A second look from calibration to plans: a small real model is calibrated, planned for, measured and served."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from flask.testing import FlaskClient
from typer.testing import CliRunner

from bundles import (
    Published,
    cache_of,
    photo,
    photo_array,
    publish_photos,
    ready,
    router_settings,
    segment_settings,
    served,
)
from isthmus.calibration.agreement import Measure, measure_for
from isthmus.calibration.calibrate import Calibrated, calibrate
from isthmus.calibration.choice import RAW, Choice
from isthmus.calibration.fidelity import Entry, Fidelity, offered
from isthmus.calibration.fidelity_document import from_json, to_json
from isthmus.calibration.inputs import files_in, open_source
from isthmus.calibration.picture import draw
from isthmus.calibration.running import runs_here
from isthmus.cli import app
from isthmus.codecs import Packing
from isthmus.errors import PlanMalformed
from isthmus.hop import HttpHop
from isthmus.planner.planning import costs
from isthmus.planner.planning.conditions import Conditions
from isthmus.planner.planning.document import from_json as read_plan
from isthmus.planner.planning.document import to_json as plan_json
from isthmus.planner.planning.draft import Draft
from isthmus.planner.planning.examples import Example as Tried
from isthmus.planner.planning.examples import from_photos
from isthmus.planner.planning.grid import under
from isthmus.planner.planning.measuring import requester
from isthmus.planner.planning.plan import Candidate, Coding, SecondLook
from isthmus.planner.planning.route import route_of
from isthmus.planner.planning.trials import Trials
from isthmus.planner.planning.usable import short_name
from isthmus.planner.planning.workbench import Workbench
from isthmus.processing.image import MAX_PIXELS
from isthmus.serving import create_router_app, create_segment_app
from isthmus.serving.tables import Tables, tables_of
from patience import least
from plans import candidate, plan_for
from test_plan_draft import LINK, drafted

SCHEMA = json.loads((Path(__file__).parents[1] / "docs" / "plan.schema.json").read_text())


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return publish_photos(tmp_path_factory.mktemp("photos"))


# Calibration and its commands


@dataclass(frozen=True)
class Known:
    """A calibrated version of the model, and the entry of its second look."""

    published: Published
    fidelity: Fidelity
    pair: Entry


def calibrated(photos: Published, folder: Path, measure: Measure, qualities: tuple[float, ...]) -> Calibrated:
    """Calibrated with noisy photos of one colour each, most of which are clear and some are not."""
    data = folder / "data"
    data.mkdir()
    for seed in range(100):
        rng = np.random.default_rng(seed)
        pixels = rng.uniform(-1, 1, (3, 1, 1)) + 0.2 * rng.standard_normal((3, 8, 8))
        np.save(data / f"{seed}.npy", np.clip(pixels, -1, 1)[None].astype(np.float32))
    return calibrate(
        photos.bundle,
        open_source(photos.bundle, files_in(data), "colours", 100),
        runs_here(photos.digest, cache_of(photos, folder), segment_settings(photos, folder)),
        folder,
        cuts=["6"],
        count=100,
        limit=0.9,
        measure=measure,
        choices=[RAW, Choice("int8/1"), *(Choice("transform/1", q) for q in qualities)],
    )


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    folder = tmp_path_factory.mktemp("calibrated")
    photos = publish_photos(folder / "model")
    made = calibrated(photos, folder, measure_for(photos.bundle), (0.5, 0.65, 0.85, 1.0))
    version = photos.registry.publish(made.bundle, made.files, alias="prod")
    published = replace(photos, bundle=made.bundle, version=version.version, digest=version.digest)
    pair = next(e for e in offered(made.fidelity, "6") if e.again_margin)
    return Known(published, made.fidelity, pair)


def isthmus(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout


def test_calibration_measures_second_looks_that_the_document_keeps(known: Known) -> None:
    entry = known.pair
    assert entry.low <= entry.measured <= entry.high
    assert 0 < entry.asked_again < 1
    plain = {e.choice: e for e in known.fidelity.entries}
    finer = plain[Choice("transform/1", entry.again_quality)]
    assert plain[entry.choice.once].agreement < entry.agreement <= finer.agreement
    assert entry.bits < 0.9 * finer.bits
    assert from_json(to_json(known.fidelity)) == known.fidelity


def test_answers_that_are_no_classes_get_none(photos: Published, tmp_path: Path) -> None:
    found = calibrated(photos, tmp_path, Measure("close"), (0.5, 0.85)).fidelity
    assert not any(e.again_margin or e.asked_again for e in found.entries)
    assert {e.quality for e in found.entries if e.codec == "transform/1"} == {0.5, 0.85}


def test_the_codec_command_names_it(known: Known, tmp_path: Path) -> None:
    where = ("--registry", known.published.folder)
    said = json.loads(isthmus("codec", "photos", "--at", 6, "--agreement", known.pair.agreement, *where, "--json"))
    names = ("quality", "again_quality", "again_margin", "asked_again")
    assert tuple(getattr(known.pair, n) for n in names) in {tuple(e[n] for n in names) for e in said["entries"]}
    picture = tmp_path / "curves.svg"
    table = isthmus("codec", "photos", "--at", 6, "--picture", picture, *where)
    (line,) = [x for x in table.splitlines() if str(known.pair.choice) in x]
    assert f"{known.pair.asked_again:.0%} again" in line
    assert table.count(" again") == sum(e.again_margin > 0 for e in known.fidelity.entries)
    assert draw(known.fidelity, ["6"], "photos:2").startswith(b"\x89PNG")


def test_a_router_serves_what_the_codec_command_writes_with_the_calibrations_own_classes(
    known: Known, tmp_path: Path
) -> None:
    published = known.published
    with served(create_segment_app(segment_settings(published, tmp_path / "tail"))) as url:

        def router(codec: str) -> FlaskClient:
            settings = router_settings(
                published, tmp_path / "router", ("local", url), codec=codec, cuts=("6",), guard_share=0.0
            )
            return ready(create_router_app(settings).test_client())

        both, coarse = router(str(known.pair.choice)), router(str(known.pair.choice.once))
        asked = 0
        for seed in range(40):
            found, first = (client.post("/", data=photo(seed=seed)).json for client in (both, coarse))
            route = found["route"]
            assert all(s["codecs"] == {"p6": "transform/1"} for s in route["segments"][1:])
            asked += route["second_look"] == "asked"
            assert (found["classes"] == first["classes"]) or route["second_look"] == "asked"
        assert 0 < asked < 40


# Plans


@pytest.fixture(scope="module")
def draft(known: Known) -> Iterator[Draft]:
    published = known.published
    tables = Tables(published.registry.bundle, published.registry.blob, MAX_PIXELS)
    table = tables_of(published.bundle, published.digest, "transform/1", tables)
    with drafted(published, examples=shown(known), kind="photo", most_cuts=1, table=table) as made:
        yield made


def shown(known: Known) -> list[Tried]:
    return from_photos(known.published.bundle, [photo(seed=n) for n in range(1000, 1005)])


def planned(known: Known, draft: Draft, link: Conditions = LINK) -> dict[str, Candidate]:
    found = {c.name: c for c in draft.predict(link)}
    return {"twice": found[f"split-6-{short_name(known.pair.choice)}"], "raw": found["split-6-raw"]}


def test_a_candidate_takes_what_one_send_and_a_share_of_another_take(
    known: Known, draft: Draft, tmp_path: Path
) -> None:
    published, pair = known.published, known.pair
    link = Conditions(1e6, 2e6, 0.02)
    found = planned(known, draft, link)
    made, share = found["twice"], pair.asked_again
    assert made.second_look == SecondLook(pair.again_quality, pair.again_margin, "logits", share)
    assert made.codecs == {"p6": Coding("transform/1", pair.quality)}
    assert made.error.calibrated
    assert made.error.disagreement == pytest.approx(1 - pair.agreement)
    tables = Tables(published.registry.bundle, published.registry.blob, MAX_PIXELS)
    table = tables_of(published.bundle, published.digest, "transform/1", tables)
    bench = Workbench(published.bundle, published.digest, {}, cache_of(published, tmp_path))
    tries = Trials(published.bundle, bench, shown(known), table, 0.0)
    one = tries.split("6", pair.choice.once)
    other = tries.split("6", Choice("transform/1", pair.again_quality))
    bench.forget()
    assert one is not None
    assert other is not None
    assert one.far is not None
    assert other.far is not None
    assert made.up_bytes == round(one.far.sent + share * other.far.sent)
    assert made.down_bytes == round(one.far.received + share * other.far.received)
    both = one.then(other, made.second_look)
    assert both.pack_s == pytest.approx(one.pack_s + share * other.pack_s)
    assert both.unpack_s == pytest.approx(one.unpack_s + share * other.unpack_s)
    terms, raw, calls = made.predicted, found["raw"].predicted, 1 + share
    assert made.calls == calls
    assert terms.rtt == pytest.approx(calls * 0.02)
    assert terms.cloud_run == pytest.approx(calls * raw.cloud_run)
    assert terms.edge_run == raw.edge_run
    assert terms.up == pytest.approx((made.up_bytes + calls * costs.HEADERS_UP) * 8 / 1e6)
    assert terms.down == pytest.approx((made.down_bytes + calls * costs.HEADERS_DOWN) * 8 / 2e6)
    hop = draft.profiles["cloud"].hop
    assert hop is not None
    bytes_s = hop.up_byte_s * made.up_bytes + hop.down_byte_s * made.down_bytes
    assert terms.cloud_hop == pytest.approx(calls * hop.fixed_s + bytes_s)


def test_over_another_link_it_is_as_if_it_had_been_predicted_there(known: Known, draft: Draft) -> None:
    there = Conditions(3e5, 7e5, 0.08)
    for name, made in planned(known, draft).items():
        expected = planned(known, draft, there)[name].predicted
        assert under(made, there).predicted.seconds == pytest.approx(expected.seconds)


def test_its_plan_keeps_to_the_schema_and_comes_back_as_it_was(known: Known, draft: Draft) -> None:
    found = planned(known, draft)
    made = plan_for(known.published.bundle, found["twice"], candidates=tuple(found.values()))
    doc = json.loads(plan_json(made))
    jsonschema.validate(doc, SCHEMA)
    assert read_plan(plan_json(made)) == made
    assert ["second_look" in c for c in doc["candidates"]] == [True, False]
    doc["candidates"][0].pop("second_look")
    assert read_plan(json.dumps(doc).encode()).choice == replace(found["twice"], second_look=None)


@pytest.mark.parametrize(
    "changes",
    [
        {"share": 1.01},
        {"share": -0.1},
        {"quality": 1.5},
        {"margin": -1},
        {"margin": "wide"},
        {"output": 3},
        {"output": "y" * 5000},
        {"more": 1},
        {"share": None},
    ],
)
def test_a_plan_whose_second_look_is_none_is_refused(photos: Published, changes: dict[str, Any]) -> None:
    chosen = candidate("split-6-t", "split", cuts=("6",), second_look=SecondLook(0.8, 0.2, "logits", 0.25))
    made = plan_for(photos.bundle, chosen)
    doc = json.loads(plan_json(made))
    assert read_plan(json.dumps(doc).encode()) == made
    doc["candidates"][0]["second_look"] |= changes
    with pytest.raises(PlanMalformed, match=r"second_look"):
        read_plan(json.dumps(doc).encode())


def test_nothing_is_looked_at_again_where_nothing_crosses(photos: Published) -> None:
    chosen = candidate("cloud-t", "cloud", second_look=SecondLook(0.8, 0.2, "logits", 0.25))
    with pytest.raises(PlanMalformed, match="no cut"):
        read_plan(plan_json(plan_for(photos.bundle, chosen)))


def no_variant(digest: str) -> Any:
    raise AssertionError(digest)


def test_the_route_of_a_plan_takes_the_second_look(photos: Published) -> None:
    looked = SecondLook(0.8, 0.2, "logits", 0.25)
    chosen = candidate("split-6-t", "split", cuts=("6",), codecs={"p6": Coding("sparse/1", 0.4)}, second_look=looked)
    hops = [HttpHop("http://127.0.0.1:9", attempts=1, connect_timeout_s=1, max_reply_bytes=1)] * 2
    route = route_of(chosen, photos.digest, photos.bundle, hops, lambda *_: None, no_variant)
    assert route.again is not None
    assert (route.again.quality, route.again.margin) == (0.8, 0.2)
    assert route.again.margin_of({"logits": np.array([[1.0, 3.5]])}) == 2.5
    assert route.packings == ({}, {"p6": Packing("sparse/1", 0.4)})
    finer = route.finer(route.again)
    assert (finer.packings, finer.again) == (({}, {"p6": Packing("sparse/1", 0.8)}), None)
    assert finer.finer(route.again).packings == finer.packings
    elsewhere = replace(chosen, second_look=replace(looked, output="p6"))
    with pytest.raises(PlanMalformed, match="'p6', no output of photos"):
        route_of(elsewhere, photos.digest, photos.bundle, hops, lambda *_: None, no_variant)


def test_measuring_takes_it_every_time_and_counts_it_by_its_share(photos: Published, tmp_path: Path) -> None:
    share, pause_s, calls = 0.25, 0.2, list[str]()
    app = create_segment_app(segment_settings(photos, tmp_path))
    inner = app.wsgi_app

    def slow(environ: Any, start_response: Any) -> Any:
        calls.append("tail")
        time.sleep(pause_s)
        return inner(environ, start_response)

    looked = SecondLook(0.9, 1e-9, "logits", share)
    codecs = {"p6": Coding("sparse/1", 0.3)}
    chosen = candidate("split-6-t", "split", cuts=("6",), codecs=codecs, second_look=looked)
    examples = [Tried({"x": photo_array(photo(seed=n))}) for n in range(2)]
    with served(app) as head, served(slow) as tail:
        hops = tuple(HttpHop(u, attempts=1, connect_timeout_s=5, max_reply_bytes=2**20) for u in (head, tail))
        run = requester(chosen, photos.digest, photos.bundle, hops, examples, lambda *_: None, no_variant)  # type: ignore[arg-type]
        once = requester(
            replace(chosen, second_look=None),
            photos.digest,
            photos.bundle,
            hops,  # type: ignore[arg-type]
            examples,
            lambda *_: None,
            no_variant,
        )
        run(0)
        assert len(calls) == 2
        found: dict[str, float] = {}

        def cloud() -> float:
            found.update(run(0))
            assert found["total"] >= found["edge"] + found["cloud"] + found["pack"]
            return found["cloud"]

        assert (1 + share) * pause_s <= least(cloud, 1.6 * pause_s) < 1.6 * pause_s
        assert found["total"] < 2 * pause_s
        calls.clear()
        assert once(0).keys() == found.keys()
        assert len(calls) == 1
        for hop in hops:
            hop.close()
