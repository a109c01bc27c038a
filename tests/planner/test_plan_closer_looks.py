"""Closer looks in plans: candidates predicted and measured, each look counted by its share of the requests."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from msgspec import structs

from isthmus.arrays import Array
from isthmus.artifacts.choice import Look
from isthmus.artifacts.conditions import Conditions
from isthmus.artifacts.fidelity import Entry
from isthmus.artifacts.plan import Candidate, CloserLooks, Coding, Error
from isthmus.artifacts.plan import from_json as read_plan
from isthmus.artifacts.plan import to_json as plan_json
from isthmus.codecs import Encoding
from isthmus.context import Context, Deadline
from isthmus.errors import DeadlineExceeded, HopUnavailable
from isthmus.pipeline import LocalHop, LookPolicy, LooksTaken, LoopbackHop, Result, execute, local_route, planned_route
from isthmus.pipeline.hop import SegmentRunner
from isthmus.processing.image_decoding import MAX_PIXELS
from isthmus.runtime.store import TimedOutputs
from isthmus.runtime.tables import Tables
from isthmus.serving import create_segment_app
from isthmus_tools.planner import costs
from isthmus_tools.planner.candidates import CandidateSet
from isthmus_tools.planner.choice import over_link
from isthmus_tools.planner.evaluation import Evaluator
from isthmus_tools.planner.inputs import TrialInput
from isthmus_tools.planner.measurement import LinkedFunctions, measure, requester
from isthmus_tools.planner.offered import offered_codecs, short_name
from isthmus_tools.planner.segment_pool import Replay, SegmentPool, codec_tables
from support.bundles import cache_of, photo, photo_array, segment_settings, served
from support.bundles import photos as photos
from support.calibrated_photos import Known, no_variant, remote, shown
from support.calibrated_photos import known as known
from support.candidate_sets import LINK, evaluated
from support.patience import least
from support.plans import SCHEMA, candidate, plan_for

# Predictions


@pytest.fixture(scope="module")
def candidate_set(known: Known) -> Iterator[CandidateSet]:
    with evaluated(known.published, examples=shown(known), kind="photo", max_cuts=1) as made:
        yield made


def closer_looks(entry: Entry) -> CloserLooks:
    return CloserLooks.of("logits", entry.looks, entry.shares)


def planned(known: Known, candidate_set: CandidateSet, link: Conditions = LINK) -> dict[str, Candidate]:
    found = {c.name: c for c in candidate_set.predict(link)}
    return {"closer": found[f"split-6-{short_name(known.chain.choice)}"], "raw": found["split-6-raw"]}


def test_each_number_of_looks_that_saves_bytes_is_a_candidate(known: Known, candidate_set: CandidateSet) -> None:
    chosen = [c for c in offered_codecs(known.fidelity, "6") if c.codec == "transform/4"]
    looks = [len(c.looks) for c in chosen]
    assert looks == sorted(set(looks))
    assert (looks[0], looks[-1]) == (0, 2)
    sizes = [e.bytes for c in chosen for e in known.fidelity.entries if e.choice == c]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(chosen)
    names = [c.name for c in candidate_set.predict(LINK)]
    assert [n for n in names if "transform" in n] == [f"split-6-{short_name(c)}" for c in chosen]
    assert "split-6-transform-60-80-100" in names


def test_a_candidate_costs_the_first_transmission_and_the_shares_of_the_looks(
    known: Known, candidate_set: CandidateSet, tmp_path: Path
) -> None:
    published, chain = known.published, known.chain
    link = Conditions(1e6, 2e6, 0.02)
    found = planned(known, candidate_set, link)
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
        always = tuple(structs.replace(look, margin=math.inf) for look in chain.looks)
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
    hop = candidate_set.profiles["cloud"].hop
    assert hop is not None
    bytes_s = hop.up_byte_s * made.up_bytes + hop.down_byte_s * made.down_bytes
    assert terms.cloud_hop == pytest.approx(calls * hop.fixed_s + bytes_s)


@pytest.fixture
def evaluator(known: Known, tmp_path: Path) -> Iterator[Evaluator]:
    published = known.published
    with contextlib.closing(SegmentPool(published.bundle, published.digest, {}, cache_of(published, tmp_path))) as own:
        yield Evaluator(published.bundle, published.digest, own, shown(known), codec_tables(published.registry))


def test_encoding_and_decoding_count_by_the_shares_of_the_looks(
    known: Known, evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_the_clock(*given: Any) -> Result:
        result = execute(*given)
        runs = tuple(r._replace(encode_s=10.0**n, decode_s=2 * 10.0**n) for n, r in enumerate(result.runs))
        return replace(result, runs=runs)

    monkeypatch.setattr("isthmus_tools.planner.evaluation.execute", by_the_clock)
    looks = CloserLooks.of("logits", known.chain.looks, (0.5, 0.25))
    made = evaluator.closer_looks("6", known.chain.choice, looks, Error(0.0, 1))
    assert made is not None
    assert made.encode_s == 1 + 5 + 25
    assert made.decode_s == 2 * made.encode_s


def test_a_split_that_cannot_be_sent_finer_is_no_candidate(known: Known, evaluator: Evaluator) -> None:
    assert evaluator.closer_looks("3", known.chain.choice, closer_looks(known.chain), Error(0.0, 1)) is None


def test_moving_to_another_link_equals_a_prediction_there(known: Known, candidate_set: CandidateSet) -> None:
    there = Conditions(3e5, 7e5, 0.08)
    for name, made in planned(known, candidate_set).items():
        expected = planned(known, candidate_set, there)[name].predicted
        assert over_link(made, there).predicted.seconds == pytest.approx(expected.seconds)


def test_a_plan_with_closer_looks_survives_its_document(known: Known, candidate_set: CandidateSet) -> None:
    found = planned(known, candidate_set)
    made = plan_for(known.published.bundle, found["closer"], candidates=tuple(found.values()))
    doc = json.loads(plan_json(made))
    jsonschema.validate(doc, SCHEMA)
    assert read_plan(plan_json(made)) == made
    assert ["closer_looks" in c for c in doc["candidates"]] == [True, False]
    assert not any("looks" in c for c in doc["candidates"])
    doc["candidates"][0].pop("closer_looks")
    assert read_plan(json.dumps(doc).encode()).choice == structs.replace(found["closer"], looks=None)


# Requests


def test_measuring_takes_every_look_and_counts_each_by_its_share(known: Known, tmp_path: Path) -> None:
    published, pause_s, calls = known.published, 0.2, list[int]()
    app = create_segment_app(segment_settings(published, tmp_path))
    inner = app.wsgi_app

    def slow(environ: Any, start_response: Any) -> Any:
        calls.append(int(environ["CONTENT_LENGTH"]))
        time.sleep(pause_s)
        return inner(environ, start_response)

    # Nothing is sure by such margins, and all of it is looked at all the same.
    looks = CloserLooks.of(
        "logits", tuple(structs.replace(look, margin=1e-9) for look in known.chain.looks), (0.5, 0.25)
    )
    codecs = {"p6": Coding("transform/4", known.chain.quality)}
    chosen = candidate("split-6-t", "split", cuts=("6",), codecs=codecs, looks=looks)
    examples = [TrialInput({"x": photo_array(photo(seed=n))}) for n in range(2)]
    tables = Tables(published.registry.bundle, published.registry.blob, MAX_PIXELS)
    with served(app) as head, served(slow) as tail:
        hops = remote(head, tail)
        always, once = (
            requester(c, published.digest, published.bundle, hops, examples, tables, no_variant)
            for c in (chosen, structs.replace(chosen, looks=None))
        )
        always(0)
        assert len(calls) == 3
        found: dict[str, float] = {}

        def cloud() -> float:
            found.update(always(0))
            assert found["total"] >= found["edge"] + found["cloud"] + found["pack"]
            # The edge of a busy machine may pause where the cloud does not.
            return found["cloud"] if found["total"] < 3 * pause_s else math.inf

        assert 1.75 * pause_s <= least(cloud, 2.4 * pause_s) < 2.4 * pause_s
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

    looks = CloserLooks.of("logits", known.chain.looks, (0.5, 0.25))
    coarse = {"p6": Coding("transform/4", known.chain.quality)}
    chain = candidate("split-6-t", "split", cuts=("6",), codecs=coarse, looks=looks)
    examples = [TrialInput({"x": photo_array(photo(seed=n))}) for n in range(2)]
    tables = Tables(published.registry.bundle, published.registry.blob, MAX_PIXELS)
    with served(app) as good, served(refuses) as bad:
        functions = LinkedFunctions(good, *((good, bad) if where == "warming up" else (bad, good)))
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


def test_a_link_that_breaks_during_measurement_is_an_error_and_no_choice_of_the_edge(
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
    examples = [TrialInput({"x": photo_array(photo(seed=0))})]
    tables = Tables(published.registry.bundle, published.registry.blob, MAX_PIXELS)
    with served(app) as good, served(breaks) as bad, pytest.raises(HopUnavailable):
        measure(
            candidates,
            published.digest,
            published.bundle,
            LinkedFunctions(good, bad, good),
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

    looks = CloserLooks.of("logits", known.chain.looks, (0.5, 0.25))
    coarse = {"p6": Coding("transform/4", known.chain.quality)}
    chain = candidate("split-6-t", "split", cuts=("6",), codecs=coarse, looks=looks, seconds=0.0)
    tables = Tables(published.registry.bundle, published.registry.blob, MAX_PIXELS)
    with served(app) as head, served(slow) as tail:
        hops, examples = remote(head, tail), [TrialInput({"x": photo_array(photo(seed=0))})]
        ask = requester(chain, published.digest, published.bundle, hops, examples, tables, no_variant)
        ask(0)
        monkeypatch.setattr("isthmus_tools.planner.measurement._MIN_S", 1.5)
        ask = requester(chain, published.digest, published.bundle, hops, examples, tables, no_variant)
        with pytest.raises(DeadlineExceeded, match="no time for closer look 1"):
            ask(0)
        for hop in hops:
            hop.close()


# What each transmission takes


class Recorder:
    """A pool that records the tensors arriving at its segments."""

    def __init__(self, pool: SegmentPool) -> None:
        self.arrived: list[Mapping[str, Array]] = []
        self._pool = pool

    def run(self, bundle: str, segment: str, arrays: Mapping[str, Array], deadline: Deadline) -> TimedOutputs:
        self.arrived.append(arrays)
        return self._pool.run(bundle, segment, arrays, deadline)


@pytest.fixture(scope="module")
def pool(known: Known, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SegmentPool]:
    published, folder = known.published, tmp_path_factory.mktemp("pool")
    with contextlib.closing(SegmentPool(published.bundle, published.digest, {}, cache_of(published, folder))) as opened:
        yield opened


@pytest.fixture(scope="module")
def at_cut(known: Known, pool: SegmentPool) -> Mapping[str, Array]:
    return transmitted(known, pool, "..6", shown(known)[0].arrays).tensors


def transmitted(
    known: Known,
    runner: SegmentRunner,
    segment: str,
    tensors: Mapping[str, Array],
    how: Encoding | None = None,
    *finer: float,
) -> Result:
    """The result of one segment over a loopback hop, with a closer look at each further quality."""
    published = known.published
    hop = LoopbackHop(LocalHop(runner), codec_tables(published.registry))
    route = local_route(
        published.digest, published.bundle, [published.bundle.segments[segment]], hop, {"p6": how} if how else None
    )
    policy = LookPolicy(tuple(Look(quality, 1.0) for quality in finer), lambda outputs: 0.0) if finer else None
    return execute(replace(route, looks=policy), tensors, Context.from_headers({}, longest_s=60.0))


@pytest.mark.parametrize("codec", ["transform/4", "sparse/2"])
def test_each_look_sends_the_whole_tensor_finer(
    known: Known, pool: SegmentPool, at_cut: Mapping[str, Array], codec: str
) -> None:
    table = known.table("p6") if codec == "transform/4" else None
    recorder = Recorder(pool)
    runs = transmitted(known, recorder, "6..", at_cut, Encoding(codec, 0.25, table), 0.45, 0.7).runs
    errors = [float(np.abs(arrays["p6"] - at_cut["p6"]).max()) for arrays in recorder.arrived]
    assert errors[0] > errors[1] > errors[2]
    for run, quality, arrays in zip(runs, (0.25, 0.45, 0.7), list(recorder.arrived), strict=True):
        (alone,) = transmitted(known, recorder, "6..", at_cut, Encoding(codec, quality, table)).runs
        assert run.sent_bytes == alone.sent_bytes
        assert run.codecs == {"p6": codec}
        assert np.array_equal(arrays["p6"], recorder.arrived[-1]["p6"])
        assert run.encode_s > 0 < run.decode_s


def test_raw_tensors_are_not_sent_again(known: Known, pool: SegmentPool, at_cut: Mapping[str, Array]) -> None:
    spoilt = {**at_cut, "p6": np.full_like(at_cut["p6"], np.nan)}
    result = transmitted(known, pool, "6..", spoilt, Encoding("transform/4", 0.25, known.table("p6")), 0.45)
    assert result.closer_looks is None
    (run,) = result.runs
    assert not run.codecs
    assert run.sent_bytes > spoilt["p6"].nbytes


def test_equal_inputs_run_once(known: Known, pool: SegmentPool, at_cut: Mapping[str, Array]) -> None:
    recorder = Recorder(pool)
    replay = Replay(recorder, inputs=1)
    first = transmitted(known, replay, "6..", at_cut)
    for codec in ("lossless/3", "int8/1", "int8/1"):
        result = transmitted(known, replay, "6..", at_cut, Encoding(codec))
    assert len(recorder.arrived) == 2
    assert not np.array_equal(result.outputs["logits"], first.outputs["logits"])
