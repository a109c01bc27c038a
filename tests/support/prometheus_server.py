"""Debian's Prometheus and promtool, for tests; without them their tests are skipped."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import urllib3

from support.local_stack import http
from support.patience import eventually
from support.ports import free_port


def program(name: str) -> str:
    """The path of `prometheus` or `promtool`; skips the test where it is not installed."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed: apt-get install prometheus")
    return path


def promtool(*arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([program("promtool"), *arguments], input=given, capture_output=True, text=True, check=False)


@contextmanager
def prometheus(configuration: Path) -> Iterator[str]:
    """A running server with that configuration, its URL."""
    url = f"http://127.0.0.1:{free_port()}"
    arguments = (
        f"--config.file={configuration}",
        f"--storage.tsdb.path={configuration.parent / 'data'}",
        f"--web.listen-address={url.removeprefix('http://')}",
        "--log.level=error",
    )
    with subprocess.Popen([program("prometheus"), *arguments], stderr=subprocess.PIPE) as process:
        try:
            eventually(lambda: process.poll() is not None or _is_ready(url))
            assert process.poll() is None, process.stderr and process.stderr.read()
            yield url
        finally:
            process.kill()


def _is_ready(url: str) -> bool:
    try:
        return http("GET", f"{url}/-/ready").status == 200
    except urllib3.exceptions.HTTPError:
        return False


def query(url: str, expression: str) -> list[dict[str, Any]]:
    """The samples of an instant query."""
    answer = http("GET", f"{url}/api/v1/query", fields={"query": expression})
    assert answer.status == 200, answer.data
    samples: list[dict[str, Any]] = answer.json()["data"]["result"]
    return samples


def firing(url: str) -> set[tuple[str, str]]:
    """Alerts that fire, each with its hop."""
    alerts = http("GET", f"{url}/api/v1/alerts").json()["data"]["alerts"]
    return {(a["labels"]["alertname"], a["labels"].get("hop", "")) for a in alerts if a["state"] == "firing"}
