"""`isthmus top`: a router's state as tables and as JSON, once and live, and what happens where there is no router."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from isthmus.routing.state import CandidateState, ExitState, HopState, ModelState, RouterState
from isthmus.serving import create_router_app
from isthmus_tools.cli import console, top
from support.bundles import Published, photo, ready, router_settings, served
from support.bundles import photos as photos
from support.cli import document, isthmus
from support.patience import LONG_S
from support.ports import free_port

STATE = RouterState(
    hops=(
        HopState("local", calls=120),
        HopState("hop1", "open", 3, 4_321, 17, 0.0203, 250_000, 6_250_000, 12.0, opened=2),
        HopState("hop2", "half-open", 0, 9, 0, 0.0019, 50_000, None, 0.4, up_is_bound=True, wait_s=0.012),
    ),
    models=(
        ModelState(
            "efficientnet-lite0",
            "3",
            "split-65-sparse-50",
            4,
            (
                CandidateState("edge-float", ("..",), 0.25, 0.2, 0.21, 400, 0, measured_s=0.19, drift=1.37),
                CandidateState(
                    "split-65-sparse-50",
                    ("..65", "65.."),
                    0.75,
                    0.0631,
                    0.05,
                    1200,
                    17,
                    exit=ExitState("65", 0.9, 0.62, 400, 0.0125, 0.02),
                ),
                CandidateState(
                    "edge-int8", ("..",), degraded="97.0% of 200 inputs have the model's prediction", loaded=False
                ),
            ),
            12.5,
        ),
    ),
    limit=8,
    working=5,
    queued=2,
    refused=3,
    refusals={"queue_full": 3},
)


@pytest.fixture(scope="module")
def router(photos: Published, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a router that has answered a photo."""
    app = create_router_app(router_settings(photos, tmp_path_factory.mktemp("router"), ("local",)))
    client = ready(app.test_client())
    assert client.post("/", data=photo()).status_code == 200
    with served(app) as url:
        yield url


def test_one_look_shows_routes_hops_and_queue(router: str) -> None:
    result = isthmus("top", "--once", "--url", router)
    assert result.exit_code == 0, result.output
    assert "0 of at most" in result.output
    assert "0 queued, 0 refused" in result.output
    assert "local" in result.output
    assert "closed" in result.output
    assert "→ default" in result.output
    assert "photos:1" in result.output


def test_json_is_the_routers_document(router: str) -> None:
    state = document(isthmus("top", "--json", "--url", router))
    assert [hop["name"] for hop in state["hops"]] == ["local"]
    (model,) = state["models"]
    assert (model["name"], model["version"], model["preferred"]) == ("photos", "1", "default")
    (route,) = model["candidates"]
    assert route["requests"] == 1
    assert route["measured_s"] > 0


def test_a_file_gets_one_look_without_being_asked(router: str) -> None:
    assert isthmus("top", "--url", router).exit_code == 0


@pytest.mark.parametrize("arguments", [["--interval", "1ms"], ["--interval", "soon"], ["--url", "nowhere"]])
def test_wrong_options_are_refused(arguments: list[str]) -> None:
    result = isthmus("top", "--json", *arguments)
    assert result.exit_code != 0
    assert json.loads(result.stderr)["error"]


def test_where_nothing_runs_the_error_says_what_to_start() -> None:
    result = isthmus("top", "--url", f"http://127.0.0.1:{free_port()}/function/router")
    assert result.exit_code == 1
    assert "cannot be reached" in result.stderr
    assert "isthmus up" in result.stderr.replace("\n", " ")


def test_a_server_that_is_no_router_is_named_as_such(photos: Published, tmp_path: Path) -> None:
    from support.hop_servers import server

    with server([(200, {}, b"{}")]) as (url, _):
        result = isthmus("top", "--json", "--url", url)
    assert result.exit_code == 1
    assert json.loads(result.stderr)["type"] == "HopRejected"
    assert "--url" in json.loads(result.stderr)["hint"]


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_tables_fit_the_terminal_and_show_the_facts(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert console.out.width == width
    top.show("http://127.0.0.1:8080/function/router", STATE)
    text = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    facts = [
        "5 of at most 8",
        "3 queue_full",
        "half-open",
        "20 ms",
        "2 Mbit/s",
        "≥",
        "75%",
        "63.1",
        "efficientnet-lite0:3",
    ]
    facts += ["62% at 65, 1.25% of 400 differ"] if width == 200 else []
    assert [fact for fact in facts if fact not in " ".join(text.split())] == []


def test_the_live_view_draws_until_a_signal(router: str) -> None:
    leader, follower = pty.openpty()
    command = [str(Path(sys.executable).with_name("isthmus")), "top", "--url", router, "--interval", "100ms"]
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"}
    with subprocess.Popen(command, stdout=follower, stderr=follower, stdin=follower, env=environment) as process:
        os.close(follower)
        drawn, end = b"", time.monotonic() + LONG_S
        while drawn.count(b"photos:1") < 3 and time.monotonic() < end:
            if select.select([leader], [], [], 0.1)[0]:
                drawn += os.read(leader, 2**16)
        process.send_signal(signal.SIGINT)
        while True:  # what is not read may block the end of the process
            try:
                if not os.read(leader, 2**16):
                    break
            except OSError:
                break
        assert process.wait(LONG_S) == 0
    os.close(leader)
    assert drawn.count(b"photos:1") >= 3
