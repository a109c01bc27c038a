"""Routers that choose: pins, steps of a link, candidates that are gone; with real servers and an emulated link."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from flask import request
from flask.testing import FlaskClient
from msgspec.structs import replace

from isthmus.artifacts.conditions import Constraints
from isthmus.artifacts.plan import Candidate, Coding, Error, Terms
from isthmus.serving import create_router_app, create_segment_app
from isthmus_tools.netem import LinkShape, NetworkEmulator
from isthmus_tools.planner.publishing import publish_plan
from support.bundles import Published, photo, publish_photos, ready, router_settings, segment_settings, served
from support.patience import until
from support.plans import DIGEST, plan_for

# Seconds that the head takes, so that a fast link is quicker and a slow one is not.
EDGE_S = 0.08
PHOTO = photo((110, 110))  # 36 kB of noise
EDGE = Candidate("edge-float", "edge", Terms(edge_run=EDGE_S))
CLOUD = Candidate(
    "cloud-photo", "cloud", Terms(up=0.03, cloud_run=0.001), input="photo", codecs={"x": Coding("photo/1")},
    up_bytes=len(PHOTO), down_bytes=400,
)  # fmt: skip
SPLIT = Candidate(
    "split-3", "split", Terms(edge_run=EDGE_S / 4, cloud_run=0.001), ("3",), up_bytes=5000, down_bytes=400
)
INT8 = Candidate("edge-int8", "edge", Terms(edge_run=0.01), variant=DIGEST, error=Error(0.2, 50, 0.1))
FAST, SLOW = LinkShape(2e7, 2e7, 0.002), LinkShape(4e5, 4e5, 0.002)


@dataclass(frozen=True)
class Site:
    """A published model, its head and tail, and the link to the tail."""

    published: Published
    head: str
    link: NetworkEmulator
    folder: Path

    def router(self, candidates: Sequence[Candidate], **changes: Any) -> FlaskClient:
        """A router of a version with such a plan, the first of which is the choice."""
        given = {name: changes.pop(name) for name in ("constraints",) if name in changes}
        plan = plan_for(self.published.bundle, candidates[0], candidates=tuple(candidates), **given)
        version = publish_plan(self.published.registry, self.published.bundle, {}, plan)
        hops = (self.head, self.link.url)
        settings = router_settings(
            self.published, self.folder / "router", hops, model=f"photos:{version.version}", **changes
        )
        return create_router_app(settings).test_client()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("choice")
    published = publish_photos(folder)
    apps = [create_segment_app(segment_settings(published, folder / name)) for name in ("head", "tail")]

    # Within the request, so that Server-Timing has it as it has the time of a slow model.
    @apps[0].before_request
    def compute() -> None:
        if (request.method, request.path) == ("POST", "/"):
            time.sleep(EDGE_S)

    with served(apps[0]) as head, served(apps[1]) as tail, NetworkEmulator(tail, FAST) as link:
        yield Site(published, head, link, folder)


def route(client: FlaskClient, **headers: str) -> str:
    response = client.post("/", data=PHOTO, headers=headers)
    assert response.status_code == 200, response.get_data(as_text=True)
    return response.headers["Isthmus-Route"]


def pinned(client: FlaskClient, name: str) -> str:
    return route(client, **{"Isthmus-Route": name})


def requests_until(client: FlaskClient, name: str, most: int = 80) -> int:
    """The requests before the first of five in a row along a route."""
    taken: list[str] = []
    for _ in range(most):
        taken.append(route(client))
        if taken[-5:] == [name] * 5:
            return len(taken) - 5
    raise AssertionError(f"{name} was not taken five times in a row: {taken}")


def states(client: FlaskClient) -> dict[str, dict[str, Any]]:
    (model,) = client.get("/routes").json["models"]
    return {c["name"]: c for c in model["candidates"]} | {"": model}


def test_requests_follow_the_link_to_the_route_that_is_best_now(site: Site) -> None:
    client = ready(site.router((EDGE, CLOUD)))
    route(client)
    assert until(lambda: all(state.get("loaded", True) for state in states(client).values()))
    site.link.set(FAST)
    requests_until(client, "cloud-photo")
    before = states(client)[""]["switches"]
    site.link.set(SLOW)
    assert requests_until(client, "edge-float") <= 20
    site.link.set(FAST)
    requests_until(client, "cloud-photo")
    assert states(client)[""]["switches"] - before <= 4


def test_a_pin_takes_the_route_that_it_names(site: Site) -> None:
    client = ready(site.router((EDGE, CLOUD, SPLIT)))
    for name in ("split-3", "edge-float", "cloud-photo", "split-3"):
        assert pinned(client, name) == name


@pytest.mark.parametrize("pin", ["split-4", "EDGE-FLOAT", "é", "x" * 5000, "edge-float,cloud-photo"])
def test_a_pin_of_no_route_is_refused_with_the_routes_that_exist(site: Site, pin: str) -> None:
    client = ready(site.router((EDGE, CLOUD)))
    response = client.post("/", data=PHOTO, headers={"Isthmus-Route": pin})
    assert (response.status_code, response.json["type"]) == (400, "RequestMalformed")
    assert response.json["facts"]["exists"] == ["edge-float", "cloud-photo"]
    assert len(response.get_data()) < 1000


def test_a_pin_breaks_no_constraint_of_the_plan(site: Site) -> None:
    client = ready(site.router((EDGE, CLOUD), constraints=Constraints(private_depth=2)))
    response = client.post("/", data=PHOTO, headers={"Isthmus-Route": "cloud-photo"})
    assert (response.status_code, response.json["facts"]["exists"]) == (400, ["edge-float"])


def test_a_candidate_whose_files_are_gone_is_left_out(site: Site) -> None:
    client = ready(site.router((EDGE, INT8, CLOUD)))
    assert set(states_after_one(client)) == {"", "edge-float", "cloud-photo"}


def test_a_plan_whose_choice_is_gone_serves_nothing_and_says_why(site: Site) -> None:
    client = site.router((replace(INT8, error=Error(0, 5)), EDGE), registry_attempts=1)
    assert until(lambda: DIGEST[7:] in client.get("/ready").get_data(as_text=True))
    assert client.post("/", data=PHOTO).status_code == 503


def test_without_adapting_every_request_takes_the_plans_choice(site: Site) -> None:
    client = ready(site.router((EDGE, CLOUD), adapt=False))
    assert {route(client) for _ in range(5)} == {"edge-float"}


def test_a_route_beside_the_served_ones_leaves_their_state_alone(site: Site) -> None:
    client = ready(site.router((EDGE, CLOUD), page=True))
    before = states_after_one(client)
    response = client.post("/page/prediction?beside=cloud", data=PHOTO)
    assert response.status_code == 200
    after = states(client)
    assert list(after) == list(before)
    served_once = sum(c["requests"] for name, c in after.items() if name) - sum(
        c["requests"] for name, c in before.items() if name
    )
    assert served_once == 1


def states_after_one(client: FlaskClient) -> dict[str, dict[str, Any]]:
    route(client)
    return states(client)
