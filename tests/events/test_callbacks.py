"""Results by POST: signatures that receivers verify, repetition within bounds, and addresses that are permitted."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from email.message import Message as Headers
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import stamina
from standardwebhooks import Webhook, WebhookVerificationError

from isthmus.errors import BrokerRefused, BrokerUnavailable, ConfigurationMalformed, MessageTooLarge, SettingsError
from isthmus.events.configuration import CallbackPlace
from isthmus.events.message import Message
from isthmus.events.places import callback
from isthmus.events.places.callback import CallbackPublisher, callback_headers
from isthmus.events.places.signing import sign, signing_keys
from isthmus.http import sockets
from support.ports import free_port

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
OTHER = "c2VjcmV0IG9mIHR3ZW50eS1mb3VyIGJ5dGVz"
RESULT = Message(b'{"label": "heron"}', "photos-7", headers={"content-type": "application/json"})


class Receiver:
    """A server that records requests and responds with the next of `statuses`, else 204."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/done"
        self.requests: list[tuple[Headers, bytes]] = []
        self.statuses: list[int] = []
        self.headers: dict[str, str] = {}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            state.requests.append((self.headers, body))
            self.send_response(state.statuses.pop(0) if state.statuses else 204)
            for name, value in state.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        state = Receiver(server.server_port)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield state
        server.shutdown()
        thread.join()


@pytest.fixture
def no_pauses() -> Iterator[None]:
    with stamina.set_testing(True, attempts=callback.ATTEMPTS, cap=True):
        yield


@pytest.fixture
def publisher_of(receiver: Receiver) -> Iterator[Callable[..., CallbackPublisher]]:
    publishers = []

    def make(secret: str = "", **options: Any) -> CallbackPublisher:
        place = CallbackPlace(
            url=options.pop("url", receiver.url),
            signing_secret="signing" if secret else "",
            allow=options.pop("allow", ("127.0.0.0/8",)),
        )
        publishers.append(CallbackPublisher(place, secret, **options))
        return publishers[-1]

    yield make
    for publisher in publishers:
        publisher.close()


# Signatures


def test_a_receiver_verifies_a_callback_and_refuses_a_changed_one(
    receiver: Receiver, publisher_of: Callable[..., CallbackPublisher]
) -> None:
    publisher_of(SECRET).publish(RESULT)
    headers, body = receiver.requests[0]
    assert Webhook(SECRET).verify(body, dict(headers)) == {"label": "heron"}
    assert headers["webhook-id"] == "photos-7"
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(body.replace(b"heron", b"stork"), dict(headers))
    with pytest.raises(WebhookVerificationError):
        Webhook(OTHER).verify(body, dict(headers))


def test_a_signature_is_that_of_the_specifications_example() -> None:
    headers = sign(signing_keys(SECRET, "s"), "msg_p5jXN8AQM9LWM0D4loKWxJek", b'{"test": 2432232314}', 1614265330.9)
    assert headers["webhook-timestamp"] == "1614265330"
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_both_keys_sign_while_keys_are_rotated() -> None:
    keys = signing_keys(f"{SECRET} {OTHER}\n", "s")
    first, second = sign(keys, "m", b"x", 1.0)["webhook-signature"].split()
    assert first == sign(keys[:1], "m", b"x", 1.0)["webhook-signature"]
    assert second == sign(keys[1:], "m", b"x", 1.0)["webhook-signature"]


def test_an_id_with_a_full_stop_cannot_pass_for_another_ids_timestamp() -> None:
    assert "." not in sign([b"k" * 24], "photos.7", b"", 1.0)["webhook-id"]


@pytest.mark.parametrize("secret", ["", "whsec_", "c2hvcnQ=", "not base64 at all!", "A" * 88, " ".join([OTHER] * 5)])
def test_a_secret_that_cannot_sign_is_refused_without_showing_it(secret: str) -> None:
    with pytest.raises(SettingsError, match="the secret signing cannot sign") as refused:
        signing_keys(secret, "signing")
    assert not secret or secret not in str(refused.value)


def test_a_callback_without_a_secret_has_no_signature(
    receiver: Receiver, publisher_of: Callable[..., CallbackPublisher]
) -> None:
    publisher_of().publish(RESULT)
    assert not [name for name in receiver.requests[0][0] if name.lower().startswith("webhook")]


# Headers


def test_a_callback_has_the_headers_of_openfaas() -> None:
    headers = callback_headers(Message(b"", "c1", headers={"x-function-status": "400", "x-duration-seconds": "0.25"}))
    assert headers == {
        "content-type": "application/octet-stream",
        "x-call-id": "c1",
        "x-function-name": "router",
        "x-function-status": "400",
        "x-duration-seconds": "0.25",
    }


def test_headers_of_a_connection_and_credentials_stay_here() -> None:
    headers = {"authorization": "x", "host": "x", "transfer-encoding": "chunked", "x-call-id": "x", "a b": "x", "": "x"}
    assert set(callback_headers(Message(b"", "c1", headers=headers))) == {
        "content-type",
        "x-call-id",
        "x-function-name",
        "x-function-status",
    }


def test_header_values_that_http_cannot_carry_are_percent_encoded(
    receiver: Receiver, publisher_of: Callable[..., CallbackPublisher]
) -> None:
    publisher_of().publish(Message(b"x", "c1", headers={"ce-subject": "a\r\nb: é 5%"}))
    assert receiver.requests[0][0]["ce-subject"] == "a%0D%0Ab: %C3%A9 5%25"


# Repetition


@pytest.mark.usefixtures("no_pauses")
def test_a_receiver_that_is_busy_gets_the_callback_again_with_one_id(
    receiver: Receiver, publisher_of: Callable[..., CallbackPublisher]
) -> None:
    receiver.statuses = [503, 429, 500]
    times = iter([1.0, 2.0, 3.0, 4.0])
    publisher_of(SECRET, clock=lambda: next(times)).publish(RESULT)
    assert {headers["webhook-id"] for headers, _ in receiver.requests} == {"photos-7"}
    assert [headers["webhook-timestamp"] for headers, _ in receiver.requests] == ["1", "2", "3", "4"]
    assert len({headers["webhook-signature"] for headers, _ in receiver.requests}) == 4


@pytest.mark.usefixtures("no_pauses")
def test_attempts_are_bounded(receiver: Receiver, publisher_of: Callable[..., CallbackPublisher]) -> None:
    receiver.statuses = [503] * 20
    with pytest.raises(BrokerUnavailable, match="responded 503"):
        publisher_of().publish(RESULT)
    assert len(receiver.requests) == callback.ATTEMPTS


@pytest.mark.parametrize("status", [301, 307, 400, 404, 410])
def test_a_redirect_or_a_refusal_is_not_repeated(
    status: int, receiver: Receiver, publisher_of: Callable[..., CallbackPublisher]
) -> None:
    receiver.statuses, receiver.headers = [status], {"Location": receiver.url + "/elsewhere"}
    with pytest.raises(BrokerRefused, match=f"responded {status}"):
        publisher_of().publish(RESULT)
    assert len(receiver.requests) == 1


@pytest.mark.usefixtures("no_pauses")
def test_a_receiver_that_is_not_there_is_unavailable(publisher_of: Callable[..., CallbackPublisher]) -> None:
    with pytest.raises(BrokerUnavailable, match="does not respond"):
        publisher_of(url=f"http://127.0.0.1:{free_port()}/").publish(RESULT)


def test_a_body_beyond_the_bound_is_refused_with_both_numbers(
    receiver: Receiver, publisher_of: Callable[..., CallbackPublisher]
) -> None:
    publisher = publisher_of()
    with pytest.raises(MessageTooLarge) as refused:
        publisher.publish(RESULT.with_body(bytes(publisher.max_bytes + 1)))
    assert refused.value.facts == {"bytes": publisher.max_bytes + 1, "limit": publisher.max_bytes}
    assert not receiver.requests


# Addresses


def test_a_private_address_is_refused_unless_allowed(
    receiver: Receiver, publisher_of: Callable[..., CallbackPublisher]
) -> None:
    with pytest.raises(BrokerRefused, match="not public") as refused:
        publisher_of(allow=()).publish(RESULT)
    assert 'allow = ["10.0.0.0/8"]' in refused.value.hint
    assert not receiver.requests


def test_a_name_is_judged_by_the_address_of_the_connection(
    receiver: Receiver, publisher_of: Callable[..., CallbackPublisher], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS rebinding: a name that was public before leads to this machine now."""

    def resolve(host: str, port: int, *, timeout_s: float) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(sockets, "resolve", resolve)
    publisher = publisher_of(allow=(), url=receiver.url.replace("127.0.0.1", "rebinds.example"))
    with pytest.raises(BrokerRefused, match="not public"):
        publisher.publish(RESULT)
    assert not receiver.requests


@pytest.mark.parametrize("url", ["ftp://example.com/", "http://127.1/", "http://a b/", "example.com", "http://x:0/"])
def test_a_malformed_url_stops_the_start(url: str) -> None:
    with pytest.raises(ConfigurationMalformed, match="the URL of a callback"):
        CallbackPublisher(CallbackPlace(url=url))


def test_a_malformed_network_stops_the_start() -> None:
    with pytest.raises(ConfigurationMalformed, match="allow of a callback"):
        CallbackPublisher(CallbackPlace(url="http://example.com/", allow=("10.0.0.1/8",)))
