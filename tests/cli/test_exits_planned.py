"""`isthmus exits`, then `isthmus plan` over a slow link, then the router: requests that are clear end at the edge."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.artifacts.plan import from_json
from isthmus.serving import create_router_app
from isthmus_tools.profiling import profiles
from support.bundles import Published, metrics, ready, router_settings, segment_settings, until
from support.cli import document, isthmus
from support.digits import TRAINED, digits, publish_digits, write_digits
from support.plans import MEMORY, profile_of
from support.routers import served_functions

LINK = ["--uplink", "1mbit", "--rtt", "40ms"]


@dataclass(frozen=True)
class Place:
    """The classifier of digits with its exits, two functions, and the plan for an edge too small for all of it."""

    published: Published
    hops: tuple[str, str]
    folder: Path
    plan: Any


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("digits")
    published = publish_digits(folder)
    for tier, seconds in (("edge", 0.004), ("cloud", 0.001)):
        profiles.put(published.registry, profile_of(published, tier, seconds))
    data = write_digits(folder / "held-out", stop=TRAINED + 1000)
    registry = ["--registry", published.folder]
    document(isthmus("exits", "digits", "--data", data, "--limit", "2%", "--threads", 1, *registry, "--json"))
    np.save(folder / "x.npy", digits()[0][-1:])
    given = ["--tensor", f"x={folder / 'x.npy'}", "--no-int8", "--edge-memory", MEMORY - 1, "--time-limit", "1m"]
    with served_functions(*(segment_settings(published, folder / name) for name in ("head", "tail"))) as hops:
        functions = ["--head", hops[0], "--tail", hops[1]]
        plan = document(isthmus("plan", "digits", *LINK, *given, *functions, *registry, "--json"))
        yield Place(published, hops, folder, plan)


def test_a_split_with_an_exit_is_measured_and_chosen_over_a_slow_link(place: Place) -> None:
    plan = from_json(json.dumps(place.plan["plan"]).encode())
    choice, by_name = plan.choice, {c.name: c for c in plan.candidates}
    gate = next(e.gate for e in place.published.registry.resolve("digits").bundle.exits if e.cut == choice.cuts[0])
    assert gate is not None
    assert choice.exit is not None
    assert (choice.exit.share, choice.exit.inputs, choice.exit.examples) == (gate.share, 1000 - 500, False)
    assert choice.error.disagreement >= gate.bound
    assert choice.measured is not None
    # Each request that goes on waits for the link's round trip, and so for that share of it on average.
    assert (1 - choice.exit.share) * 0.04 < choice.measured.median < 0.04
    whole = by_name["cloud-raw"].measured
    assert whole is not None
    assert whole.median > 0.04
    assert by_name["edge-float"].refused
    assert any(f"exit at {choice.cuts[0]}: bytes and times behind" in sentence for sentence in plan.why)


def test_the_router_serves_the_plan_and_ends_clear_requests_at_the_edge(place: Place) -> None:
    settings = router_settings(place.published, place.folder / "router", place.hops, adapt=False)
    client = ready(create_router_app(settings).test_client())
    share, taken = place.plan["plan"]["candidates"], []
    exit_share = next(c["exit"]["share"] for c in share if c["name"] == place.plan["plan"]["chosen"])
    for pixels in digits()[0][-40:]:
        tensor = {"name": "x", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": pixels.ravel().tolist()}
        response = client.post("/v2/models/digits/infer", json={"inputs": [tensor]})
        assert response.status_code == 200, response.get_data(as_text=True)
        facts = response.json["parameters"]
        taken.append("exit" in facts)
        assert taken[-1] == (facts["link_bytes"] == 0)
    assert abs(sum(taken) / len(taken) - exit_share) < 0.25


def test_explain_tells_the_share_that_exits(place: Place) -> None:
    shown = isthmus("explain", "digits", "--registry", place.published.folder).output
    assert "exit at the edge" in shown
    assert "exit, %" in shown


def test_digits_that_lie_elsewhere_in_their_picture_break_the_limit_and_close_the_exit(place: Place) -> None:
    """Moved by two of eight columns, which no held-out digit was: a third of them exit with another class."""
    settings = router_settings(place.published, place.folder / "router", place.hops, adapt=False, guard_share=1.0)
    client = ready(create_router_app(settings).test_client())
    moved = itertools.cycle(np.roll(digits()[0][-200:], 2, axis=-1))

    def ask() -> Any:
        tensor = {"name": "x", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": next(moved).ravel().tolist()}
        response = client.post("/v2/models/digits/infer", json={"inputs": [tensor]})
        assert response.status_code == 200, response.get_data(as_text=True)
        return response.json["parameters"]

    assert until(lambda: "exit_closed" in ask())
    for _ in range(20):
        facts = ask()
        assert "exit_confidence" not in facts
        assert facts["link_bytes"] > 0
    found = metrics(client)
    assert found["isthmus_exits_closed", ()] == 1
    assert found["isthmus_exit_disagreements_total", ()] >= 2
    client.application.extensions["isthmus"].close()
