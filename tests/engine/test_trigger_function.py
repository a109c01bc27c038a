"""The trigger as a function of stack.yml: its process, its calls over HTTP, and the engine's own NATS server."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import urllib3

from isthmus_tools.engine import Engine, Event
from support.local_stack import http
from support.nats_server import program
from support.paths import ROOT
from support.patience import LONG_S, eventually
from support.trigger_apps import HeldRouter, events_of, held_router

ALONE = {"router": 0, "edge-head": 0, "cloud-tail": 0}


@pytest.fixture(scope="module")
def held() -> Iterator[tuple[HeldRouter, str]]:
    with held_router() as router:
        yield router


@pytest.fixture(scope="module")
def trigger(held: tuple[HeldRouter, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a trigger under the engine, by the example nats.toml with a short time to a redelivery."""
    program()
    text = (ROOT / "functions" / "trigger" / "nats.toml").read_text()
    text = text.replace('subject = "photos.>"', 'subject = "photos.>"\nack_wait = "2s"')
    environment = {"trigger": {"trigger_config": text, "router_url": held[1]}}
    with Engine(ROOT / "stack.yml", replicas=ALONE, environment=environment) as engine:
        engine.wait_ready(2 * LONG_S)
        yield f"{engine.url}/function/trigger"


def call(url: str, path: str, **options: Any) -> Any:
    answer = http("GET", f"{url}/calls/{path}", **options)
    assert answer.status == 200, answer.data
    return answer.json()


def test_a_call_is_queued_awaited_and_its_result_fetched(trigger: str, held: tuple[HeldRouter, str]) -> None:
    held[0].let_go.set()
    queued = http("POST", trigger, body=b"photo", headers={"X-Call-Id": "c1", "Content-Type": "image/png"})
    assert (queued.status, queued.headers["X-Call-Id"]) == (202, "c1")
    assert queued.headers["Location"] == "/function/trigger/calls/c1"
    gateway = trigger.removesuffix("/function/trigger")
    document = http("GET", f"{gateway}{queued.headers['Location']}?wait=20s").json()
    assert (document["state"], document["result"]["status"]) == ("done", 200)
    assert http("GET", f"{trigger}/calls/c1/result").json() == {"bytes": 5}
    assert http("GET", f"{trigger}/calls/nobody").status == 404
    eventually(lambda: call(trigger, "c1")["published"] != [])


def test_events_arrive_one_by_one_through_gateway_and_server(trigger: str, held: tuple[HeldRouter, str]) -> None:
    held[0].let_go.clear()
    started = len(held[0].bodies)
    queued = http("POST", trigger, body=b"photo").json()["id"]
    eventually(lambda: len(held[0].bodies) > started)
    with urllib3.PoolManager(retries=False) as pool:
        stream = pool.request(
            "GET", f"{trigger}/calls/{queued}", headers={"Accept": "text/event-stream"}, preload_content=False
        )
        body = b""
        while not events_of(body):
            body += stream.read1()
        assert [document["state"] for _, document in events_of(body)] == ["running"]
        held[0].let_go.set()
        body += stream.read()
    assert [document["state"] for _, document in events_of(body)] == ["running", "done"]


def test_a_trigger_that_is_to_end_gives_its_messages_back_without_an_attempt_lost(
    trigger: str, held: tuple[HeldRouter, str]
) -> None:
    held[0].let_go.clear()
    started = len(held[0].bodies)
    queued = http("POST", trigger, body=b"photo").json()["id"]
    eventually(lambda: len(held[0].bodies) > started)
    (process,) = [p for p in psutil.Process().children(recursive=True) if serves(p)]
    process.send_signal(signal.SIGTERM)
    held[0].let_go.set()
    eventually(lambda: call(trigger, queued)["state"] == "done")
    # What comes now waits for the next process, and can be asked for.
    waiting = http("POST", trigger, body=b"photo").json()["id"]
    assert call(trigger, f"{waiting}?wait=2s")["state"] == "queued"
    process.kill()
    eventually(lambda: http("GET", f"{trigger}/ready").status == 200)
    document = call(trigger, f"{waiting}?wait=20s")
    assert (document["state"], document["attempts"]) == ("done", 1)


def test_calls_outlive_the_death_of_the_process(trigger: str, held: tuple[HeldRouter, str]) -> None:
    held[0].let_go.clear()
    started = len(held[0].bodies)
    ids = [http("POST", trigger, body=b"photo").json()["id"] for _ in range(20)]
    eventually(lambda: len(held[0].bodies) > started)
    victims = [p for p in psutil.Process().children(recursive=True) if serves(p)]
    assert victims
    for victim in victims:
        os.kill(victim.pid, signal.SIGKILL)
    held[0].let_go.set()
    eventually(lambda: http("GET", f"{trigger}/ready").status == 200)

    def states() -> set[str]:
        return {call(trigger, each)["state"] for each in ids}

    eventually(lambda: states() == {"done"})


def serves(process: psutil.Process) -> bool:
    try:
        return process.cwd().endswith("/trigger") and "index.py" in " ".join(process.cmdline())
    except psutil.Error:  # it ends, or is a zombie
        return False


def test_a_trigger_without_a_configuration_is_not_started(tmp_path: Path) -> None:
    events: list[Event] = []
    environment = {"trigger": {"trigger_config": "trigger.toml"}}
    assert not (ROOT / "functions" / "trigger" / "trigger.toml").exists()
    with Engine(ROOT / "stack.yml", replicas=ALONE, environment=environment, on_event=events.append) as engine:
        engine.wait_ready(LONG_S)
        assert http("POST", f"{engine.url}/function/trigger", body=b"x").status == 503
    (told,) = [event.text for event in events if event.kind == "idle"]
    assert told == "no configuration: ./functions/trigger/trigger.toml is missing"
    assert not [event for event in events if event.kind == "starting"]
