"""A second look as it is served: through real sockets, with hops that answer, hang, refuse and go away."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
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
from isthmus.calibration.agreement import TOP1, Measure, margin_of
from isthmus.calibration.choice import Choice
from isthmus.codecs import Packed, Packing
from isthmus.context import Context, Deadline
from isthmus.errors import RunFailed, SettingsError
from isthmus.frame import Frame
from isthmus.hop import Hop, LocalHop, Reply, hops_to
from isthmus.pipeline import Result, Route, SecondLook, plan_route, run
from isthmus.planner.planning import plan as plans_of
from isthmus.planner.planning.published import publish_plan
from isthmus.runners.store import SegmentStore
from isthmus.serving import create_router_app, create_segment_app
from isthmus.serving.by_hand import packed
from isthmus.serving.guard import Guard, Sample
from isthmus.serving.metrics import Metrics
from patience import LONG_S
from plans import candidate, plan_for
from test_guard import Echo

ALWAYS, NEVER = math.inf, 1e-9
COARSE, FINE = 0.2, 0.9


@dataclass
class Gate:
    """A function behind a socket, and what it does with its calls instead of answering, first to last."""

    app: Any
    instead: list[Callable[[], Response | None]] = field(default_factory=list)
    calls: int = 0
    url: str = ""

    def __call__(self, environ: Any, start_response: Any) -> Any:
        if environ["REQUEST_METHOD"] == "POST":
            self.calls += 1
            act = self.instead.pop(0) if self.instead else None
            if act is not None and (answer := act()) is not None:
                return answer(environ, start_response)
        return self.app(environ, start_response)

    def then(self, *acts: Callable[[], Response | None]) -> None:
        """Do that with the next calls."""
        self.instead, self.calls = list(acts), 0


def answers() -> None:
    """Let the function answer."""


def refuses() -> Response:
    return Response("busy", 503, {"Retry-After": "30"})


def slowly() -> None:
    time.sleep(0.8)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return publish_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def tail_of_all(photos: Published, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    gate = Gate(create_segment_app(segment_settings(photos, tmp_path_factory.mktemp("tail"))))
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


def remote(*urls: str) -> tuple[Hop, ...]:
    return hops_to(urls, None, attempts=3, connect_timeout_s=1, max_reply_bytes=2**20)


def looks(margin: float, quality: float = FINE) -> SecondLook:
    return SecondLook(quality, margin, Measure(TOP1, "logits").margin)


def split(
    photos: Published,
    hops: tuple[Hop, ...],
    margin: float,
    cuts: tuple[str, ...] = ("6",),
    qualities: Mapping[str, float] = {"p6": COARSE},
) -> Route:
    """A route through `cuts`, those of its tensors packed at these qualities, with a second look."""
    route = plan_route(photos.digest, photos.bundle, hops, cuts)
    packings = tuple(
        {s.name: Packing("sparse/1", qualities[s.name]) for s in segment.inputs if s.name in qualities}
        for segment in route.segments
    )
    return replace(route, packings=packings, again=looks(margin))


def context(seconds: float = LONG_S) -> Context:
    return Context(Deadline.after(seconds), "call-1", "00-" + "a" * 32 + "-" + "b" * 16 + "-01")


def same_bits(one: Result, other: Result) -> bool:
    return all(array.tobytes() == other.outputs[name].tobytes() for name, array in one.outputs.items())


def once(route: Route, published: Published) -> Result:
    return run(replace(route, again=None), published.inputs, context())


# Along a route


def test_a_clear_answer_is_sure_and_nothing_is_sent_again(photos: Published, head: Hop, tail: Gate) -> None:
    route = split(photos, (head, *remote(tail.url)), NEVER)
    found = run(route, photos.inputs, context())
    assert (found.second_look, tail.calls) == ("sure", 1)
    assert [s.segment for s in found.stages] == ["..6", "6.."]
    assert found.facts()["second_look"] == "sure"
    assert same_bits(found, once(route, photos))


def test_the_margin_itself_is_clear_enough(photos: Published, head: Hop, tail: Gate) -> None:
    route = split(photos, (head, *remote(tail.url)), ALWAYS)
    margin = margin_of(once(route, photos).outputs["logits"])
    for given, outcome in ((margin, "sure"), (math.nextafter(margin, math.inf), "asked")):
        assert run(replace(route, again=looks(given)), photos.inputs, context()).second_look == outcome


def test_an_unclear_answer_is_the_finer_qualitys_bit_for_bit(photos: Published, head: Hop, tail: Gate) -> None:
    route = split(photos, (head, *remote(tail.url)), ALWAYS)
    found = run(route, photos.inputs, context())
    assert (found.second_look, tail.calls) == ("asked", 2)
    first, finer = once(route, photos), once(route.finer(looks(ALWAYS)), photos)
    assert same_bits(found, finer)
    assert not same_bits(found, first)
    assert [s.segment for s in found.stages] == ["..6", "6..", "6.."]
    assert [s.codecs for s in found.stages] == [{}, {"p6": "sparse/1"}, {"p6": "sparse/1"}]
    assert [s.sent for s in found.stages[1:]] == [first.stages[1].sent, finer.stages[1].sent]
    assert found.facts()["segments"] == "..6,6..,6.."


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
    photos: Published, head: Hop, tail: Gate, qualities: dict[str, float], again: list[str]
) -> None:
    route = split(photos, (head, *remote(tail.url)), ALWAYS, ("1", "6"), qualities)
    found = run(route, photos.inputs, context())
    assert [s.segment for s in found.stages] == ["..1", "1..6", "6..", *again]
    assert found.second_look == ("asked" if again else "")
    assert same_bits(found, once(route.finer(looks(ALWAYS)), photos))


def test_hops_in_this_process_pack_nothing_and_are_not_asked_again(photos: Published, head: Hop) -> None:
    found = run(split(photos, (head,), ALWAYS), photos.inputs, context())
    assert (found.second_look, len(found.stages)) == ("", 2)
    assert "second_look" not in found.facts()


def test_a_tensor_that_went_raw_is_not_sent_again(photos: Published, head: Hop, tail: Gate) -> None:
    route = split(photos, (head, *remote(tail.url)), ALWAYS)
    found = run(route, {"x": np.full((1, 3, 8, 8), np.nan, np.float32)}, context())
    assert found.stages[1].codecs == {}
    assert margin_of(found.outputs["logits"]) == 0
    assert (found.second_look, tail.calls) == ("", 1)


def test_an_input_that_its_caller_has_packed_is_not_made_anew(photos: Published, tail: Gate) -> None:
    route = split(photos, remote(tail.url), ALWAYS, (), {"x": COARSE})
    data = Packed("photo/1", "float32", (1, 3, 8, 8), photo())
    found = run(route, {}, context(), {"x": data})
    assert (found.second_look, [s.codecs for s in found.stages]) == ("", [{"x": "photo/1"}])
    assert run(route, photos.inputs, context()).second_look == "asked"


def test_where_no_time_is_left_the_first_answer_stands(photos: Published, head: Hop, tail: Gate) -> None:
    """What took 0.8 s is not begun again with less than twice that left."""
    route = split(photos, (head, *remote(tail.url)), ALWAYS)
    expected = once(route, photos)
    tail.then(slowly)
    found = run(route, photos.inputs, context(2.3))
    assert (found.second_look, tail.calls) == ("late", 1)
    assert same_bits(found, expected)


def test_a_hop_that_is_busy_the_second_time_fails_at_once_and_the_first_answer_stands(
    photos: Published, head: Hop, tail: Gate
) -> None:
    route = split(photos, (head, *remote(tail.url)), ALWAYS)
    expected = once(route, photos)
    tail.then(answers, refuses)
    start = time.monotonic()
    found = run(route, photos.inputs, context())
    assert time.monotonic() - start < LONG_S / 2  # it asks for 30 s, which no answer waits for
    assert (found.second_look, tail.calls) == ("failed", 2)
    assert [s.segment for s in found.stages] == ["..6", "6.."]
    assert same_bits(found, expected)


def test_a_hop_that_hangs_the_second_time_leaves_time_for_the_first_answer(
    photos: Published, head: Hop, tail: Gate
) -> None:
    route = split(photos, (head, *remote(tail.url)), ALWAYS)
    expected, over = once(route, photos), threading.Event()

    def hangs() -> None:
        over.wait(LONG_S)

    for seconds in (4.0, LONG_S):
        over.clear()
        tail.then(answers, hangs)
        given = context(seconds)
        found = run(route, photos.inputs, given)
        over.set()
        assert found.second_look == "failed"
        assert given.deadline.remaining() > 0
        assert same_bits(found, expected)
    assert given.deadline.remaining() > 0.7 * LONG_S, "some times what the first took, and no half of what is left"


@dataclass
class Leaving:
    """A hop whose first calls are answered, and which is gone or broken after those."""

    answering: Hop
    after: Hop | Exception
    left: int = 1
    name: str = "leaving"
    packs: bool = True

    def call(self, frame: Frame, context: Context) -> Reply:
        self.left -= 1
        if self.left >= 0:
            return self.answering.call(frame, context)
        if isinstance(self.after, Exception):
            raise self.after
        return self.after.call(frame, context)


@pytest.mark.parametrize("left", [2, 3])
def test_a_hop_that_is_gone_the_second_time_leaves_the_first_answer_whole(
    photos: Published, head: Hop, tail: Gate, left: int
) -> None:
    """Also where the middle segment has given its finer values, and the last one has not."""
    (answering, dead) = remote(tail.url, "http://127.0.0.1:9/")
    qualities = {"r1": COARSE, "p6": COARSE}
    expected = once(split(photos, (head, answering), ALWAYS, ("1", "6"), qualities), photos)
    for after in (dead, RunFailed("out of memory")):
        route = split(photos, (head, Leaving(answering, after, left)), ALWAYS, ("1", "6"), qualities)
        found = run(route, photos.inputs, context())
        assert (found.second_look, len(found.stages)) == ("failed", 3)
        assert same_bits(found, expected)


def test_outputs_of_a_middle_segment_are_not_of_two_looks(tmp_path: Path) -> None:
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
        (answering,) = remote(url)
        for left, outcome in ((5, "asked"), (4, "failed")):
            hop = Leaving(answering, RunFailed("out of memory"), left)
            route = plan_route(three.digest, three.bundle, (hop,), ("1", "3"))
            packings = ({}, {"r1": Packing("sparse/1", COARSE)}, {})
            route = replace(route, packings=packings, again=SecondLook(FINE, 1.0, lambda outputs: 0.0))
            found = run(route, three.inputs, context())
            first = once(replace(route, hops=(answering,) * 3), three)
            assert found.second_look == outcome
            assert same_bits(found, first) == (outcome == "failed")


# The router

Routers = Callable[..., FlaskClient]
INFER = "/v2/models/photos/infer"


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
    name = "isthmus_second_looks_total"
    return {labels[0][1]: count for (found, labels), count in metrics(client).items() if found == name}


def test_answers_timings_and_metrics_tell_of_second_looks(router: Routers, photos: Published) -> None:
    client = router(f"sparse/1@{COARSE}+{FINE}:1000")
    answer = ask(client)
    route = answer.json["route"]
    assert route["second_look"] == "asked"
    assert [s["segment"] for s in route["segments"]] == ["..6", "6..", "6.."]
    assert route["segments"][1]["sent_bytes"] < route["segments"][2]["sent_bytes"]
    stages = [part.strip().partition(";")[0] for part in answer.headers["Server-Timing"].split(",")]
    hops = [name for name in stages if name.startswith(("hop", "again"))]
    assert hops == ["hop0", "hop0-run", "hop1", "hop1-run", "hop1-pack", "again0", "again0-run", "again0-pack"]
    assert answer.json["timings_ms"]["again0"] > 0
    assert outcomes(client) == {"asked": 1}
    x = photos.inputs["x"]
    inputs = {"name": "x", "shape": list(x.shape), "datatype": "FP32", "data": x.ravel().tolist()}
    told = client.post(INFER, json={"inputs": [inputs]}).json["parameters"]
    assert (told["second_look"], told["segments"]) == ("asked", "..6,6..,6..")
    assert outcomes(client) == {"asked": 2}
    sent = metrics(client)["isthmus_hop_sent_bytes_total", (("hop", route["segments"][1]["hop"]),)]
    assert sent >= sum(s["sent_bytes"] for s in route["segments"])


def test_each_outcome_is_counted(router: Routers, tail: Gate) -> None:
    client = router(f"sparse/1@{COARSE}+{FINE}:1000")
    tail.then(answers, refuses)
    assert ask(client).json["route"]["second_look"] == "failed"
    tail.then(slowly)
    assert ask(client, **{"X-Timeout": "2300ms"}).json["route"]["second_look"] == "late"
    assert outcomes(client) == {"failed": 1, "late": 1}
    sure = router(f"sparse/1@{COARSE}+{FINE}:0.000000001")
    assert ask(sure).json["route"]["second_look"] == "sure"
    assert outcomes(sure) == {"sure": 1}


def test_answers_are_those_of_the_quality_that_answered(router: Routers) -> None:
    coarse, fine = router(f"sparse/1@{COARSE}"), router(f"sparse/1@{FINE}")
    both = router(f"sparse/1@{COARSE}+{FINE}:60")
    seen = set()
    for seed in range(30):
        route = (found := ask(both, seed).json)["route"]
        expected = ask(fine if route["second_look"] == "asked" else coarse, seed).json
        assert "second_look" not in expected["route"]
        assert found["classes"] == expected["classes"]
        seen.add(route["second_look"])
    assert seen == {"sure", "asked"}


def test_a_plans_second_look_is_taken_and_codec_raw_switches_it_off(
    photos: Published, tail: Gate, tmp_path: Path
) -> None:
    looked = plans_of.SecondLook(FINE, 900.0, "logits", 0.5)
    codecs = {"p6": plans_of.Coding("sparse/1", COARSE)}
    chosen = candidate("split-6-t", "split", cuts=("6",), codecs=codecs, second_look=looked)
    version = publish_plan(photos.registry, photos.bundle, {}, plan_for(photos.bundle, chosen))
    hops = ("local", tail.url)

    def answer(**given: Any) -> Any:
        settings = router_settings(photos, tmp_path, hops, model=f"photos:{version.version}", **given)
        return ask(ready(create_router_app(settings).test_client())).json["route"]

    found = answer()
    assert (found["plan"], found["second_look"], len(found["segments"])) == ("split-6-t", "asked", 3)
    raw = answer(codec="raw")
    assert "second_look" not in raw
    assert ["codecs" in s for s in raw["segments"]] == [False, False]


@pytest.mark.parametrize("codec", ["sparse/1@0.4+0.3:1", "sparse/1@0.4+0.8", "sparse/1@0.4+0.8:0", "int8/1+0.8:0.2"])
def test_a_setting_that_is_no_second_look_stops_the_start(photos: Published, tmp_path: Path, codec: str) -> None:
    with pytest.raises(SettingsError, match=r"the setting codec: .*quality") as e:
        create_router_app(router_settings(photos, tmp_path, ("local",), codec=codec))
    assert e.value.facts["variable"] == "codec"


def test_answers_that_are_no_classes_are_refused_and_the_router_says_what_to_do(tmp_path: Path) -> None:
    pair = publish(tmp_path, pair_model(tmp_path / "pair.onnx"), {}, partitions=[["1"]])
    settings = router_settings(pair, tmp_path / "cache", ("local",), codec="sparse/1@0.4+0.8:0.2")
    client = create_router_app(settings).test_client()
    assert until(lambda: "second look" in client.get("/ready").get_data(as_text=True))
    said = client.get("/ready")
    assert said.status_code == 503
    assert "which pair does not answer: set codec to sparse/1@0.4, or" in said.json["error"]
    settings = router_settings(pair, tmp_path / "cache", ("local",), codec="sparse/1@0.4")
    assert ready(create_router_app(settings).test_client())


def test_a_measure_of_what_is_no_output_is_refused_too(photos: Published, head: Hop) -> None:
    route = plan_route(photos.digest, photos.bundle, (head,))
    for measure in (Measure(TOP1, "nothing"), Measure("close")):
        with pytest.raises(SettingsError, match="does not answer") as e:
            packed(route, Choice.parse("sparse/1@0.4+0.8:0.2"), lambda *_: None, lambda _, m=measure: m)  # type: ignore[misc]
        assert e.value.facts["variable"] == "codec"


# The guard


def sample(photos: Published, hop: Any, again: SecondLook | None, answer: Any, step: int = 0) -> Sample:
    whole = photos.bundle.segment("..")
    packings = ({"x": Packing("sparse/1", COARSE)},)
    route = Route(photos.digest, photos.bundle, (whole,), (hop,), packings, again)
    return Sample(route, photos.inputs, {}, {"logits": answer}, step)


def test_the_guards_steps_drop_the_second_look_and_its_notes_name_it(photos: Published) -> None:
    right, wrong = np.eye(5, dtype=np.float32)[None, 0], np.eye(5, dtype=np.float32)[None, 1]
    hop = Echo({"logits": right})
    guard = Guard(1.0, lambda _: None, Metrics(), logging.getLogger("isthmus.guard-test"), deadline_s=LONG_S)
    route = sample(photos, hop, looks(0.25), right).route
    assert guard.safer(route)[0] == route
    found = []
    for step in range(6):
        for _ in range(2):
            guard.check(sample(photos, hop, looks(0.25), wrong, step))
        taken, standing = guard.safer(route)
        assert taken.again is None
        assert standing.notes["guard_instead_of"] == f"sparse/1@{COARSE}+{FINE}:0.25"
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
    for other in (None, looks(0.3), looks(0.25, 0.8)):
        assert guard.safer(sample(photos, hop, other, right).route)[1].step == 0, "other routes stand where they stood"


def test_the_guard_compares_the_answer_that_was_given_with_the_raw_one(
    photos: Published, tail: Gate, tmp_path: Path
) -> None:
    """Of a coarse quality that loses answers and a second look that takes every one of them back."""
    hops = ("local", tail.url)
    settings = router_settings(photos, tmp_path, hops, codec="sparse/1@0+1:1000", guard_share=1.0)
    client = ready(create_router_app(settings).test_client())
    seeds = iter(range(100_000))

    def checked() -> bool:
        assert ask(client, next(seeds)).json["route"]["second_look"] == "asked"
        return metrics(client)["isthmus_guard_checks_total", ()] >= 10

    assert until(checked)
    assert metrics(client)["isthmus_guard_disagreements_total", ()] == 0
    assert metrics(client)["isthmus_guard_step", ()] == 0
