"""Closer looks along a route: which answers get one, which segments run again, and what is sent to them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from isthmus.artifacts.choice import Look
from isthmus.codecs import EncodedTensor, Encoding
from isthmus.pipeline.agreement import margin_of
from isthmus.pipeline.execution import run
from isthmus.pipeline.hop import HttpHop, LocalHop
from isthmus.pipeline.looks import Looked
from isthmus.pipeline.passage import encode_all
from isthmus.pipeline.route import Looks, plan_route
from isthmus.serving import create_segment_app
from support.bundles import pair_model, photo, publish, segment_settings, served
from support.served_looks import (
    ALWAYS,
    CALIBRATED,
    COARSE,
    FINE,
    FINER,
    NEVER,
    PLAIN,
    Gate,
    Known,
    context,
    input_of,
    looks,
    once,
    same_bits,
    split,
)
from support.served_looks import head as head
from support.served_looks import known as known
from support.served_looks import new_tail as new_tail
from support.served_looks import photos as photos
from support.served_looks import remote as remote
from support.served_looks import tail as tail
from support.served_looks import tail_of_all as tail_of_all


@pytest.mark.parametrize("codec", [CALIBRATED, PLAIN])
def test_a_clear_answer_is_sure_and_nothing_is_sent_again(
    known: Known, head: LocalHop, tail: Gate, remote: Callable[[str], HttpHop], codec: str
) -> None:
    route = split(known, (head, remote(tail.url)), looks(NEVER), codec=codec)
    found = run(route, known.inputs, context())
    assert (found.looked, tail.calls) == (Looked("sure"), 1)
    assert [s.segment for s in found.stages] == ["..6", "6.."]
    assert (found.facts()["looks"], found.facts()["looks_ended"]) == (0, "sure")
    assert same_bits(found, once(route, known.inputs))


def test_the_margin_itself_is_clear_enough(
    known: Known, head: LocalHop, tail: Gate, remote: Callable[[str], HttpHop]
) -> None:
    route = split(known, (head, remote(tail.url)), looks(ALWAYS))
    margin = margin_of(once(route, known.inputs).outputs["logits"])
    for given, expected in ((margin, Looked("sure")), (math.nextafter(margin, math.inf), Looked("last", 1))):
        assert run(replace(route, looks=looks(given)), known.inputs, context()).looked == expected


@pytest.mark.parametrize("codec", [CALIBRATED, PLAIN])
def test_an_unclear_answer_is_the_finer_qualitys_and_the_tensor_is_sent_again_whole(
    known: Known, head: LocalHop, tail: Gate, remote: Callable[[str], HttpHop], codec: str
) -> None:
    route = split(known, (head, remote(tail.url)), looks(ALWAYS, 0.6), ("1",), {"r1": 0.4}, codec)
    found = run(route, known.inputs, context())
    assert (found.looked, tail.calls) == (Looked("last", 1), 2)
    first, finer = once(route, known.inputs), once(route, known.inputs, 0.6)
    assert same_bits(found, finer)
    assert not same_bits(found, first)
    assert [s.segment for s in found.stages] == ["..1", "1..", "1.."]
    assert [s.codecs for s in found.stages] == [{}, {"r1": codec}, {"r1": codec}]
    assert [s.sent for s in found.stages[1:]] == [each.stages[1].sent for each in (first, finer)]
    assert found.facts()["segments"] == "..1,1..,1.."


def test_each_of_three_looks_sends_all_of_it_finer(
    known: Known, head: LocalHop, tail: Gate, remote: Callable[[str], HttpHop]
) -> None:
    route = split(known, (head, remote(tail.url)), looks(ALWAYS, *FINER), ("1",), {"r1": COARSE})
    for seed in range(5):
        tail.then()
        found = run(route, input_of(seed), context())
        assert (found.looked, tail.calls) == (Looked("last", 3), 4)
        each = [once(route, input_of(seed), q) for q in (COARSE, *FINER)]
        assert same_bits(found, each[-1])
        assert [s.sent for s in found.stages[1:]] == [one.stages[1].sent for one in each]


@pytest.mark.parametrize(("clear", "taken"), [((0, 9), 1), ((0, 0, 9), 2), ((0, 0, 0), 3), ((9,), 0)])
def test_looks_end_with_the_first_clear_answer(
    known: Known, head: LocalHop, tail: Gate, remote: Callable[[str], HttpHop], clear: tuple[int, ...], taken: int
) -> None:
    margins = iter(clear)
    wanted = Looks(tuple(Look(q, 1.0) for q in FINER), lambda outputs: next(margins))
    route = split(known, (head, remote(tail.url)), wanted)
    found = run(route, known.inputs, context())
    assert found.looked == Looked("last" if taken == 3 else "sure", taken)
    assert tail.calls == 1 + taken
    assert same_bits(found, once(route, known.inputs, (COARSE, *FINER)[taken]))


@pytest.mark.parametrize("codec", [CALIBRATED, PLAIN])
@pytest.mark.parametrize(
    ("qualities", "again"),
    [
        ({"r1": COARSE, "p6": COARSE}, ["1..6", "6.."]),
        ({"p6": COARSE}, ["6.."]),
        ({"r1": COARSE}, ["1..6", "6.."]),
        ({"r1": COARSE, "p6": 1.0}, ["1..6", "6.."]),
        ({"r1": FINE, "p6": COARSE}, ["6.."]),
        ({"r1": 1.0, "p6": FINE}, []),
        ({}, []),
    ],
)
def test_of_three_segments_only_those_from_the_first_coarse_cut_on_run_again(
    known: Known,
    head: LocalHop,
    tail: Gate,
    remote: Callable[[str], HttpHop],
    qualities: dict[str, float],
    again: list[str],
    codec: str,
) -> None:
    route = split(known, (head, remote(tail.url)), looks(ALWAYS), ("1", "6"), qualities, codec)
    found = run(route, known.inputs, context())
    assert [s.segment for s in found.stages] == ["..1", "1..6", "6..", *again]
    assert found.looked == (Looked("last", 1) if again else None)
    assert same_bits(found, once(route, known.inputs, FINE))


def test_hops_in_this_process_pack_nothing_and_are_not_asked_again(known: Known, head: LocalHop) -> None:
    found = run(split(known, (head,), looks(ALWAYS)), known.inputs, context())
    assert (found.looked, len(found.stages)) == (None, 2)
    assert "looks" not in found.facts()


def test_a_tensor_that_went_raw_is_not_sent_again(
    known: Known, head: LocalHop, tail: Gate, remote: Callable[[str], HttpHop]
) -> None:
    route = split(known, (head, remote(tail.url)), looks(ALWAYS))
    found = run(route, {"x": np.full((1, 3, 8, 8), np.nan, np.float32)}, context())
    assert found.stages[1].codecs == {}
    assert margin_of(found.outputs["logits"]) == 0
    assert (found.looked, tail.calls) == (None, 1)


def test_an_input_that_its_caller_has_packed_is_not_made_anew(
    known: Known, tail: Gate, remote: Callable[[str], HttpHop]
) -> None:
    route = split(known, (remote(tail.url),), looks(ALWAYS), (), {"x": COARSE}, PLAIN)
    data = EncodedTensor("photo/1", "float32", (1, 3, 8, 8), photo())
    found = run(route, {}, context(), {"x": data})
    assert (found.looked, [s.codecs for s in found.stages]) == (None, [{"x": "photo/1"}])
    assert run(route, known.inputs, context()).looked == Looked("last", 1)


def test_nothing_is_sent_again_to_a_segment_whose_other_input_its_caller_has_packed(
    tmp_path: Path, remote: Callable[[str], HttpHop]
) -> None:
    arrays = {n: np.random.default_rng(i).standard_normal((1, 32)).astype(np.float32) for i, n in enumerate("xm")}
    pair = publish(tmp_path, pair_model(tmp_path / "pair.onnx"), {"x": arrays["x"], "mask": arrays["m"]})
    gate = Gate(create_segment_app(segment_settings(pair, tmp_path / "cache")))
    with served(gate) as url:
        route = plan_route(pair.digest, pair.bundle, (remote(url),), ())
        wanted = Looks((Look(0.9, 1.0),), lambda outputs: 0.0)
        route = replace(route, encodings=({"mask": Encoding(PLAIN, COARSE)},), looks=wanted)
        assert run(route, pair.inputs, context()).looked == Looked("last", 1)
        gate.then()
        ready_made = encode_all({"x": arrays["x"]}, {"x": Encoding("half/1")})
        found = run(route, {"mask": arrays["m"]}, context(), ready_made)
        assert (found.looked, gate.calls) == (None, 1)
        assert found.stages[0].codecs == {"x": "half/1", "mask": PLAIN}
