"""Closer looks along a route: the predictions that need one, the segments that run again, and hops that fail."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from isthmus.artifacts.choice import Look
from isthmus.codecs import EncodedTensor, Encoding
from isthmus.context import Context
from isthmus.errors import RunFailed
from isthmus.pipeline import (
    HopReply,
    HttpHop,
    LocalHop,
    LookPolicy,
    LooksTaken,
    LoopbackHop,
    encode_tensors,
    execute,
    plan_route,
)
from isthmus.pipeline.agreement import margin_of
from isthmus.serving import create_segment_app
from isthmus.wire.frame import Frame
from support.bundles import pair_model, photo, publish, save, segment_settings, served, value, weight
from support.patience import LONG_S
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
    Wsgi,
    answers,
    breaks_off,
    context,
    input_of,
    looks,
    once,
    refuses,
    same_bits,
    slowly,
    split,
)
from support.served_looks import head as head
from support.served_looks import known as known
from support.served_looks import new_tail as new_tail
from support.served_looks import photos as photos
from support.served_looks import remote as remote
from support.served_looks import tail as tail
from support.served_looks import tail_of_all as tail_of_all

# Looks that are taken


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


# Hops that fail


def test_where_no_time_is_left_the_last_answer_stands(
    known: Known, head: LocalHop, tail: Gate, remote: Callable[[str], HttpHop]
) -> None:
    """What took 0.8 s is not begun again with less than twice that left."""
    route = split(known, (head, remote(tail.url)), looks(ALWAYS, *FINER))
    expected = once(route, known.inputs)
    tail.then(slowly)
    found = execute(route, known.inputs, context(2.3))
    assert (found.closer_looks, tail.calls) == (LooksTaken("late"), 1)
    assert same_bits(found, expected)


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_a_hop_that_is_busy_the_next_time_fails_at_once_and_the_last_answer_stands(
    known: Known, head: LocalHop, tail: Gate, remote: Callable[[str], HttpHop], taken: int
) -> None:
    route = split(known, (head, remote(tail.url)), looks(ALWAYS, *FINER))
    expected = once(route, known.inputs, (COARSE, *FINER)[taken])
    tail.then(*[answers] * (1 + taken), refuses)
    start = time.monotonic()
    found = execute(route, known.inputs, context())
    assert time.monotonic() - start < LONG_S / 2  # it asks for 30 s, which no answer waits for
    assert (found.closer_looks, tail.calls) == (LooksTaken("failed", taken), 2 + taken)
    assert [s.segment for s in found.runs] == ["..6", "6..", *["6.."] * taken]
    assert same_bits(found, expected)


def test_a_hop_that_hangs_the_second_time_leaves_time_for_the_first_answer(
    known: Known, head: LocalHop, tail: Gate, remote: Callable[[str], HttpHop]
) -> None:
    route = split(known, (head, remote(tail.url)), looks(ALWAYS))
    expected, over = once(route, known.inputs), threading.Event()

    def hangs(gate: Gate, environ: dict[str, Any]) -> None:
        over.wait(LONG_S)

    for seconds in (4.0, LONG_S):
        over.clear()
        tail.then(answers, hangs)
        given = context(seconds)
        found = execute(route, known.inputs, given)
        over.set()
        assert found.closer_looks == LooksTaken("failed")
        assert given.deadline.remaining() > 0
        assert same_bits(found, expected)
    assert given.deadline.remaining() > 0.7 * LONG_S, "some times what the first took, and no half of what is left"


@dataclass
class Leaving:
    """A hop whose first calls are answered, and which is gone or broken after those."""

    answering: Any
    after: Any
    left: int = 1
    name: str = "leaving"
    encodes: bool = True

    def call(self, frame: Frame, context: Context) -> HopReply:
        self.left -= 1
        if self.left >= 0:
            return self.answering.call(frame, context)  # type: ignore[no-any-return]
        if isinstance(self.after, Exception):
            raise self.after
        return self.after.call(frame, context)  # type: ignore[no-any-return]


@pytest.mark.parametrize("left", [2, 3])
def test_a_hop_that_is_gone_the_second_time_leaves_the_first_answer_whole(
    known: Known, head: LocalHop, tail: Gate, remote: Callable[[str], HttpHop], left: int
) -> None:
    """Also where the middle segment has given its finer values, and the last one has not."""
    answering, dead = remote(tail.url), remote("http://127.0.0.1:9/")
    qualities = {"r1": COARSE, "p6": COARSE}
    expected = once(split(known, (head, answering), looks(ALWAYS), ("1", "6"), qualities), known.inputs)
    for after in (dead, RunFailed("out of memory")):
        route = split(known, (head, Leaving(answering, after, left)), looks(ALWAYS), ("1", "6"), qualities)
        found = execute(route, known.inputs, context())
        assert (found.closer_looks, len(found.runs)) == (LooksTaken("failed"), 3)
        assert same_bits(found, expected)


def test_outputs_of_a_middle_segment_are_not_of_two_looks(tmp_path: Path, remote: Callable[[str], HttpHop]) -> None:
    """The middle one gives an output, too: where the last one is gone, its finer values go with it."""
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["m0"]),
        helper.make_node("Relu", ["m0"], ["r1"]),
        helper.make_node("MatMul", ["r1", "w2"], ["middle"]),
        helper.make_node("Relu", ["middle"], ["r3"]),
        helper.make_node("MatMul", ["r3", "w4"], ["last"]),
    ]
    ends, weights = [value("middle", 1, 32), value("last", 1, 32)], [weight(f"w{i}", 32, 32) for i in (0, 2, 4)]
    path = save(tmp_path / "three.onnx", nodes, [value("x", 1, 32)], ends, weights)
    x = np.random.default_rng(0).standard_normal((1, 32)).astype(np.float32)
    three = publish(tmp_path, path, {"x": x}, partitions=[["1", "3"]])
    with served(create_segment_app(segment_settings(three, tmp_path / "cache"))) as url:
        answering = remote(url)
        for left, looked in ((5, LooksTaken("last", 1)), (4, LooksTaken("failed"))):
            hop = Leaving(answering, RunFailed("out of memory"), left)
            route = plan_route(three.digest, three.bundle, (hop,), ("1", "3"))
            encodings = ({}, {"r1": Encoding(PLAIN, COARSE)}, {})
            route = replace(route, encodings=encodings, looks=LookPolicy((Look(0.9, 1.0),), lambda outputs: 0.0))
            found = execute(route, three.inputs, context())
            first = once(replace(route, hops=(answering,) * 3), three.inputs)
            assert found.closer_looks == looked
            assert same_bits(found, first) == (looked.outcome == "failed")


def test_a_look_whose_answer_broke_off_is_sent_again(
    known: Known, head: LocalHop, tail: Gate, remote: Callable[[str], HttpHop]
) -> None:
    route = split(known, (head, remote(tail.url)), looks(ALWAYS, *FINER))
    tail.then(answers, breaks_off, answers, breaks_off)
    found = execute(route, known.inputs, context())
    assert (found.closer_looks, tail.calls) == (LooksTaken("last", 3), 6)
    assert same_bits(found, once(route, known.inputs, 0.8))


def test_replicas_that_take_turns_cost_nothing_under_sixteen_threads(
    known: Known, head: LocalHop, new_tail: Callable[[], Wsgi], remote: Callable[[str], HttpHop]
) -> None:
    """Functions keep no state between calls: any replica answers any look, in as many bytes."""
    turn = itertools.cycle([new_tail(), new_tail()])
    gate = Gate(lambda environ, start_response: next(turn)(environ, start_response))
    with served(gate) as url:
        route = split(known, (head, remote(url)), looks(ALWAYS, *FINER), ("1",), {"r1": COARSE})
        alone = [[once(route, input_of(seed), q) for q in (COARSE, *FINER)] for seed in range(16)]
        gate.then()

        def ask(seed: int) -> bool:
            found = execute(route, input_of(seed), context())
            sent = [stage.sent_bytes for stage in found.runs[1:]]
            right = found.closer_looks == LooksTaken("last", 3) and same_bits(found, alone[seed][-1])
            return right and sent == [each.runs[1].sent_bytes for each in alone[seed]]

        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(ask, range(16)))
        assert gate.calls == 4 * 16
