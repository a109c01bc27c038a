"""Exits in a router: who ends there, who asks for the full model, an outage behind one, and a limit that is broken."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flask.testing import FlaskClient

from isthmus.client import Client
from isthmus.context import Context, Deadline
from isthmus.pipeline import LocalHop, execute, plan_route
from isthmus.pipeline.continuation import CONTENT_TYPE
from isthmus.runtime.session_store import open_store
from isthmus.serving import create_router_app, create_segment_app
from isthmus_tools.planner.publishing import publish_plan
from support.bundles import (
    Published,
    cache_of,
    metrics,
    photo,
    photo_array,
    publish_photos,
    ready,
    router_settings,
    segment_settings,
    served,
    until,
)
from support.exits import ALWAYS, NEVER, planned_exit, with_exit
from support.patience import LONG_S
from support.plans import candidate, plan_for
from support.ports import free_port
from support.routers import expected_classes, oip_json, photo_form

SEEDS = range(24)
# The scores of the model for photos are some 20 apart.
TEMPERATURE = 20.0


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return publish_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def confidences(plain: Published, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Of the exit for each of SEEDS."""
    folder = tmp_path_factory.mktemp("confidences")
    known = with_exit(plain, folder, threshold=ALWAYS, temperature=TEMPERATURE)
    store = open_store(cache_of(known, folder), segment_settings(known, folder))
    route = plan_route(known.digest, known.bundle, (LocalHop(store),)).with_exit()
    found = []
    for seed in SEEDS:
        context = Context(Deadline.after(LONG_S), "c", "00-" + "a" * 32 + "-" + "b" * 16 + "-01")
        outcome = execute(route, {"x": photo_array(photo(seed=seed))}, context).exit
        assert outcome is not None
        found.append(outcome.confidence)
    store.store.close()
    assert len(set(found)) == len(found)
    return found


@pytest.fixture(scope="module")
def half(confidences: list[float]) -> float:
    """A threshold that half of SEEDS reach."""
    return float(np.median(confidences))


@pytest.fixture(scope="module")
def exiting(plain: Published, half: float, tmp_path_factory: pytest.TempPathFactory) -> Published:
    return with_exit(plain, tmp_path_factory.mktemp("exit"), threshold=half, temperature=TEMPERATURE)


@pytest.fixture(scope="module")
def functions(plain: Published, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A head and a tail, which serve every version."""
    apps = [create_segment_app(segment_settings(plain, tmp_path_factory.mktemp(n))) for n in ("head", "tail")]
    with served(apps[0]) as head, served(apps[1]) as tail:
        yield head, tail
    for app in apps:
        app.extensions["isthmus"].close()


Routers = Callable[..., FlaskClient]


@pytest.fixture
def router(tmp_path: Path) -> Iterator[Routers]:
    apps = []

    def start(published: Published, hops: tuple[str, ...], **given: Any) -> FlaskClient:
        model = f"{published.name}:{published.version}"
        given = {"guard_share": 0.0, "model": model} | given
        apps.append(create_router_app(router_settings(published, tmp_path, hops, **given)))
        return ready(apps[-1].test_client())

    yield start
    for app in apps:
        app.extensions["isthmus"].close()


def ask(client: FlaskClient, seed: int = 0, **headers: str) -> Any:
    answer = client.post("/", data=photo(seed=seed), headers=headers)
    assert answer.status_code == 200, answer.json
    return answer


def exits(client: FlaskClient) -> dict[str, float]:
    return {labels[0][1]: count for (name, labels), count in metrics(client).items() if name == "isthmus_exits_total"}


def state(client: FlaskClient) -> Any:
    (model,) = client.get("/routes").json["models"]
    return model["candidates"][0]


@pytest.mark.parametrize("head", ["local", "function"])
def test_easy_photos_end_at_the_exit_and_hard_ones_travel(
    exiting: Published, functions: tuple[str, str], router: Routers, confidences: list[float], half: float, head: str
) -> None:
    client = router(exiting, ("local" if head == "local" else functions[0], functions[1]))
    for seed, confidence in zip(SEEDS, confidences, strict=True):
        answer = ask(client, seed).json
        route, is_early = answer["route"], confidence >= half
        assert [s["segment"] for s in route["segments"]] == (["..6"] if is_early else ["..6", "6.."])
        assert route.get("exit") == ("6" if is_early else None)
        assert route["exit_confidence"] == pytest.approx(confidence, abs=1e-4)
        assert (route["link_bytes"] == 0) == is_early
        expected = expected_classes(exiting, photo(seed=seed))
        assert [c["label"] for c in answer["classes"]] == [c["label"] for c in expected]
    early = sum(confidence >= half for confidence in confidences)
    assert exits(client) == {"taken": early, "unsure": len(SEEDS) - early}
    # The latest requests and a prior of eight as the exit was fitted, 70%.
    assert state(client)["exit"] == {
        "cut": "6",
        "threshold": half,
        "share": pytest.approx((early + 8 * 0.7) / (len(SEEDS) + 8)),
        "checks": 0,
        "disagreement": 0.0,
        "limit": 0.01,
        "closed": False,
    }
    labels = (("model", "photos"), ("route", "default"), ("version", exiting.version))
    assert 0 < metrics(client)["isthmus_route_exit_share", labels] < 1


def test_a_caller_gets_the_full_model_by_a_header_or_a_parameter(
    plain: Published, functions: tuple[str, str], router: Routers, tmp_path: Path
) -> None:
    known = with_exit(plain, tmp_path, threshold=ALWAYS)
    client = router(known, ("local", functions[1]))
    assert "exit" in ask(client).json["route"]
    assert "exit" in ask(client, **{"Isthmus-Exit": "ON"}).json["route"]
    full = ask(client, **{"Isthmus-Exit": " off"}).json["route"]
    assert [s["segment"] for s in full["segments"]] == ["..6", "6.."]
    assert "exit" not in full
    assert "exit_confidence" not in full
    document, infer = oip_json(known), f"/v2/models/photos/versions/{known.version}/infer"
    early = client.post(infer, json=document).json["parameters"]
    assert (early["segments"], early["exit"], early["link_bytes"]) == ("..6", "6", 0)
    late = client.post(infer, json=document | {"parameters": {"isthmus.exit": False}}).json
    assert late["parameters"]["segments"] == "..6,6.."
    assert np.allclose(late["outputs"][0]["data"], known.whole["logits"].ravel(), rtol=1e-5, atol=1e-5)
    with served(client.application) as url:
        found = {
            exits: Client(url, exits=exits).infer(known.inputs, model="photos", version=known.version)
            for exits in (True, False)
        }
    assert [found[exits].parameters["segments"] for exits in (True, False)] == ["..6", "..6,6.."]
    for refused in (
        client.post("/", data=photo(), headers={"Isthmus-Exit": "never"}),
        client.post(infer, json=document | {"parameters": {"isthmus.exit": "off"}}),
    ):
        assert (refused.status_code, refused.json["type"]) == (400, "RequestMalformed")
        assert "xit" in refused.json["error"]


def test_each_photo_of_a_batch_ends_where_it_is_sure(
    exiting: Published, functions: tuple[str, str], router: Routers, confidences: list[float], half: float
) -> None:
    client = router(exiting, ("local", functions[1]))
    answer = client.post("/", **photo_form(*(photo(seed=seed) for seed in range(6))))
    assert answer.status_code == 200, answer.json
    found = ["exit" in each["route"] for each in answer.json["predictions"]]
    assert found == [confidence >= half for confidence in confidences[:6]]


def test_an_exit_is_off_by_the_settings_and_in_explanations(
    plain: Published, functions: tuple[str, str], router: Routers, tmp_path: Path
) -> None:
    known = with_exit(plain, tmp_path, threshold=ALWAYS)
    off = router(known, ("local", functions[1]), exits=False)
    assert "exit_confidence" not in ask(off).json["route"]
    assert state(off)["exit"] is None
    client = router(known, ("local", functions[1]))
    explained = client.post("/explain?grid=2", data=photo())
    assert explained.status_code == 200, explained.json
    assert [s["segment"] for s in explained.json["route"]["segments"]] == ["..6", "6.."]


def test_an_exit_serves_sure_requests_through_an_outage_and_says_what_an_unsure_one_costs(
    exiting: Published, router: Routers, confidences: list[float], half: float
) -> None:
    """Without the setting an unsure request is an error; with it the early prediction, also of a pinned route."""
    hops = ("local", f"http://127.0.0.1:{free_port()}")
    sure = next(seed for seed, confidence in zip(SEEDS, confidences, strict=True) if confidence >= half)
    unsure = next(seed for seed, confidence in zip(SEEDS, confidences, strict=True) if confidence < half)
    strict = router(exiting, hops, hop_attempts=1)
    assert ask(strict, sure).json["route"]["exit"] == "6"
    refused = strict.post("/", data=photo(seed=unsure))
    assert (refused.status_code, refused.json["type"]) == (503, "HopUnavailable")
    lenient = router(exiting, hops, exit_when_cut_off=True)
    assert "degraded" not in ask(lenient, sure).json["route"]
    for headers in ({}, {"Isthmus-Route": "default"}):
        answer = ask(lenient, unsure, **headers)
        degraded = answer.headers["Isthmus-Degraded"]
        assert degraded.startswith(f"an exit that is not sure at 6, {confidences[unsure]:.3g} of {half:.3g}")
        assert answer.json["route"]["degraded"] == degraded
        assert answer.json["route"]["name"] == "default"
        assert "exit" not in answer.json["route"]
        assert answer.json["route"]["exit_confidence"] == pytest.approx(confidences[unsure], abs=1e-4)
        expected = expected_classes(exiting, photo(seed=unsure))
        assert [c["label"] for c in answer.json["classes"]] == [c["label"] for c in expected]
    assert exits(lenient) == {"taken": 1, "cut_off": 2}
    full = lenient.post("/", data=photo(seed=sure), headers={"Isthmus-Exit": "off", "X-Timeout": "1s"})
    assert full.status_code in (503, 504)
    later = lenient.post("/", data=photo(seed=unsure), headers={"Accept": CONTENT_TYPE, "Prefer": "wait=0"})
    assert (later.status_code, later.content_type) == (503, CONTENT_TYPE)
    # Requests that found no tail count as late: an outage does not make every request seem early.
    assert state(lenient)["exit"]["share"] < 0.7


def test_the_page_shows_where_a_photo_ended_and_the_full_model_beside_it(
    plain: Published, functions: tuple[str, str], router: Routers, tmp_path: Path
) -> None:
    known = with_exit(plain, tmp_path, threshold=ALWAYS)
    client = router(known, ("local", functions[1]), page=True)
    text = client.post("/page/prediction?beside=raw", **photo_form(photo())).get_data(as_text=True)
    assert text.count("<dt>exit</dt>") == 1
    assert "<dd>at 6, confidence " in text
    assert (text.count("<li>..6 on"), text.count("<li>6.. on")) == (2, 1)


def test_another_route_goes_before_an_exit_that_is_not_sure(
    plain: Published, router: Routers, tmp_path: Path, half: float, confidences: list[float]
) -> None:
    """The tail is away: an unsure photo takes the whole model at the edge, exact, whatever the setting allows."""
    known = with_exit(plain, tmp_path, threshold=half, temperature=TEMPERATURE)
    split = candidate("split-6-exit", "split", cuts=("6",), exit=planned_exit(0.9))
    edge = candidate("edge-float", seconds=0.2)
    plan = plan_for(known.bundle, split, candidates=(split, edge))
    version = publish_plan(known.registry, known.bundle, {}, plan)
    hops = ("local", f"http://127.0.0.1:{free_port()}")
    client = router(known, hops, model=f"photos:{version.version}", exit_when_cut_off=True)
    routes = {}
    for seed, confidence in zip(SEEDS, confidences, strict=True):
        answer = ask(client, seed, **({"Isthmus-Route": "split-6-exit"} if seed % 2 else {}))
        route = answer.json["route"]
        is_pinned = "pinned" if seed % 2 else "free"
        routes[is_pinned, confidence >= half] = (route["name"], "exit" in route, bool(route.get("degraded")))
    assert routes["pinned", True] == ("split-6-exit", True, False)
    assert routes["pinned", False] == ("split-6-exit", False, True)
    assert routes["free", False] == ("edge-float", False, False)
    assert routes["free", True][2] is False


def test_a_route_whose_requests_mostly_end_at_its_exit_is_taken_while_its_tail_is_away(
    plain: Published, router: Routers, tmp_path: Path
) -> None:
    known = with_exit(plain, tmp_path, threshold=ALWAYS)
    split = candidate("split-6-exit", "split", cuts=("6",), exit=planned_exit(0.9))
    plan = plan_for(known.bundle, split, candidates=(split, candidate("edge-float", seconds=0.2)))
    version = publish_plan(known.registry, known.bundle, {}, plan)
    tail = create_segment_app(segment_settings(known, tmp_path / "tail"))
    with served(tail) as url:
        client = router(known, ("local", url), model=f"photos:{version.version}", hop_attempts=1)
        assert until(lambda: all(each["loaded"] for each in ask_for_candidates(client)))
    tail.extensions["isthmus"].close()

    def is_open() -> bool:
        # Of the full model alone, so that the tail is called.
        pinned = {"Isthmus-Route": "split-6-exit", "Isthmus-Exit": "off", "X-Timeout": "2s"}
        assert client.post("/", data=photo(), headers=pinned).status_code in (503, 504)
        return client.get("/routes").json["hops"][1]["breaker"] == "open"

    assert until(is_open)
    assert {ask(client, seed).json["route"]["name"] for seed in range(5)} == {"split-6-exit"}
    # Whoever asks for the full model gets it from the edge.
    full = ask(client, **{"Isthmus-Exit": "off"}).json["route"]
    assert (full["name"], "exit" in full) == ("edge-float", False)


def test_a_plans_candidate_has_the_exit_that_it_names(
    plain: Published, functions: tuple[str, str], router: Routers, tmp_path: Path
) -> None:
    known = with_exit(plain, tmp_path, threshold=ALWAYS)
    names = {}
    for name, chosen in (
        ("split-6-exit", candidate("split-6-exit", "split", cuts=("6",), exit=planned_exit(0.9))),
        ("split-6", candidate("split-6", "split", cuts=("6",))),
    ):
        version = publish_plan(known.registry, known.bundle, {}, plan_for(known.bundle, chosen))
        client = router(known, ("local", functions[1]), model=f"photos:{version.version}")
        names[name] = ask(client).json["route"].get("exit")
    assert names == {"split-6-exit": "6", "split-6": None}


def test_an_exit_that_breaks_its_limit_is_closed_for_good_and_all_say_so(
    plain: Published, functions: tuple[str, str], router: Routers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = with_exit(plain, tmp_path, threshold=ALWAYS, wrong=True)
    client = router(broken, ("local", functions[1]), guard_share=1.0, log_level="warning")
    seeds = iter(range(100_000))

    def closed() -> bool:
        ask(client, next(seeds))
        return metrics(client)["isthmus_exits_closed", ()] == 1

    with caplog.at_level(logging.WARNING, "isthmus"):
        assert until(closed)
    (facts,) = [r.facts for r in caplog.records if "closed an exit" in r.getMessage()]  # type: ignore[attr-defined]
    assert (facts["cut"], facts["limit"], facts["disagreement"]) == ("6", 0.01, 1.0)
    assert "isthmus exits photos" in facts["hint"]
    for seed in range(3):
        answer = ask(client, seed).json
        assert [s["segment"] for s in answer["route"]["segments"]] == ["..6", "6.."]
        assert answer["route"]["exit_closed"] == "6"
        assert "exit" not in answer["route"]
        expected = expected_classes(broken, photo(seed=seed))
        assert [c["label"] for c in answer["classes"]] == [c["label"] for c in expected]
    shown = state(client)["exit"]
    assert (shown["closed"], shown["share"], shown["disagreement"]) == (True, 0.0, 1.0)
    found = metrics(client)
    assert found["isthmus_exit_checks_total", ()] == found["isthmus_exit_disagreements_total", ()] >= 2
    assert found["isthmus_exit_disagreement", ()] == 1.0


def test_an_exit_that_keeps_its_limit_stays_open_and_unsure_requests_count_as_checks(
    exiting: Published, functions: tuple[str, str], router: Routers
) -> None:
    client = router(exiting, ("local", functions[1]), guard_share=1.0)

    def checked() -> bool:
        for seed in SEEDS:
            ask(client, seed)
        return metrics(client)["isthmus_exit_checks_total", ()] >= 10

    assert until(checked)
    found = metrics(client)
    assert found["isthmus_exit_disagreements_total", ()] == found["isthmus_exits_closed", ()] == 0
    assert until(lambda: state(client)["exit"]["checks"] == metrics(client)["isthmus_exit_checks_total", ()])


def test_the_branch_is_loaded_ahead_with_its_head(plain: Published, router: Routers, tmp_path: Path) -> None:
    known = with_exit(plain, tmp_path, threshold=NEVER)
    app = create_segment_app(segment_settings(known, tmp_path / "warm", preload=(f"photos:{known.version}@head",)))
    client = ready(app.test_client())
    assert metrics(client)["isthmus_loaded_segments", ()] == 2
    with served(app) as head:
        warm = router(known, (head, head))
        assert until(lambda: ask_for_candidates(warm)[0]["loaded"])
        assert metrics(client)["isthmus_loaded_segments", ()] == 3
    app.extensions["isthmus"].close()


def ask_for_candidates(client: FlaskClient) -> Any:
    ask(client)
    return client.get("/routes").json["models"][0]["candidates"]
