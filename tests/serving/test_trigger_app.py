"""The trigger function: calls into its queue over HTTP, their state and results, over a real NATS server."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import urllib3
from flask.testing import FlaskClient
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from isthmus.errors import BrokerRefused, SettingsError
from isthmus.events.brokers import nats_connection
from isthmus.events.brokers.nats import NatsPublisher
from isthmus.events.configuration import MqttPlace
from isthmus.events.intake import place_of_calls
from isthmus.events.message import Message
from isthmus.serving import call_stream
from isthmus.serving.trigger import create_trigger_app
from isthmus.settings import TriggerSettings
from support.bundles import Published, metrics, photo, ready, router_settings, served
from support.bundles import photos as photos
from support.nats_server import NatsServer, unique_subject
from support.patience import LONG_S, eventually
from support.ports import free_port
from support.routers import assert_classes, expected_classes, served_router
from support.trigger_apps import (
    HeldRouter,
    close,
    configuration_text,
    events_of,
    held_router,
    running_trigger,
    trigger_settings,
)


@pytest.fixture
def held() -> Iterator[tuple[HeldRouter, str]]:
    with held_router(held=True) as router:
        yield router


@pytest.fixture
def trigger(nats_server: NatsServer, held: tuple[HeldRouter, str], tmp_path: Path) -> Iterator[FlaskClient]:
    """A trigger before a router that answers once its test lets it."""
    text = configuration_text(nats_server.url, unique_subject(), held[1], tmp_path)
    with running_trigger(text, tmp_path) as client:
        yield client
        held[0].let_go.set()


def state(client: FlaskClient, call_id: str, query: str = "") -> str:
    answer = client.get(f"/calls/{call_id}{query}")
    assert answer.status_code == 200
    return str(answer.json["state"])


def test_a_photo_is_queued_and_its_call_has_the_routers_prediction(
    nats_server: NatsServer, photos: Published, tmp_path: Path
) -> None:
    with served_router(router_settings(photos, tmp_path / "router", ("local",))) as url:
        text = configuration_text(nats_server.url, unique_subject(), url, tmp_path)
        with running_trigger(text, tmp_path) as client:
            queued = client.post("/", data=photo(), headers={"X-Call-Id": "c1"})
            assert (queued.status_code, queued.json["state"]) == (202, "queued")
            assert queued.headers["Location"] == "/function/trigger/calls/c1"
            assert queued.headers["X-Call-Id"] == queued.json["id"] == "c1"
            call = client.get("/calls/c1?wait=60s").json
            assert (call["state"], call["result"]["status"], call["attempts"]) == ("done", 200, 1)
            result = client.get("/calls/c1/result")
            assert (result.status_code, result.content_type) == (200, "application/json")
            assert_classes(result.json["classes"], expected_classes(photos, photo()))
            assert result.headers["X-Isthmus-State"] == "done"


def test_a_repeated_id_is_one_call_whichever_header_has_it(trigger: FlaskClient, held: tuple[HeldRouter, str]) -> None:
    headers = {"Idempotency-Key": "order 7"}
    first, again = (trigger.post(path, data=b"x", headers=headers) for path in ("/", "/calls"))
    event = trigger.post("/", data=b"y", headers={"ce-id": "1", "ce-source": "/a", "ce-specversion": "1.0"})
    assert first.json["id"] == again.json["id"] != event.json["id"]
    held[0].let_go.set()
    assert state(trigger, first.json["id"], "?wait=60") == state(trigger, event.json["id"], "?wait=60") == "done"
    assert trigger.get("/calls/order 7").json["id"] == first.json["id"]
    assert sorted(held[0].bodies) == [b"x", b"y"]
    over = trigger.post("/", data=b"x", headers=headers)
    assert (over.status_code, over.json["state"]) == (202, "done")


def test_the_router_gets_the_headers_that_mean_something_to_it(
    trigger: FlaskClient, held: tuple[HeldRouter, str]
) -> None:
    sent = {"Content-Type": "image/png", "X-Other": "1", "Cookie": "secret=1", "Authorization": "Bearer x"}
    trace = "00-" + "1" * 32 + "-" + "2" * 16 + "-01"
    call = trigger.post("/", data=b"x", headers={**sent, "traceparent": trace}).json["id"]
    held[0].let_go.set()
    assert state(trigger, call, "?wait=60s") == "done"
    (got,) = held[0].headers
    assert (got["Content-Type"], got["Traceparent"], got["X-Call-Id"]) == ("image/png", trace, call)
    assert not {"X-Other", "Cookie", "Authorization"} & set(got)


def test_a_refused_message_is_a_failed_call_with_the_routers_error(
    trigger: FlaskClient, held: tuple[HeldRouter, str]
) -> None:
    call = trigger.post("/", data=b"bad").json["id"]
    held[0].let_go.set()
    document = trigger.get(f"/calls/{call}?wait=60s").json
    assert (document["state"], document["result"]["status"]) == ("failed", 415)
    assert "no photo" in document["reason"]
    result = trigger.get(f"/calls/{call}/result")
    assert (result.status_code, result.json["error"], result.headers["X-Isthmus-State"]) == (415, "no photo", "failed")


def test_a_result_that_is_not_there_yet_is_a_202_with_the_call(
    trigger: FlaskClient, held: tuple[HeldRouter, str]
) -> None:
    call = trigger.post("/", data=b"x").json["id"]
    early = trigger.get(f"/calls/{call}/result?wait=10ms")
    assert (early.status_code, early.headers["Retry-After"]) == (202, "1")
    assert early.json["state"] in ("queued", "running")
    held[0].let_go.set()
    assert trigger.get(f"/calls/{call}/result?wait=60s").json == {"bytes": 1}


def test_unknown_calls_are_a_404_everywhere(trigger: FlaskClient) -> None:
    for path in ("/calls/nobody", "/calls/nobody?wait=1s", "/calls/nobody/result"):
        for accept in ("*/*", "text/event-stream"):
            answer = trigger.get(path, headers={"Accept": accept})
            assert (answer.status_code, answer.json["type"]) == (404, "CallUnknown")


def test_a_call_expires(nats_server: NatsServer, tmp_path: Path) -> None:
    with held_router() as (_, url):
        text = configuration_text(nats_server.url, unique_subject(), url, tmp_path, records='keep = "1s"')
        with running_trigger(text, tmp_path) as client:
            call = client.post("/", data=b"x").json
            assert 0 < call["expires"] - call["created"] <= 1.001
            eventually(lambda: client.get(f"/calls/{call['id']}").status_code == 404)


@pytest.mark.parametrize("wait", ["soon", "-1s", "1e9", "inf", "9" * 400])
def test_a_wait_that_is_no_duration_is_refused(trigger: FlaskClient, wait: str) -> None:
    call = trigger.post("/", data=b"x").json["id"]
    answer = trigger.get("/calls/" + call, query_string={"wait": wait})
    assert (answer.status_code, answer.json["facts"]["parameter"]) == (400, "wait")


def test_a_long_poll_ends_with_the_callers_deadline(trigger: FlaskClient) -> None:
    call = trigger.post("/", data=b"x").json["id"]
    answer = trigger.get(f"/calls/{call}?wait=1h", headers={"X-Timeout": "1s"})
    assert (answer.status_code, answer.json["state"]) in ((200, "queued"), (200, "running"))


def test_events_tell_every_state_until_the_call_is_over(
    trigger: FlaskClient, held: tuple[HeldRouter, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call_stream, "HEARTBEAT_S", 0.05)
    with served(trigger.application) as url, urllib3.PoolManager(retries=False) as pool:
        call = trigger.post("/", data=b"x").json["id"]
        eventually(lambda: state(trigger, call) == "running")
        stream = pool.request(
            "GET", f"{url}/calls/{call}", headers={"Accept": "text/event-stream"}, preload_content=False
        )
        assert (stream.status, stream.headers["Content-Type"]) == (200, "text/event-stream")
        body = b""
        while body.count(b": waiting\n\n") < 2:
            body += stream.read1()
        held[0].let_go.set()
        body += stream.read()
    assert [(name, document["state"]) for name, document in events_of(body)] == [
        ("state", "running"),
        ("state", "done"),
    ]
    assert body.startswith(b"retry: ")


def test_a_reader_that_has_the_last_event_is_told_to_stop(trigger: FlaskClient, held: tuple[HeldRouter, str]) -> None:
    held[0].let_go.set()
    call = trigger.post("/", data=b"x").json["id"]
    assert state(trigger, call, "?wait=60s") == "done"
    headers = {"Accept": "text/event-stream"}
    stream = trigger.get(f"/calls/{call}", headers=headers).data.decode()
    (last,) = [line.removeprefix("id: ") for line in stream.splitlines() if line.startswith("id: ")]
    assert trigger.get(f"/calls/{call}", headers={**headers, "Last-Event-ID": last}).status_code == 204


def test_a_stream_whose_call_expires_ends_with_the_error(nats_server: NatsServer, tmp_path: Path) -> None:
    with held_router(held=True) as (router, url):
        text = configuration_text(nats_server.url, unique_subject(), url, tmp_path)
        with running_trigger(text, tmp_path) as client:
            call = client.post("/", data=b"x").json["id"]
            eventually(lambda: state(client, call) == "running")
            records = client.application.extensions["isthmus"]._running.trigger.parts.calls._records
            response = client.get(f"/calls/{call}", headers={"Accept": "text/event-stream"}, buffered=False)
            events = iter(response.response)
            next(events)
            records.sweep(-LONG_S)
            rest = b"".join(part.encode() if isinstance(part, str) else part for part in events)
            response.close()
            router.let_go.set()
    assert [(name, document["type"]) for name, document in events_of(rest)] == [("error", "CallUnknown")]


def test_a_hundred_wait_at_once_and_calls_are_taken_meanwhile(
    nats_server: NatsServer, held: tuple[HeldRouter, str], tmp_path: Path
) -> None:
    text = configuration_text(nats_server.url, unique_subject(), held[1], tmp_path)
    with (
        running_trigger(text, tmp_path, max_concurrency=104, max_waiters=100) as client,
        served(client.application) as url,
        urllib3.PoolManager(maxsize=110, retries=False) as pool,
        ThreadPoolExecutor(100) as threads,
    ):
        call = client.post("/", data=b"x").json["id"]
        waiting = [threads.submit(pool.request, "GET", f"{url}/calls/{call}?wait=60s") for _ in range(100)]
        eventually(lambda: metrics(client)[("isthmus_trigger_waiters", ())] == 100)
        refused = client.get(f"/calls/{call}?wait=60s")
        assert (refused.status_code, refused.json["type"]) == (429, "Overloaded")
        stream = client.get(f"/calls/{call}", headers={"Accept": "text/event-stream"})
        assert (stream.status_code, "Retry-After" in stream.headers) == (429, True)
        assert client.get(f"/calls/{call}").status_code == 200
        assert client.post("/", data=b"y").status_code == 202
        held[0].let_go.set()
        answers = [each.result(LONG_S) for each in waiting]
        assert {(a.status, json.loads(a.data)["state"]) for a in answers} == {(200, "done")}
        eventually(lambda: metrics(client)[("isthmus_trigger_waiters", ())] == 0)


def test_a_full_queue_is_a_429_and_takes_calls_once_it_is_shorter(
    nats_server: NatsServer, held: tuple[HeldRouter, str], tmp_path: Path
) -> None:
    text = configuration_text(nats_server.url, unique_subject(), held[1], tmp_path)
    with running_trigger(text, tmp_path, max_backlog=3) as client:
        # Before the first look at the backlog nothing is known of it.
        eventually(lambda: ("isthmus_trigger_backlog_messages", ()) in metrics(client))
        statuses = [client.post("/", data=b"x").status_code for _ in range(5)]
        assert (statuses[:3], statuses[-1]) == ([202, 202, 202], 429)
        held[0].let_go.set()
        eventually(lambda: client.post("/", data=b"x").status_code == 202)


def test_a_body_beyond_the_brokers_limit_travels_by_claim_or_is_refused_with_both_numbers(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    body = b"x" * 3_200_000
    with held_router() as (router, url):
        text = configuration_text(nats_server.url, unique_subject(), url, tmp_path)
        with running_trigger(text, tmp_path) as client:
            refused = client.post("/", data=body, headers={"X-Call-Id": "large"})
            assert (refused.status_code, refused.json["type"]) == (413, "MessageTooLarge")
            assert (refused.json["facts"]["bytes"], refused.json["facts"]["limit"]) == (3_200_000, 2**20 - 4096)
            assert client.get("/calls/large").status_code == 404
        claims = f'[claims]\nurl = "{tmp_path / "claims"}"\nmax_bytes = "4MB"\n'
        text = configuration_text(nats_server.url, unique_subject(), url, tmp_path) + claims
        with running_trigger(text, tmp_path) as client:
            call = client.post("/", data=body, headers={"Content-Type": "image/png"}).json["id"]
            assert client.get(f"/calls/{call}/result?wait=60s").json == {"bytes": len(body)}
            beyond = client.post("/", data=bytes(4_000_001))
            assert (beyond.status_code, beyond.json["facts"]["limit"]) == (413, 4_000_000)
    assert router.bodies == [body]
    assert router.headers[0]["Content-Type"] == "image/png"


def test_headers_that_leave_no_room_for_the_body_end_the_call_with_the_reason(trigger: FlaskClient) -> None:
    headers = {"X-Call-Id": "wide", **{f"ce-x{i}": "x" * 3000 for i in range(3)}}
    refused = trigger.post("/", data=bytes(2**20 - 4096), headers=headers)
    assert (refused.status_code, refused.json["type"]) == (413, "MessageTooLarge")
    call = trigger.get("/calls/wide").json
    assert (call["state"], call["result"]["status"]) == ("failed", 413)


def test_a_message_of_the_queues_own_client_is_a_call_by_its_id(nats_server: NatsServer, tmp_path: Path) -> None:
    subject = unique_subject()
    with (
        held_router() as (_, url),
        running_trigger(configuration_text(nats_server.url, subject, url, tmp_path), tmp_path) as client,
    ):
        publisher = NatsPublisher(nats_server.place(subject))
        publisher.publish(Message(b"photo", "camera-3-17"))
        publisher.close()
        eventually(lambda: client.get("/calls/camera-3-17").status_code == 200)
        assert client.get("/calls/camera-3-17/result?wait=60s").json == {"bytes": 5}


def test_a_result_that_comes_back_as_a_call_is_refused_as_a_loop(nats_server: NatsServer, tmp_path: Path) -> None:
    """A callback that leads to the trigger itself, which no configuration shows."""
    with held_router() as (router, url):
        text = configuration_text(nats_server.url, unique_subject(), url, tmp_path, more='name = "photos"')
        with running_trigger(text, tmp_path) as client:
            for path in ("photos", "other,photos"):
                answer = client.post("/", data=b"x", headers={"X-Isthmus-Trigger": path, "X-Call-Id": "c"})
                assert (answer.status_code, answer.json["type"]) == (400, "EventMalformed")
            assert client.get("/calls/c").status_code == 404
            of_another = client.post("/", data=b"x", headers={"X-Isthmus-Trigger": "other"}).json["id"]
            assert state(client, of_another, "?wait=60s") == "done"
            assert router.bodies == [b"x"]


def test_a_call_outlives_the_process_that_took_it(nats_server: NatsServer, tmp_path: Path) -> None:
    with held_router(held=True) as (router, url):
        text = configuration_text(nats_server.url, unique_subject(), url, tmp_path)
        with running_trigger(text, tmp_path) as client:
            calls = [client.post("/", data=b"x").json["id"] for _ in range(20)]
            eventually(lambda: len(router.bodies) > 0)
            # The stop waits for what is in work.
            threading.Timer(0.1, router.let_go.set).start()
        with running_trigger(text, tmp_path) as client:
            assert {state(client, call, "?wait=60s") for call in calls} == {"done"}


def test_a_queued_call_whose_message_was_never_sent_is_sent_by_a_repetition(
    nats_server: NatsServer, held: tuple[HeldRouter, str], tmp_path: Path
) -> None:
    held[0].let_go.set()
    text = configuration_text(nats_server.url, unique_subject(), held[1], tmp_path)
    with running_trigger(text, tmp_path) as client:
        calls = client.application.extensions["isthmus"]._running.trigger.parts.calls
        calls.queue("lost")  # as by a process that was killed before it published
        assert state(client, "lost", "?wait=50ms") == "queued"
        assert client.post("/", data=b"x", headers={"X-Call-Id": "lost"}).status_code == 202
        assert state(client, "lost", "?wait=60s") == "done"


def test_a_wildcard_source_takes_calls_at_a_level_of_their_own(nats_server: NatsServer, tmp_path: Path) -> None:
    base = unique_subject()
    with held_router() as (_, url):
        text = configuration_text(nats_server.url, f"{base}.*.>", url, tmp_path)
        with running_trigger(text, tmp_path) as client:
            call = client.post("/", data=b"x").json
            assert call["source"] == f"{base}.http.http"
            assert state(client, call["id"], "?wait=60s") == "done"


def test_an_order_by_header_holds_for_calls_too(nats_server: NatsServer, tmp_path: Path) -> None:
    with held_router() as (router, url):
        text = configuration_text(nats_server.url, unique_subject(), url, tmp_path, more='order_by = "header:Camera"')
        with running_trigger(text, tmp_path) as client:
            calls = [client.post("/", data=b"%d" % i, headers={"Camera": "7"}).json["id"] for i in range(20)]
            assert {state(client, call, "?wait=60s") for call in calls} == {"done"}
    assert router.bodies == [b"%d" % i for i in range(20)]


def test_ready_says_what_is_away_and_a_router_that_is_away_leaves_it_ready(
    own_nats_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats_connection, "CONNECT_TIMEOUT_S", 1.0)
    url = f"http://127.0.0.1:{free_port()}"
    text = configuration_text(own_nats_server.url, unique_subject(), url, tmp_path)
    with running_trigger(text, tmp_path) as client:
        call = client.post("/", data=b"x").json["id"]
        eventually(lambda: ("isthmus_trigger_away", (("counterpart", "router"),)) in metrics(client))
        assert client.get("/ready").status_code == 200
        own_nats_server.kill()
        eventually(lambda: client.get("/ready").status_code == 503)
        answer = client.get("/ready")
        assert "source" in answer.json["error"]
        assert client.post("/", data=b"x").json["type"] == "BrokerUnavailable"
        # The state of a call needs no broker where its records are in a file.
        assert client.get(f"/calls/{call}").status_code == 200
        own_nats_server.restart()
        eventually(lambda: client.get("/ready").status_code == 200)


def test_without_a_configuration_the_function_says_so(tmp_path: Path) -> None:
    app = create_trigger_app(TriggerSettings(log_level="error", expose_details=False), tmp_path)
    client = app.test_client()
    for answer in (client.get("/ready"), client.post("/", data=b"x"), client.get("/calls/a")):
        assert (answer.status_code, answer.json["type"]) == (503, "NotConfigured")
        assert "no configuration: trigger.toml" in answer.json["error"]
    assert metrics(client)[("isthmus_ready", ())] == 0
    close(app)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("absent.toml", "cannot be read"),
        ("[source]\nkind = 'carrier pigeon'", "pigeon"),
        ("[source]\nkind = 'nats'\nsubject = 'a'\nurl = '${nowhere}'", "nowhere"),
        ("[source]\nkind = 'nats'\nsubject = 'a'\n[[results]]\nkind = 'nats'\nsubject = 'a'", "is a loop"),
    ],
)
def test_a_malformed_configuration_stops_the_start(tmp_path: Path, given: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said) as e:
        create_trigger_app(TriggerSettings(trigger_config=given), tmp_path)
    assert e.value.facts["variable"] == "trigger_config"


def test_a_configuration_beside_the_handler_is_filled_from_the_environment(
    nats_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held_router() as (_, url):
        monkeypatch.setenv("router_url", url)
        text = configuration_text(nats_server.url, unique_subject(), "${router_url}", tmp_path)
        (tmp_path / "trigger.toml").write_text(text)
        with running_trigger("trigger.toml", tmp_path) as client:
            assert client.get(f"/calls/{client.post('/', data=b'x').json['id']}?wait=60s").json["state"] == "done"


def test_a_broker_that_is_away_at_the_start_is_waited_for(
    own_nats_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats_connection, "CONNECT_TIMEOUT_S", 1.0)
    own_nats_server.kill()
    with held_router() as (_, url):
        text = configuration_text(own_nats_server.url, unique_subject(), url, tmp_path)
        app = create_trigger_app(trigger_settings(text), tmp_path)
        client = app.test_client()
        eventually(lambda: "nats://" in client.get("/ready").json.get("error", ""))
        assert client.get("/calls/a").status_code == 404
        own_nats_server.restart()
        assert ready(client).post("/", data=b"x").status_code == 202
        close(app)


def test_a_trigger_whose_thread_ends_with_an_error_ends_its_process(
    nats_server: NatsServer, held: tuple[HeldRouter, str], tmp_path: Path
) -> None:
    ended = threading.Event()
    text = configuration_text(nats_server.url, unique_subject(), held[1], tmp_path)
    app = create_trigger_app(trigger_settings(text, log_level="error"), tmp_path, on_failure=ended.set)
    ready(app.test_client())
    app.extensions["isthmus"]._running.trigger._failure = ZeroDivisionError()
    assert ended.wait(LONG_S)
    close(app)


def test_a_mqtt_source_without_headers_takes_no_calls_and_says_why() -> None:
    with pytest.raises(BrokerRefused, match="no ids of calls"):
        place_of_calls(MqttPlace(topic="a", version="3.1.1"))
    place: Any = place_of_calls(MqttPlace(topic="$share/g/a/+/b/#", client_id="c", group="g"))
    assert (place.topic, place.client_id, place.group) == ("a/http/b/http", "", "")


def test_the_apps_description_is_valid_and_true(trigger: FlaskClient, held: tuple[HeldRouter, str]) -> None:
    document: Any = trigger.get("/openapi.json").json
    validate(document)
    assert set(document["paths"]) == {
        *("/", "/calls", "/calls/{call_id}", "/calls/{call_id}/result", "/ready", "/metrics", "/openapi.json")
    }
    held[0].let_go.set()
    queued = trigger.post("/", data=b"x")
    done = trigger.get(f"/calls/{queued.json['id']}?wait=60s")
    for answer, path, method in ((queued, "/", "post"), (done, "/calls/{call_id}", "get")):
        content = document["paths"][path][method]["responses"][str(answer.status_code)]["content"]
        schema = {**content["application/json"]["schema"], "components": document["components"]}
        Draft202012Validator(schema).validate(answer.json)


def test_a_compressed_body_is_queued_decompressed(trigger: FlaskClient, held: tuple[HeldRouter, str]) -> None:
    held[0].let_go.set()
    call = trigger.post("/", data=gzip.compress(b"x" * 1000), headers={"Content-Encoding": "gzip"}).json["id"]
    assert trigger.get(f"/calls/{call}/result?wait=60s").json == {"bytes": 1000}


def test_waiting_costs_no_look_at_the_store_for_each_result_of_others(nats_server: NatsServer, tmp_path: Path) -> None:
    """A result wakes those who wait for its call alone."""
    with held_router() as (_, url):
        text = configuration_text(nats_server.url, unique_subject(), url, tmp_path)
        with running_trigger(text, tmp_path) as client:
            calls = client.application.extensions["isthmus"]._running.trigger.parts.calls
            calls.queue("never")
            reads: list[str] = []
            get = calls.get
            calls.get = lambda call_id: (reads.append(call_id), get(call_id))[1]
            waiter = threading.Thread(target=lambda: calls.wait("never", 2.0))
            waiter.start()
            ids = [client.post("/", data=b"x").json["id"] for _ in range(100)]
            assert {state(client, call, "?wait=60s") for call in ids} == {"done"}
            waiter.join()
    assert reads.count("never") < 12  # 2 s of pauses that double from 50 ms to 1 s
