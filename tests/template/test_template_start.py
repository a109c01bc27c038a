"""The template's index.py, run as the container runs it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import urllib3
import yaml

from isthmus_tools.engine.replica import IMAGE_VARIABLES
from support.local_stack import ROOT, http
from support.patience import LONG_S, eventually
from support.ports import free_port
from support.template_process import template_module

TEMPLATE = ROOT / "template" / "python3-isthmus"
# As in a cluster: a UID that no password file knows, without capabilities; it is the owner's by another name.
UNSHARE = ["unshare", "--user", "--map-user=12000", "--map-group=12000"]
AS_ANYONE = UNSHARE if shutil.which("unshare") and not subprocess.run([*UNSHARE, "true"], stderr=-3).returncode else []
SLOW = """
import os, time
from shared_words import WORD
from flask import Flask, request

class Wrong(Exception):
    facts = {"variable": "registry", "value": "?"}
    hint = "set registry"

def create_app():
    while not os.path.exists(os.environ["go"]):
        time.sleep(0.01)
    if os.environ.get("wrong") == "known":
        raise Wrong("the setting registry is '?'")
    if os.environ.get("wrong") == "unknown":
        raise ZeroDivisionError("x" * 200_000)
    app = Flask(__name__)

    @app.post("/")
    def answer():
        return WORD + str(len(request.get_data()))

    return app
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """/home/app of an image: the template with a handler and a shared folder laid over it."""
    home = tmp_path / "app"
    shutil.copytree(ROOT / "template" / "python3-isthmus", home)
    (home / "function" / "handler.py").write_text(SLOW)
    (home / "function" / "shared").mkdir()
    (home / "function" / "shared" / "shared_words.py").write_text("WORD = 'isthmus'")
    return home


@contextmanager
def serving(home: Path, **env: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    url = f"http://127.0.0.1:{free_port()}"
    environment = {"PATH": os.environ["PATH"], "upstream_url": url, "go": str(home / "go"), **env}
    with subprocess.Popen(
        [*AS_ANYONE, sys.executable, "-B", "index.py"], cwd=home, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield url, process
        finally:
            process.kill()


def answers(url: str) -> bool:
    try:
        return http("GET", url).status > 0
    except urllib3.exceptions.HTTPError:
        return False


def test_index_listens_before_the_app_is_there_and_says_not_ready(image: Path) -> None:
    with serving(image) as (url, _):
        eventually(lambda: answers(url))
        reply = http("POST", url, body=b"x" * 1000)
        assert (reply.status, reply.headers["Retry-After"]) == (503, "1")
        assert reply.json()["type"] == "NotReady"
        error = http("POST", f"{url}/v1/completions", body=b"{}").json()["error"]
        assert (error["type"], error["code"]) == ("server_error", "not_ready")
        assert http("GET", f"{url}/ready").status == 503
        (image / "go").touch()
        eventually(lambda: http("POST", url, body=b"").status == 200)
        assert http("POST", url, body=b"x" * 2_000_000).data == b"isthmus2000000"


def test_index_ignores_sigterm_and_ends_on_sigint(image: Path) -> None:
    (image / "go").touch()
    with serving(image) as (url, process):
        eventually(lambda: answers(url) and http("POST", url, body=b"").status == 200)
        process.send_signal(signal.SIGTERM)
        assert http("POST", url, body=b"").status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(LONG_S) == 0


def test_index_calls_a_handlers_drain_on_sigterm(image: Path) -> None:
    handler = image / "function" / "handler.py"
    handler.write_text(handler.read_text() + "\n\ndef drain():\n    open(os.environ['go'] + '-drained', 'w').close()\n")
    (image / "go").touch()
    with serving(image) as (url, process):
        eventually(lambda: answers(url) and http("POST", url, body=b"").status == 200)
        process.send_signal(signal.SIGTERM)
        eventually((image / "go-drained").exists)
        assert http("POST", url, body=b"").status == 200


def test_index_names_the_setting_that_is_wrong_and_exits_78(image: Path) -> None:
    (image / "go").touch()
    with serving(image, wrong="known") as (_, process):
        _, said = process.communicate(timeout=LONG_S)
        assert process.returncode == 78
    line = json.loads(said.splitlines()[-1])
    assert (line["level"], line["variable"]) == ("critical", "registry")
    assert line["message"] == "cannot start: Wrong: the setting registry is '?'; set registry"


def test_index_logs_an_unexpected_failure_in_one_short_line(image: Path) -> None:
    (image / "go").touch()
    with serving(image, wrong="unknown") as (_, process):
        _, said = process.communicate(timeout=LONG_S)
        assert process.returncode == 1
    (line,) = said.splitlines()
    assert len(line) < 64 * 1024
    assert "ZeroDivisionError" in json.loads(line)["exception"]


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("max_concurrency", "0"),
        ("max_concurrency", "x"),
        ("max_concurrency", "999999999"),
        ("max_queued", "-1"),
        ("max_queued", "4097"),
        ("max_request_bytes", "a lot"),
        ("upstream_url", "http://h:p"),
    ],
)
def test_index_refuses_a_bad_variable_of_its_own(image: Path, variable: str, value: str) -> None:
    with serving(image, **{variable: value}) as (_, process):
        _, said = process.communicate(timeout=LONG_S)
        assert process.returncode == 78
    assert json.loads(said)["variable"] == variable


def test_a_port_in_use_is_one_line_without_a_traceback(image: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with serving(image, upstream_url=url) as (_, process):
            _, said = process.communicate(timeout=LONG_S)
            assert process.returncode == 1
    line = json.loads(said)
    assert "Address already in use" in line["message"]
    assert "exception" not in line


@pytest.mark.skipif(not AS_ANYONE and os.getuid() == 0, reason="root can write anywhere, and unshare is not permitted")
def test_index_runs_where_it_cannot_write(image: Path) -> None:
    (image / "go").touch()
    for path in (image, image / "function", image / "function" / "shared"):
        path.chmod(0o555)
    with serving(image) as (url, _):
        eventually(lambda: answers(url) and http("POST", url, body=b"").status == 200)
    assert not list(image.rglob("*.pyc"))


def test_a_body_far_over_the_bound_is_refused_as_json(image: Path) -> None:
    (image / "go").touch()
    with serving(image, max_request_bytes="1KiB") as (url, _):
        eventually(lambda: answers(url))
        head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9000000\r\n\r\n"
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=LONG_S) as s:
            with contextlib.suppress(ConnectionError):  # of bytes after the refusal
                s.sendall(head + bytes(1_500_000))
            said = s.recv(10_000)
    assert said.startswith(b"HTTP/1.1 413")
    assert b'"type": "RequestTooLarge"' in said


def test_the_templates_fprocess_is_its_dockerfiles() -> None:
    document = yaml.safe_load((TEMPLATE / "template.yml").read_text())
    found = re.search(r'fprocess="([^"]*)"', (TEMPLATE / "Dockerfile").read_text())
    assert document["language"] == TEMPLATE.name
    assert found is not None
    assert document["fprocess"] == found[1]


def test_the_templates_dockerfile_keeps_the_watchdogs_rules() -> None:
    text = (TEMPLATE / "Dockerfile").read_text()
    seconds = {k: int(v) for k, v in re.findall(r'(\w+_timeout)="(\d+)s"', text)}
    assert seconds["exec_timeout"] < seconds["write_timeout"]
    for needed in (
        'mode="http"',
        'ready_path="/ready"',
        'healthcheck_interval="5s"',
        'prefix_logs="false"',
        'log_buffer_size="-1"',
        "HEALTHCHECK",
        "/tmp/.lock",  # noqa: S108
        "of-watchdog:0.11.6",
        "chmod -R a+rX",
    ):
        assert needed in text
    assert "http_buffer_req_body" not in text  # with ready_path it panics the watchdog


def test_a_process_of_the_local_engine_has_its_images_variables() -> None:
    text = (TEMPLATE / "Dockerfile").read_text().replace("\\\n", " ")
    pairs = shlex.split(" ".join(re.findall(r"^ENV (.*)", text, re.MULTILINE)))
    said = dict(pair.split("=", 1) for pair in pairs)
    assert said.items() >= IMAGE_VARIABLES.items()


def test_a_log_line_is_one_bounded_json_object() -> None:
    json_lines = template_module("json_lines")
    for facts in ({"segment": "..6"}, {"exists": ["é" * 50] * 1000}, {"error": "x" * 30_000}):
        record = logging.LogRecord("isthmus", logging.INFO, "", 0, "happened\n" * 2, None, None)
        record.facts = {**facts, "call_id": "c", "trace_id": "t"}
        line = json_lines.JsonLines().format(record)
        assert "\n" not in line
        assert len(line) <= json_lines.MAX_LINE
        written = json.loads(line)
        assert written["message"].startswith("happened")
        assert (written["call_id"], written["trace_id"]) == ("c", "t")
        assert len(str(written.get("error", ""))) < 8000
