"""Generations through a router: routes of the plan and their fallbacks, codecs, deadlines, metrics and spans."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, Response
from flask.testing import FlaskClient

from isthmus.artifacts.plan import Coding
from isthmus.registry import open_registry
from isthmus.serving import create_router_app, create_segment_app
from isthmus.settings import RouterSettings, SegmentSettings
from isthmus_tools.graph.decoder.bundler import build_decoder
from isthmus_tools.graph.decoder.transformers_folder import read_folder
from isthmus_tools.planner.publishing import publish_plan
from support.bundles import metrics, ready, served
from support.decoders import with_swapped_tokens
from support.otlp_receiver import otlp_receiver
from support.patience import LONG_S, eventually
from support.plans import candidate, plan_for
from support.published_decoders import PublishedDecoder
from support.published_decoders import tiny_decoder as tiny_decoder
from support.routers import before

PROMPT = [11, 7, 250, 3, 42, 42, 9, 11, 7]
BODY = {"prompt": PROMPT, "max_tokens": 30, "temperature": 0.8, "seed": 5, "frequency_penalty": 0.4}


@dataclass
class Tail:
    """A segment function of which some calls are not answered as they should be."""

    url: str
    app: Flask
    fault: Callable[[int], Response | None] = lambda number: None
    frames: int = 0
    ended: int = 0

    def seen(self, environ: dict[str, Any]) -> Response | None:
        if environ["PATH_INFO"] == "/sessions/end":
            self.ended += 1
            return None
        self.frames += 1
        return self.fault(self.frames)


@pytest.fixture(scope="module")
def registry(tiny_decoder: PublishedDecoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The decoder with a plan: split with half precision, else whole at the edge."""
    root = tmp_path_factory.mktemp("planned")
    bundle, files = build_decoder(read_folder(tiny_decoder.folder), "tiny", root / "bundle", cuts=["1"])
    (tensor,) = (s.name for s in bundle.carried(bundle.partition(("layer_1",))[1].inputs))
    split = candidate("split-1", "split", 0.001, cuts=("layer_1",), up_bytes=300)
    half = candidate("split-1-half", "split", 0.002, cuts=("layer_1",), up_bytes=100, codecs={tensor: Coding("half/1")})
    plan = plan_for(bundle, split, candidates=(split, half, candidate("edge", seconds=5.0)))
    (root / "registry").mkdir()
    publish_plan(open_registry(SegmentSettings(registry=str(root / "registry"))), bundle, files, plan, alias="prod")
    return root / "registry"


@dataclass
class Place:
    """Where the functions of a test run."""

    stack: ExitStack
    registry: Path
    folder: Path
    tail: Tail

    def router(self, **given: Any) -> FlaskClient:
        settings = {"hops": ("local", self.tail.url), "registry": str(self.registry), "model": "tiny"} | given
        app = create_router_app(RouterSettings(**common(self.folder / "router") | settings))
        self.stack.callback(app.extensions["isthmus"].close)
        return ready(app.test_client())


def common(cache: Path) -> dict[str, Any]:
    return {"cache_dir": str(cache), "threads": 1, "log_level": "error", "deadline_s": LONG_S, "exec_timeout": 0.0}


@pytest.fixture
def place(registry: Path, tmp_path: Path) -> Iterator[Place]:
    app = create_segment_app(SegmentSettings(registry=str(registry), **common(tmp_path / "tail")))
    with ExitStack() as stack:
        tail = Tail("", app)
        before(app, tail.seen)
        stack.callback(app.extensions["isthmus"].close)
        tail.url = stack.enter_context(served(app))
        yield Place(stack, registry, tmp_path, tail)


def complete(client: FlaskClient, headers: dict[str, str] | None = None, **changes: Any) -> Any:
    return client.post("/v1/completions", data=json.dumps({**BODY, **changes}), headers=headers)


def text_of(response: Any) -> str:
    assert response.status_code == 200, response.json
    text: str = response.json["choices"][0]["text"]
    return text


@pytest.fixture
def expected(place: Place) -> str:
    return text_of(complete(place.router(hops=("local",), adapt=False, plan=False, cuts="")))


def unavailable() -> Response:
    return Response(status=503)


def test_the_plans_route_generates_and_another_takes_over_in_the_middle(place: Place, expected: str) -> None:
    client = place.router()
    response = complete(client)
    assert text_of(response) == expected
    assert response.headers["Isthmus-Route"] == "split-1"
    calls = place.tail.frames
    assert calls > 5
    place.tail.fault = lambda number: unavailable() if number > calls + 6 else None
    response = complete(client)
    assert text_of(response) == expected
    assert response.headers["Isthmus-Route"] == "edge"
    assert response.json["isthmus"]["recoveries"] == 1
    found = metrics(client)
    assert found["isthmus_generation_recoveries_total", ()] == 1
    assert found["isthmus_replayed_positions_total", ()] >= len(PROMPT)
    assert found["isthmus_generations_total", (("outcome", "length"),)] == 2
    assert found["isthmus_generated_tokens_total", ()] == 60
    assert found["isthmus_first_token_seconds_count", ()] == 2
    assert found["isthmus_generations_open", ()] == found["isthmus_replay_memory_bytes", ()] == 0
    fallbacks = {key: n for key, n in found.items() if key[0] == "isthmus_route_fallbacks_total"}
    assert sum(fallbacks.values()) == 1


def test_a_header_pins_the_route(place: Place, expected: str) -> None:
    client = place.router()
    response = complete(client, {"Isthmus-Route": "edge"})
    assert (text_of(response), place.tail.frames) == (expected, 0)
    place.tail.fault = lambda number: unavailable()
    refused = complete(client, {"Isthmus-Route": "split-1", "X-Timeout": "1s"})
    assert refused.status_code in (503, 504)
    assert complete(client, {"Isthmus-Route": "other"}).status_code == 400


def test_codecs_of_the_plan_and_of_the_setting_apply_to_steps(place: Place) -> None:
    sent = {}
    for name, client, headers in (
        ("raw", place.router(), {"Isthmus-Route": "split-1"}),
        ("plan", place.router(), {"Isthmus-Route": "split-1-half"}),
        ("setting", place.router(cuts="layer_1", codec="half/1"), {}),
        ("int8", place.router(cuts="layer_1", codec="int8-token/1"), {}),
    ):
        response = complete(client, headers, max_tokens=20, frequency_penalty=0)
        assert text_of(response)
        sent[name] = response.json["isthmus"]["link_bytes"] / response.json["isthmus"]["steps"]
    assert sent["plan"] == pytest.approx(sent["setting"], rel=0.1)
    assert sent["raw"] - sent["plan"] > 100
    assert sent["plan"] > sent["int8"]


def test_the_deadlines_of_a_generation_are_its_own(place: Place) -> None:
    def slow(number: int) -> None:
        time.sleep(0.05)

    client = place.router(deadline_s=0.4, fallback=("none",))
    text_of(complete(client, max_tokens=1))
    place.tail.fault = slow
    assert text_of(complete(client))
    assert complete(client, {"X-Timeout": "600ms"}).status_code == 504
    silent = place.router(generation_silence_s=0.04, fallback=("none",))
    assert complete(silent).status_code == 504


def test_sessions_end_with_their_generation(place: Place) -> None:
    client = place.router()
    text_of(complete(client))
    eventually(lambda: place.tail.ended == 1)
    place.tail.fault = lambda number: Response(status=400)
    assert complete(client).status_code == 502
    eventually(lambda: place.tail.ended == 2)


def publish_draft(place: Place, folder: Path) -> None:
    bundle, files = build_decoder(read_folder(folder), "small", place.folder / "small", cuts=[])
    open_registry(SegmentSettings(registry=str(place.registry))).publish(bundle, files, alias="prod")


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_draft_model_changes_no_token(place: Place, tiny_decoder: PublishedDecoder, temperature: float) -> None:
    publish_draft(place, tiny_decoder.folder)
    place.tail.fault = lambda number: time.sleep(0.03)  # so that drafts pay
    changes = {"temperature": temperature, "frequency_penalty": 0, "prompt": PROMPT[:5]}
    without = complete(place.router(), {"Isthmus-Route": "split-1"}, **changes)
    client = place.router(draft="small")
    found = complete(client, {"Isthmus-Route": "split-1"}, **changes)
    assert text_of(found) == text_of(without)
    assert found.json["isthmus"]["proposed"] > 0
    if not temperature:  # a model agrees with itself
        assert found.json["isthmus"]["accepted"] > without.json["isthmus"]["accepted"]
    # The generation's session and the draft's were both given back.
    eventually(lambda: metrics(client)["isthmus_sessions", ()] == 0)


def test_a_draft_model_of_another_vocabulary_keeps_the_router_unready(
    place: Place, tiny_decoder: PublishedDecoder
) -> None:
    folder = shutil.copytree(tiny_decoder.folder, place.folder / "other")
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_bytes(with_swapped_tokens(tokenizer.read_bytes()))
    publish_draft(place, folder)
    given = common(place.folder / "r") | {"registry": str(place.registry), "expose_details": True}
    app = create_router_app(RouterSettings(model="tiny", hops=("local",), draft="small", **given))
    place.stack.callback(app.extensions["isthmus"].close)
    client = app.test_client()
    eventually(lambda: "another vocabulary" in client.get("/ready").text)
    assert client.get("/ready").status_code == 503


def test_a_trace_has_the_generation_and_a_few_of_its_steps(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with otlp_receiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
        client = place.router()
        text_of(complete(client, max_tokens=80, frequency_penalty=2))
        eventually(lambda: any(s.name == "POST /v1/completions" for s in receiver.spans))
        names = [span.name for span in receiver.spans]
    assert names.count("generate tiny") == 1
    steps = [name for name in names if name.startswith("segment ")]
    assert 16 <= len(steps) < 40
    (generation,) = (span for span in receiver.spans if span.name == "generate tiny")
    assert generation.attributes["isthmus.tokens"] == 80
