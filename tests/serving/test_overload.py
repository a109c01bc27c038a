"""Functions under more load than they take, and headers of callers that lie: deadlines, traces, names, labels."""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from isthmus.runtime.ort_runner import OrtRunner
from isthmus.serving import create_router_app, create_segment_app
from support.bundles import Published, framed, metrics, photo, ready, router_settings, segment_settings
from support.bundles import photos as photos
from support.patience import LONG_S, eventually


@dataclass
class Gate:
    """Runs of segments wait for it; `begun` counts those that came."""

    opened: threading.Event = field(default_factory=threading.Event)
    begun: int = 0


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    gate.opened.set()
    original = OrtRunner.run

    def run(self: OrtRunner, arrays: Any) -> dict[str, Any]:
        gate.begun += 1
        gate.opened.wait(LONG_S)
        return original(self, arrays)

    monkeypatch.setattr(OrtRunner, "run", run)
    yield gate
    gate.opened.set()


@pytest.fixture
def tail(photos: Published, tmp_path: Path, gate: Gate) -> Flask:
    """A segment function with one slot and two places in its queue, its segment loaded."""
    settings = segment_settings(photos, tmp_path / "t", max_concurrency=1, max_queued=2, caller_header="X-Caller")
    app = create_segment_app(settings)
    assert ready(app.test_client()).post("/", data=framed(photos)).status_code == 200
    return app


@contextmanager
def busy(app: Flask, photos: Published, gate: Gate) -> Iterator[ThreadPoolExecutor]:
    """The slot of `app` is taken for the block."""
    gate.opened.clear()
    begun = gate.begun
    with ThreadPoolExecutor(16) as pool:
        first = post(pool, app, photos, {"X-Caller": "greedy"})
        eventually(lambda: gate.begun == begun + 1)
        try:
            yield pool
        finally:
            gate.opened.set()
        assert first.result(LONG_S).status_code == 200


def post(pool: ThreadPoolExecutor, app: Flask, photos: Published, headers: dict[str, str]) -> Future[Any]:
    return pool.submit(app.test_client().post, "/", data=framed(photos), headers=headers)


def queued(app: Flask) -> float:
    return metrics(app.test_client())["isthmus_requests_queued", ()]


def refused(app: Flask, reason: str) -> float:
    return metrics(app.test_client())["isthmus_refused_total", (("reason", reason),)]


def test_a_request_waits_for_its_turn_and_one_too_many_is_refused(tail: Flask, photos: Published, gate: Gate) -> None:
    with busy(tail, photos, gate) as pool:
        waiting = post(pool, tail, photos, {"X-Caller": "greedy"})
        eventually(lambda: queued(tail) == 1)
        share = tail.test_client().post("/", data=framed(photos), headers={"X-Caller": "greedy"})
        assert (share.status_code, share.json["type"], share.headers["Retry-After"]) == (429, "Overloaded", "1")
        other = post(pool, tail, photos, {"X-Caller": "modest"})
        eventually(lambda: queued(tail) == 2)
        full = tail.test_client().post("/", data=framed(photos), headers={"X-Caller": "third"})
        assert (full.status_code, full.json["type"]) == (429, "Overloaded")
        assert tail.test_client().get("/ready").status_code == 200, "a busy function is a ready one"
        gate.opened.set()
        for answer in (waiting.result(LONG_S), other.result(LONG_S)):
            assert answer.status_code == 200
            (queue_ms,) = re.findall(r"queue;dur=([0-9.]+)", answer.headers["Server-Timing"])
            assert float(queue_ms) > 0
    assert (refused(tail, "share"), refused(tail, "full"), queued(tail)) == (1, 1, 0)


def test_a_request_whose_deadline_passes_in_the_queue_is_never_begun(
    tail: Flask, photos: Published, gate: Gate
) -> None:
    begun = gate.begun
    with busy(tail, photos, gate):
        late = tail.test_client().post("/", data=framed(photos), headers={"X-Timeout": "300ms", "X-Caller": "a"})
        assert (late.status_code, late.json["type"]) == (504, "DeadlineExceeded")
        assert late.json["facts"]["waited_s"] > 0
    assert gate.begun == begun + 1
    assert refused(tail, "late") == 1


def test_callers_are_not_told_apart_without_the_setting(photos: Published, tmp_path: Path, gate: Gate) -> None:
    app = create_segment_app(segment_settings(photos, tmp_path, max_concurrency=1, max_queued=2))
    assert ready(app.test_client()).post("/", data=framed(photos)).status_code == 200
    with busy(app, photos, gate) as pool:
        for count in (1, 2):
            post(pool, app, photos, {"X-Caller": "greedy"})
            eventually(lambda count=count: queued(app) == count)  # type: ignore[misc]
        assert app.test_client().post("/", data=framed(photos), headers={"X-Caller": "me"}).status_code == 429


def test_a_queue_holds_the_bytes_of_its_bodies(photos: Published, tmp_path: Path, gate: Gate) -> None:
    body = framed(photos)
    size = {"max_request_bytes": len(body), "max_working_bytes": 6 * len(body)}
    app = create_segment_app(segment_settings(photos, tmp_path, max_concurrency=1, max_queued=64, **size))
    assert ready(app.test_client()).post("/", data=body).status_code == 200
    with busy(app, photos, gate) as pool:
        for _ in range(16):
            post(pool, app, photos, {})
        eventually(
            lambda: metrics(app.test_client())["isthmus_requests_total", (("code", "429"), ("endpoint", "run"))] > 0
        )
        assert queued(app) <= 5
    eventually(lambda: queued(app) == 0)


@pytest.fixture
def router(photos: Published, tmp_path: Path) -> FlaskClient:
    return ready(create_router_app(router_settings(photos, tmp_path / "r", ("local",), page=True)).test_client())


@pytest.mark.parametrize("timeout", ["0s", "0ms", "-1s", "soon", "1e3s", "9" * 400 + "s", "1s, 2s", "\u221e"])
@pytest.mark.parametrize("path", ["/", "/v2/models/photos/infer", "/explain"])
def test_a_deadline_that_is_none_is_refused(router: FlaskClient, path: str, timeout: str) -> None:
    answer = router.post(path, data=photo(), headers={"X-Timeout": timeout})
    assert (answer.status_code, answer.json["type"]) == (400, "RequestMalformed")
    assert answer.json["facts"]["header"] == "X-Timeout"


def test_a_look_up_with_a_deadline_of_nothing_is_refused(router: FlaskClient) -> None:
    assert router.get("/v2/models/photos", headers={"X-Timeout": "0s"}).status_code == 400


@pytest.mark.parametrize("timeout", ["999999999999h", "1000h", "1h" * 500])
def test_a_huge_deadline_is_the_functions_own(router: FlaskClient, timeout: str) -> None:
    assert router.post("/", data=photo(), headers={"X-Timeout": timeout}).status_code == 200


LIES = {
    "Isthmus-Degraded": "a lie",
    "X-Isthmus-State": "done",
    "X-Call-Id": "x" * 500,
    "Server-Timing": "run;dur=0",
    "traceparent": "ff-" + "0" * 32 + "-" + "f" * 16 + "-ff",
    "tracestate": "a=1," * 5000,
    "Retry-After": "1000000",
}


def test_headers_that_are_the_functions_own_are_not_the_callers(router: FlaskClient) -> None:
    answer = router.post("/", data=photo(), headers=LIES)
    assert answer.status_code == 200
    assert "Isthmus-Degraded" not in answer.headers
    assert "X-Isthmus-State" not in answer.headers
    assert "Retry-After" not in answer.headers
    assert len(answer.headers["X-Call-Id"]) == 36
    assert re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-01", answer.headers["traceparent"])
    assert "degraded" not in answer.json["route"]
    assert answer.headers["Server-Timing"].startswith("queue;dur=")


def test_callers_add_no_metrics(router: FlaskClient) -> None:
    """Whatever callers name: paths, models, methods, callers, routes, traces, deadlines."""

    def ask(i: int) -> None:
        headers = {"Isthmus-Route": f"r{i}", "X-Caller": f"c{i}", "X-Timeout": f"{i}s", "X-Call-Id": f"id{i}"}
        router.post("/", data=photo(), headers=headers)
        router.post(f"/?model=m{i}", data=photo())
        router.post(f"/v2/models/m{i}/versions/{i}/infer", data=b"{}")
        router.get(f"/v2/models/m{i}/versions/{i}/ready")
        router.get(f"/no/such/{i}")
        router.open("/", method=f"M{i}")
        router.post("/", data=photo(), headers={"Content-Encoding": f"e{i}", "Accept-Encoding": f"a{i}"})
        router.post(f"/?top_k={i}", data=photo())

    ask(1)
    metrics(router)  # the endpoint of metrics has series of its own
    series = len(metrics(router))
    for i in range(2, 12):
        ask(i)
    assert len(metrics(router)) == series


def test_a_clock_that_jumps_changes_no_deadline_and_no_duration(
    router: FlaskClient, tail: Flask, photos: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    jumps = itertools.cycle([0.0, 1e9, -1e9, 4e9])
    wall = time.time
    monkeypatch.setattr("time.time", lambda: wall() + next(jumps))
    for _ in range(8):
        for answer in (
            router.post("/", data=photo(), headers={"X-Timeout": f"{LONG_S}s"}),
            tail.test_client().post("/", data=framed(photos), headers={"X-Timeout": f"{LONG_S}s"}),
        ):
            assert answer.status_code == 200
            (total_ms,) = re.findall(r"total;dur=([0-9.]+)", answer.headers["Server-Timing"])
            assert 0 <= float(total_ms) < LONG_S * 1000
