"""Capture of labelled readings from a real broker: nats-server, which speaks MQTT 3.1.1."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from isthmus.errors import BrokerUnavailable, LearningError
from isthmus.events.brokers.mqtt import MqttPublisher
from isthmus.events.configuration import MqttPlace, Seconds
from isthmus.events.message import Message
from isthmus.settings import RegistrySettings
from isthmus_tools.learning.training.capture import Capture, capture
from isthmus_tools.learning.training.config import MqttSource
from support.brokers import fetched
from support.nats_server import NatsServer
from support.ports import free_port

SETTINGS = RegistrySettings()


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a broker."""
    port = free_port()
    server = NatsServer(
        tmp_path_factory.mktemp("mqtt"), "server_name: watches", f'mqtt {{ listen: "127.0.0.1:{port}" }}'
    )
    yield f"mqtt://127.0.0.1:{port}"
    server.kill()


def publish(broker: str, topic: str, payload: object, name: str = "m") -> None:
    with closing(MqttPublisher(MqttPlace(url=broker, topic=topic, version="3.1.1"))) as publisher:
        publisher.publish(Message(json.dumps(payload).encode(), name))


def request(values: np.ndarray) -> dict[str, object]:
    """Readings as a request of the Open Inference Protocol."""
    data = values.ravel().tolist()
    return {"inputs": [{"name": "readings", "datatype": "FP32", "shape": [1, *values.shape], "data": data}]}


def test_readings_are_labelled_by_their_topic_and_a_killed_capture_goes_on(broker: str, tmp_path: Path) -> None:
    source = MqttSource(
        url=broker, topic="study/{group}/{label}/readings", version="3.1.1", count=3, time=Seconds(30), part="train"
    )
    first = Capture(source, tmp_path, SETTINGS)
    # The session begins with the subscription.
    with closing(first.consumer()) as consumer:
        consumer.fetch(1, 0.0)
        values = np.arange(6, dtype=np.float32).reshape(2, 3)
        publish(broker, "study/ann/walk/readings", request(values))
        (delivery,) = fetched(consumer, 1)
        first.take([delivery])
        first.take([delivery])
    # A kill in the middle of a line.
    with first.path.open("ab") as file:
        file.write(b'{"id": "half')
    publish(broker, "study/bob/run/readings", [[1, 2], [3, None]], "n")
    publish(broker, "study/bob/run", [[9, 9]], "elsewhere")
    publish(broker, "study/cat/run/readings", [[5, 6], [7, 8]], "o")
    second = Capture(source, tmp_path, SETTINGS)
    assert second.count == 1
    capture([second])
    assert (second.count, second.done, Capture(source, tmp_path, SETTINGS).done) == (3, True, True)
    samples = list(second.samples())
    assert [(s.label, s.group, s.part) for s in samples] == [
        ("walk", "ann", "train"),
        ("run", "bob", "train"),
        ("run", "cat", "train"),
    ]
    np.testing.assert_array_equal(samples[0].values, values)
    np.testing.assert_array_equal(samples[1].values, [[1, 2], [3, np.nan]])


def test_a_capture_without_messages_says_where_it_listened(broker: str, tmp_path: Path) -> None:
    source = MqttSource(url=broker, topic="silent/{label}", version="3.1.1", time=Seconds(0.2))
    with pytest.raises(LearningError, match=r"no message came from .* on silent/\{label\} within 0.2 s"):
        capture([Capture(source, tmp_path, SETTINGS)])


def test_a_broker_that_is_away_is_waited_for_within_the_time_alone(tmp_path: Path) -> None:
    source = MqttSource(url=f"mqtt://127.0.0.1:{free_port()}", topic="a/{label}", version="3.1.1", time=Seconds(0.2))
    with pytest.raises(BrokerUnavailable):
        capture([Capture(source, tmp_path, SETTINGS)])


@pytest.mark.parametrize(
    "payload",
    ["20.5 degrees", "{}", '{"inputs": []}', "[[1, 2], [3]]", '{"inputs": [{"shape": [1, 4], "data": [1, 2]}]}'],
    ids=["text", "no request", "no input", "ragged", "another shape"],
)
def test_a_payload_without_readings_is_named(payload: str, tmp_path: Path) -> None:
    source = MqttSource(topic="a/{label}")
    empty = Capture(source, tmp_path, SETTINGS)
    empty.path.write_text(json.dumps({"id": "1", "topic": "a/walk", "payload": payload}) + "\n")
    with pytest.raises(LearningError, match="message 1 of a/walk holds no readings"):
        list(Capture(source, tmp_path, SETTINGS).samples())
