"""A message as a request to the router, and the meaning of each of its responses."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest

from isthmus.events import route
from isthmus.events.configuration import RouterTable, Seconds
from isthmus.events.message import Message
from isthmus.events.route import Outcome, RouterRoute
from support.ports import free_port
from support.scripted_router import ScriptedRouter, scripted_router

ERROR = json.dumps({"error": "the model failed", "type": "RunFailed", "facts": {}}).encode()


@pytest.fixture
def router() -> Iterator[ScriptedRouter]:
    with scripted_router() as running:
        yield running


PHOTO = Message(b"photo", "m1")


def call(url: str, message: Message = PHOTO, **options: object) -> route.RouterReply:
    table = RouterTable(url=url, **options)  # type: ignore[arg-type]
    opened = RouterRoute(table)
    try:
        return opened.call(message)
    finally:
        opened.close()


def test_a_message_is_a_request_with_its_id_source_deadline_and_model(router: ScriptedRouter) -> None:
    headers = {
        "content-type": "image/jpeg",
        "ce-id": "7",
        "ce-source": "/camera",
        "authorization": "Bearer secret",
        "x-callback-url": "http://10.0.0.1",
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    }
    reply = call(router.url, Message(b"photo", "m1", "photos.1", headers), model="photos:2", timeout=Seconds(7))
    assert (reply.outcome, reply.content_type) == (Outcome.DONE, "application/json")
    (received,) = router.received
    assert (received.path, received.body) == ("/?model=photos:2", b"photo")
    assert received.headers["content-type"] == "image/jpeg"
    assert (received.headers["ce-id"], received.headers["ce-source"]) == ("7", "/camera")
    assert (received.headers["x-topic"], received.headers["x-connector"]) == ("photos.1", "isthmus")
    assert received.headers["x-call-id"] == received.headers["idempotency-key"] == "m1"
    assert received.headers["x-timeout"] == "7000ms"
    assert received.headers["traceparent"] == headers["traceparent"]
    assert not {"authorization", "x-callback-url"} & set(received.headers)


def test_the_routers_key_goes_with_every_message_in_place_of_a_callers_own(router: ScriptedRouter) -> None:
    opened = RouterRoute(RouterTable(url=router.url), key="isthmus_key")
    try:
        opened.call(Message(b"photo", "m1", headers={"authorization": "Bearer other"}))
    finally:
        opened.close()
    (received,) = router.received
    assert received.headers["authorization"] == "Bearer isthmus_key"


def test_a_message_without_a_trace_begins_one(router: ScriptedRouter) -> None:
    call(router.url)
    assert len(router.received[0].headers["traceparent"]) == 55


@pytest.mark.parametrize("value", ["a\r\nX-Evil: 1", "é" * 10, "x" * 5000, "\x00"])
def test_a_header_that_is_no_header_is_left_out(router: ScriptedRouter, value: str) -> None:
    message = Message(b"", "m1", value, {"content-type": value, "ce-id": value, f"ce-{value}": "1"})
    assert call(router.url, message).outcome is Outcome.DONE
    received = router.received[0].headers
    assert not [name for name in received if name.startswith("ce-") or name in ("x-evil", "x-topic", "content-type")]


@pytest.mark.parametrize(
    ("status", "headers", "body", "outcome"),
    [
        (202, {}, b"", Outcome.DONE),
        (204, {}, b"", Outcome.DONE),
        (302, {"Location": "http://127.0.0.1/"}, b"", Outcome.AWAY),
        (400, {}, ERROR, Outcome.REFUSED),
        (400, {}, b"<html>", Outcome.REFUSED),
        (401, {}, b"", Outcome.AWAY),
        (404, {}, b"error finding function router", Outcome.AWAY),
        (404, {}, ERROR, Outcome.REFUSED),
        (408, {}, b"", Outcome.UNCLEAR),
        (413, {}, b"", Outcome.REFUSED),
        (415, {}, ERROR, Outcome.REFUSED),
        (429, {}, b"", Outcome.BUSY),
        (500, {}, ERROR, Outcome.FAILED),
        (500, {}, b"", Outcome.UNCLEAR),
        (500, {"X-OpenFaaS-Internal": "proxy"}, b"Can't reach service for: router", Outcome.AWAY),
        (502, {}, ERROR, Outcome.FAILED),
        (502, {}, b"", Outcome.UNCLEAR),
        (503, {}, ERROR, Outcome.AWAY),
        (503, {"X-OpenFaaS-Internal": "proxy"}, b"No endpoints available", Outcome.AWAY),
        (504, {}, b"", Outcome.UNCLEAR),
        (507, {}, ERROR, Outcome.FAILED),
        (507, {}, json.dumps({"error": "full", "type": "SpoolFull"}).encode(), Outcome.AWAY),
    ],
)
def test_each_status_has_a_meaning(
    router: ScriptedRouter, status: int, headers: dict[str, str], body: bytes, outcome: Outcome
) -> None:
    router.replies = [(status, headers, body)]
    reply = call(router.url)
    assert (reply.outcome, reply.status) == (outcome, status)


def test_a_refusal_has_the_routers_document_and_its_pause(router: ScriptedRouter) -> None:
    router.replies = [(429, {"Retry-After": "3"}, ERROR)]
    reply = call(router.url)
    assert (reply.retry_after_s, reply.document["type"]) == (3.0, "RunFailed")
    assert "the model failed" in reply.reason


def test_a_router_that_does_not_listen_is_away() -> None:
    assert call(f"http://127.0.0.1:{free_port()}").outcome is Outcome.AWAY


def test_a_router_that_does_not_answer_is_unclear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "_LATE_S", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert call(url, timeout=Seconds(0.1)).outcome is Outcome.UNCLEAR


def test_a_router_that_breaks_off_has_failed_on_the_message(router: ScriptedRouter) -> None:
    router.replies = [(0, {}, b"")]
    assert call(router.url).outcome is Outcome.FAILED


def test_an_endless_result_is_refused(router: ScriptedRouter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "MAX_RESULT_BYTES", 10)
    router.replies = [(200, {}, bytes(11))]
    reply = call(router.url)
    assert (reply.outcome, reply.status) == (Outcome.REFUSED, 413)
