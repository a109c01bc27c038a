"""Places of a configuration, opened by their kind, with a real server of each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from isthmus.errors import ConfigurationMalformed
from isthmus.events.configuration import Broker, RedisPlace
from isthmus.events.message import Message
from isthmus.events.open import open_consumer, open_publisher
from isthmus.settings import RegistrySettings
from support.brokers import PASSWORD, BrokerServer, fetched, unique_place
from support.mqtt_server import MqttServer
from support.redis_server import RedisServer
from support.sqs_server import SqsServer, credentials


@pytest.fixture
def settings(tmp_path: Path) -> RegistrySettings:
    for name in ("mqtt", "redis"):
        (tmp_path / name).write_text(PASSWORD + "\n")
    return RegistrySettings(secrets_dir=str(tmp_path))


@pytest.fixture(params=[MqttServer, RedisServer, SqsServer])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerServer]:
    server: BrokerServer = request.param(tmp_path_factory.mktemp("broker"))
    yield server
    server.kill()


def table(server: BrokerServer, name: str) -> Broker:
    """The table of a place, as a configuration names it."""
    if isinstance(server, RedisServer):
        return RedisPlace(url=server.place(name).url, stream=name, password_secret="redis")
    if isinstance(server, MqttServer):
        return server.place(name, password_secret="mqtt")
    assert isinstance(server, SqsServer)
    return server.place(name)


def test_a_message_passes_between_the_publisher_and_the_consumer_of_a_place(
    server: BrokerServer, settings: RegistrySettings
) -> None:
    name = unique_place()
    server.make(name)
    with (
        credentials(),
        closing(open_consumer(table(server, name), settings)) as consumer,
        closing(open_publisher(table(server, name), settings)) as publisher,
    ):
        consumer.fetch(1, 0)
        publisher.publish(Message(b"photo", "m1"))
        [delivery] = fetched(consumer, 1)
        assert (delivery.message.id, delivery.message.body) == ("m1", b"photo")
        delivery.ack()


def test_a_secret_that_is_not_there_is_named(settings: RegistrySettings) -> None:
    place = RedisPlace(url="redis://127.0.0.1:6379/0", stream="photos", password_secret="absent")
    with pytest.raises(ConfigurationMalformed, match="the secret absent"):
        open_consumer(place, settings)
