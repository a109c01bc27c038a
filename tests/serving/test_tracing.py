"""Traces by OTLP: one over router, head and tail; the caller's decision to sample; a receiver that is away."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from flask import Flask
from flask.testing import FlaskClient

from isthmus.errors import SettingsError
from isthmus.serving import create_router_app, create_segment_app
from support.bundles import Published, photo, ready, router_settings, segment_settings, served
from support.bundles import photos as photos
from support.nats_server import NatsServer, unique_subject
from support.otlp_receiver import OtlpReceiver, ReceivedSpan, otlp_receiver
from support.patience import eventually
from support.ports import free_port
from support.template_process import log_lines
from support.trigger_apps import configuration_text, running_trigger

TRACE, PARENT = "c" * 32, "d" * 16
SAMPLED = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[OtlpReceiver]:
    with otlp_receiver() as running:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", running.url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
        # No proxy of the environment is asked.
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
        yield running


@pytest.fixture
def apps() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def close(app: Flask) -> None:
    app.extensions["isthmus"].close()


def chain(photos: Published, folder: Path, apps: ExitStack) -> FlaskClient:
    """A router before a head and a tail on sockets of their own."""
    urls = []
    for name in ("head", "tail"):
        app = create_segment_app(segment_settings(photos, folder / name, log_level="info"))
        apps.callback(close, app)
        urls.append(apps.enter_context(served(app)))
    router = create_router_app(router_settings(photos, folder / "router", (urls[0], urls[1]), log_level="info"))
    apps.callback(close, router)
    return ready(router.test_client())


def one(spans: list[ReceivedSpan]) -> ReceivedSpan:
    assert len(spans) == 1
    return spans[0]


def test_one_trace_leads_from_the_caller_over_router_head_and_tail(
    receiver: OtlpReceiver, photos: Published, tmp_path: Path, apps: ExitStack
) -> None:
    client = chain(photos, tmp_path, apps)
    response = client.post("/", data=photo(), headers={**SAMPLED, "X-Call-Id": "call-9"})
    assert response.status_code == 200
    eventually(lambda: len(receiver.of_requests()) == 6)
    assert {span.trace for span in receiver.of_requests()} == {TRACE}
    request = one(receiver.named("isthmus-router", "POST /"))
    assert (request.parent, request.kind) == (PARENT, "SERVER")
    # The caller finds its request's span by the response.
    assert response.headers["traceparent"] == f"00-{TRACE}-{request.id}-01"
    route = one(receiver.named("isthmus-router", "route default"))
    assert route.parent == request.id
    calls = receiver.named("isthmus-router", "segment ")
    assert [(call.parent, call.kind) for call in calls] == [(route.id, "CLIENT")] * 2
    runs = receiver.named("isthmus-segment", "POST /")
    assert {run.parent for run in runs} == {call.id for call in calls}
    facts = request.attributes
    assert facts["isthmus.call_id"] == "call-9"
    assert (facts["isthmus.model"], facts["isthmus.version"], facts["isthmus.route"]) == ("photos", "1", "default")
    assert (facts["http.route"], facts["http.response.status_code"]) == ("/", 200)
    assert facts["http.request.body.size"] == len(photo())
    for call in calls:
        run = one([r for r in runs if r.parent == call.id])
        assert call.attributes["isthmus.segment"] == run.attributes["isthmus.segment"]
        assert call.attributes["isthmus.sent_bytes"] == run.attributes["http.request.body.size"]
        assert run.attributes["isthmus.run_ms"] > 0
        assert "isthmus.wait_ms" in run.attributes
    assert not any(photo()[100:130] in body for body in receiver.bodies)


def test_a_request_without_a_trace_begins_one(
    receiver: OtlpReceiver, photos: Published, tmp_path: Path, apps: ExitStack
) -> None:
    client = chain(photos, tmp_path, apps)
    sent = [{}, {"traceparent": "00-" + "0" * 32 + "-" + PARENT + "-01"}, {"traceparent": "lies"}]
    for headers in sent:
        assert client.post("/", data=photo(), headers=headers).status_code == 200
    eventually(lambda: len(receiver.named("isthmus-router", "POST")) == len(sent))
    roots = receiver.named("isthmus-router", "POST")
    assert {root.parent for root in roots} == {""}
    assert len({root.trace for root in roots}) == len(sent)


def test_a_caller_that_does_not_sample_is_followed_by_all(
    receiver: OtlpReceiver, photos: Published, tmp_path: Path, apps: ExitStack
) -> None:
    client = chain(photos, tmp_path, apps)
    response = client.post("/", data=photo(), headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
    assert response.headers["traceparent"].startswith(f"00-{TRACE}-")
    assert response.headers["traceparent"].endswith("-00")
    client.post("/", data=photo(), headers={"traceparent": f"00-{'e' * 32}-{PARENT}-01"})
    eventually(lambda: len(receiver.of_requests()) == 6)
    assert {span.trace for span in receiver.of_requests()} == {"e" * 32}


def test_the_sampler_of_the_environment_decides(
    receiver: OtlpReceiver, photos: Published, tmp_path: Path, apps: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    client = chain(photos, tmp_path, apps)
    response = client.post("/", data=photo(), headers=SAMPLED)
    assert response.headers["traceparent"].endswith("-00")
    apps.close()
    assert receiver.of_requests() == []


def test_a_route_that_fails_is_marked_with_the_class_of_the_error_alone(
    receiver: OtlpReceiver, photos: Published, tmp_path: Path, apps: ExitStack
) -> None:
    hops = ("local", f"http://127.0.0.1:{free_port()}")
    router = create_router_app(router_settings(photos, tmp_path, hops, hop_attempts=1))
    apps.callback(close, router)
    assert ready(router.test_client()).post("/", data=photo(), headers=SAMPLED).status_code >= 500
    apps.close()
    request = one(receiver.named("isthmus-router", "POST /"))
    local, call = receiver.named("isthmus-router", "segment ")
    assert (local.kind, local.is_error, call.kind) == ("INTERNAL", False, "CLIENT")
    assert request.is_error
    assert call.is_error
    assert call.attributes["error.type"] == "HopUnavailable"
    assert not any(b"cannot be reached" in body for body in receiver.bodies)


def test_spans_of_the_last_requests_are_sent_as_the_app_closes(
    receiver: OtlpReceiver, photos: Published, tmp_path: Path, apps: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")
    client = chain(photos, tmp_path, apps)
    client.post("/", data=photo(), headers=SAMPLED)
    assert receiver.of_requests() == []
    apps.close()
    assert len(receiver.of_requests()) == 6


@pytest.mark.parametrize("status", [0, 400, 503])
def test_a_receiver_that_is_away_or_refuses_costs_a_line_and_no_answer(
    status: int,
    receiver: OtlpReceiver,
    photos: Published,
    tmp_path: Path,
    apps: ExitStack,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "5")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.05")
    receiver.status = status
    if not status:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    with log_lines() as log:
        client = chain(photos, tmp_path, apps)
        for _ in range(30):
            assert client.post("/", data=photo(), headers=SAMPLED).status_code == 200
        eventually(lambda: "receiver of traces" in log.getvalue())
        apps.close()
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    lines = [line for line in lines if line["level"] != "debug"]
    about = [line for line in lines if "opentelemetry" in line["logger"] or "traces" in line["message"]]
    # One of each of the three functions at most, however many batches failed.
    assert 1 <= len(about) <= 3
    assert all(line["spans"] and line["reason"] for line in about)
    assert receiver.of_requests() == []


def test_messages_of_the_trigger_join_the_trace_of_their_call(
    receiver: OtlpReceiver, nats_server: NatsServer, photos: Published, tmp_path: Path, apps: ExitStack
) -> None:
    router = create_router_app(router_settings(photos, tmp_path / "router", ("local",)))
    apps.callback(close, router)
    ready(router.test_client())
    url = apps.enter_context(served(router))
    text = configuration_text(nats_server.url, unique_subject(), url, tmp_path)
    with running_trigger(text, tmp_path) as client:
        queued = client.post("/", data=photo(), headers=SAMPLED)
        assert client.get(f"/calls/{queued.json['id']}?wait=60s").json["state"] == "done"
        eventually(lambda: len(receiver.named("isthmus-router", "POST /")) == 1)
    request, process = (
        one(receiver.named("isthmus-trigger", "POST /")),
        one(receiver.named("isthmus-trigger", "process")),
    )
    assert (request.parent, process.parent, process.kind) == (PARENT, request.id, "CONSUMER")
    assert process.attributes["isthmus.outcome"] == "done"
    assert process.attributes["messaging.message.id"] == queued.json["id"]
    assert one(receiver.named("isthmus-router", "POST /")).parent == process.id
    assert {span.trace for span in receiver.of_requests()} == {TRACE}


def test_without_a_receiver_nothing_of_opentelemetry_is_loaded() -> None:
    script = """
import sys
from isthmus.serving import create_segment_app
from isthmus.settings import SegmentSettings
app = create_segment_app(SegmentSettings(registry="/nowhere", cache_dir="/tmp/none"))
assert app.extensions["isthmus"].tracing is None
print(sorted(name for name in sys.modules if name.startswith(("opentelemetry", "requests"))))
"""
    for environment in ({}, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_SDK_DISABLED": "true"}):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
        assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_a_traced_segment_function_loads_neither_routing_nor_events() -> None:
    script = """
import sys
import isthmus.serving.segment, isthmus.serving.tracing
print(sorted(name for name in sys.modules if name.startswith(("isthmus.routing", "isthmus.events", "highspy"))))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_missing_packages_are_a_line_in_the_log_and_no_end(
    photos: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delitem(sys.modules, "isthmus.serving.tracing", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    log: io.StringIO
    with log_lines() as log:
        settings = router_settings(photos, tmp_path, ("local",), log_level="info")
        client = ready(create_router_app(settings).test_client())
    assert client.post("/", data=photo()).status_code == 200
    assert "isthmus[traces]" in log.getvalue()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4317"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "grpc://collector"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "0"),
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "-1"),
    ],
)
def test_a_variable_that_cannot_be_used_stops_the_start(
    variable: str,
    value: str,
    receiver: OtlpReceiver,
    photos: Published,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError) as refused:
        create_segment_app(segment_settings(photos, tmp_path))
    assert refused.value.facts["variable"] in (variable, "OTEL_*")
    assert receiver.spans == []


LIES = (
    {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "x" * 9000},
    {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": ",".join(f"k{i}=v" for i in range(200))},
    {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "a=1,,=,é=ü,b=\u20ac"},
    {"traceparent": f"cc-{TRACE}-{PARENT}-ff-more"},
    {"traceparent": f"ff-{TRACE}-{PARENT}-01"},
    {"traceparent": f"00-{TRACE}-{PARENT}-01" * 40},
    {"traceparent": "00-" + "g" * 32 + f"-{PARENT}-01"},
    {"traceparent": "", "tracestate": "a=1"},
    {"X-Call-Id": "c" * 5000, "Isthmus-Route": "default", "baggage": "k=" + "v" * 9000},
)


@pytest.mark.parametrize("headers", LIES, ids=range(len(LIES)))
def test_lying_trace_headers_cost_no_answer_and_no_more_than_the_callers_trace(
    headers: dict[str, str], receiver: OtlpReceiver, photos: Published, tmp_path: Path, apps: ExitStack
) -> None:
    router = create_router_app(router_settings(photos, tmp_path, ("local",)))
    apps.callback(close, router)
    response = ready(router.test_client()).post("/", data=photo(), headers=headers)
    assert response.status_code == 200
    apps.close()
    request = one(receiver.named("isthmus-router", "POST /"))
    assert response.headers["traceparent"][3:52] == f"{request.trace}-{request.id}"
    # Version ff is none, and no other lie has a valid parent.
    is_valid = headers.get("traceparent", "")[:2] in ("00", "cc") and len(headers["traceparent"]) < 99
    assert (request.trace == TRACE) == (is_valid and "g" not in headers["traceparent"])
    for span in receiver.of_requests():
        assert all(len(value) <= 200 for value in span.attributes.values() if isinstance(value, str))
    assert max(map(len, receiver.bodies)) < 8000
