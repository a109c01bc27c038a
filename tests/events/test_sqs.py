"""What is special about SQS: texts, attributes, FIFO groups, limits of a queue, credentials."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import BrokerRefused, BrokerUnavailable, ConfigurationMalformed, MessageTooLarge
from isthmus.events.brokers.sqs import SqsConsumer, SqsPublisher, encoded, message_of
from isthmus.events.configuration import SqsPlace
from isthmus.events.message import Message
from support.brokers import fetched, unique_place
from support.sqs_server import REGION, SqsFifoServer, SqsServer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SqsServer]:
    server = SqsServer(tmp_path_factory.mktemp("sqs"))
    yield server
    server.kill()


@pytest.fixture(scope="module")
def fifo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SqsFifoServer]:
    server = SqsFifoServer(tmp_path_factory.mktemp("sqs-fifo"))
    yield server
    server.kill()


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@given(st.binary(max_size=64) | st.text(max_size=64).map(lambda text: text.encode(errors="surrogatepass")))
def test_every_body_survives_its_encoding(body: bytes) -> None:
    text, encoding = encoded(body)
    attributes = {"isthmus-encoding": {"DataType": "String", "StringValue": encoding}} if encoding else {}
    assert message_of("q", {"MessageId": "m", "Body": text, "MessageAttributes": attributes}).body == body


@pytest.mark.parametrize("body", [b"\x00", b"\x1b", b"\xff", "\ufffe".encode(), b""])
def test_a_body_that_is_no_text_of_sqs_is_encoded(body: bytes) -> None:
    assert encoded(body)[1] in ("base64", "empty")


def test_a_text_stays_readable() -> None:
    assert encoded('{"a": "é\n"}'.encode()) == ('{"a": "é\n"}', "")


def test_halves_of_characters_stop_no_consumer() -> None:
    attributes = {"isthmus-headers": {"StringValue": '{"idempotency-key": "\\ud800", "a\\udfff": "b"}'}}
    message = message_of("photos", {"MessageId": "1", "Body": "\ud800", "MessageAttributes": attributes})
    assert message.body == b"?"
    assert message.headers == {"idempotency-key": "?", "a?": "b"}


def test_attributes_of_other_producers_are_headers() -> None:
    message = message_of(
        "photos",
        {
            "MessageId": "7f1",
            "Body": "{}",
            "Attributes": {"SentTimestamp": "1700000000500", "ApproximateReceiveCount": "3", "MessageGroupId": "g"},
            "MessageAttributes": {
                "Content-Type": {"DataType": "String", "StringValue": "application/json"},
                "Size": {"DataType": "Number", "StringValue": "3"},
                "Thumbnail": {"DataType": "Binary", "BinaryValue": b"\x00"},
                "isthmus-headers": {"DataType": "String", "StringValue": "[1]"},
                "isthmus-encoding": {"DataType": "String", "StringValue": "base64"},
            },
        },
    )
    assert dict(message.headers) == {"content-type": "application/json", "size": "3"}
    assert (message.id, message.key, message.published, message.body) == ("7f1", "g", 1_700_000_000.5, b"{}")


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "a/b"},
        {f"x-{n}": "v" for n in range(20)},
        {"empty": "", "odd name": "v", "control": "\x01", "aws.x": "v"},
        {"isthmus-headers": "x"},
    ],
    ids=["few", "many", "odd", "own"],
)
def test_headers_travel_however_many_there_are(headers: dict[str, str], server: SqsServer, opened: ExitStack) -> None:
    place = unique_place()
    server.make(place)
    opened.enter_context(closing(server.publisher(place))).publish(Message(b"x", "m", headers=headers))
    [delivery] = fetched(opened.enter_context(closing(server.consumer(place))), 1)
    got = dict(delivery.message.headers)
    assert got.pop("idempotency-key") == "m"
    assert got == {name: value for name, value in headers.items() if name != "isthmus-headers"}
    delivery.ack()


def test_headers_beyond_their_share_are_refused_with_both_numbers(server: SqsServer, opened: ExitStack) -> None:
    place = unique_place()
    server.make(place)
    publisher = opened.enter_context(closing(server.publisher(place)))
    with pytest.raises(MessageTooLarge, match="of headers exceed the limit of 16384") as refused:
        publisher.publish(Message(b"x", "m", headers={"x-long": "v" * 16_384}))
    assert refused.value.facts["limit"] == 16_384


def test_a_queues_own_limit_holds(server: SqsServer, opened: ExitStack) -> None:
    place = unique_place()
    server.make(place, MaximumMessageSize="4096")
    publisher = opened.enter_context(closing(server.publisher(place)))
    assert publisher.max_bytes == (4096 - 1024) // 4 * 3
    publisher.publish(Message(bytes(publisher.max_bytes), "m"))
    with pytest.raises(MessageTooLarge):
        publisher.publish(Message(bytes(publisher.max_bytes + 1), "n"))


def test_more_than_one_batch_is_fetched_at_once(server: SqsServer, opened: ExitStack) -> None:
    place = unique_place()
    server.make(place)
    publisher = opened.enter_context(closing(server.publisher(place)))
    for n in range(25):
        publisher.publish(Message(b"x", f"m-{n}"))
    consumer = opened.enter_context(closing(server.consumer(place)))
    deliveries = consumer.fetch(30, 0.0)
    assert len(deliveries) == 25
    assert consumer.backlog().messages == 25
    consumer.close()  # all are visible again
    assert len(opened.enter_context(closing(server.consumer(place))).fetch(30, 0.0)) == 25


def test_messages_of_one_key_keep_their_order_and_wait_for_one_another(fifo: SqsFifoServer, opened: ExitStack) -> None:
    place = unique_place()
    fifo.make(place)
    publisher = opened.enter_context(closing(fifo.publisher(place)))
    for n in range(3):
        publisher.publish(Message(b"%d" % n, f"m-{n}", key="camera 1"))
    consumer = opened.enter_context(closing(fifo.consumer(place)))
    bodies = []
    for _ in range(3):
        [delivery] = fetched(consumer, 1)
        assert consumer.fetch(1, 0.0) == []  # the group waits for the one in work
        bodies.append(delivery.message.body)
        delivery.ack()
    assert bodies == [b"0", b"1", b"2"]


def test_messages_without_a_key_do_not_wait_for_one_another(fifo: SqsFifoServer, opened: ExitStack) -> None:
    place = unique_place()
    fifo.make(place)
    publisher = opened.enter_context(closing(fifo.publisher(place)))
    for n in range(3):
        publisher.publish(Message(b"x", f"m-{n}"))
    consumer = opened.enter_context(closing(fifo.consumer(place)))
    assert len([*fetched(consumer, 1), *fetched(consumer, 1), *fetched(consumer, 1)]) == 3


def test_a_queue_that_never_was_there_is_refused_and_one_that_went_is_waited_for(
    server: SqsServer, opened: ExitStack
) -> None:
    place = unique_place()
    consumer = opened.enter_context(closing(server.consumer(place)))
    publisher = opened.enter_context(closing(server.publisher(place)))
    with pytest.raises(BrokerRefused):
        consumer.fetch(1, 0.0)
    with pytest.raises(BrokerRefused):
        publisher.publish(Message(b"x", "m"))
    server.make(place)
    assert consumer.fetch(1, 0.0) == []
    with closing(server.client()) as client:
        client.delete_queue(QueueUrl=server.place(place).queue_url)
    with pytest.raises(BrokerUnavailable):
        consumer.fetch(1, 0.0)


def test_wrong_keys_are_refused(tmp_path: Path, opened: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INITIAL_NO_AUTH_ACTION_COUNT", "0")
    server = SqsServer(tmp_path / "sqs")
    opened.callback(server.kill)
    with pytest.raises(BrokerRefused):
        opened.enter_context(closing(server.consumer("q"))).fetch(1, 0.0)
    with pytest.raises(BrokerRefused):
        opened.enter_context(closing(server.publisher("q"))).publish(Message(b"x", "m"))


def test_absent_keys_are_refused(server: SqsServer, opened: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, "/nowhere")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    consumer = opened.enter_context(closing(SqsConsumer(server.place("q"))))
    with pytest.raises(BrokerRefused, match="credentials"):
        consumer.fetch(1, 0.0)


def test_the_region_is_in_the_queues_url(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_DEFAULT_REGION", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    url = f"https://sqs.{REGION}.amazonaws.com/123456789012/photos"
    with closing(SqsPublisher(SqsPlace(queue_url=url))) as publisher:
        assert publisher._queue._client.meta.region_name == REGION


def test_a_malformed_endpoint_stops_the_start() -> None:
    with pytest.raises(ConfigurationMalformed):
        SqsConsumer(SqsPlace(queue_url="http://x/1/q", endpoint="not a url", region=REGION))
