"""A function behind the real of-watchdog, where that is installed as `fwatchdog`."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import urllib3

from support.local_stack import ROOT, http
from support.patience import LONG_S, eventually
from support.ports import free_port

HANDLER = """
import os
import time

from flask import Response

from isthmus.serving.app import FunctionApp
from isthmus.serving.route_roles import Need
from isthmus.settings import SegmentSettings


def create_app():
    needs = dict.fromkeys(("nap", "stream"), Need(is_open=True))
    app = FunctionApp("nap", SegmentSettings.from_env(os.environ), lambda: None, needs)

    def nap(request):
        while True:
            request.context.deadline.check("the nap was over")
            time.sleep(0.005)

    def stream(request):
        def events():
            yield b"data: 1\\n\\n"
            time.sleep(1)
            yield b"data: 2\\n\\n"

        return Response(events(), mimetype="text/event-stream")

    app.post("/", nap, "nap")
    app.post("/stream", stream, "stream")
    app.readiness.start()
    return app.flask
"""
METRICS_PORT = 8081  # of-watchdog's own, which cannot be set


def is_free(port: int) -> bool:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("0.0.0.0", port))  # noqa: S104
        except OSError:
            return False
    return True


@pytest.fixture
def napping(tmp_path: Path) -> Iterator[str]:
    if shutil.which("fwatchdog") is None or not is_free(METRICS_PORT):
        pytest.skip("fwatchdog is not installed, or something listens on its port of metrics")
    home = tmp_path / "app"
    shutil.copytree(ROOT / "template" / "python3-isthmus", home)
    (home / "function" / "handler.py").write_text(HANDLER)
    port = free_port()
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "fprocess": "python index.py",
        "mode": "http",
        "port": str(port),
        "upstream_url": f"http://127.0.0.1:{free_port()}",
        "ready_path": "/ready",
        "exec_timeout": "4s",
        "healthcheck_interval": "0s",
        "TMPDIR": str(tmp_path),  # where its lock lies
        "registry": str(tmp_path),
        "log_level": "error",
        "max_request_bytes": "1MiB",
    }
    process = subprocess.Popen(
        ["fwatchdog"],
        cwd=home,
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        eventually(lambda: process.poll() is not None or answers(f"{url}/_/ready"))
        if process.poll() is not None and not is_free(METRICS_PORT):
            pytest.skip("something else took the watchdog's port of metrics meanwhile")
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(LONG_S)


def answers(url: str) -> bool:
    try:
        return bool(http("GET", url).status == 200)
    except urllib3.exceptions.HTTPError:
        return False


@pytest.mark.parametrize("timeout", ["1s", "1h"])
def test_a_deadline_is_our_error_and_not_the_watchdogs_empty_504(napping: str, timeout: str) -> None:
    def kinds() -> list[str]:
        with ThreadPoolExecutor(8) as callers:
            replies = callers.map(lambda _: http("POST", napping, body=b"", headers={"X-Timeout": timeout}), range(8))
            return [reply.json()["type"] if reply.data else f"empty {reply.status}" for reply in replies]

    # A pause of the machine that is longer than the margin lets the watchdog win, but not in each of three rounds.
    rounds = (kinds() for _ in range(3))
    assert any(round == ["DeadlineExceeded"] * 8 for round in rounds)


def test_a_body_over_the_bound_is_413_with_json_behind_the_watchdog(napping: str) -> None:
    response = http("POST", napping, body=bytes(8_000_000))
    assert (response.status, response.json()["type"]) == (413, "RequestTooLarge")


def test_events_pass_the_watchdog_as_they_come(napping: str) -> None:
    accept = {"Accept": "text/event-stream"}
    with urllib3.PoolManager(retries=False) as pool:
        response = pool.request("POST", f"{napping}/stream", body=b"", headers=accept, preload_content=False)
        # The second event is a second away: a watchdog that waited for the end would give both at once.
        assert response.read1() == b"data: 1\n\n"
        assert response.read() == b"data: 2\n\n"
