"""What is special about MQTT: sessions, packet identifiers, wildcards, headers by user properties, takeovers."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from isthmus.errors import BrokerRefused, BrokerUnavailable, ConfigurationMalformed, MessageTooLarge
from isthmus.events.brokers import mqtt, mqtt_connection
from isthmus.events.brokers.mqtt import MqttConsumer, MqttPublisher
from isthmus.events.configuration import MqttPlace
from isthmus.events.message import Message
from support.brokers import PASSWORD, USER, fetched, unique_place
from support.mqtt_server import Mqtt3Server, MqttServer
from support.patience import LONG_S, eventually, until

EVENT = {"ce-id": "7", "ce-source": "camera", "ce-type": "photo", "ce-specversion": "1.0"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MqttServer]:
    server = MqttServer(tmp_path_factory.mktemp("mqtt"))
    yield server
    server.kill()


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def consumer_of(opened: ExitStack, server: MqttServer, topic: str, **options: str) -> MqttConsumer:
    """A consumer that is subscribed."""
    consumer = opened.enter_context(closing(MqttConsumer(server.place(topic, **options), PASSWORD)))

    eventually(lambda: is_connected(consumer))
    return consumer


def is_connected(consumer: MqttConsumer) -> bool:
    try:
        return consumer.fetch(1, 0.0) == []
    except BrokerUnavailable:
        return False


def publisher_of(opened: ExitStack, server: MqttServer, topic: str) -> MqttPublisher:
    return opened.enter_context(closing(server.publisher(topic)))


def mosquitto_pub(server: MqttServer, *options: str) -> None:
    if shutil.which("mosquitto_pub") is None:
        pytest.skip("mosquitto_pub is not installed: apt install mosquitto-clients")
    login = f"-p {server.port} -u {USER} -P {PASSWORD} -q 1".split()
    subprocess.run(["mosquitto_pub", *login, *options], check=True, capture_output=True)


def test_a_wildcard_takes_the_messages_of_many_topics(server: MqttServer, opened: ExitStack) -> None:
    root = unique_place()
    consumer = consumer_of(opened, server, f"{root}/+/photo")
    for name in ("a", "b"):
        publisher_of(opened, server, f"{root}/{name}/photo").publish(Message(b"x", name))
    deliveries = fetched(consumer, 2)
    assert {d.message.source for d in deliveries} == {f"{root}/a/photo", f"{root}/b/photo"}
    for delivery in deliveries:
        delivery.ack()


def test_headers_that_mqtt_cannot_have_end_no_connection(server: MqttServer, opened: ExitStack) -> None:
    topic = unique_place()
    consumer = consumer_of(opened, server, topic)
    headers = {"content-type": "text/plain\x07", "line\n": "a\r\nb", "half": "\ud800", "none": "\x00\ufffe", "é": "ü"}
    publisher_of(opened, server, topic).publish(Message(b"x", "m", headers=headers))
    (delivery,) = fetched(consumer, 1)
    assert dict(delivery.message.headers) == {
        "content-type": "text/plain%07",
        "line%0a": "a%0D%0Ab",
        "half": "%3F",
        "none": "%00%EF%BF%BE",
        "é": "ü",
        "idempotency-key": "m",
    }
    delivery.ack()


def test_an_event_with_half_a_character_in_its_id_stops_no_consumer(server: MqttServer, opened: ExitStack) -> None:
    topic = unique_place()
    consumer = consumer_of(opened, server, topic)
    mosquitto_pub(server, "-t", topic, "-m", '{"specversion": "1.0", "source": "\\ud800", "id": "1"}')
    mosquitto_pub(server, "-t", topic, "-m", "next")
    deliveries = fetched(consumer, 2)
    assert deliveries[1].message.body == b"next"
    for delivery in deliveries:
        delivery.ack()


@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_two_equal_readings_without_an_id_are_two_messages(version: str, server: MqttServer, opened: ExitStack) -> None:
    topic = unique_place()
    consumer = consumer_of(opened, server, topic, version=version)
    for _ in range(2):
        mosquitto_pub(server, "-t", topic, "-m", "20.5")
    deliveries = fetched(consumer, 2)
    assert [d.message.body for d in deliveries] == [b"20.5", b"20.5"]
    assert len({d.message.id for d in deliveries}) == 2
    for delivery in deliveries:
        delivery.ack()


def test_user_properties_are_headers_and_name_the_message(server: MqttServer, opened: ExitStack) -> None:
    topic = unique_place()
    consumer = consumer_of(opened, server, topic)
    properties = ["-D", "publish", "user-property", "Idempotency-Key", "r-1"]
    mosquitto_pub(server, "-V", "5", "-t", topic, "-m", "{}", *properties, "-D", "publish", "content-type", "a/b")
    [delivery] = fetched(consumer, 1)
    assert (delivery.message.id, delivery.message.content_type) == ("r-1", "a/b")
    delivery.ack()


def test_a_cloudevent_travels_by_its_own_attributes(server: MqttServer, opened: ExitStack) -> None:
    topic = unique_place()
    consumer = consumer_of(opened, server, topic)
    arguments = "-D publish user-property id 7 -D publish user-property source camera -D publish user-property"
    mosquitto_pub(
        server, *f"-V 5 -t {topic} -m x {arguments} type photo -D publish user-property specversion 1.0".split()
    )
    publisher_of(opened, server, topic).publish(Message(b"x", "camera/7", headers=EVENT))
    deliveries = fetched(consumer, 2)
    for delivery in deliveries:
        assert {name: delivery.message.headers[name] for name in EVENT} == EVENT
        delivery.ack()
    assert len({d.message.id for d in deliveries}) == 1


def test_a_structured_cloudevent_names_its_message_by_mqtt_3(server: MqttServer, opened: ExitStack) -> None:
    topic = unique_place()
    consumer = consumer_of(opened, server, topic, version="3.1.1")
    event = '{"specversion": "1.0", "id": "7", "source": "camera", "type": "photo", "data": 1}'
    for _ in range(2):
        mosquitto_pub(server, "-t", topic, "-m", event)
    mosquitto_pub(server, "-t", topic, "-m", '{"specversion": [')
    deliveries = fetched(consumer, 3)
    assert len({d.message.id for d in deliveries}) == 2
    for delivery in deliveries:
        delivery.ack()


def test_a_message_in_work_is_not_delivered_again_after_the_connection_was_lost(
    tmp_path: Path, opened: ExitStack
) -> None:
    server = MqttServer(tmp_path / "mqtt")
    opened.callback(server.kill)
    topic = unique_place()
    consumer, publisher = consumer_of(opened, server, topic), publisher_of(opened, server, topic)
    for n in range(4):
        publisher.publish(Message(b"%d" % n, f"m-{n}"))
    deliveries = fetched(consumer, 4)
    server.stop()
    # An acknowledgement on an ending connection would be lost, and the message come again, as a broker may.
    eventually(lambda: not is_connected(consumer))
    deliveries[0].ack()
    deliveries[1].retry(0.0)
    server.restart()
    [again] = fetched(consumer, 1)
    assert (again.message.id, again.attempt) == ("m-1", 2)
    deliveries[2].ack()
    # A further message, which comes after all that the broker sends again.
    publisher_of(opened, server, topic).publish(Message(b"last", "last"))
    [last] = fetched(consumer, 1)
    assert last.message.id == "last"
    for delivery in (again, last):
        delivery.ack()
    # Only the one that has no end yet is still with the broker.
    consumer.close()
    following = opened.enter_context(closing(MqttConsumer(server.place(topic), PASSWORD)))
    [left] = fetched(following, 1)
    assert left.message.id == "m-3"
    left.ack()
    assert following.fetch(1, 0.3) == []


def test_a_long_queue_of_a_session_is_served_at_once_by_the_next_consumer(
    monkeypatch: pytest.MonkeyPatch, server: MqttServer, opened: ExitStack
) -> None:
    topic, count = unique_place(), 3 * mqtt_connection.RECEIVE_MAXIMUM
    # As of a process that dies: what it has is unacknowledged when the next one takes the session over.
    first = consumer_of(opened, server, topic, client_id=topic)
    publisher = publisher_of(opened, server, topic)
    for n in range(count):
        publisher.publish(Message(b"x", f"m{n}"))
    # Later than this test waits.
    monkeypatch.setattr(mqtt_connection, "_CONNECT_S", 3 * LONG_S)
    monkeypatch.setattr(mqtt, "_MAX_STALL_S", 2 * LONG_S)
    consumer = opened.enter_context(closing(MqttConsumer(server.place(topic, client_id=topic), PASSWORD)))
    received: set[str] = set()

    def take_all() -> None:
        while len(received) < count:
            for delivery in consumer.fetch(8, 0.3):
                received.add(delivery.message.id)
                delivery.ack()

    thread = threading.Thread(target=take_all, daemon=True)
    thread.start()
    assert until(lambda: len(received) == count), f"{len(received)} of {count} messages came"
    # One that holds all that it may, and reads nothing for that, ends at once too.
    closing_first = threading.Thread(target=first.close, daemon=True)
    closing_first.start()
    assert until(lambda: not closing_first.is_alive())


@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_consumers_of_one_session_do_not_fight_for_ever(
    version: str, server: MqttServer, opened: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mqtt_connection, "_MAX_QUICK_ENDS", 2)
    topic = unique_place()
    consumers = [
        opened.enter_context(closing(MqttConsumer(server.place(topic, version=version), PASSWORD))) for _ in range(2)
    ]
    reasons: list[str] = []

    def is_settled() -> bool:
        for consumer in consumers:
            try:
                consumer.fetch(1, 0.1)
            except BrokerRefused as e:
                reasons.append(f"{e} {e.hint}")
            except BrokerUnavailable:
                pass
        return bool(reasons)

    eventually(is_settled)
    assert "another client uses the same client id" in reasons[0]
    assert "give each trigger its own client_id" in reasons[0]


def test_a_retained_message_comes_once_in_a_session(server: MqttServer, opened: ExitStack) -> None:
    topic = unique_place()
    mosquitto_pub(server, "-t", topic, "-m", "state", "-r")
    consumer = opened.enter_context(closing(MqttConsumer(server.place(topic), PASSWORD)))
    [delivery] = fetched(consumer, 1)
    delivery.ack()
    consumer.close()
    following = consumer_of(opened, server, topic)
    assert following.fetch(1, 0.3) == []


def test_a_topic_that_the_broker_denies_is_refused(tmp_path: Path, opened: ExitStack) -> None:
    rights = tmp_path / "rights"
    rights.write_text(f"user {USER}\ntopic readwrite open/#\n")
    rights.chmod(0o600)
    server = MqttServer(tmp_path / "mqtt", f"acl_file {rights}")
    opened.callback(server.kill)
    with pytest.raises(BrokerRefused, match="Not authorized"):
        publisher_of(opened, server, "closed/topic").publish(Message(b"x", "m"))
    publisher_of(opened, server, "open/topic").publish(Message(b"x", "m"))


def test_headers_beyond_the_packet_are_refused(server: MqttServer, opened: ExitStack) -> None:
    publisher = publisher_of(opened, server, unique_place())
    publisher.publish(Message(b"x", "m", headers={"x-long": "v" * 60_000}))
    with pytest.raises(MessageTooLarge, match="bytes of headers"):
        publisher.publish(Message(b"x", "n", headers={"x-long": "v" * 70_000}))
    with pytest.raises(MessageTooLarge, match="bytes of headers"):
        publisher.publish(Message(bytes(publisher.max_bytes), "o", headers={"x-long": "v" * 2000}))


def test_a_publication_without_confirmation_is_not_sent_twice(
    tmp_path: Path, opened: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second call with the id waits for the message that the client sends again by itself."""
    monkeypatch.setattr(mqtt_connection, "_CONNECT_S", 1.0)
    monkeypatch.setattr(mqtt_connection, "_MAX_RECONNECT_S", 1)
    server = Mqtt3Server(tmp_path / "mqtt")
    opened.callback(server.kill)
    topic = unique_place()
    consumer, publisher = consumer_of(opened, server, topic), publisher_of(opened, server, topic)
    publisher.publish(Message(b"first", "m"))
    server.kill()
    with pytest.raises(BrokerUnavailable):
        publisher.publish(Message(b"second", "n"))
    server.restart()
    bodies: list[bytes] = []
    eventually(lambda: published_once(publisher, Message(b"second", "n")))
    publisher.publish(Message(b"last", "o"))
    while b"last" not in bodies:
        for delivery in fetched(consumer, 1):
            bodies.append(delivery.message.body)
            delivery.ack()
    assert bodies.count(b"second") == 1


def published_once(publisher: MqttPublisher, message: Message) -> bool:
    try:
        publisher.publish(message)
    except BrokerUnavailable:
        return False
    return True


@pytest.mark.parametrize("topic", ["a/#/b", "a/b#", "a+/b", "+a", "a/#b"])
def test_a_malformed_filter_stops_the_start(topic: str) -> None:
    with pytest.raises(ConfigurationMalformed, match="no topic filter"):
        MqttConsumer(MqttPlace(topic=topic))


@pytest.mark.parametrize("topic", ["a/+", "#"])
def test_a_publisher_with_a_wildcard_stops_the_start(topic: str) -> None:
    with pytest.raises(ConfigurationMalformed, match="has a wildcard"):
        MqttPublisher(MqttPlace(topic=topic))


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1", "mqtt://", "mqtt://user:password@host", "mqtt://h:x", "mqtt://h/path", "127.0.0.1"]
)
def test_a_malformed_url_stops_the_start(url: str) -> None:
    with pytest.raises(ConfigurationMalformed) as refused:
        MqttPublisher(MqttPlace(url=url, topic="t"))
    assert "password" not in str(refused.value)


def test_default_client_ids_differ_by_topic_and_fit_every_broker() -> None:
    ids: set[Any] = {mqtt_connection.stable_client_id(*parts) for parts in (("a",), ("b",), ("a", "g", "host"))}
    assert len(ids) == 3
    assert all(len(each) <= 23 for each in ids)


# paho leaves the socket of a failed handshake to the garbage collector.
@pytest.mark.filterwarnings("ignore:Exception ignored in.*SSLSocket:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:unclosed .*SSLSocket:ResourceWarning")
def test_mqtts_needs_a_certificate_that_is_trusted(
    tmp_path: Path, opened: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make_certificate(key, certificate)
    server = MqttServer(tmp_path / "mqtt", f"certfile {certificate}", f"keyfile {key}")
    opened.callback(server.kill)
    topic = unique_place()
    place = msgspec.structs.replace(server.place(topic), url=f"mqtts://127.0.0.1:{server.port}")
    with monkeypatch.context() as patch:
        patch.setattr(mqtt_connection, "_CONNECT_S", 1.0)
        untrusting = opened.enter_context(closing(MqttPublisher(place, PASSWORD)))
        with pytest.raises(BrokerUnavailable):
            untrusting.publish(Message(b"x", "m"))
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    opened.enter_context(closing(MqttPublisher(place, PASSWORD))).publish(Message(b"x", "m"))


def make_certificate(key: Path, certificate: Path) -> None:
    """A certificate of 127.0.0.1 that signs itself."""
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("openssl is not installed")
    options = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=127.0.0.1"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([openssl, *options.split(), *names], check=True, capture_output=True)
