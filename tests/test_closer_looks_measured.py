"""Closer looks as plans measure them: requests, of which each look counts by its share, and what each send takes."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.arrays import Array
from isthmus.artifacts.plan import CloserLooks, Coding
from isthmus.codecs import Encoding
from isthmus.errors import DeadlineExceeded, HopUnavailable
from isthmus.processing.image import MAX_PIXELS
from isthmus.runtime.tables import Tables
from isthmus.serving import create_segment_app
from isthmus_tools.planner import measuring
from isthmus_tools.planner.examples import Example as Tried
from isthmus_tools.planner.measuring import Functions, measure, requester
from isthmus_tools.planner.sends import frame_bytes, send, sends
from isthmus_tools.planner.workbench import Workbench
from support.bundles import cache_of, photo, photo_array, segment_settings, served
from support.calibrated_photos import Known, no_variant, remote, shown
from support.calibrated_photos import known as known
from support.patience import least
from support.plans import candidate

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
    looks = CloserLooks("logits", tuple(replace(look, margin=1e-9) for look in known.chain.looks), (0.5, 0.25))
    codecs = {"p6": Coding("transform/4", known.chain.quality)}
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
    coarse = {"p6": Coding("transform/4", known.chain.quality)}
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
    coarse = {"p6": Coding("transform/4", known.chain.quality)}
    chain = candidate("split-6-t", "split", cuts=("6",), codecs=coarse, looks=looks, seconds=0.0)
    tables = Tables(published.registry.bundle, published.registry.blob, MAX_PIXELS)
    with served(app) as head, served(slow) as tail:
        hops, examples = remote(head, tail), [Tried({"x": photo_array(photo(seed=0))})]
        ask = requester(chain, published.digest, published.bundle, hops, examples, tables, no_variant)
        ask(0)
        monkeypatch.setattr(measuring, "_MIN_S", 1.5)
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


def ways(known: Known, *qualities: float, codec: str = "transform/4") -> list[dict[str, Encoding]]:
    table = known.table("p6") if codec == "transform/4" else None
    return [{"p6": Encoding(codec, q, table), "ids": Encoding("lossless/3")} for q in qualities]


@pytest.mark.parametrize("codec", ["transform/4", "sparse/2"])
def test_each_look_sends_all_of_it_finer(known: Known, crossed: dict[str, Array], codec: str) -> None:
    hows = ways(known, 0.25, 0.45, 0.7, codec=codec)
    made = sends(crossed, "6..", hows)
    errors = [float(np.abs(one.arrived["p6"] - crossed["p6"]).max()) for one in made]
    assert errors[0] > errors[1] > errors[2]
    for one, how in zip(made, hows, strict=True):
        alone = send(crossed, "6..", how)
        assert one.nbytes == alone.nbytes == frame_bytes({"scale": crossed["scale"]}, "6..", one.coded)
        assert one.coded["p6"].codec == codec
        assert np.array_equal(one.arrived["p6"], alone.arrived["p6"])
        assert np.array_equal(one.arrived["ids"], crossed["ids"])
        assert "scale" not in one.coded
        assert one.encode_s > 0 < one.decode_s


def test_nothing_more_is_sent_of_what_went_raw(known: Known, crossed: dict[str, Array]) -> None:
    spoilt = crossed | {"p6": np.full_like(crossed["p6"], np.nan)}
    (only,) = sends(spoilt, "6..", ways(known, 0.25, 0.45))
    assert only.coded.keys() == {"ids"}
    assert only.nbytes > crossed["p6"].nbytes
