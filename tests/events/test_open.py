"""Places of a configuration, opened by their kind, with a real server of each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from isthmus.errors import ConfigurationMalformed
from isthmus.events.configuration import Broker, RedisPlace, parse_configuration
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


NATS = 'kind = "nats"\nsubject = "photos"\n'
WRONG = {
    "source.url": [
        NATS + 'url = "http://127.0.0.1:4222"',
        NATS + 'url = "nats://127.0.0.1:port"',
        NATS + 'url = "nats://a:4222,b"',
        'kind = "mqtt"\ntopic = "a"\nurl = "127.0.0.1:1883"',
        'kind = "redis"\nstream = "a"\nurl = "127.0.0.1"',
        'kind = "redis"\nstream = "a"\nurl = "rediss://a?ssl_cert_reqs=none"',
        'kind = "redis"\nstream = "a"\nurl = "rediss://a?db=1&ssl_check_hostname=false"',
    ],
    "source.subject": [f'kind = "nats"\nsubject = "{s}"' for s in ("a..b", "two words", "a.b*", "a.>.b", "a>", ".")],
    "source.durable": [NATS + 'durable = "a.b"', NATS + 'durable = "a b"'],
    "source.stream": [NATS + 'stream = "a.*"'],
    "source.ack_wait": [NATS + 'ack_wait = "10ms"'],
    "source.user": ['kind = "mqtt"\ntopic = "a"\npassword_secret = "b"'],
    "source.claim_after": ['kind = "redis"\nstream = "a"\nclaim_after = "0s"'],
    "source.queue_url": ['kind = "sqs"\nqueue_url = "photos"', 'kind = "sqs"\nqueue_url = "https://sqs/photos"'],
    "source.endpoint": ['kind = "sqs"\nqueue_url = "https://sqs/1/photos"\nendpoint = "x"'],
    "dead_letters.url": [NATS + '[dead_letters]\nkind = "nats"\nsubject = "b"\nurl = "redis://a"'],
    "results[1].url": [
        NATS + '[[results]]\nkind = "objects"\nurl = "out"\n[[results]]\nkind = "mqtt"\ntopic = "b"\nurl = "a"'
    ],
    "records.keep": [NATS + '[records]\nkeep = "10ms"'],
    "router.url": [NATS + '[router]\nurl = "127.0.0.1:8080"'],
}


@pytest.mark.parametrize(("key", "text"), [(key, text) for key, texts in WRONG.items() for text in texts])
def test_a_wrong_configuration_names_its_key_and_where_to_read_on(key: str, text: str) -> None:
    with pytest.raises(ConfigurationMalformed, match=re.escape(f"trigger.toml: {key} ")) as caught:
        parse_configuration(f"[source]\n{text}\n", {})
    assert caught.value.facts["where"] == key
    assert "docs/reference/trigger.md" in caught.value.hint


def test_every_kind_of_place_passes_its_rules() -> None:
    places = [
        NATS + 'url = "nats://user:key@a:4222,tls://b"\nstream = "photos-1"\n',
        'kind = "nats"\nsubject = "photos.*.>"\n',
        'kind = "mqtt"\ntopic = "a/#"\nurl = "mqtts://a"\nuser = "u"\npassword_secret = "b"\n',
        'kind = "redis"\nstream = "a"\nurl = "unix:///run/redis.sock"\n',
        'kind = "redis"\nstream = "a"\nurl = "rediss://user:key@[::1]:6379/2"\n',
        'kind = "sqs"\nqueue_url = "https://sqs.eu-central-1.amazonaws.com/123456789012/photos.fifo"\n',
    ]
    for place in places:
        assert parse_configuration(f"[source]\n{place}", {}).source
