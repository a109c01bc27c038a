"""What is special about streams of Redis and Valkey: claims, foreign fields, servers that lost their data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import msgspec
import pytest
import redis

from isthmus.errors import BrokerRefused, ConfigurationMalformed
from isthmus.events.brokers.redis import RedisConsumer, RedisPublisher, message_of
from isthmus.events.configuration import RedisPlace
from isthmus.events.message import Message
from support.brokers import PASSWORD, fetched, unique_place
from support.patience import eventually
from support.redis_server import RedisServer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture
def client(server: RedisServer) -> Iterator[Any]:
    with redis.Redis(port=server.port, password=PASSWORD) as client:
        yield client


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def consumer_of(opened: ExitStack, server: RedisServer, stream: str) -> RedisConsumer:
    return opened.enter_context(closing(server.consumer(stream)))


def publisher_of(opened: ExitStack, server: RedisServer, stream: str, **options: Any) -> RedisPublisher:
    place = msgspec.structs.replace(server.place(stream), **options)
    return opened.enter_context(closing(RedisPublisher(place, PASSWORD)))


@pytest.mark.parametrize(
    ("fields", "body", "headers"),
    [
        ({b"body": b"\x00", b"Content-Type": b"image/png"}, b"\x00", {"content-type": "image/png"}),
        ({b"data": b"x", b"other": b"\xff"}, b"x", {"other": "�"}),
        ({b"temperature": b"20.5"}, b"20.5", {}),
        ({b"t": b"20.5", b"h": b"3"}, b'{"t": "20.5", "h": "3"}', {"content-type": "application/json"}),
    ],
)
def test_entries_of_other_producers_have_a_body(
    fields: dict[bytes, bytes], body: bytes, headers: dict[str, str]
) -> None:
    message = message_of("readings", "1700000000500-3", fields)
    assert (message.body, dict(message.headers)) == (body, headers)
    assert (message.id, message.source, message.published) == ("readings.1700000000500-3", "readings", 1_700_000_000.5)


def test_an_entry_keeps_the_id_that_its_producer_gave_it() -> None:
    fields = {b"body": b"x", b"ce-source": b"camera", b"ce-id": b"7", b"Idempotency-Key": b"other"}
    assert message_of("s", "1-0", fields).id == message_of("t", "2-0", fields).id


def test_entries_that_were_there_before_the_group_are_delivered(
    server: RedisServer, client: Any, opened: ExitStack
) -> None:
    stream = unique_place()
    client.xadd(stream, {"body": b"early"})
    [delivery] = fetched(consumer_of(opened, server, stream), 1)
    assert delivery.message.body == b"early"
    delivery.ack()


def test_a_server_that_lost_its_data_gets_its_group_again(server: RedisServer, client: Any, opened: ExitStack) -> None:
    stream = unique_place()
    consumer, publisher = consumer_of(opened, server, stream), publisher_of(opened, server, stream)
    publisher.publish(Message(b"lost", "m"))
    [lost] = fetched(consumer, 1)
    lost.retry(0.0)
    client.delete(stream)
    assert consumer.fetch(1, 0.2) == []
    assert consumer.backlog().messages == 0
    lost.ack()
    publisher.publish(Message(b"new", "n"))
    [delivery] = fetched(consumer, 1)
    assert delivery.message.body == b"new"
    delivery.ack()


def test_a_stream_that_goes_while_a_consumer_waits_is_made_again(
    server: RedisServer, client: Any, opened: ExitStack
) -> None:
    stream = unique_place()
    consumer = consumer_of(opened, server, stream)
    consumer.fetch(1, 0.0)
    client.delete(stream)
    assert consumer.backlog().messages == 0
    assert client.xinfo_groups(stream)[0]["name"] == b"isthmus"


def test_a_message_that_waits_for_its_retry_goes_to_no_other_consumer(server: RedisServer, opened: ExitStack) -> None:
    stream = unique_place()
    consumer, other = consumer_of(opened, server, stream), consumer_of(opened, server, stream)
    publisher_of(opened, server, stream).publish(Message(b"x", "m"))
    [delivery] = fetched(consumer, 1)
    delivery.retry(60.0)
    until = time.monotonic() + 1.3 * (server.redelivery_s or 0)
    while time.monotonic() < until:
        assert [*consumer.fetch(1, 0.1), *other.fetch(1, 0.1)] == []


def test_messages_of_a_consumer_that_died_go_to_another_and_its_pause_is_forgotten(
    server: RedisServer, opened: ExitStack
) -> None:
    stream = unique_place()
    consumer, other = consumer_of(opened, server, stream), consumer_of(opened, server, stream)
    publisher_of(opened, server, stream).publish(Message(b"x", "m"))
    [delivery] = fetched(consumer, 1)
    delivery.retry(0.1)  # and then the process hangs
    [claimed] = fetched(other, 1)
    assert claimed.attempt == 2
    assert consumer.fetch(1, 0.0) == []
    claimed.ack()


def test_a_closed_consumer_leaves_its_messages_and_not_its_name(
    server: RedisServer, client: Any, opened: ExitStack
) -> None:
    stream = unique_place()
    consumer = consumer_of(opened, server, stream)
    publisher_of(opened, server, stream).publish(Message(b"x", "m"))
    fetched(consumer, 1)
    consumer.close()
    [left] = client.xinfo_consumers(stream, "isthmus")
    assert (left["name"], left["pending"]) == (b"isthmus-released", 1)
    [delivery] = fetched(consumer_of(opened, server, stream), 1)
    delivery.ack()


def test_a_long_list_of_left_messages_is_claimed_page_by_page(server: RedisServer, opened: ExitStack) -> None:
    stream = unique_place()
    consumer, publisher = consumer_of(opened, server, stream), publisher_of(opened, server, stream)
    for n in range(50):
        publisher.publish(Message(b"x", f"m-{n}"))
    assert len(fetched(consumer, 50)) == 50
    consumer.close()
    other = consumer_of(opened, server, stream)
    ids = set()
    while len(ids) < 50:
        for delivery in fetched(other, 1):
            ids.add(delivery.message.id)
            delivery.ack()
    assert other.backlog().messages == 0


def test_a_stream_is_trimmed_to_about_its_length(server: RedisServer, client: Any, opened: ExitStack) -> None:
    stream = unique_place()
    publisher = publisher_of(opened, server, stream, max_length=10)
    for n in range(500):
        publisher.publish(Message(b"x", f"m-{n}"))
    assert 10 <= client.xlen(stream) < 300  # whole nodes of about 100 entries go


def test_another_type_under_the_streams_name_is_refused(server: RedisServer, client: Any, opened: ExitStack) -> None:
    stream = unique_place()
    client.set(stream, "text")
    with pytest.raises(BrokerRefused, match="WRONGTYPE"):
        consumer_of(opened, server, stream).fetch(1, 0.1)
    with pytest.raises(BrokerRefused, match="WRONGTYPE"):
        publisher_of(opened, server, stream).publish(Message(b"x", "m"))


def test_a_user_without_the_right_to_read_the_configuration_has_the_default_limit(
    server: RedisServer, client: Any, opened: ExitStack
) -> None:
    stream = unique_place()
    client.acl_setuser("limited", enabled=True, passwords=["+other"], keys=["*"], commands=["+@all", "-config"])
    place = RedisPlace(url=f"redis://limited@127.0.0.1:{server.port}/0", stream=stream)
    publisher = opened.enter_context(closing(RedisPublisher(place, "other")))
    assert publisher.max_bytes == 512 * 2**20
    publisher.publish(Message(b"x", "m"))
    assert client.xlen(stream) == 1


def test_the_age_of_the_oldest_entry_is_stated_before_and_after_its_delivery(
    server: RedisServer, client: Any, opened: ExitStack
) -> None:
    stream = unique_place()
    consumer = consumer_of(opened, server, stream)
    seconds, _ = client.time()
    client.xadd(stream, {"body": "x"}, id=f"{1000 * (seconds - 100)}-0")
    eventually(lambda: (consumer.backlog().oldest_s or 0) >= 99)
    [delivery] = fetched(consumer, 1)
    assert 99 <= (consumer.backlog().oldest_s or 0) < 1000
    delivery.ack()
    assert (consumer.backlog().messages, consumer.backlog().oldest_s) == (0, None)


@pytest.mark.parametrize("url", ["http://127.0.0.1/", "127.0.0.1:6379", "redis://127.0.0.1:port/0"])
def test_a_malformed_url_stops_the_start(url: str) -> None:
    with pytest.raises(ConfigurationMalformed):
        RedisConsumer(RedisPlace(url=url, stream="s"))
