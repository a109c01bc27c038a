"""Closer looks from calibration to plans: a small real model is calibrated, planned for, measured and served."""

from __future__ import annotations

import json
import math
import statistics
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
from isthmus.calibration.choice import RAW, Choice, Look
from isthmus.calibration.fidelity import Entry, Fidelity, offered
from isthmus.calibration.fidelity_document import from_json, to_json
from isthmus.calibration.inputs import files_in, open_source
from isthmus.calibration.picture import draw
from isthmus.calibration.running import runs_here
from isthmus.cli import app
from isthmus.codecs import Array, Packing
from isthmus.codecs.layers import KEY_BYTES, First
from isthmus.context import Context
from isthmus.errors import DeadlineExceeded, HopUnavailable, PlanMalformed
from isthmus.hop import HttpHop
from isthmus.looks import Looked
from isthmus.pipeline import run
from isthmus.planner.planning import costs, measuring
from isthmus.planner.planning.conditions import Conditions
from isthmus.planner.planning.document import from_json as read_plan
from isthmus.planner.planning.document import to_json as plan_json
from isthmus.planner.planning.draft import Draft
from isthmus.planner.planning.examples import Example as Tried
from isthmus.planner.planning.examples import from_photos
from isthmus.planner.planning.grid import under
from isthmus.planner.planning.measuring import Functions, measure, requester
from isthmus.planner.planning.plan import Candidate, CloserLooks, Coding, Error
from isthmus.planner.planning.route import route_of
from isthmus.planner.planning.sends import Send, frame_bytes, send, sends
from isthmus.planner.planning.trials import Trials
from isthmus.planner.planning.usable import short_name, usable_codecs
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

QUALITIES = (0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class Known:
    """A calibrated version of the model, and the entry of its chain of two closer looks."""

    published: Published
    fidelity: Fidelity
    chain: Entry

    def table(self, name: str) -> object:
        """The table of a tensor."""
        registry = self.published.registry
        tables = Tables(registry.bundle, registry.blob, MAX_PIXELS)
        return tables_of(self.published.bundle, self.published.digest, "transform/3", tables)(name)


def calibrated(photos: Published, folder: Path, measure: Measure) -> Calibrated:
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
        limit=0.97,
        measure=measure,
        choices=[RAW, Choice("int8/1"), *(Choice("transform/3", q) for q in QUALITIES)],
    )


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    folder = tmp_path_factory.mktemp("calibrated")
    photos = publish_photos(folder / "model")
    made = calibrated(photos, folder, measure_for(photos.bundle))
    version = photos.registry.publish(made.bundle, made.files, alias="prod")
    published = replace(photos, bundle=made.bundle, version=version.version, digest=version.digest)
    chain = next(e for e in offered(made.fidelity, "6") if len(e.looks) == 2)
    return Known(published, made.fidelity, chain)


def isthmus(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
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
    assert {e.quality for e in found.entries if e.codec == "transform/3"} == set(QUALITIES)


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
                published, tmp_path / "router", ("local", url), codec=codec, cuts=("6",), guard_share=0.0
            )
            return ready(create_router_app(settings).test_client())

        closer, coarse = router(str(known.chain.choice)), router(str(known.chain.choice.once))
        taken = set()
        for seed in range(40):
            found, first = (client.post("/", data=photo(seed=seed)).json for client in (closer, coarse))
            route = found["route"]
            assert all(s["codecs"] == {"p6": "layers/1"} for s in route["segments"][1:])
            assert (found["classes"] == first["classes"]) or route["looks"]
            taken.add(route["looks"])
        assert {0, 2} <= taken <= {0, 1, 2}


# Plans


@pytest.fixture(scope="module")
def draft(known: Known) -> Iterator[Draft]:
    with drafted(known.published, examples=shown(known), kind="photo", most_cuts=1, table=known.table) as made:
        yield made


def shown(known: Known) -> list[Tried]:
    return from_photos(known.published.bundle, [photo(seed=n) for n in range(1000, 1005)])


def closer_looks(entry: Entry) -> CloserLooks:
    return CloserLooks("logits", entry.looks, entry.shares)


def planned(known: Known, draft: Draft, link: Conditions = LINK) -> dict[str, Candidate]:
    found = {c.name: c for c in draft.predict(link)}
    return {"closer": found[f"split-6-{short_name(known.chain.choice)}"], "raw": found["split-6-raw"]}


def remote(*urls: str) -> tuple[HttpHop, HttpHop]:
    head, tail = (HttpHop(u, attempts=1, connect_timeout_s=5, max_reply_bytes=2**20) for u in urls)
    return head, tail


def test_each_number_of_looks_that_saves_bytes_is_a_candidate(known: Known, draft: Draft) -> None:
    chosen = [c for c in usable_codecs(known.fidelity, "6") if c.codec == "transform/3"]
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
    known: Known, draft: Draft, tmp_path: Path
) -> None:
    published, chain = known.published, known.chain
    link = Conditions(1e6, 2e6, 0.02)
    found = planned(known, draft, link)
    made = found["closer"]
    assert made.looks == closer_looks(chain)
    assert made.codecs == {"p6": Coding("transform/3", chain.quality)}
    assert made.error == Error(chain.error, known.fidelity.inputs.held_out, 1 - chain.agreement, calibrated=True)

    # What a hop is really sent, when every look is taken.
    tables = Tables(published.registry.bundle, published.registry.blob, MAX_PIXELS)
    with served(create_segment_app(segment_settings(published, tmp_path))) as url:
        hops = remote(url, url)
        route = route_of(made, published.digest, published.bundle, hops, tables, no_variant)
        assert route.looks is not None
        always = tuple(replace(look, margin=math.inf) for look in chain.looks)
        route = replace(route, looks=replace(route.looks, looks=always))
        answers = [run(route, e.arrays, Context.from_headers({}, longest_s=60.0)) for e in shown(known)]
        for hop in hops:
            hop.close()
    assert {answer.looked for answer in answers} == {Looked("last", 2, forgotten=False)}
    stages = [answer.stages[1:] for answer in answers]
    sent, received = (
        [statistics.median_low(each) for each in zip(*([getattr(s, way) for s in ss] for ss in stages), strict=True)]
        for way in ("sent", "received")
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


def tries(known: Known, folder: Path) -> tuple[Trials, Workbench]:
    bench = Workbench(known.published.bundle, known.published.digest, {}, cache_of(known.published, folder))
    return Trials(known.published.bundle, bench, shown(known), known.table, 0.0), bench


def test_packing_and_unpacking_count_by_the_shares(
    known: Known, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_the_clock(*given: Any) -> list[Send]:
        return [s._replace(pack_s=10.0**n, unpack_s=2 * 10.0**n) for n, s in enumerate(sends(*given))]

    monkeypatch.setattr("isthmus.planner.planning.trials.sends", by_the_clock)
    trials, bench = tries(known, tmp_path)
    looks = replace(closer_looks(known.chain), shares=(0.5, 0.25))
    made = trials.closer("6", known.chain.choice, looks, Error(0.0, 1))
    bench.forget()
    assert made is not None
    assert made.pack_s == 1 + 5 + 25
    assert made.unpack_s == 2 * made.pack_s


def test_what_cannot_be_sent_finer_is_no_candidate(known: Known, tmp_path: Path) -> None:
    trials, bench = tries(known, tmp_path)
    found = trials.closer("3", known.chain.choice, closer_looks(known.chain), Error(0.0, 1))
    bench.forget()
    assert found is None


def test_over_another_link_it_is_as_if_it_had_been_predicted_there(known: Known, draft: Draft) -> None:
    there = Conditions(3e5, 7e5, 0.08)
    for name, made in planned(known, draft).items():
        expected = planned(known, draft, there)[name].predicted
        assert under(made, there).predicted.seconds == pytest.approx(expected.seconds)


def test_its_plan_keeps_to_the_schema_and_comes_back_as_it_was(known: Known, draft: Draft) -> None:
    found = planned(known, draft)
    made = plan_for(known.published.bundle, found["closer"], candidates=tuple(found.values()))
    doc = json.loads(plan_json(made))
    jsonschema.validate(doc, SCHEMA)
    assert read_plan(plan_json(made)) == made
    assert ["closer_looks" in c for c in doc["candidates"]] == [True, False]
    assert not any("looks" in c for c in doc["candidates"])
    doc["candidates"][0].pop("closer_looks")
    assert read_plan(json.dumps(doc).encode()).choice == replace(found["closer"], looks=None)


LOOKS = CloserLooks("logits", (Look(0.5, 0.4), Look(0.7, 0.2)), (0.5, 0.25))
CODECS = {"p6": Coding("transform/3", 0.3), "mask": Coding("lossless/2")}


def looks_document(photos: Published) -> Any:
    chosen = candidate("split-6-t", "split", cuts=("6",), codecs=CODECS, looks=LOOKS)
    made = plan_for(photos.bundle, chosen)
    doc = json.loads(plan_json(made))
    assert read_plan(json.dumps(doc).encode()) == made
    jsonschema.validate(doc, SCHEMA)
    return doc


@pytest.mark.parametrize(
    "change",
    [
        {"share": 0.51},
        {"share": -0.1},
        {"share": None},
        {"quality": 0.5},
        {"quality": 0.3},
        {"quality": 1.01},
        {"quality": True},
        {"margin": 0},
        {"margin": -1},
        {"margin": 1001},
        {"margin": 10**400},
        {"margin": "wide"},
        {"more": 1},
    ],
)
def test_a_plan_with_a_look_that_is_none_is_refused(photos: Published, change: dict[str, Any]) -> None:
    doc = looks_document(photos)
    doc["candidates"][0]["closer_looks"]["looks"][1] |= change
    with pytest.raises(PlanMalformed, match=r"closer_looks"):
        read_plan(json.dumps(doc).encode())


@pytest.mark.parametrize(
    "change",
    [
        {"output": 3},
        {"output": "y" * 5000},
        {"looks": []},
        {"looks": {}},
        {"looks": [0.5]},
        {"looks": [{"quality": 0.3 + n / 10, "margin": 1.0, "share": 0.5} for n in range(1, 6)]},
        {"looks": [{"quality": 0.5, "margin": 1.0, "share": 1.01}]},
        {"looks": [{"quality": 0.2, "margin": 1.0, "share": 0.5}]},
        {"looks": [{"quality": 0.5, "share": 0.5}]},
        {"shares": [0.5]},
    ],
)
def test_a_plan_with_closer_looks_that_are_none_is_refused(photos: Published, change: dict[str, Any]) -> None:
    doc = looks_document(photos)
    doc["candidates"][0]["closer_looks"] |= change
    with pytest.raises(PlanMalformed, match=r"closer_looks") as e:
        read_plan(json.dumps(doc).encode())
    assert len(str(e.value)) < 400


def test_a_plan_with_a_second_look_as_it_once_was_is_refused(photos: Published) -> None:
    doc = looks_document(photos)
    doc["candidates"][0].pop("closer_looks")
    doc["candidates"][0]["second_look"] = {"quality": 0.8, "margin": 0.2, "output": "logits", "share": 0.25}
    with pytest.raises(PlanMalformed, match="unknown keys: second_look"):
        read_plan(json.dumps(doc).encode())


@pytest.mark.parametrize(
    ("kind", "cuts", "codecs", "why"),
    [
        ("cloud", (), CODECS, "no cut"),
        ("split", ("6",), {}, "nothing that they could send finer"),
        ("split", ("6",), {"p6": Coding("int8/1")}, "nothing that they could send finer"),
        ("split", ("6",), {"p6": Coding("layers/1", 0.3)}, "codec cannot be 'layers/1'"),
        ("split", ("6",), CODECS | {"q": Coding("transform/3", 0.5)}, "transform/3@0.5"),
    ],
)
def test_nothing_is_looked_at_closer_where_nothing_could_be_sent_finer(
    photos: Published, kind: str, cuts: tuple[str, ...], codecs: dict[str, Coding], why: str
) -> None:
    chosen = candidate("t", kind, cuts=cuts, codecs=codecs, looks=LOOKS)
    with pytest.raises(PlanMalformed, match=why):
        read_plan(plan_json(plan_for(photos.bundle, chosen)))


def no_variant(digest: str) -> Any:
    raise AssertionError(digest)


def test_the_route_of_a_plan_takes_the_closer_looks(photos: Published) -> None:
    chosen = candidate("split-6-t", "split", cuts=("6",), codecs={"p6": Coding("transform/3", 0.3)}, looks=LOOKS)
    hops = remote("http://127.0.0.1:9", "http://127.0.0.1:9")
    route = route_of(chosen, photos.digest, photos.bundle, hops, lambda *_: None, no_variant)
    assert route.looks is not None
    assert route.looks.looks == LOOKS.looks
    assert route.looks.margin_of({"logits": np.array([[1.0, 3.5]])}) == 2.5
    assert route.packings == ({}, {"p6": Packing("transform/3", 0.3)})
    assert route.finer(0.7).packings == ({}, {"p6": Packing("transform/3", 0.7)})
    elsewhere = replace(chosen, looks=replace(LOOKS, output="p6"))
    with pytest.raises(PlanMalformed, match="'p6', no output of photos"):
        route_of(elsewhere, photos.digest, photos.bundle, hops, lambda *_: None, no_variant)


def test_measuring_takes_every_look_and_counts_each_by_its_share(known: Known, tmp_path: Path) -> None:
    published, pause_s, calls = known.published, 0.2, list[int]()
    app = create_segment_app(segment_settings(published, tmp_path))
    inner = app.wsgi_app

    def slow(environ: Any, start_response: Any) -> Any:
        calls.append(int(environ["CONTENT_LENGTH"]))
        time.sleep(pause_s)
        return inner(environ, start_response)

    # Nothing is sure by such margins, and all of it is looked at all the same.
    looks = CloserLooks("logits", tuple(replace(look, margin=1e-9) for look in known.chain.looks), (0.5, 0.25))
    codecs = {"p6": Coding("transform/3", known.chain.quality)}
    chosen = candidate("split-6-t", "split", cuts=("6",), codecs=codecs, looks=looks)
    examples = [Tried({"x": photo_array(photo(seed=n))}) for n in range(2)]
    tables = Tables(published.registry.bundle, published.registry.blob, MAX_PIXELS)
    with served(app) as head, served(slow) as tail:
        hops = remote(head, tail)
        always, once = (
            requester(c, published.digest, published.bundle, hops, examples, tables, no_variant)
            for c in (chosen, replace(chosen, looks=None))
        )
        always(0)
        assert len(calls) == 3
        found: dict[str, float] = {}

        def cloud() -> float:
            found.update(always(0))
            assert found["total"] >= found["edge"] + found["cloud"] + found["pack"]
            return found["cloud"]

        assert 1.75 * pause_s <= least(cloud, 2.4 * pause_s) < 2.4 * pause_s
        assert found["total"] < 3 * pause_s
        calls.clear()
        assert once(0).keys() == found.keys()
        assert len(calls) == 1
        for hop in hops:
            hop.close()


@pytest.mark.parametrize("where", ["warming up", "measured"])
def test_a_candidate_whose_closer_look_fails_while_it_is_measured_is_refused(
    known: Known, tmp_path: Path, where: str
) -> None:
    """A look that was not taken would make it quicker than it is."""
    published, packed = known.published, list[int]()
    app = create_segment_app(segment_settings(published, tmp_path))
    inner, raw_bytes = app.wsgi_app, 16 * 4 * 4 * 4

    def refuses(environ: Any, start_response: Any) -> Any:
        if (length := int(environ["CONTENT_LENGTH"])) < raw_bytes:
            packed.append(length)
        # A look of the only candidate that packs: each of its requests has two of them.
        if length < raw_bytes and len(packed) == (2 if where == "warming up" else 5):
            start_response("503 SERVICE UNAVAILABLE", [("Retry-After", "30")])
            return [b""]
        return inner(environ, start_response)

    looks = CloserLooks("logits", known.chain.looks, (0.5, 0.25))
    coarse = {"p6": Coding("transform/3", known.chain.quality)}
    chain = candidate("split-6-t", "split", cuts=("6",), codecs=coarse, looks=looks)
    examples = [Tried({"x": photo_array(photo(seed=n))}) for n in range(2)]
    tables = Tables(published.registry.bundle, published.registry.blob, MAX_PIXELS)
    with served(app) as good, served(refuses) as bad:
        functions = Functions(good, *((good, bad) if where == "warming up" else (bad, good)))
        found = {
            c.name: c
            for c in measure(
                [chain, candidate("split-6-raw", "split", cuts=("6",))],
                published.digest,
                published.bundle,
                functions,
                examples,
                tables,
                no_variant,
                rounds=4,
                eliminate=False,
            )
        }
    assert (found["split-6-t"].measured, found["split-6-t"].refused[:10]) == (None, "it failed:")
    raw = found["split-6-raw"].measured
    assert raw is not None
    assert raw.runs == 4


def test_a_link_that_breaks_while_candidates_are_measured_is_no_reason_not_to_cross_it(
    known: Known, tmp_path: Path
) -> None:
    published, calls = known.published, list[int]()
    app = create_segment_app(segment_settings(published, tmp_path))

    def breaks(environ: Any, start_response: Any) -> Any:
        calls.append(1)
        if len(calls) > 2:
            start_response("503 SERVICE UNAVAILABLE", [("Retry-After", "30")])
            return [b""]
        return app.wsgi_app(environ, start_response)

    candidates = [candidate(), candidate("split-6-raw", "split", cuts=("6",))]
    examples = [Tried({"x": photo_array(photo(seed=0))})]
    tables = Tables(published.registry.bundle, published.registry.blob, MAX_PIXELS)
    with served(app) as good, served(breaks) as bad, pytest.raises(HopUnavailable):
        measure(
            candidates,
            published.digest,
            published.bundle,
            Functions(good, bad, good),
            examples,
            tables,
            no_variant,
            eliminate=False,
        )


def test_a_look_for_which_no_time_was_left_is_a_failed_measurement(
    known: Known, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = known.published
    app = create_segment_app(segment_settings(published, tmp_path))

    def slow(environ: Any, start_response: Any) -> Any:
        time.sleep(0.6)
        return app.wsgi_app(environ, start_response)

    looks = CloserLooks("logits", known.chain.looks, (0.5, 0.25))
    coarse = {"p6": Coding("transform/3", known.chain.quality)}
    chain = candidate("split-6-t", "split", cuts=("6",), codecs=coarse, looks=looks, seconds=0.0)
    tables = Tables(published.registry.bundle, published.registry.blob, MAX_PIXELS)
    with served(app) as head, served(slow) as tail:
        hops, examples = remote(head, tail), [Tried({"x": photo_array(photo(seed=0))})]
        ask = requester(chain, published.digest, published.bundle, hops, examples, tables, no_variant)
        ask(0)
        monkeypatch.setattr(measuring, "_LEAST_S", 1.5)
        ask = requester(chain, published.digest, published.bundle, hops, examples, tables, no_variant)
        with pytest.raises(DeadlineExceeded, match="no time for closer look 1"):
            ask(0)
        for hop in hops:
            hop.close()


# What each send takes


@pytest.fixture(scope="module")
def crossed(known: Known, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Array]:
    """What a photo's head gives, an integer tensor, and a float that nothing is packed for."""
    folder = tmp_path_factory.mktemp("crossed")
    bench = Workbench(known.published.bundle, known.published.digest, {}, cache_of(known.published, folder))
    given = bench.run(known.published.bundle.segment("..6"), shown(known)[0].arrays)
    bench.forget()
    return {"p6": given["p6"], "ids": np.arange(64), "scale": np.ones(1, np.float32)}


def ways(known: Known, *qualities: float, codec: str = "transform/3") -> list[dict[str, Packing]]:
    table = known.table("p6") if codec == "transform/3" else None
    return [{"p6": Packing(codec, q, table), "ids": Packing("lossless/2")} for q in qualities]


def refines(made: Send) -> bool:
    assert made.coded["p6"].codec == "layers/1"
    return not isinstance(made.coded["p6"].payload, First)


def test_each_look_sends_what_refines_the_one_before(known: Known, crossed: dict[str, Array]) -> None:
    hows = ways(known, 0.25, 0.45, 0.65)
    made = sends(crossed, "6..", hows)
    assert [refines(one) for one in made] == [False, True, True]
    errors = [float(np.abs(one.arrived["p6"] - crossed["p6"]).max()) for one in made]
    whole = send(crossed, "6..", hows[2])
    finest = float(np.abs(whole.arrived["p6"] - crossed["p6"]).max())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] <= 1.5 * finest
    payloads = [one.coded["p6"].nbytes for one in made]
    # Of so small a tensor the keys weigh more than the rest.
    assert sum(payloads) - 2 * (1 + KEY_BYTES) < 1.3 * whole.coded["p6"].nbytes
    for one in made:
        assert one.nbytes == frame_bytes({"scale": crossed["scale"]}, "6..", one.coded)
        assert np.array_equal(one.arrived["ids"], crossed["ids"])
        assert "scale" not in one.coded
        assert one.pack_s > 0 < one.unpack_s


def test_a_look_that_cannot_refine_sends_all_of_it_and_the_next_refines_that(
    known: Known, crossed: dict[str, Array]
) -> None:
    made = sends(crossed, "6..", ways(known, 0.25, 0.5, 0.7))
    assert [refines(one) for one in made] == [False, False, True]
    (whole,) = sends(crossed, "6..", ways(known, 0.5))
    assert made[1].nbytes == whole.nbytes
    assert np.array_equal(made[1].arrived["p6"], whole.arrived["p6"])


def test_codecs_that_cannot_be_refined_send_all_of_it_finer(known: Known, crossed: dict[str, Array]) -> None:
    hows = ways(known, 0.3, 0.6, codec="sparse/1")
    assert [one.nbytes for one in sends(crossed, "6..", hows)] == [send(crossed, "6..", h).nbytes for h in hows]


def test_nothing_more_is_sent_of_what_went_raw(known: Known, crossed: dict[str, Array]) -> None:
    spoilt = crossed | {"p6": np.full_like(crossed["p6"], np.nan)}
    (only,) = sends(spoilt, "6..", ways(known, 0.25, 0.45))
    assert only.coded.keys() == {"ids"}
    assert only.nbytes > crossed["p6"].nbytes
