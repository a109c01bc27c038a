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
from isthmus.pipeline import HttpHop, LocalHop, LookPolicy, LooksTaken, LoopbackHop, encode_tensors, execute, plan_route
from isthmus.pipeline.agreement import margin_of
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
    found = execute(route, known.inputs, context())
    assert (found.closer_looks, tail.calls) == (LooksTaken("sure"), 1)
    assert [s.segment for s in found.runs] == ["..6", "6.."]
    assert (found.facts()["looks"], found.facts()["looks_ended"]) == (0, "sure")
    assert same_bits(found, once(route, known.inputs))


def test_a_loopback_takes_closer_looks_as_functions_do(
    known: Known, head: LocalHop, tail: Gate, remote: Callable[[str], HttpHop]
) -> None:
    """It looks calibrated tables up by bundle, tensor and codec: it is told no more than a function is."""
    asked = []

    def tables(*key: str) -> object:
        asked.append(key)
        return known.tables[key[1]]

    results = [
        execute(split(known, (head, hop), looks(ALWAYS)), known.inputs, context())
        for hop in (LoopbackHop(head, tables), remote(tail.url))
    ]
    assert same_bits(*results)
    sizes = [[(run.sent_bytes, run.payload_bytes) for run in result.runs] for result in results]
    assert sizes[0] == sizes[1]
    assert asked == [(known.published.digest, "p6", CALIBRATED)] * 2


def test_the_margin_itself_is_clear_enough(
    known: Known, head: LocalHop, tail: Gate, remote: Callable[[str], HttpHop]
) -> None:
    route = split(known, (head, remote(tail.url)), looks(ALWAYS))
    margin = margin_of(once(route, known.inputs).outputs["logits"])
    for given, expected in ((margin, LooksTaken("sure")), (math.nextafter(margin, math.inf), LooksTaken("last", 1))):
        assert execute(replace(route, looks=looks(given)), known.inputs, context()).closer_looks == expected


@pytest.mark.parametrize("codec", [CALIBRATED, PLAIN])
def test_an_unclear_answer_is_the_finer_qualitys_and_the_tensor_is_sent_again_whole(
    known: Known, head: LocalHop, tail: Gate, remote: Callable[[str], HttpHop], codec: str
) -> None:
    route = split(known, (head, remote(tail.url)), looks(ALWAYS, 0.6), ("1",), {"r1": 0.4}, codec)
    found = execute(route, known.inputs, context())
    assert (found.closer_looks, tail.calls) == (LooksTaken("last", 1), 2)
    first, finer = once(route, known.inputs), once(route, known.inputs, 0.6)
    assert same_bits(found, finer)
    assert not same_bits(found, first)
    assert [s.segment for s in found.runs] == ["..1", "1..", "1.."]
    assert [s.codecs for s in found.runs] == [{}, {"r1": codec}, {"r1": codec}]
    assert [s.sent_bytes for s in found.runs[1:]] == [each.runs[1].sent_bytes for each in (first, finer)]
    assert found.facts()["segments"] == "..1,1..,1.."


def test_each_of_three_looks_sends_all_of_it_finer(
    known: Known, head: LocalHop, tail: Gate, remote: Callable[[str], HttpHop]
) -> None:
    route = split(known, (head, remote(tail.url)), looks(ALWAYS, *FINER), ("1",), {"r1": COARSE})
    for seed in range(5):
        tail.then()
        found = execute(route, input_of(seed), context())
        assert (found.closer_looks, tail.calls) == (LooksTaken("last", 3), 4)
        each = [once(route, input_of(seed), q) for q in (COARSE, *FINER)]
        assert same_bits(found, each[-1])
        assert [s.sent_bytes for s in found.runs[1:]] == [one.runs[1].sent_bytes for one in each]


@pytest.mark.parametrize(("clear", "taken"), [((0, 9), 1), ((0, 0, 9), 2), ((0, 0, 0), 3), ((9,), 0)])
def test_looks_end_with_the_first_clear_answer(
    known: Known, head: LocalHop, tail: Gate, remote: Callable[[str], HttpHop], clear: tuple[int, ...], taken: int
) -> None:
    margins = iter(clear)
    wanted = LookPolicy(tuple(Look(q, 1.0) for q in FINER), lambda outputs: next(margins))
    route = split(known, (head, remote(tail.url)), wanted)
    found = execute(route, known.inputs, context())
    assert found.closer_looks == LooksTaken("last" if taken == 3 else "sure", taken)
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
    found = execute(route, known.inputs, context())
    assert [s.segment for s in found.runs] == ["..1", "1..6", "6..", *again]
    assert found.closer_looks == (LooksTaken("last", 1) if again else None)
    assert same_bits(found, once(route, known.inputs, FINE))


def test_hops_in_this_process_pack_nothing_and_are_not_asked_again(known: Known, head: LocalHop) -> None:
    found = execute(split(known, (head,), looks(ALWAYS)), known.inputs, context())
    assert (found.closer_looks, len(found.runs)) == (None, 2)
    assert "looks" not in found.facts()


def test_a_tensor_that_went_raw_is_not_sent_again(
    known: Known, head: LocalHop, tail: Gate, remote: Callable[[str], HttpHop]
) -> None:
    route = split(known, (head, remote(tail.url)), looks(ALWAYS))
    found = execute(route, {"x": np.full((1, 3, 8, 8), np.nan, np.float32)}, context())
    assert found.runs[1].codecs == {}
    assert margin_of(found.outputs["logits"]) == 0
    assert (found.closer_looks, tail.calls) == (None, 1)


def test_an_input_that_its_caller_has_packed_is_not_made_anew(
    known: Known, tail: Gate, remote: Callable[[str], HttpHop]
) -> None:
    route = split(known, (remote(tail.url),), looks(ALWAYS), (), {"x": COARSE}, PLAIN)
    data = EncodedTensor("photo/1", "float32", (1, 3, 8, 8), photo())
    found = execute(route, {}, context(), {"x": data})
    assert (found.closer_looks, [s.codecs for s in found.runs]) == (None, [{"x": "photo/1"}])
    assert execute(route, known.inputs, context()).closer_looks == LooksTaken("last", 1)


def test_nothing_is_sent_again_to_a_segment_whose_other_input_its_caller_has_packed(
    tmp_path: Path, remote: Callable[[str], HttpHop]
) -> None:
    arrays = {n: np.random.default_rng(i).standard_normal((1, 32)).astype(np.float32) for i, n in enumerate("xm")}
    pair = publish(tmp_path, pair_model(tmp_path / "pair.onnx"), {"x": arrays["x"], "mask": arrays["m"]})
    gate = Gate(create_segment_app(segment_settings(pair, tmp_path / "cache")))
    with served(gate) as url:
        route = plan_route(pair.digest, pair.bundle, (remote(url),), ())
        wanted = LookPolicy((Look(0.9, 1.0),), lambda outputs: 0.0)
        route = replace(route, encodings=({"mask": Encoding(PLAIN, COARSE)},), looks=wanted)
        assert execute(route, pair.inputs, context()).closer_looks == LooksTaken("last", 1)
        gate.then()
        ready_made = encode_tensors({"x": arrays["x"]}, {"x": Encoding("half/1")})
        found = execute(route, {"mask": arrays["m"]}, context(), ready_made)
        assert (found.closer_looks, gate.calls) == (None, 1)
        assert found.runs[0].codecs == {"x": "half/1", "mask": PLAIN}
