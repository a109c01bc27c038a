"""A router whose tail fails: another candidate of the plan answers in time, and says where it is only close."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flask import Response
from flask.testing import FlaskClient

from isthmus.artifacts.plan import Candidate, Coding, Error
from isthmus.oip import messages as oip
from isthmus.pipeline.continuation import CONTENT_TYPE
from isthmus.routing.breaker import Breaker
from isthmus.serving import create_router_app, create_segment_app
from isthmus_tools.netem import NetworkEmulator
from isthmus_tools.planner.publishing import publish_plan
from support.bundles import Published, metrics, photo, publish_photos, ready, router_settings, segment_settings, served
from support.patience import LONG_S, eventually
from support.plans import candidate, plan_for
from support.ports import free_port
from support.routers import assert_classes, before, expected_classes, oip_json, photo_form

CAT = photo(seed=1)
SPLIT = candidate("split-3", "split", 0.02, cuts=("3",))
CLOUD = candidate("cloud-photo", "cloud", 0.03, input="photo", codecs={"x": Coding("photo/1")})
# Live estimates show soon that this edge is the quicker place; a degraded route is never chosen for its speed.
EDGE = candidate("edge-float", "edge", 0.5)
INT8 = candidate("edge-int8", "edge", 0.3, error=Error(0.02, 50, 0.04))
FIDELITY = "outputs within 2.00% of the model's"


@dataclass
class Tail:
    """The function behind the link, which does what a test says to each frame."""

    url: str = ""
    fault: Callable[[], Response | None] = lambda: None
    frames: int = 0
    is_ready: bool = True
    ended: threading.Event = field(default_factory=threading.Event)

    def act(self, environ: dict[str, Any]) -> Response | None:
        if environ["PATH_INFO"] == "/ready":
            return None if self.is_ready else Response(status=503)
        self.frames += 1
        return self.fault()

    def stall(self) -> Response | None:
        """As a stopped process: no response until the test's end."""
        self.ended.wait(LONG_S)
        return Response(status=503)


@dataclass
class Place:
    """A published model, its tail, and routers of it; `infer` is the path for tensors of the latest router."""

    published: Published
    tail: Tail
    folder: Path
    infer: str = ""

    def router(self, chosen: Candidate, *others: Candidate, hops: tuple[str, ...] = (), **given: Any) -> FlaskClient:
        plan = plan_for(self.published.bundle, chosen, candidates=(chosen, *others))
        version = publish_plan(self.published.registry, self.published.bundle, {}, plan)
        self.infer = f"/v2/models/photos/versions/{version.version}/infer"
        given = {"deadline_s": 20.0, "model": f"photos:{version.version}", **given}
        settings = router_settings(self.published, self.folder / "router", hops or ("local", self.tail.url), **given)
        return ready(create_router_app(settings).test_client())


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return publish_photos(tmp_path_factory.mktemp("fallbacks"))


@pytest.fixture
def place(published: Published, tmp_path: Path) -> Iterator[Place]:
    tail = Tail()
    app = create_segment_app(segment_settings(published, tmp_path / "tail", max_concurrency=64))
    before(app, tail.act)
    with served(app) as url:
        tail.url = url
        yield Place(published, tail, tmp_path)
        tail.ended.set()


def route_of(client: FlaskClient, **request: Any) -> Any:
    response = client.post("/", **{"data": CAT, **request})
    assert response.status_code == 200, response.text
    route = json.loads(response.data)["route"]
    assert response.headers["Isthmus-Route"] == route["name"]
    assert response.headers.get("Isthmus-Degraded") == route.get("degraded")
    return route


def names(client: FlaskClient, times: int, **request: Any) -> list[str]:
    return [route_of(client, **request)["name"] for _ in range(times)]


def unavailable() -> Response:
    return Response(status=503)


def garbage() -> Response:
    return Response(b"\x93NUMPY garbage" * 50, 200)


FAULTS = {
    "unavailable": unavailable,
    "busy": lambda: Response(status=429),
    "garbage": garbage,
    "failing": lambda: Response(json.dumps({"error": "x", "type": "RunFailed"}), 500),
}


@pytest.mark.parametrize("fault", ["unavailable", "busy", "garbage", "failing"])
def test_the_whole_model_at_the_edge_answers_where_the_tail_fails(place: Place, fault: str) -> None:
    client = place.router(SPLIT, EDGE)
    place.tail.fault, place.tail.is_ready = FAULTS[fault], False
    response = client.post("/", data=CAT)
    assert response.status_code == 200, response.text
    assert response.json["route"]["name"] == "edge-float"
    assert_classes(response.json["classes"], expected_classes(place.published, CAT))


def test_after_failures_no_request_calls_the_tail_until_it_is_ready_again(place: Place) -> None:
    client = place.router(SPLIT, INT8)
    place.tail.fault, place.tail.is_ready = unavailable, False
    assert names(client, 10) == ["edge-int8"] * 10
    assert place.tail.frames == 3
    place.tail.fault = lambda: None
    assert names(client, 2) == ["edge-int8"] * 2
    place.tail.is_ready = True
    eventually(lambda: names(client, 1) == ["split-3"])
    eventually(lambda: names(client, 5) == ["split-3"] * 5)


def test_a_tail_that_is_stopped_leaves_time_for_another_route(place: Place) -> None:
    client = place.router(SPLIT, INT8)
    assert names(client, 4) == ["split-3"] * 4
    place.tail.fault, place.tail.is_ready = place.tail.stall, False
    assert names(client, 8, headers={"X-Timeout": "15s"}) == ["edge-int8"] * 8
    assert 4 < place.tail.frames < 12  # those that found the breaker open did not call it


def test_a_tail_that_is_stopped_leaves_time_within_a_short_deadline_as_well(place: Place) -> None:
    client = place.router(SPLIT, INT8)
    assert names(client, 2) == ["split-3"] * 2
    place.tail.fault, place.tail.is_ready = place.tail.stall, False
    assert names(client, 1, headers={"X-Timeout": "2s"}) == ["edge-int8"]


def test_an_exact_route_goes_before_a_quicker_degraded_one(place: Place) -> None:
    client = place.router(SPLIT, INT8, EDGE)
    place.tail.fault, place.tail.is_ready = unavailable, False
    assert "degraded" not in (found := route_of(client))
    assert found["name"] == "edge-float"


def test_a_degraded_answer_says_so_with_its_fidelity(place: Place) -> None:
    client = place.router(SPLIT, INT8)
    place.tail.fault, place.tail.is_ready = unavailable, False
    assert route_of(client)["degraded"] == FIDELITY
    infer = client.post(place.infer, json=oip_json(place.published))
    assert (infer.headers["Isthmus-Route"], infer.headers["Isthmus-Degraded"]) == ("edge-int8", FIDELITY)
    assert infer.json["parameters"]["isthmus.degraded"] == FIDELITY


def test_a_degraded_binary_answer_and_a_degraded_event_say_so(place: Place) -> None:
    client = place.router(SPLIT, INT8)
    place.tail.fault, place.tail.is_ready = unavailable, False
    document = oip_json(place.published) | {"parameters": {"binary_data_output": True}}
    binary = client.post(place.infer, json=document)
    length = int(binary.headers[oip.HEADER_LENGTH])
    assert json.loads(binary.data[:length])["parameters"]["isthmus.degraded"] == FIDELITY
    event = {"ce-id": "1", "ce-source": "/camera", "ce-type": "photo", "ce-specversion": "1.0"}
    answer = client.post("/", data=CAT, headers={"Content-Type": "image/png", **event})
    assert answer.headers["Isthmus-Degraded"] == answer.json["route"]["degraded"] == FIDELITY
    assert answer.headers["ce-specversion"] == "1.0"


def test_a_batch_names_the_route_of_each_photo_and_all_routes_in_its_header(place: Place) -> None:
    client = place.router(SPLIT, INT8)

    def fails_from_the_second_on() -> Response | None:
        return unavailable() if place.tail.frames > 1 else None

    place.tail.fault, place.tail.is_ready = fails_from_the_second_on, False
    answer = client.post("/", **photo_form(*[CAT] * 3))
    routes = [each["route"] for each in answer.json["predictions"]]
    assert [route["name"] for route in routes] == ["split-3", "edge-int8", "edge-int8"]
    assert [route.get("degraded") for route in routes] == [None, FIDELITY, FIDELITY]
    assert answer.headers["Isthmus-Route"] == "split-3; edge-int8"
    assert answer.headers["Isthmus-Degraded"] == FIDELITY


def test_a_candidate_that_the_plan_refuses_is_no_fallback(place: Place) -> None:
    """Such as one that lets photos leave the edge; the constraint holds, whatever fails."""
    refused = candidate("edge-float", refused="its memory is over the constraint")
    client = place.router(SPLIT, refused, hop_attempts=1)
    place.tail.fault, place.tail.is_ready = unavailable, False
    answer = client.post("/", data=CAT)
    assert (answer.status_code, answer.json["type"]) == (503, "HopUnavailable")
    assert int(answer.headers["Retry-After"]) >= 1


def test_a_private_cut_is_kept_where_only_the_photo_itself_could_still_be_sent(place: Place) -> None:
    photo_to_cloud = candidate(
        "cloud-photo", "cloud", input="photo", codecs={"x": Coding("photo/1")}, refused="private"
    )
    client = place.router(SPLIT, photo_to_cloud, hop_attempts=1)

    def refuses_the_split_alone() -> Response | None:
        return unavailable() if place.tail.frames % 2 else None

    place.tail.fault = refuses_the_split_alone
    answers = [client.post("/", data=CAT) for _ in range(4)]
    assert {a.json["route"]["name"] for a in answers if a.status_code == 200} == {"split-3"}


@pytest.mark.parametrize(
    ("fallback", "expected"),
    [((), "edge-float"), (("edge-int8", "edge-float"), "edge-int8"), (("no-such", "edge-float"), "edge-float")],
)
def test_the_setting_declares_the_chain(place: Place, fallback: Sequence[str], expected: str) -> None:
    client = place.router(SPLIT, EDGE, INT8, fallback=tuple(fallback))
    place.tail.fault, place.tail.is_ready = unavailable, False
    assert route_of(client)["name"] == expected


def test_without_fallbacks_the_caller_is_told_when_to_come_again(place: Place) -> None:
    client = place.router(SPLIT, EDGE, fallback=("none",), hop_attempts=1)
    place.tail.fault, place.tail.is_ready = unavailable, False
    answer = client.post("/", data=CAT)
    assert (answer.status_code, answer.json["type"]) == (503, "HopUnavailable")
    assert int(answer.headers["Retry-After"]) >= 1


def test_a_tail_that_starts_is_waited_for_where_every_route_needs_it(place: Place) -> None:
    client = place.router(SPLIT, CLOUD)

    def starts() -> Response | None:
        return unavailable() if place.tail.frames < 5 else None

    place.tail.fault = starts
    assert route_of(client)["name"] in ("split-3", "cloud-photo")


def test_a_pinned_route_has_no_fallback(place: Place) -> None:
    client = place.router(SPLIT, EDGE, hop_attempts=1)
    place.tail.fault, place.tail.is_ready = unavailable, False
    answer = client.post("/", data=CAT, headers={"Isthmus-Route": "split-3"})
    assert (answer.status_code, answer.json["type"]) == (503, "HopUnavailable")


ACCEPTS = {"Accept": f"application/json, {CONTENT_TYPE}", "Prefer": "wait=1"}


def test_a_caller_that_takes_a_continuation_gets_an_exact_answer_first(place: Place) -> None:
    client = place.router(SPLIT, INT8, EDGE)
    place.tail.fault, place.tail.is_ready = unavailable, False
    answer = client.post("/", data=CAT, headers=ACCEPTS)
    assert (answer.status_code, answer.json["route"]["name"]) == (200, "edge-float")


def test_a_caller_that_takes_a_continuation_gets_that_rather_than_a_degraded_answer(place: Place) -> None:
    client = place.router(SPLIT, INT8, hop_attempts=1)
    place.tail.fault, place.tail.is_ready = unavailable, False
    for _ in range(5):  # with the breaker closed, and open
        answer = client.post("/", data=CAT, headers=ACCEPTS)
        assert (answer.status_code, answer.content_type) == (503, CONTENT_TYPE), answer.text
    assert route_of(client)["name"] == "edge-int8"


def test_a_callers_own_error_takes_no_other_route(place: Place) -> None:
    client = place.router(CLOUD, EDGE)
    answer = client.post("/", data=CAT[:60])
    assert (answer.status_code, answer.json["type"]) == (400, "ImageMalformed")
    assert place.tail.frames == 1


def test_no_photo_of_a_batch_is_decoded_after_the_deadline(place: Place) -> None:
    client = place.router(CLOUD, fallback=("none",))
    place.tail.fault = place.tail.stall
    answer = client.post("/", **photo_form(*[CAT] * 8), headers={"X-Timeout": "500ms"})
    assert answer.status_code == 504, answer.text
    assert place.tail.frames == 1


def test_work_of_a_passed_deadline_is_not_begun(place: Place) -> None:
    client = place.router(SPLIT, EDGE)
    route_of(client)
    before = place.tail.frames
    for timeout in ("0s", "1ns", "1us"):
        answer = client.post("/", data=CAT, headers={"X-Timeout": timeout})
        assert answer.status_code in (400, 504), answer.text
    assert place.tail.frames == before


def test_requests_under_way_when_the_tail_dies_are_answered_within_their_deadline(place: Place) -> None:
    """Eight callers at a time; the link goes silent, then down, in mid-run."""
    with NetworkEmulator(place.tail.url) as link:
        client = place.router(SPLIT, INT8, hops=("local", link.url), max_concurrency=16)
        routes: list[str] = []
        ended = threading.Event()

        def call() -> None:
            while not ended.is_set():
                response = client.application.test_client().post("/", data=CAT, headers={"X-Timeout": "10s"})
                routes.append(response.headers.get("Isthmus-Route", str(response.status_code)))

        with ThreadPoolExecutor(8) as callers:
            done = [callers.submit(call) for _ in range(8)]
            try:
                eventually(lambda: routes.count("split-3") > 50)
                link.stall(LONG_S)
                eventually(lambda: routes[-8:] == ["edge-int8"] * 8)
                link.down()
                link.up()
                eventually(lambda: routes[-20:] == ["split-3"] * 20)
            finally:
                ended.set()
        for each in done:
            each.result()
    assert set(routes) == {"split-3", "edge-int8"}


def test_a_tail_that_comes_and_goes_does_not_drag_the_traffic_along(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    # By the clock of breakers and probes a request takes 10 ms, on a slow machine too: their pauses follow that clock.
    now = [0.0]
    monkeypatch.setattr("isthmus.routing.replicas.Breaker", partial(Breaker, clock=lambda: now[0]))
    monkeypatch.setattr("isthmus.routing.readiness.time", SimpleNamespace(monotonic=lambda: now[0]))
    client = place.router(SPLIT, INT8)
    route_of(client)
    # From a failure on: of calls that begin with two successes fewer than half fail, and the breaker stays closed.
    flaps = iter([unavailable(), None] * 10_000)
    place.tail.fault = lambda: next(flaps)
    routes = []
    for now[0] in itertools.islice(itertools.count(1, 0.01), 200):
        routes += names(client, 1)
    changes = sum(a != b for a, b in itertools.pairwise(routes))
    # It fails every other call: without a breaker each of them would change the route.
    assert place.tail.frames < 50
    assert changes < 50


def test_one_of_two_urls_of_a_tail_is_enough(place: Place) -> None:
    dead = f"http://127.0.0.1:{free_port()}"
    client = place.router(SPLIT, INT8, hops=("local", f"{dead}|{place.tail.url}"), expose_details=False)
    eventually(lambda: names(client, 5) == ["split-3"] * 5)
    labels = [sorted(labels) for name, labels in metrics(client) if name == "isthmus_hop_calls_total"]
    assert sorted(labels) == [[("hop", "hop1.0")], [("hop", "hop1.1")], [("hop", "local")]]
