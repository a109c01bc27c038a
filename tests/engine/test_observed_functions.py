"""Processes of the functions, watched from outside: one trace over all of them, and what they log of a request."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import pytest

from isthmus_tools.cli.options import stack_variables
from isthmus_tools.engine import Engine
from support.bundles import Published, photo
from support.bundles import photos as photos
from support.local_stack import http, system
from support.otlp_receiver import OtlpReceiver, otlp_receiver
from support.paths import ROOT
from support.patience import LONG_S, eventually

FUNCTIONS = ("router", "edge-head", "cloud-tail")
TRACE, PARENT = "c" * 32, "d" * 16


@dataclass(frozen=True)
class Observed:
    """An engine whose functions send their spans to `receiver`, in an hour or at their end."""

    engine: Engine
    receiver: OtlpReceiver

    def lines(self, function: str) -> list[dict[str, Any]]:
        """The lines of JSON that a function logged; the engine adds its own to them."""
        answer = system(self.engine, "GET", f"/system/logs?name={function}&follow=false")
        texts = [json.loads(line)["text"] for line in answer.data.decode().splitlines()]
        return [json.loads(text) for text in texts if text.startswith("{")]


@pytest.fixture(scope="module")
def observed(photos: Published, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    cache = tmp_path_factory.mktemp("cache")
    with otlp_receiver() as receiver:
        common = {
            "threads": "1",
            "log_level": "debug",
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
            "OTEL_BSP_SCHEDULE_DELAY": "3600000",
        }
        environment = {name: {**common, "cache_dir": str(cache / name)} for name in FUNCTIONS}
        variables = {**stack_variables(str(photos.folder)), "MODEL": "photos"}
        with Engine(ROOT / "stack.yml", environment=environment, variables=variables, asynchronous=False) as engine:
            engine.wait_ready(2 * LONG_S)
            yield Observed(engine, receiver)


def ask(observed: Observed, call_id: str, body: bytes) -> Any:
    headers = {"X-Call-Id": call_id, "traceparent": f"00-{TRACE}-{PARENT}-01", "Content-Type": "image/png"}
    return http("POST", f"{observed.engine.url}/function/router", body=body, headers=headers)


def test_every_line_about_a_request_has_its_ids_and_none_has_its_photo(observed: Observed) -> None:
    answer = ask(observed, "call-log", photo())
    assert answer.status == 200
    assert ask(observed, "call-log", b"\x89PNG\r\n" + b"SECRETMARK" * 9).status == 415
    for function in FUNCTIONS:
        eventually(lambda name=function: any(line["message"] == "request" for line in observed.lines(name)))  # type: ignore[misc]
    for function in FUNCTIONS:
        lines = observed.lines(function)
        own = [line for line in lines if line.get("call_id") == "call-log"]
        assert {line["trace_id"] for line in own} == {TRACE}, function
        assert any(line["message"] == "request" for line in own)
        assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
        # The other lines are of the start and of the engine's probes, and have no request.
        assert all(("call_id" in line) == ("trace_id" in line) for line in lines)
        text = json.dumps(lines)
        assert "SECRETMARK" not in text
        assert photo()[30:60].hex() not in text
        assert repr(photo()[30:60])[2:-1] not in text


def test_processes_send_one_trace_as_they_are_told_to_end(observed: Observed) -> None:
    assert observed.receiver.spans == []
    answer = ask(observed, "call-9", photo())
    assert answer.status == 200
    for process in psutil.Process().children(recursive=True):
        if "index.py" in " ".join(process.cmdline()):
            process.send_signal(signal.SIGTERM)
    eventually(lambda: {span.service for span in observed.receiver.spans} == set(FUNCTIONS))
    (request,) = [s for s in observed.receiver.named("router") if s.attributes.get("isthmus.call_id") == "call-9"]
    assert (request.trace, request.parent) == (TRACE, PARENT)
    assert answer.headers["traceparent"] == f"00-{TRACE}-{request.id}-01"
    (route,) = [s for s in observed.receiver.named("router", "route") if s.parent == request.id]
    calls = {s.id: s for s in observed.receiver.named("router", "segment") if s.parent == route.id}
    for function in ("edge-head", "cloud-tail"):
        (run,) = [s for s in observed.receiver.named(function, "POST /") if s.parent in calls]
        assert calls[run.parent].attributes["url.full"].endswith(f"/function/{function}")
        assert run.attributes["isthmus.segment"] == calls[run.parent].attributes["isthmus.segment"]
    assert not any(photo()[30:60] in body for body in observed.receiver.bodies)
