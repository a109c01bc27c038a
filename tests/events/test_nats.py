"""What is special about NATS JetStream, with a real server that dies."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import nats
import nkeys
import pytest
from nats.aio.client import Client
from nats.js import JetStreamContext

from isthmus.errors import BrokerRefused, BrokerUnavailable, ConfigurationMalformed, MessageTooLarge
from isthmus.events.brokers import nats_connection
from isthmus.events.brokers.nats import HEADER_BYTES, NatsConsumer, NatsPublisher
from isthmus.events.brokers.nats_connection import NatsConnection
from isthmus.events.configuration import NatsPlace
from isthmus.events.message import Message
from support.brokers import fetched
from support.nats_server import NatsServer, unique_subject
from support.patience import LONG_S, eventually
from support.ports import free_port


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    """Closes consumers and publishers at the end."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine may pause for seconds while the server makes a stream."""
    monkeypatch.setattr(nats_connection, "CONNECT_TIMEOUT_S", LONG_S)


def consumer_of(opened: ExitStack, server: NatsServer, subject: str, **options: Any) -> NatsConsumer:
    consumer = NatsConsumer(server.place(subject, **options))
    opened.callback(consumer.close)
    return consumer


def publisher_of(opened: ExitStack, server: NatsServer, subject: str, **options: Any) -> NatsPublisher:
    publisher = NatsPublisher(server.place(subject, **options))
    opened.callback(publisher.close)
    return publisher


def with_jetstream(server: NatsServer, work: Callable[[JetStreamContext], Awaitable[Any]]) -> Any:
    """The result of `work` by the broker's own client."""

    async def connected() -> Any:
        client = await nats.connect(server.url)
        try:
            return await work(client.jetstream())
        finally:
            await client.close()

    return asyncio.run(connected())


def test_a_message_comes_with_its_id_headers_subject_and_time(nats_server: NatsServer, opened: ExitStack) -> None:
    subject = unique_subject()
    consumer = consumer_of(opened, nats_server, subject)
    publisher_of(opened, nats_server, subject).publish(
        Message(b"body", "photo-1", headers={"content-type": "image/jpeg"})
    )
    [delivery] = fetched(consumer, 1)
    message = delivery.message
    assert (message.body, message.id, message.source) == (b"body", "photo-1", subject)
    assert (message.content_type, delivery.attempt) == ("image/jpeg", 1)
    assert message.published > 1_700_000_000


def test_headers_of_other_transports_can_neither_be_refused_nor_add_others(
    nats_server: NatsServer, opened: ExitStack
) -> None:
    subject = unique_subject()
    consumer = consumer_of(opened, nats_server, subject)
    headers = {"two words": "1", "a:b": "2", "line": "x\r\nNats-Rollup: all", "name\n": "ü", "": "4", "half": "\ud800"}
    publisher_of(opened, nats_server, subject).publish(Message(b"", "m", headers=headers))
    (delivery,) = fetched(consumer, 1)
    assert dict(delivery.message.headers) == {
        "two%20words": "1",
        "a%3ab": "2",
        "line": "x%0D%0ANats-Rollup: all",
        "name%0a": "ü",
        "half": "%3F",
        "idempotency-key": "m",
        "nats-msg-id": f"{subject}/m",
    }


def test_a_foreign_publishers_nats_msg_id_is_the_id(nats_server: NatsServer, opened: ExitStack) -> None:
    subject = unique_subject()
    consumer = consumer_of(opened, nats_server, subject)
    assert consumer.backlog().messages == 0  # the stream is there
    with_jetstream(nats_server, lambda js: js.publish(subject, b"", headers={"Nats-Msg-Id": "own"}))
    with_jetstream(nats_server, lambda js: js.publish(subject, b""))
    named, nameless = (delivery.message.id for delivery in fetched(consumer, 2))
    assert named == "own"
    assert nameless.startswith(subject.replace(".", "-"))


def test_wildcards_read_all_matching_subjects(nats_server: NatsServer, opened: ExitStack) -> None:
    prefix = unique_subject()
    consumer = consumer_of(opened, nats_server, f"{prefix}.*.done")
    assert consumer.backlog().messages == 0
    for name in ("a.done", "b.done"):
        publisher_of(opened, nats_server, f"{prefix}.{name}").publish(Message(b"", name))
    assert {d.message.source for d in fetched(consumer, 2)} == {f"{prefix}.a.done", f"{prefix}.b.done"}


def test_the_result_of_a_message_in_the_messages_own_stream_is_no_duplicate(
    nats_server: NatsServer, opened: ExitStack
) -> None:
    prefix = unique_subject()
    consumer = consumer_of(opened, nats_server, f"{prefix}.>")
    assert consumer.backlog().messages == 0
    for name in ("in", "out", "out"):
        publisher_of(opened, nats_server, f"{prefix}.{name}").publish(Message(b"", "same"))
    assert [d.message.source for d in fetched(consumer, 2)] == [f"{prefix}.in", f"{prefix}.out"]
    assert not consumer.fetch(1, 0.1)


def test_a_publisher_of_a_source_makes_the_stream_that_the_source_would(
    nats_server: NatsServer, opened: ExitStack
) -> None:
    prefix = unique_subject()
    source = nats_server.place(f"{prefix}.*")
    publisher = NatsPublisher(nats_server.place(f"{prefix}.file"), read_by=source)
    opened.callback(publisher.close)
    publisher.publish(Message(b"", "first"))
    other = publisher_of(opened, nats_server, f"{prefix}.camera")
    other.publish(Message(b"", "second"))
    consumer = consumer_of(opened, nats_server, f"{prefix}.*")
    deliveries = fetched(consumer, 2)
    assert [d.message.id for d in deliveries] == ["first", "second"]
    for delivery in deliveries:
        delivery.ack()
    # A work queue: an acknowledged message is removed.
    stream = f"{prefix}.any".replace(".", "-")
    eventually(lambda: with_jetstream(nats_server, lambda js: js.stream_info(stream)).state.messages == 0)


def test_a_message_over_max_payload_is_refused_before_sending_with_both_numbers(
    tmp_path: Path, opened: ExitStack
) -> None:
    server = NatsServer(tmp_path / "nats", "max_payload: 65536")
    opened.callback(server.kill)
    subject = unique_subject()
    consumer = consumer_of(opened, server, subject)
    publisher = publisher_of(opened, server, subject)
    limit = 65_536 - HEADER_BYTES
    assert publisher.max_bytes == limit
    with pytest.raises(MessageTooLarge, match=rf"{limit + 1} bytes.*{limit}") as caught:
        publisher.publish(Message(bytes(limit + 1), "large"))
    assert caught.value.facts == {"bytes": limit + 1, "limit": limit}
    publisher.publish(Message(bytes(limit), "fits", headers={"x-large": "h" * 3900}))
    assert len(fetched(consumer, 1)[0].message.body) == limit


def test_kill_and_restart_of_the_server_during_a_fetch_loses_nothing(
    own_nats_server: NatsServer, opened: ExitStack
) -> None:
    subject = unique_subject()
    consumer = consumer_of(opened, own_nats_server, subject, ack_wait=1.0)
    publisher = publisher_of(opened, own_nats_server, subject)
    publisher.publish(Message(b"", "before"))
    [first] = fetched(consumer, 1)
    failures: list[Exception] = []

    def fetch() -> None:
        try:
            consumer.fetch(1, LONG_S)
        except BrokerUnavailable as e:
            failures.append(e)

    waiting = threading.Thread(target=fetch)
    waiting.start()
    stream = subject.replace(".", "-")
    info = lambda: with_jetstream(own_nats_server, lambda js: js.consumer_info(stream, "isthmus"))  # noqa: E731
    eventually(lambda: info().num_waiting == 1)
    own_nats_server.kill()
    waiting.join(LONG_S)
    assert len(failures) == 1  # at once, not after the fetch's time
    first.ack()  # lost with the connection: the message comes again
    own_nats_server.restart()
    [again] = fetched(consumer, 1)
    assert (again.message.id, again.attempt) == ("before", 2)
    again.ack()
    publisher.publish(Message(b"", "after"))
    assert fetched(consumer, 1)[0].message.id == "after"


def test_a_request_ends_with_its_connection_and_not_at_its_timeout(
    own_nats_server: NatsServer, opened: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.events.brokers.nats.REQUEST_TIMEOUT_S", 10 * LONG_S)
    publisher = publisher_of(opened, own_nats_server, unique_subject())
    publisher.publish(Message(b"", "first"))
    own_nats_server.pause()  # takes requests, and responds to none
    failures: list[Exception] = []

    def publish() -> None:
        try:
            publisher.publish(Message(b"", "second"))
        except BrokerUnavailable as e:
            failures.append(e)

    waiting = threading.Thread(target=publish)
    waiting.start()
    waiting.join(0.2)
    own_nats_server.kill()
    waiting.join(LONG_S)
    assert len(failures) == 1


def test_a_connection_that_breaks_with_a_full_buffer_is_made_again(
    own_nats_server: NatsServer, opened: ExitStack
) -> None:
    connection = opened.enter_context(NatsConnection(own_nats_server.url))

    async def send_much(client: Client) -> None:
        while not client.is_closed:
            await client.publish("much", bytes(1000))
            await asyncio.sleep(0)

    def sends() -> None:
        with suppress(BrokerUnavailable):
            connection.run(send_much)

    def is_connected() -> bool:
        with suppress(BrokerUnavailable):
            connection.run(Client.flush)
            return True
        return False

    for _ in range(2):
        senders = [threading.Thread(target=sends) for _ in range(4)]
        for sender in senders:
            sender.start()
        senders[0].join(0.2)
        own_nats_server.kill()
        for sender in senders:
            sender.join(LONG_S)
        own_nats_server.restart()
        eventually(is_connected)


def test_an_unforeseen_error_while_connecting_is_told_and_does_not_end_the_connecting(
    nats_server: NatsServer, opened: ExitStack
) -> None:
    goes_on = threading.Event()

    async def prepare(client: Client) -> None:
        if not goes_on.is_set():
            raise TypeError("'NoneType' object is not subscriptable")

    connection = opened.enter_context(NatsConnection(nats_server.url, prepare=prepare))
    with pytest.raises(BrokerUnavailable, match="NoneType"):
        connection.run(Client.flush, connect_timeout_s=0.5)
    goes_on.set()
    connection.run(Client.flush)


def test_a_server_with_an_empty_store_gets_stream_and_consumer_anew(
    own_nats_server: NatsServer, opened: ExitStack
) -> None:
    subject = unique_subject()
    consumer = consumer_of(opened, own_nats_server, subject, ack_wait=1.0)
    publisher = publisher_of(opened, own_nats_server, subject)
    publisher.publish(Message(b"", "first"))
    [old] = fetched(consumer, 1)
    own_nats_server.restart(empty=True)
    publisher.publish(Message(b"", "second"))  # has the number of the first
    old.ack()
    [new] = fetched(consumer, 1)
    assert new.message.id == "second"
    again = fetched(consumer, 1)  # the old acknowledgement was not taken for the new message's
    assert (again[0].message.id, again[0].attempt) == ("second", 2)


def test_nameless_messages_of_equal_numbers_have_different_ids_after_the_store_was_emptied(
    own_nats_server: NatsServer, opened: ExitStack
) -> None:
    subject = unique_subject()
    consumer = consumer_of(opened, own_nats_server, subject)
    ids = []
    for _ in range(2):
        eventually(lambda: is_empty(consumer))
        with_jetstream(own_nats_server, lambda js: js.publish(subject, b""))
        ids.append(fetched(consumer, 1)[0].message.id)
        own_nats_server.restart(empty=True)
    assert len(set(ids)) == 2


def is_empty(consumer: NatsConsumer) -> bool:
    try:
        return consumer.backlog().messages == 0
    except BrokerUnavailable:
        return False


def test_a_consumer_that_somebody_removed_is_made_again(nats_server: NatsServer, opened: ExitStack) -> None:
    subject = unique_subject()
    consumer = consumer_of(opened, nats_server, subject, stream="removed")
    assert consumer.backlog().messages == 0
    with_jetstream(nats_server, lambda js: js.delete_stream("removed"))
    assert list(consumer.fetch(1, 0.2)) == []
    publisher_of(opened, nats_server, subject).publish(Message(b"", "x"))
    assert fetched(consumer, 1)[0].message.id == "x"


def test_a_consumer_name_in_use_for_another_subject_is_refused(
    nats_server: NatsServer, opened: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = unique_subject()
    stream = prefix.replace(".", "-")
    with_jetstream(nats_server, lambda js: js.add_stream(name=stream, subjects=[f"{prefix}.>"]))
    assert consumer_of(opened, nats_server, f"{prefix}.a").backlog().messages == 0
    # The refusal may be there before the consumer is.
    start = NatsConnection.start

    def returns_late(connection: NatsConnection) -> NatsConnection:
        start(connection)
        time.sleep(0.5)
        return connection

    monkeypatch.setattr(NatsConnection, "start", returns_late)
    other = consumer_of(opened, nats_server, f"{prefix}.b")
    with pytest.raises(BrokerRefused, match=rf"'isthmus'.*{prefix}\.a") as caught:
        other.fetch(1, LONG_S)
    assert "durable" in caught.value.hint


def test_backlog_counts_unacknowledged_messages_and_the_age_of_the_oldest(
    nats_server: NatsServer, opened: ExitStack
) -> None:
    subject = unique_subject()
    consumer = consumer_of(opened, nats_server, subject)
    publisher = publisher_of(opened, nats_server, subject)
    for name in "abc":
        publisher.publish(Message(b"", name))
    first, second = fetched(consumer, 2)
    first.ack()
    eventually(lambda: consumer.backlog().messages == 2)
    backlog = consumer.backlog()
    assert backlog.oldest_s is not None
    assert 0 < backlog.oldest_s < LONG_S
    second.ack()


def test_closing_gives_back_what_was_fetched(nats_server: NatsServer, opened: ExitStack) -> None:
    subject = unique_subject()
    consumer = consumer_of(opened, nats_server, subject)
    publisher_of(opened, nats_server, subject).publish(Message(b"", "x"))
    fetched(consumer, 1)
    consumer.close()
    assert fetched(consumer_of(opened, nats_server, subject), 1)[0].attempt == 2


@pytest.mark.parametrize("setting", ['token: "s3cret-token"', 'user: "u", password: "s3cret-token"'])
def test_credentials_are_used_refused_and_never_shown(setting: str, tmp_path: Path, opened: ExitStack) -> None:
    server = NatsServer(tmp_path / "nats", f"authorization {{ {setting} }}")
    opened.callback(server.kill)
    place = server.place(unique_subject())
    right = "s3cret-token" if "user" not in setting else "u:s3cret-token"
    consumer = NatsConsumer(place, right)
    opened.callback(consumer.close)
    assert consumer.backlog().messages == 0
    for wrong in ("wrong-s3cret", ""):
        publisher = NatsPublisher(place, wrong)
        opened.callback(publisher.close)
        with pytest.raises(BrokerRefused, match=r"(?i)authorization violation") as caught:
            publisher.publish(Message(b"", "x"))
        assert "s3cret" not in f"{caught.value} {caught.value.facts} {publisher.url}"


def test_a_missing_permission_is_named(tmp_path: Path, opened: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    # The server reports it beside the request, which it leaves without a response.
    monkeypatch.setattr("isthmus.events.brokers.nats.REQUEST_TIMEOUT_S", 1.0)
    setting = 'authorization { users: [{ user: u, password: p, permissions: { publish: { deny: "secret.>" } } }] }'
    server = NatsServer(tmp_path / "nats", setting)
    opened.callback(server.kill)
    publisher = NatsPublisher(server.place("secret.x"), "u:p")
    opened.callback(publisher.close)
    with pytest.raises(BrokerRefused, match=r"(?i)permissions violation for publish to \"secret.x\""):
        publisher.publish(Message(b"", "x"))


def test_a_server_without_jetstream_is_named_as_the_cause(tmp_path: Path, opened: ExitStack) -> None:
    server = NatsServer(tmp_path / "nats", jetstream=False)
    opened.callback(server.kill)
    with pytest.raises(BrokerUnavailable, match="JetStream does not answer"):
        publisher_of(opened, server, unique_subject()).publish(Message(b"", "x"))


def test_a_server_that_is_not_there_is_unavailable_and_its_credentials_are_not_shown(opened: ExitStack) -> None:
    port = free_port()
    consumer = NatsConsumer(NatsPlace(url=f"nats://u:s3cret@127.0.0.1:{port}", subject="x"))
    opened.callback(consumer.close)
    assert consumer.url == f"nats://127.0.0.1:{port}/x"
    with pytest.raises(BrokerUnavailable) as caught:
        consumer.fetch(1, 0.3)
    assert "s3cret" not in str(caught.value)


def test_a_credentials_file_without_a_seed_is_refused(nats_server: NatsServer) -> None:
    text = "-----BEGIN NATS USER JWT-----\neyJ0\n------END NATS USER JWT------\n"
    for seed in ("", "-----BEGIN USER NKEY SEED-----\nSUAnothing\n------END USER NKEY SEED------\n"):
        with pytest.raises(BrokerRefused, match="no user's seed"):
            NatsPublisher(nats_server.place("x"), text + seed)


def test_a_wildcard_cannot_be_published_to(nats_server: NatsServer) -> None:
    with pytest.raises(ConfigurationMalformed, match="wildcard"):
        NatsPublisher(nats_server.place("photos.*"))


def test_a_closed_publisher_says_so(nats_server: NatsServer) -> None:
    publisher = NatsPublisher(nats_server.place("x"))
    publisher.close()
    with pytest.raises(BrokerUnavailable, match="closed"):
        publisher.publish(Message(b"", "x"))


class Identity:
    """A key of NATS, and the JWTs that it signs."""

    def __init__(self, prefix: int) -> None:
        self.seed = nkeys.encode_seed(os.urandom(32), prefix)
        self._pair = nkeys.from_seed(bytearray(self.seed))
        self.name = self._pair.public_key.decode()

    def jwt(self, subject: str, claims: dict[str, Any]) -> str:
        """A token about `subject`, signed by this key."""
        body = {"jti": "x", "iat": 1_700_000_000, "iss": self.name, "name": "x", "sub": subject, "nats": claims}
        parts = [
            base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=")
            for part in ({"typ": "JWT", "alg": "ed25519-nkey"}, body)
        ]
        signature = base64.urlsafe_b64encode(self._pair.sign(b".".join(parts))).rstrip(b"=")
        return b".".join([*parts, signature]).decode()


def test_a_credentials_file_opens_an_account(tmp_path: Path, opened: ExitStack) -> None:
    operator = Identity(nkeys.PREFIX_BYTE_OPERATOR)
    system, account = Identity(nkeys.PREFIX_BYTE_ACCOUNT), Identity(nkeys.PREFIX_BYTE_ACCOUNT)
    user = Identity(nkeys.PREFIX_BYTE_USER)
    names = ("subs", "data", "payload", "imports", "exports", "conn", "leaf", "disk_storage", "streams", "consumer")
    limits = {**dict.fromkeys(names, -1), "mem_storage": -1, "wildcards": True}
    accounts = {
        system.name: {"limits": {**limits, "disk_storage": 0, "mem_storage": 0, "streams": 0, "consumer": 0}},
        account.name: {"limits": limits},
    }
    tokens = {
        name: operator.jwt(name, {"type": "account", "version": 2, **claims}) for name, claims in accounts.items()
    }
    server = NatsServer(
        tmp_path / "nats",
        f"operator: {operator.jwt(operator.name, {'type': 'operator', 'version': 2})}",
        f"system_account: {system.name}",
        "resolver: MEMORY",
        f"resolver_preload: {{ {', '.join(f'{name}: {token}' for name, token in tokens.items())} }}",
    )
    opened.callback(server.kill)
    token = account.jwt(user.name, {"type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1})
    credentials = (
        f"-----BEGIN NATS USER JWT-----\n{token}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{user.seed.decode()}\n------END USER NKEY SEED------\n"
    )
    publisher = NatsPublisher(server.place("photos"), credentials)
    opened.callback(publisher.close)
    publisher.publish(Message(b"", "x"))
    without = NatsPublisher(server.place("photos"))
    opened.callback(without.close)
    with pytest.raises(BrokerRefused, match=r"(?i)authorization violation"):
        without.publish(Message(b"", "y"))
