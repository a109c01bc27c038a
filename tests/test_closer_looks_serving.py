"""Closer looks as they are served: through real sockets, with hops that answer, forget, hang, refuse and go away."""

from __future__ import annotations

import itertools
import logging
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flask import Response
from flask.testing import FlaskClient
from onnx import helper

from bundles import (
    Published,
    cache_of,
    metrics,
    pair_model,
    photo,
    publish,
    publish_photos,
    ready,
    router_settings,
    save,
    segment_settings,
    served,
    until,
    value,
    weight,
)
from isthmus import frame as frames
from isthmus.bundle import Blob, digest_of
from isthmus.calibration.agreement import TOP1, Measure, margin_of
from isthmus.calibration.choice import Choice, Look
from isthmus.calibration.learn import learn
from isthmus.codecs import Packed, Packing
from isthmus.codecs.layers import follow, layered, trail_of
from isthmus.codecs.table import Table
from isthmus.context import Context, Deadline
from isthmus.errors import FrameMalformed, RunFailed, SettingsError
from isthmus.frame import CONTENT_TYPE, Frame
from isthmus.hop import HttpHop, LocalHop, Reply
from isthmus.kept import Kept
from isthmus.looks import WHOLE_FOR_S, Looked
from isthmus.passage import pack_all
from isthmus.pipeline import Result, run
from isthmus.planner.planning import plan as plans_of
from isthmus.planner.planning.published import publish_plan
from isthmus.route import Looks, Route, plan_route
from isthmus.runners import Array
from isthmus.runners.store import SegmentStore
from isthmus.serving import create_router_app, create_segment_app
from isthmus.serving.by_hand import packed
from isthmus.serving.guard import Guard, Sample
from isthmus.serving.metrics import Metrics
from isthmus.serving.tables import Tables
from patience import LONG_S
from plans import candidate, plan_for
from test_guard import Echo

ALWAYS, NEVER = math.inf, 1e-9
REFINED, WHOLE = "transform/3", "sparse/1"
COARSE, FINE = 0.2, 0.4
FINER = (0.4, 0.6, 0.8)
"""A third of the step each."""
Wsgi = Callable[..., Any]


@dataclass
class Gate:
    """A function behind a socket, and what it does with its calls instead of answering, first to last."""

    app: Wsgi
    instead: list[Callable[[Gate, dict[str, Any]], Response | None]] = field(default_factory=list)
    calls: int = 0
    url: str = ""

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        if environ["REQUEST_METHOD"] == "POST":
            self.calls += 1
            act = self.instead.pop(0) if self.instead else None
            if act is not None and (answer := act(self, environ)) is not None:
                return answer(environ, start_response)
        return self.app(environ, start_response)

    def then(self, *acts: Callable[[Gate, dict[str, Any]], Response | None]) -> None:
        """Do that with the next calls."""
        self.instead, self.calls = list(acts), 0


def answers(gate: Gate, environ: dict[str, Any]) -> None:
    """Let the function answer."""


def refuses(gate: Gate, environ: dict[str, Any]) -> Response:
    return Response("busy", 503, {"Retry-After": "30"})


def slowly(gate: Gate, environ: dict[str, Any]) -> None:
    time.sleep(0.8)


def breaks_off(gate: Gate, environ: dict[str, Any]) -> Response:
    """Answer to nobody: the call has arrived, and its answer has not."""
    list(gate.app(environ, lambda status, headers: None))
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    return Response()


def with_tables(published: Published, folder: Path, tables: Mapping[str, Table]) -> Published:
    """The next version, calibrated: with these tables for its tensors."""
    blobs, files = {}, {}
    for name, table in tables.items():
        data = frames.encode(Frame(table.to_arrays()))
        blobs[name] = Blob(digest_of(data), len(data))
        files[blobs[name].digest] = folder / f"{name}.table"
        files[blobs[name].digest].write_bytes(data)
    bundle = replace(published.bundle, tables=blobs)
    version = published.registry.publish(bundle, files, alias="prod")
    return replace(published, bundle=bundle, version=version.version, digest=version.digest)


def input_of(seed: int) -> dict[str, Array]:
    return {"x": np.random.default_rng(seed).standard_normal((1, 3, 8, 8)).astype(np.float32)}


@dataclass(frozen=True)
class Known:
    """A calibrated model, and the tables of what crosses its cuts."""

    published: Published
    tables: Mapping[str, Table]

    @property
    def inputs(self) -> dict[str, Array]:
        return self.published.inputs


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    folder = tmp_path_factory.mktemp("photos")
    photos = publish_photos(folder)
    hop = LocalHop(SegmentStore(cache_of(photos, folder), segment_settings(photos, folder)))
    route = plan_route(photos.digest, photos.bundle, (hop,), ("1", "6"))
    seen: dict[str, list[Array]] = {"r1": [], "p6": []}
    for seed in range(100, 180):
        values = input_of(seed)
        for segment in route.segments:
            frame = Frame({s.name: values[s.name] for s in segment.inputs}, photos.digest, segment.id)
            values |= hop.call(frame, context()).frame.tensors
        for name, samples in seen.items():
            samples.append(np.array(values[name]))
    tables = {name: learn(samples) for name, samples in seen.items()}
    return Known(with_tables(photos, folder, tables), tables)


@pytest.fixture(scope="module")
def photos(known: Known) -> Published:
    return known.published


@pytest.fixture(scope="module")
def new_tail(photos: Published, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Wsgi]:
    """A function that has just started: it keeps nothing yet."""
    return lambda: create_segment_app(segment_settings(photos, tmp_path_factory.mktemp("tail")))


@pytest.fixture(scope="module")
def tail_of_all(new_tail: Callable[[], Wsgi]) -> Iterator[Gate]:
    gate = Gate(new_tail())
    with served(gate) as gate.url:
        yield gate


@pytest.fixture
def tail(tail_of_all: Gate) -> Gate:
    tail_of_all.then()
    return tail_of_all


@pytest.fixture(scope="module")
def head(photos: Published, tmp_path_factory: pytest.TempPathFactory) -> LocalHop:
    folder = tmp_path_factory.mktemp("head")
    return LocalHop(SegmentStore(cache_of(photos, folder), segment_settings(photos, folder)))


@pytest.fixture
def remote() -> Iterator[Callable[[str], HttpHop]]:
    made: list[HttpHop] = []

    def to(url: str) -> HttpHop:
        made.append(HttpHop(url, attempts=3, connect_timeout_s=1, max_reply_bytes=2**20))
        return made[-1]

    yield to
    for hop in made:
        hop.close()


def looks(margin: float, *qualities: float) -> Looks:
    return Looks(tuple(Look(q, margin) for q in qualities or (FINE,)), Measure(TOP1, "logits").margin)


def split(
    known: Known,
    hops: tuple[Any, ...],
    wanted: Looks,
    cuts: tuple[str, ...] = ("6",),
    qualities: Mapping[str, float] = {"p6": COARSE},
    codec: str = REFINED,
) -> Route:
    """A route through `cuts`, those of its tensors packed at these qualities, with closer looks."""
    route = plan_route(known.published.digest, known.published.bundle, hops, cuts)
    packings = tuple(
        {s.name: Packing(codec, qualities[s.name], known.tables.get(s.name)) for s in g.inputs if s.name in qualities}
        for g in route.segments
    )
    return replace(route, packings=packings, looks=wanted)


def context(seconds: float = LONG_S) -> Context:
    return Context(Deadline.after(seconds), "call-1", "00-" + "a" * 32 + "-" + "b" * 16 + "-01")


def same_bits(one: Result, other: Result) -> bool:
    return all(array.tobytes() == other.outputs[name].tobytes() for name, array in one.outputs.items())


def alike(one: Result, other: Result) -> bool:
    """But for how sums round, and for values that lie in the middle of two steps."""
    return all(np.allclose(array, other.outputs[name], atol=1e-4) for name, array in one.outputs.items())


def once(route: Route, inputs: Mapping[str, Array], quality: float = 0.0) -> Result:
    """The answer where all is sent at that quality at least, and no look taken."""
    return run(replace(route.finer(quality), looks=None), inputs, context())


# Along a route


@pytest.mark.parametrize("codec", [REFINED, WHOLE])
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


def test_an_unclear_answer_is_the_finer_qualitys_and_only_what_is_new_is_sent(
    known: Known, head: LocalHop, tail: Gate, remote: Callable[[str], HttpHop]
) -> None:
    route = split(known, (head, remote(tail.url)), looks(ALWAYS), ("1",), {"r1": 0.4})
    route = replace(route, looks=looks(ALWAYS, 0.6))
    found = run(route, known.inputs, context())
    assert (found.looked, tail.calls) == (Looked("last", 1), 2)
    first, finer = once(route, known.inputs), once(route, known.inputs, 0.6)
    assert same_bits(found, finer)
    assert not same_bits(found, first)
    assert [s.segment for s in found.stages] == ["..1", "1..", "1.."]
    assert [s.codecs for s in found.stages] == [{}, {"r1": "layers/1"}, {"r1": "layers/1"}]
    assert [s.codecs for s in finer.stages] == [{}, {"r1": "transform/3"}]
    # Frames of one segment are as long as their payloads, up to the next multiple of 64 bytes of the header.
    assert abs(found.stages[1].sent - first.stages[1].sent) <= 64
    assert found.stages[2].sent < 0.85 * finer.stages[1].sent
    assert found.facts()["segments"] == "..1,1..,1.."


def test_three_looks_refine_one_another(
    known: Known, head: LocalHop, tail: Gate, remote: Callable[[str], HttpHop]
) -> None:
    route = split(known, (head, remote(tail.url)), looks(ALWAYS, *FINER), ("1",), {"r1": COARSE})
    for seed in range(5):
        tail.then()
        found = run(route, input_of(seed), context())
        assert (found.looked, tail.calls) == (Looked("last", 3), 4)
        assert alike(found, once(route, input_of(seed), 0.8))
        whole = [once(route, input_of(seed), q).stages[1].sent for q in (COARSE, *FINER)]
        sent = [stage.sent for stage in found.stages[1:]]
        assert all(a < b for a, b in zip(sent[1:], whole[1:], strict=True))
        # Beside its payload each frame has a header, and a refinement a key.
        assert sum(sent) < 1.1 * whole[-1] + 3 * (whole[0] + 64)


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
    assert alike(found, once(route, known.inputs, (COARSE, *FINER)[taken]))


@pytest.mark.parametrize(("codec", "qualities"), [(WHOLE, (0.4, 0.9)), (REFINED, (0.3, 0.65))])
def test_what_cannot_be_refined_is_sent_whole(
    known: Known,
    head: LocalHop,
    tail: Gate,
    remote: Callable[[str], HttpHop],
    codec: str,
    qualities: tuple[float, ...],
) -> None:
    """Another codec's payloads, and qualities that are no factor of three apart."""
    route = split(known, (head, remote(tail.url)), looks(ALWAYS, *qualities), codec=codec)
    found = run(route, known.inputs, context())
    assert (found.looked, tail.calls) == (Looked("last", 2), 3)
    for stage, quality in zip(found.stages[2:], qualities, strict=True):
        assert abs(stage.sent - once(route, known.inputs, quality).stages[1].sent) <= 64
    assert same_bits(found, once(route, known.inputs, qualities[-1]))


def test_a_look_that_was_sent_whole_is_refined_by_the_next(
    known: Known, head: LocalHop, tail: Gate, remote: Callable[[str], HttpHop]
) -> None:
    route = split(known, (head, remote(tail.url)), looks(ALWAYS, 0.5, 0.7), ("1",), {"r1": COARSE})
    found = run(route, known.inputs, context())
    assert (found.looked, tail.calls) == (Looked("last", 2), 3)
    assert alike(found, once(route, known.inputs, 0.7))
    assert found.stages[3].sent < 0.85 * once(route, known.inputs, 0.7).stages[1].sent


@pytest.mark.parametrize("codec", [REFINED, WHOLE])
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
    assert alike(found, once(route, known.inputs, FINE))


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
    route = split(known, (remote(tail.url),), looks(ALWAYS), (), {"x": COARSE}, WHOLE)
    data = Packed("photo/1", "float32", (1, 3, 8, 8), photo())
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
        route = replace(route, packings=({"mask": Packing(WHOLE, COARSE)},), looks=wanted)
        assert run(route, pair.inputs, context()).looked == Looked("last", 1)
        gate.then()
        ready_made = pack_all({"x": arrays["x"]}, {"x": Packing("half/1")})
        found = run(route, {"mask": arrays["m"]}, context(), ready_made)
        assert (found.looked, gate.calls) == (None, 1)
        assert found.stages[0].codecs == {"x": "half/1", "mask": WHOLE}


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


@pytest.fixture
def restarts(new_tail: Callable[[], Wsgi], tail: Gate) -> Iterator[Callable[[Gate, dict[str, Any]], None]]:
    """The call comes to a function that has just started."""
    before = tail.app

    def act(gate: Gate, environ: dict[str, Any]) -> None:
        gate.app = new_tail()

    yield act
    tail.app = before


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
        nobody(digest, "p6", "layers/1")
    with pytest.raises(FrameMalformed, match="no calibration"):
        Tables(registry.bundle, registry.blob, 2**20, Kept())(digest, "x", "layers/1")


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


# The router

Routers = Callable[..., FlaskClient]
INFER = "/v2/models/photos/infer"
LOOKS = "transform/3@0.2+0.4:1000+0.6:1000"


@pytest.fixture
def router(photos: Published, tail: Gate, tmp_path: Path) -> Routers:
    def start(codec: str = "", **given: Any) -> FlaskClient:
        settings = router_settings(photos, tmp_path, ("local", tail.url), codec=codec, guard_share=0.0, **given)
        client = ready(create_router_app(settings).test_client())
        tail.then()
        return client

    return start


def ask(client: FlaskClient, seed: int = 0, **headers: str) -> Any:
    answer = client.post("/", data=photo(seed=seed), headers=headers)
    assert answer.status_code == 200, answer.json
    return answer


def outcomes(client: FlaskClient) -> dict[str, float]:
    name = "isthmus_looked_answers_total"
    return {labels[0][1]: count for (found, labels), count in metrics(client).items() if found == name}


def counted(client: FlaskClient, what: str) -> float:
    return metrics(client)[f"isthmus_{what}_total", ()]


@pytest.mark.parametrize("codec", [LOOKS, "sparse/1@0.2+0.4:1000+0.9:1000"])
def test_answers_timings_and_metrics_tell_of_closer_looks(router: Routers, photos: Published, codec: str) -> None:
    client = router(codec)
    answer = ask(client)
    route = answer.json["route"]
    assert (route["looks"], route["looks_ended"]) == (2, "last")
    assert [s["segment"] for s in route["segments"]] == ["..6", "6..", "6..", "6.."]
    stages = [part.strip().partition(";")[0] for part in answer.headers["Server-Timing"].split(",")]
    hops = [name for name in stages if name.startswith(("hop", "again"))]
    again = [f"again{i}{part}" for i in range(2) for part in ("", "-run", "-pack")]
    assert hops == ["hop0", "hop0-run", "hop1", "hop1-run", "hop1-pack", *again]
    assert answer.json["timings_ms"]["again0"] > 0
    assert (outcomes(client), counted(client, "closer_looks")) == ({"last": 1}, 2)
    x = photos.inputs["x"]
    inputs = {"name": "x", "shape": list(x.shape), "datatype": "FP32", "data": x.ravel().tolist()}
    told = client.post(INFER, json={"inputs": [inputs]}).json["parameters"]
    assert (told["looks"], told["looks_ended"], told["segments"]) == (2, "last", "..6,6..,6..,6..")
    assert (outcomes(client), counted(client, "closer_looks")) == ({"last": 2}, 4)
    sent = metrics(client)["isthmus_hop_sent_bytes_total", (("hop", route["segments"][1]["hop"]),)]
    assert sent >= sum(s["sent_bytes"] for s in route["segments"])


def test_each_outcome_is_counted(router: Routers, tail: Gate) -> None:
    client = router(LOOKS)
    tail.then(answers, refuses)
    assert ask(client).json["route"]["looks_ended"] == "failed"
    tail.then(slowly)
    assert ask(client, **{"X-Timeout": "2300ms"}).json["route"]["looks_ended"] == "late"
    assert (outcomes(client), counted(client, "closer_looks")) == ({"failed": 1, "late": 1}, 0)
    tail.then(answers, answers, refuses)
    assert ask(client).json["route"]["looks"] == 1
    assert (outcomes(client), counted(client, "closer_looks")) == ({"failed": 2, "late": 1}, 1)
    sure = router("transform/3@0.2+0.4:0.000000001")
    assert ask(sure).json["route"]["looks_ended"] == "sure"
    assert outcomes(sure) == {"sure": 1}


def test_why_a_look_failed_is_logged_and_counted_as_other_failed_calls_are(
    router: Routers, tail: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    client = router(LOOKS, log_level="warning")
    tail.then(answers, answers, refuses)
    with caplog.at_level(logging.WARNING, "isthmus"):
        assert ask(client).json["route"]["looks_ended"] == "failed"
    (facts,) = [r.facts for r in caplog.records if "closer look failed" in r.getMessage()]  # type: ignore[attr-defined]
    assert (facts["hop"], facts["type"]) == (tail.url, "HopUnavailable")
    assert "503" in facts["error"]
    assert metrics(client)["isthmus_hop_errors_total", (("error", "HopUnavailable"), ("hop", tail.url))] == 1


def test_tensors_that_closer_looks_send_more_of_count_once(router: Routers, tail: Gate) -> None:
    looking, plain = router(LOOKS), router("transform/3@0.2")
    hop = (("hop", tail.url),)
    told = [(ask(client).json["route"], metrics(client)) for client in (looking, plain)]
    assert [route.get("looks") for route, _ in told] == [2, None]
    assert len({route["crossed_bytes"] for route, _ in told}) == 1
    tensors, sent = (
        [found[f"isthmus_hop_{what}_bytes_total", hop] for _, found in told] for what in ("tensor", "sent")
    )
    assert tensors[0] == tensors[1] > 0
    assert sent[0] > sent[1]


def test_a_hop_that_had_forgotten_is_counted_and_is_no_error_of_it(router: Routers, tail: Gate, restarts: Any) -> None:
    client = router(LOOKS)
    expected = ask(client).json["classes"]
    assert counted(client, "looks_forgotten") == 0
    tail.then(answers, restarts)
    found = ask(client).json
    assert (found["classes"], found["route"]["looks"], tail.calls) == (expected, 2, 4)
    tail.then()
    assert ask(client).json["classes"] == expected
    assert tail.calls == 3
    assert counted(client, "looks_forgotten") == 1
    assert outcomes(client) == {"last": 3}
    assert not [name for name, _ in metrics(client) if name == "isthmus_hop_errors_total"]


def test_answers_are_those_of_the_quality_that_answered(router: Routers) -> None:
    once = [router(f"transform/3@{quality}") for quality in (0.2, 0.4, 0.6)]
    looking = router("transform/3@0.2+0.4:60+0.6:20")
    seen = set()
    for seed in range(40):
        route = (found := ask(looking, seed).json)["route"]
        expected = ask(once[route["looks"]], seed).json
        assert "looks" not in expected["route"]
        assert [c["label"] for c in found["classes"]] == [c["label"] for c in expected["classes"]]
        scores = [[c["probability"] for c in answer["classes"]] for answer in (found, expected)]
        assert np.allclose(*scores, atol=1e-4)
        seen.add((route["looks"], route["looks_ended"]))
    assert seen == {(0, "sure"), (1, "sure"), (2, "last")}


def test_a_plans_closer_looks_are_taken_and_codec_raw_switches_them_off(
    photos: Published, tail: Gate, tmp_path: Path
) -> None:
    looked = plans_of.CloserLooks("logits", (Look(FINE, 900.0), Look(0.6, 900.0)), (0.5, 0.25))
    codecs = {"p6": plans_of.Coding(REFINED, COARSE)}
    chosen = candidate("split-6-t", "split", cuts=("6",), codecs=codecs, looks=looked)
    version = publish_plan(photos.registry, photos.bundle, {}, plan_for(photos.bundle, chosen))
    hops = ("local", tail.url)

    def answer(**given: Any) -> Any:
        settings = router_settings(photos, tmp_path, hops, model=f"photos:{version.version}", **given)
        return ask(ready(create_router_app(settings).test_client())).json["route"]

    found = answer()
    assert (found["plan"], found["looks"], found["looks_ended"]) == ("split-6-t", 2, "last")
    assert [s["codecs"] for s in found["segments"][1:]] == [{"p6": "layers/1"}] * 3
    raw = answer(codec="raw")
    assert "looks" not in raw
    assert ["codecs" in s for s in raw["segments"]] == [False, False]


@pytest.mark.parametrize(
    "codec",
    [
        "sparse/1@0.4+0.3:1",
        "sparse/1@0.4+0.8",
        "sparse/1@0.4+0.8:0",
        "int8/1+0.8:0.2",
        "transform/3@0.2+0.4:1+0.4:1",
        "transform/3@0+0.1:1+0.2:1+0.3:1+0.4:1+0.5:1",
    ],
)
def test_a_setting_that_is_no_closer_look_stops_the_start(photos: Published, tmp_path: Path, codec: str) -> None:
    with pytest.raises(SettingsError, match=r"the setting codec: .*quality") as e:
        create_router_app(router_settings(photos, tmp_path, ("local",), codec=codec))
    assert e.value.facts["variable"] == "codec"


def test_nobody_chooses_what_closer_looks_travel_as(photos: Published, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no codec of tensors"):
        create_router_app(router_settings(photos, tmp_path, ("local",), codec="layers/1"))


def test_answers_that_are_no_classes_are_refused_and_the_router_says_what_to_do(tmp_path: Path) -> None:
    pair = publish(tmp_path, pair_model(tmp_path / "pair.onnx"), {}, partitions=[["1"]])
    settings = router_settings(pair, tmp_path / "cache", ("local",), codec="sparse/1@0.4+0.8:0.2")
    client = create_router_app(settings).test_client()
    assert until(lambda: "closer looks" in client.get("/ready").get_data(as_text=True))
    said = client.get("/ready")
    assert said.status_code == 503
    assert "which pair does not answer: set codec to sparse/1@0.4, or" in said.json["error"]
    settings = router_settings(pair, tmp_path / "cache", ("local",), codec="sparse/1@0.4")
    assert ready(create_router_app(settings).test_client())


def test_a_new_version_whose_fidelity_another_version_wrote_leaves_the_old_one_serving(
    photos: Published, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = photos.registry
    registry.set_alias("photos", "live", photos.version)
    settings = router_settings(
        photos, tmp_path, ("local",), model="photos:live", codec="sparse/1@0.2+0.4:1000", refresh_s=0.0, guard_share=0.0
    )
    client = ready(create_router_app(settings).test_client())
    data = b'{"format": "isthmus.fidelity/1"}'
    blob = Blob(digest_of(data), len(data))
    (tmp_path / "fidelity").write_bytes(data)
    files = {blob.digest: tmp_path / "fidelity"}
    registry.publish(replace(photos.bundle, fidelity=blob), files, alias="live")

    def told() -> list[Any]:
        assert ask(client).json["model_version"] == photos.version
        return [r.facts for r in caplog.records if "stays as known" in r.getMessage()]  # type: ignore[attr-defined]

    with caplog.at_level(logging.WARNING, "isthmus"):
        assert until(lambda: bool(told()))
    assert "isthmus calibrate photos" in told()[0]["hint"]


def test_a_measure_of_what_is_no_output_is_refused_too(photos: Published, head: LocalHop) -> None:
    route = plan_route(photos.digest, photos.bundle, (head,))
    for measure in (Measure(TOP1, "nothing"), Measure("close")):
        with pytest.raises(SettingsError, match="does not answer") as e:
            packed(route, Choice.parse("sparse/1@0.4+0.8:0.2"), lambda *_: None, lambda _, m=measure: m)  # type: ignore[misc]
        assert e.value.facts["variable"] == "codec"


# The guard


def sample(photos: Published, hop: Any, wanted: Looks | None, answer: Any, step: int = 0) -> Sample:
    whole = photos.bundle.segment("..")
    packings = ({"x": Packing(WHOLE, COARSE)},)
    route = Route(photos.digest, photos.bundle, (whole,), (hop,), packings, wanted)
    return Sample(route, photos.inputs, {}, {"logits": answer}, step)


def test_the_guards_steps_drop_the_closer_looks_and_its_notes_name_them(photos: Published) -> None:
    right, wrong = np.eye(5, dtype=np.float32)[None, 0], np.eye(5, dtype=np.float32)[None, 1]
    hop = Echo({"logits": right})
    guard = Guard(1.0, lambda _: None, Metrics(), logging.getLogger("isthmus.guard-test"), deadline_s=LONG_S)
    wanted = looks(0.25, 0.4, 0.9)
    route = sample(photos, hop, wanted, right).route
    assert guard.safer(route)[0] == route
    found = []
    for step in range(6):
        for _ in range(2):
            guard.check(sample(photos, hop, wanted, wrong, step))
        taken, standing = guard.safer(route)
        assert taken.looks is None
        assert standing.notes["guard_instead_of"] == "sparse/1@0.2+0.4:0.25+0.9:0.25"
        packing = taken.packings[0].get("x")
        found.append((standing.notes["guard_codec"], packing and (packing.codec, packing.quality)))
    assert found == [
        ("sparse/1@0.9", ("sparse/1", 0.9)),
        ("sparse/1@0.95", ("sparse/1", 0.95)),
        ("sparse/1@1", ("sparse/1", 1.0)),
        ("int8/1", ("int8/1", 1.0)),
        ("half/1", ("half/1", 1.0)),
        ("raw", None),
    ]
    for other in (None, looks(0.3, 0.4, 0.9), looks(0.25, 0.9), looks(0.25, 0.4, 0.8)):
        assert guard.safer(sample(photos, hop, other, right).route)[1].step == 0, "other routes stand where they stood"


def test_the_guard_compares_the_answer_that_was_given_with_the_raw_one(
    photos: Published, tail: Gate, tmp_path: Path
) -> None:
    """Of a coarse quality that loses answers and closer looks that take every one of them back."""
    hops = ("local", tail.url)
    settings = router_settings(photos, tmp_path, hops, codec="sparse/1@0+0.5:1000+1:1000", guard_share=1.0)
    client = ready(create_router_app(settings).test_client())
    seeds = iter(range(100_000))

    def checked() -> bool:
        assert ask(client, next(seeds)).json["route"]["looks"] == 2
        return metrics(client)["isthmus_guard_checks_total", ()] >= 10

    assert until(checked)
    assert metrics(client)["isthmus_guard_disagreements_total", ()] == 0
    assert metrics(client)["isthmus_guard_step", ()] == 0
