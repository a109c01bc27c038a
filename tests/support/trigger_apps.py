"""The trigger function's app over a real NATS server, and a router whose replies a test holds back."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flask import Flask, request
from flask.testing import FlaskClient

from isthmus.serving import create_trigger_app
from isthmus.settings import TriggerSettings
from support.bundles import ready, served
from support.patience import LONG_S


def configuration_text(
    url: str, subject: str, router: str, folder: Path, *, more: str = "", records: str = "", source: str = ""
) -> str:
    """A trigger of `subject` at a NATS server, with short pauses and records in a file."""
    return f"""
retry_after = "10ms"
max_attempts = 2
{more}
[source]
kind = "nats"
url = "{url}"
subject = "{subject}"
ack_wait = "2s"
{source}
[router]
url = "{router}"
[records]
url = "sqlite:{folder / "records.sqlite"}"
{records}
"""


def trigger_settings(text: str, **given: Any) -> TriggerSettings:
    common = {"log_level": "error", "expose_details": True, "deadline_s": LONG_S, "exec_timeout": 0.0}
    return TriggerSettings(**common | {"trigger_config": text} | given)


@contextmanager
def running_trigger(text: str, folder: Path, **given: Any) -> Iterator[FlaskClient]:
    """A client of the app, once it is ready; the trigger stops at the end."""
    app = create_trigger_app(trigger_settings(text, **given), folder)
    try:
        yield ready(app.test_client())
    finally:
        close(app)


def close(app: Flask) -> None:
    """End the trigger's threads, as the end of a process does."""
    app.extensions["isthmus"].close()


class HeldRouter:
    """A server in a router's place: each message gets its length, once `let_go` is set; bodies `bad` are refused."""

    def __init__(self) -> None:
        self.let_go = threading.Event()
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.app = Flask("held")
        self.app.add_url_rule("/", "answer", self._answer, methods=["POST"])

    def _answer(self) -> Any:
        body = request.get_data()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        assert self.let_go.wait(LONG_S)
        if body == b"bad":
            return {"error": "no photo", "type": "MediaUnsupported", "facts": {}}, 415
        return {"bytes": len(body)}


@contextmanager
def held_router(*, held: bool = False) -> Iterator[tuple[HeldRouter, str]]:
    """A router's stand-in on a real socket, and its URL."""
    router = HeldRouter()
    if not held:
        router.let_go.set()
    with served(router.app) as url:
        try:
            yield router, url
        finally:
            router.let_go.set()


def events_of(stream: bytes) -> list[tuple[str, Any]]:
    """The events of a stream by name, each with its document."""
    events = []
    for block in stream.decode().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line and not line.startswith(":"))
        if "event" in fields:
            events.append((fields["event"], json.loads(fields["data"])))
    return events
