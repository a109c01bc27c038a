"""Closer looks through hops that fail and replicas that take turns: the last answer stands, and none is wrong."""

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

from isthmus.artifacts.choice import Look
from isthmus.codecs import Encoding
from isthmus.context import Context
from isthmus.errors import RunFailed
from isthmus.pipeline import HopReply, HttpHop, LocalHop, LookPolicy, LooksTaken, execute, plan_route
from isthmus.serving import create_segment_app
from isthmus.wire.frame import Frame
from support.bundles import publish, save, segment_settings, served, value, weight
from support.patience import LONG_S
from support.served_looks import (
    ALWAYS,
    COARSE,
    FINER,
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
