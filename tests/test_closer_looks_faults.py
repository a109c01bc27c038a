"""Closer looks through hops that fail and hops that forget: the last answer stands, and no answer is wrong."""

from __future__ import annotations

import itertools
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

from bundles import publish, save, segment_settings, served, value, weight
from isthmus import frame as frames
from isthmus.calibration.choice import Look
from isthmus.codecs import Packing
from isthmus.codecs.layers import follow, layered, trail_of
from isthmus.codecs.table import Table
from isthmus.context import Context
from isthmus.errors import FrameMalformed, RunFailed
from isthmus.frame import CONTENT_TYPE, Frame
from isthmus.hop import HttpHop, LocalHop, Reply
from isthmus.kept import Kept
from isthmus.looks import WHOLE_FOR_S, Looked
from isthmus.passage import pack_all
from isthmus.pipeline import run
from isthmus.route import Looks, plan_route
from isthmus.serving import create_segment_app
from isthmus.serving.tables import Tables
from patience import LONG_S
from served_looks import (
    ALWAYS,
    COARSE,
    FINE,
    FINER,
    REFINED,
    WHOLE,
    Gate,
    Known,
    Wsgi,
    alike,
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
from served_looks import head as head
from served_looks import known as known
from served_looks import new_tail as new_tail
from served_looks import photos as photos
from served_looks import remote as remote
from served_looks import restarts as restarts
from served_looks import tail as tail
from served_looks import tail_of_all as tail_of_all

# Hops that fail


def test_where_no_time_is_left_the_last_answer_stands(
    known: Known, head: LocalHop, tail: Gate, remote: Callable[[str], HttpHop]
) -> None:
    """What took 0.8 s is not begun again with less than twice that left."""
    route = split(known, (head, remote(tail.url)), looks(ALWAYS, *FINER))
    expected = once(route, known.inputs)
    tail.then(slowly)
    found = run(route, known.inputs, context(2.3))
    assert (found.looked, tail.calls) == (Looked("late"), 1)
    assert same_bits(found, expected)


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_a_hop_that_is_busy_the_next_time_fails_at_once_and_the_last_answer_stands(
    known: Known, head: LocalHop, tail: Gate, remote: Callable[[str], HttpHop], taken: int
) -> None:
    route = split(known, (head, remote(tail.url)), looks(ALWAYS, *FINER))
    expected = once(route, known.inputs, (COARSE, *FINER)[taken])
    tail.then(*[answers] * (1 + taken), refuses)
    start = time.monotonic()
    found = run(route, known.inputs, context())
    assert time.monotonic() - start < LONG_S / 2  # it asks for 30 s, which no answer waits for
    assert (found.looked, tail.calls) == (Looked("failed", taken), 2 + taken)
    assert [s.segment for s in found.stages] == ["..6", "6..", *["6.."] * taken]
    assert alike(found, expected)


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
        found = run(route, known.inputs, given)
        over.set()
        assert found.looked == Looked("failed")
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
    packs: bool = True
    whole_until: float = 0.0

    def call(self, frame: Frame, context: Context) -> Reply:
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
        found = run(route, known.inputs, context())
        assert (found.looked, len(found.stages)) == (Looked("failed"), 3)
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
        for left, looked in ((5, Looked("last", 1)), (4, Looked("failed"))):
            hop = Leaving(answering, RunFailed("out of memory"), left)
            route = plan_route(three.digest, three.bundle, (hop,), ("1", "3"))
            packings = ({}, {"r1": Packing(WHOLE, COARSE)}, {})
            route = replace(route, packings=packings, looks=Looks((Look(0.9, 1.0),), lambda outputs: 0.0))
            found = run(route, three.inputs, context())
            first = once(replace(route, hops=(answering,) * 3), three.inputs)
            assert found.looked == looked
            assert same_bits(found, first) == (looked.outcome == "failed")


# Hops that forget


def test_a_hop_that_has_restarted_is_sent_all_of_it_and_the_answer_is_right(
    known: Known, head: LocalHop, tail: Gate, remote: Callable[[str], HttpHop], restarts: Any
) -> None:
    hop = remote(tail.url)
    route = split(known, (head, hop), looks(ALWAYS, *FINER), ("1",), {"r1": COARSE})
    expected = once(route, known.inputs, 0.8)
    finer = [once(route, known.inputs, q).stages[1].sent for q in FINER]
    tail.then(answers, restarts)
    found = run(route, known.inputs, context())
    assert (found.looked, tail.calls) == (Looked("last", 3, forgotten=True), 5)
    assert alike(found, expected)
    sent = [stage.sent for stage in found.stages[2:]]
    assert all(abs(a - b) <= 64 for a, b in zip(sent, finer, strict=True)), "one that has forgotten may be several"
    assert 0.9 * WHOLE_FOR_S < hop.whole_until - time.monotonic() <= WHOLE_FOR_S
    tail.then()
    found = run(route, known.inputs, context())
    assert (found.looked, tail.calls) == (Looked("last", 3), 4), "it is not asked for what it may not have"
    assert [stage.sent for stage in found.stages[2:]] == sent
    hop.whole_until = time.monotonic()
    tail.then()
    found = run(route, known.inputs, context())
    assert (found.looked, tail.calls) == (Looked("last", 3), 4)
    assert all(stage.sent < 0.9 * whole for stage, whole in zip(found.stages[2:], finer, strict=True))
    assert alike(found, expected)


def test_a_refinement_whose_answer_broke_off_is_sent_again_as_it_was(
    known: Known, head: LocalHop, tail: Gate, remote: Callable[[str], HttpHop]
) -> None:
    route = split(known, (head, remote(tail.url)), looks(ALWAYS, *FINER))
    tail.then(answers, breaks_off, answers, breaks_off)
    found = run(route, known.inputs, context())
    assert (found.looked, tail.calls) == (Looked("last", 3), 6)
    assert alike(found, once(route, known.inputs, 0.8))


def test_where_the_hop_is_gone_after_it_had_forgotten_the_last_answer_stands(
    known: Known, head: LocalHop, tail: Gate, remote: Callable[[str], HttpHop], restarts: Any
) -> None:
    route = split(known, (head, remote(tail.url)), looks(ALWAYS, *FINER))
    expected = once(route, known.inputs)
    tail.then(answers, restarts, refuses)
    found = run(route, known.inputs, context())
    assert (found.looked, tail.calls) == (Looked("failed", 0, forgotten=True), 3)
    assert same_bits(found, expected)


def test_a_function_that_does_not_have_it_answers_409_and_says_what_to_do(
    known: Known, tail: Gate, restarts: Any
) -> None:
    array = np.zeros((1, 16, 4, 4), np.float32)
    packing = Packing(REFINED, COARSE, known.tables["p6"])
    (first,) = pack_all({"p6": array}, {"p6": layered(packing)}).values()
    trail = trail_of(first, known.published.digest, "p6")
    part, _ = follow(trail, replace(packing, quality=FINE))
    body = frames.encode(Frame({}, known.published.digest, "6..", packed={"p6": part}))
    restarts(tail, {})
    client = tail.app.test_client()  # type: ignore[attr-defined]
    answer = client.post("/", data=body, headers={"Content-Type": CONTENT_TYPE})
    assert answer.status_code == 409
    said = answer.json
    assert (said["type"], said["facts"]) == ("NotKept", {})
    assert "send it whole" in said["error"]
    assert "replicas" in said["hint"]


def test_who_keeps_nothing_reads_no_refinements(known: Known) -> None:
    registry, digest = known.published.registry, known.published.digest
    nobody = Tables(registry.bundle, registry.blob, 2**20)
    assert isinstance(nobody(digest, "p6", REFINED), Table)
    with pytest.raises(FrameMalformed, match="nothing is kept here"):
        nobody(digest, "p6", "layers/2")
    with pytest.raises(FrameMalformed, match="no calibration"):
        Tables(registry.bundle, registry.blob, 2**20, Kept())(digest, "x", "layers/2")


def test_two_replicas_that_answer_by_turns_give_right_answers(
    known: Known, head: LocalHop, new_tail: Callable[[], Wsgi], remote: Callable[[str], HttpHop]
) -> None:
    turn = itertools.cycle([new_tail(), new_tail()])
    with served(lambda environ, start_response: next(turn)(environ, start_response)) as url:
        hop = remote(url)
        route = split(known, (head, hop), looks(ALWAYS, *FINER), ("1",), {"r1": COARSE})
        forgotten = []
        for seed in range(9):
            if seed % 3 == 0:
                hop.whole_until = 0.0
            found = run(route, input_of(seed), context())
            assert found.looked is not None
            assert (found.looked.outcome, found.looked.taken) == ("last", 3)
            assert alike(found, once(route, input_of(seed), 0.8))
            forgotten.append(found.looked.forgotten)
        assert forgotten == [True, False, False] * 3


def test_sixteen_threads_at_once_get_right_answers(
    known: Known, head: LocalHop, tail: Gate, remote: Callable[[str], HttpHop]
) -> None:
    route = split(known, (head, remote(tail.url)), looks(ALWAYS, *FINER), ("1",), {"r1": COARSE})
    expected = [once(route, input_of(seed), 0.8) for seed in range(16)]

    def ask(seed: int) -> bool:
        return all(
            found.looked == Looked("last", 3) and alike(found, expected[seed])
            for found in (run(route, input_of(seed), context()) for _ in range(4))
        )

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(16)))


def test_replicas_that_restart_under_sixteen_threads_give_no_wrong_answer(
    known: Known, head: LocalHop, new_tail: Callable[[], Wsgi], remote: Callable[[str], HttpHop]
) -> None:
    gate = Gate(new_tail())
    with served(gate) as url:
        hop = remote(url)
        route = split(known, (head, hop), looks(ALWAYS, *FINER))
        expected = [once(route, input_of(seed), 0.8) for seed in range(16)]

        def ask(seed: int) -> str:
            for i in range(4):
                if seed == 0:
                    gate.app = new_tail()
                if i % 2:
                    hop.whole_until = 0.0
                found = run(route, input_of(seed), context())
                last = found.looked is not None and (found.looked.outcome, found.looked.taken) == ("last", 3)
                if not last or not alike(found, expected[seed]):
                    return f"{seed}: {found.looked}"
            return ""

        with ThreadPoolExecutor(16) as pool:
            assert not list(filter(None, pool.map(ask, range(16))))
