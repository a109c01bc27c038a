"""Log lines of functions: the ids of their request on each, and never a payload."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Response

from isthmus.context import CURRENT
from isthmus.serving import create_router_app, create_segment_app
from support.bundles import Published, photo, ready, router_settings, segment_settings, served
from support.bundles import photos as photos
from support.nats_server import NatsServer, unique_subject
from support.patience import eventually
from support.ports import free_port
from support.routers import before
from support.template_process import log_lines
from support.trigger_apps import configuration_text, held_router, running_trigger

TRACE = "00-" + "c" * 32 + "-" + "d" * 16 + "-01"
HEADERS = {"X-Call-Id": "call-9", "traceparent": TRACE}


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What the template's handler would write."""
    with log_lines() as stream:
        yield stream


def lines(log: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.getvalue().splitlines()]


def test_every_line_of_a_request_has_its_ids_also_from_deep_within(
    log: io.StringIO, photos: Published, tmp_path: Path
) -> None:
    hops = ("local", f"http://127.0.0.1:{free_port()}")
    settings = router_settings(photos, tmp_path, hops, hop_attempts=2, log_level="debug", deadline_s=0.5)
    client = ready(create_router_app(settings).test_client())
    log.truncate(0)
    log.seek(0)
    assert client.post("/", data=photo(), headers=HEADERS).status_code >= 500
    written = lines(log)
    # The retry of the hop, the error and the response.
    assert len(written) >= 3
    assert any(line["message"].startswith("retry 1") for line in written)
    assert {(line["call_id"], line["trace_id"]) for line in written} == {("call-9", "c" * 32)}
    assert all(line["level"] and line["time"] for line in written)


def test_lines_of_the_guards_check_have_the_ids_of_the_request_that_it_repeats(
    log: io.StringIO, photos: Published, tmp_path: Path
) -> None:
    tail = create_segment_app(segment_settings(photos, tmp_path / "tail"))
    calls: list[str] = []

    def once(environ: dict[str, Any]) -> Response | None:
        if environ["PATH_INFO"] != "/" or environ["REQUEST_METHOD"] != "POST":
            return None
        calls.append(environ["HTTP_TRACEPARENT"][3:35])
        return Response(status=400) if len(calls) > 1 else None

    before(tail, once)
    with served(tail) as url:
        settings = router_settings(
            photos, tmp_path / "router", ("local", url), codec="int8/1", guard_share=1.0, log_level="debug"
        )
        client = ready(create_router_app(settings).test_client())
        assert client.post("/", data=photo(), headers=HEADERS).status_code == 200
        eventually(lambda: "the guard's own request" in log.getvalue())
        client.application.extensions["isthmus"].close()
    (line,) = [line for line in lines(log) if line["message"].startswith("the guard's own")]
    assert (line["call_id"], line["trace_id"]) == ("call-9", "c" * 32)
    assert calls == ["c" * 32] * 2


def test_lines_about_a_message_have_its_ids(log: io.StringIO, nats_server: NatsServer, tmp_path: Path) -> None:
    with held_router() as (_, url):
        text = configuration_text(nats_server.url, unique_subject(), url, tmp_path)
        with running_trigger(text, tmp_path, log_level="info") as client:
            call = client.post("/", data=b"bad", headers=HEADERS).json["id"]
            assert client.get(f"/calls/{call}?wait=60s").json["state"] == "failed"
    (line,) = [line for line in lines(log) if "failed" in line["message"]]
    assert (line["call_id"], line["trace_id"]) == (call, "c" * 32)
    assert line["logger"] == "isthmus.events.processing"


def test_a_line_after_a_request_has_no_ids(log: io.StringIO, photos: Published, tmp_path: Path) -> None:
    client = ready(create_router_app(router_settings(photos, tmp_path, ("local",))).test_client())
    assert client.post("/", data=photo(), headers=HEADERS).status_code == 200
    assert CURRENT.get() is None
    logging.getLogger("isthmus.anywhere").error("later")
    assert "call_id" not in lines(log)[-1]


def test_no_line_holds_a_payload(log: io.StringIO, photos: Published, tmp_path: Path) -> None:
    """Photos, tensors as JSON, frames: good ones and those that each part refuses, all logged at debug."""
    segment = create_segment_app(segment_settings(photos, tmp_path / "tail", log_level="debug"))
    with served(segment) as tail:
        settings = router_settings(photos, tmp_path / "router", ("local", tail), log_level="debug", guard_share=1.0)
        client = ready(create_router_app(settings).test_client())
        marker = "SECRETMARK"
        number = "31.4159265358"
        tensor = {"name": "x", "shape": [1, 3, 8, 8], "datatype": "FP32", "data": [float(number)] * 192}
        infer = "/v2/models/photos/infer"
        bad_photo = b"\xff\xd8\xff" + marker.encode() * 50
        statuses = [
            client.post("/", data=photo()).status_code,
            client.post("/", data=bad_photo, headers={"Content-Type": "image/jpeg"}).status_code,
            client.post("/", data=marker.encode()).status_code,
            client.post(infer, json={"inputs": [tensor]}).status_code,
            client.post(infer, json={"inputs": [tensor | {"data": [marker]}]}).status_code,
            client.post(infer, json={"inputs": [tensor | {"shape": [1, 3, 8, 9]}]}).status_code,
            client.post(infer, data=f'{{"inputs": "{marker}', content_type="application/json").status_code,
            segment.test_client().post("/", data=b"ISTHMUS" + marker.encode()).status_code,
        ]
    text = log.getvalue()
    assert {200, 400} <= set(statuses)
    assert len(lines(log)) >= len(statuses)
    assert all(line["message"] for line in lines(log))
    for payload in (marker, number, photo()[:24].hex(), repr(photo()[100:120])[2:-1]):
        assert payload not in text
