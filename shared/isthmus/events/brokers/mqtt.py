"""MQTT 3.1.1 and 5: a consumer with a persistent session, and a publisher that waits for the acknowledgement.

MQTT neither names nor counts messages. A message keeps the id that its headers (user properties) or its CloudEvent
give; any other gets an id at its arrival, so that two equal readings are two messages. A broker sends a message without
an acknowledgement again, with its packet identifier, once the connection is back: while this process lives, the message
is recognised and not delivered twice. After its death such a message has a new id.

MQTT has no negative acknowledgement: what waits for a retry waits here, unacknowledged, and stays with the broker.

Source: OASIS, MQTT 5.0, 4.4 "Message delivery retry", 3.1.2.11 (receive maximum, session expiry); CloudEvents 1.0, MQTT
binding.
"""

from __future__ import annotations

import heapq
import json
import secrets
import socket
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from isthmus.errors import BrokerRefused, BrokerUnavailable, ConfigurationMalformed, MessageTooLarge
from isthmus.events.broker import Backlog, check_size
from isthmus.events.brokers.mqtt_connection import (
    KEEPALIVE_S,
    RECEIVE_MAXIMUM,
    MqttConnection,
    check_filter,
    is_refusal,
    is_too_large,
    stable_client_id,
)
from isthmus.events.configuration import MqttPlace
from isthmus.events.message import CONTENT_TYPE, Message, idempotency_key, printable

MAX_HELD_BYTES = 512 * 2**20
"""Bodies of unacknowledged messages in memory; beyond it nothing is read from the broker for a while."""
# A client that reads nothing sends no pings either, and a broker ends such a connection after 1.5 intervals.
_MAX_STALL_S = KEEPALIVE_S / 2
_CONFIRM_S = 10.0
# Confirmations of lost connections arrive after the next connect; each waits with its body.
_MAX_UNCONFIRMED = 256
# A share for user properties, so that the limit of a body does not depend on them; more where the packet has room.
_HEADER_BYTES, _MAX_HEADER_BYTES = 1024, 65_535
_MAX_EVENT_BYTES = 2**20
_ID_HEADER = "idempotency-key"
_ATTRIBUTES = ("id", "source", "type", "specversion")
_SEND_RETAINED_IF_NEW = 1


class _HeldMessage:
    """A message without an acknowledgement; its packet identifier is valid in one session.

    `epoch` counts connections: an acknowledgement goes to the connection on which the message came.
    """

    def __init__(self, message: Message, packet_id: int, epoch: int) -> None:
        self.message, self.packet_id, self.epoch = message, packet_id, epoch
        self.attempts, self.is_ended = 0, False


class MqttDelivery:
    """One attempt at a message; attempts are counted in this process."""

    def __init__(self, consumer: MqttConsumer, held: _HeldMessage) -> None:
        held.attempts += 1
        self._consumer, self._held = consumer, held
        self.message, self.attempt = held.message, held.attempts

    def ack(self) -> None:
        """See `isthmus.events.broker.Delivery.ack`."""
        self._consumer.acknowledge(self._held)

    def retry(self, after_s: float) -> None:
        """See `isthmus.events.broker.Delivery.retry`; the message waits in this process."""
        self._consumer.pause(self._held, after_s)

    def extend(self) -> None:
        """No-op: a broker waits as long as the connection lives."""


class MqttConsumer:
    """Subscribes with QoS 1 in a session that outlives this process.

    `place.client_id` names the session. By default it is made of the topic, or of group and host name for a shared
    subscription. `password` is the text of `place.password_secret`.

    Raises:
        ConfigurationMalformed: the URL is none of MQTT, or the topic is no filter.
    """

    extend_every_s = float("inf")

    def __init__(self, place: MqttPlace, password: str = "") -> None:
        check_filter(place.topic)
        own = (place.group, socket.gethostname()) if place.group else ()
        self._client_id = place.client_id or stable_client_id(place.topic, *own)
        self._filter = f"$share/{place.group}/{place.topic}" if place.group else place.topic
        # Ids made here must differ from those of an earlier process.
        self._run, self._number = secrets.token_hex(6), 0
        self._epoch = 0
        self._held: dict[int, _HeldMessage] = {}
        """Unacknowledged messages of the session by packet identifier."""
        self._waiting: deque[_HeldMessage] = deque()
        self._paused: list[tuple[float, int, _HeldMessage]] = []
        self._bytes = 0
        self._is_closing = False
        self._connection = MqttConnection(place, password, self, self._client_id)
        client = self._connection.client
        client.on_message, client.on_subscribe = self._on_message, self._on_subscribe
        self._connection.start()

    @property
    def url(self) -> str:
        return self._connection.url

    def fetch(self, count: int, wait_s: float) -> Sequence[MqttDelivery]:
        """See `isthmus.events.broker.Consumer.fetch`."""
        until = time.monotonic() + wait_s
        with self._connection.changed:
            # A session's messages may come before the response to the subscription, more than are read without a fetch.
            self._connection.wait_settled(lambda: bool(self._waiting))
            while True:
                self._resume()
                if self._waiting:
                    taken = [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]
                    self._connection.changed.notify_all()
                    return [MqttDelivery(self, held) for held in taken]
                now = time.monotonic()
                if now >= until:
                    self._connection.check()
                    return []
                next_at = min(until, self._paused[0][0]) if self._paused else until
                self._connection.wait_until(lambda: bool(self._waiting), next_at)

    def backlog(self) -> Backlog:
        """Unknown: brokers do not say how many messages wait."""
        with self._connection.changed:
            self._connection.wait_ready()
        return Backlog()

    def close(self) -> None:
        """Disconnect; unacknowledged messages stay with the broker."""
        with self._connection.changed:
            self._is_closing = True  # ends a stall of the thread that `stop` waits for
            self._connection.changed.notify_all()
        self._connection.stop()

    def acknowledge(self, held: _HeldMessage) -> None:
        """Acknowledge by packet identifier; after a lost connection, once the broker has sent the message again."""
        with self._connection.changed:
            if held.is_ended:
                return
            held.is_ended = True
            self._bytes -= len(held.message.body)
            self._connection.changed.notify_all()
            if held.epoch == self._epoch and self._connection.client.is_connected():
                self._send_ack(held)

    def pause(self, held: _HeldMessage, after_s: float) -> None:
        """Deliver a message again after the pause."""
        with self._connection.changed:
            self._number += 1
            heapq.heappush(self._paused, (time.monotonic() + after_s, self._number, held))
            self._connection.changed.notify_all()

    def connected(self, client: Client, session_present: bool) -> bool:
        """Subscribe, unless the broker has the subscription of this session."""
        with self._connection.changed:
            is_first = self._epoch == 0
            self._epoch += 1
            if not session_present:
                # Packet identifiers of a new session name other messages.
                self._held.clear()
        # A subscription belongs to its session, but mosquitto 2.0 forgets shared ones when it restarts, and the topic
        # of an earlier process may have been another. MQTT 3.1.1 repeats retained messages for each subscription.
        if session_present and not is_first and not (self._connection.is_v5 or self._filter.startswith("$share/")):
            return True
        if self._connection.is_v5:
            options = SubscribeOptions(qos=1, retainHandling=_SEND_RETAINED_IF_NEW)
            client.subscribe(self._filter, options=options)
        else:
            client.subscribe(self._filter, qos=1)
        return False

    def _on_subscribe(self, _: Client, __: Any, ___: int, reasons: list[ReasonCode], ____: Properties | None) -> None:
        if any(reason.is_failure for reason in reasons):
            self._connection.refused(f"the subscription was refused: {reasons[0]}")
        else:
            self._connection.ready()

    def _on_message(self, _: Client, __: Any, raw: MQTTMessage) -> None:
        with self._connection.changed:
            self._number += 1
            message = message_of(raw, f"{self._client_id}-{self._run}-{self._number}")
            packet_id = raw.mid if raw.qos else 0
            # Without the flag it is another message under the identifier, as after a loss of the broker's data.
            if raw.dup and self._is_repetition(packet_id, message):
                return
            self._stall(len(message.body))
            held = _HeldMessage(message, packet_id, self._epoch)
            if packet_id:
                self._held[packet_id] = held
            self._bytes += len(message.body)
            self._waiting.append(held)
            self._connection.changed.notify_all()

    def _is_repetition(self, packet_id: int, message: Message) -> bool:
        """Whether the message is here already, sent again after a new connection."""
        held = self._held.get(packet_id)
        if held is None or held.epoch == self._epoch:
            return False
        if (held.message.source, held.message.body) != (message.source, message.body):
            return False
        held.epoch = self._epoch
        if held.is_ended:
            self._send_ack(held)
        return True

    def _stall(self, size: int) -> None:
        """Read nothing while too much is in memory, so that the broker waits, if not for long."""
        end = time.monotonic() + _MAX_STALL_S
        while not self._is_closing and self._is_full(size) and (left_s := end - time.monotonic()) > 0:
            self._connection.changed.wait(left_s)

    def _is_full(self, size: int) -> bool:
        return (self._bytes > 0 and self._bytes + size > MAX_HELD_BYTES) or len(self._waiting) >= RECEIVE_MAXIMUM

    def _resume(self) -> None:
        """Make paused messages whose time has come wait for `fetch`."""
        while self._paused and self._paused[0][0] <= time.monotonic():
            held = heapq.heappop(self._paused)[2]
            if not held.is_ended:
                self._waiting.append(held)

    def _send_ack(self, held: _HeldMessage) -> None:
        if held.packet_id:
            self._held.pop(held.packet_id, None)
            self._connection.client.ack(held.packet_id, 1)


class _Confirmation:
    """The broker's acknowledgement of a published message."""

    def __init__(self) -> None:
        self.reason: ReasonCode | None = None


class MqttPublisher:
    """Publishes with QoS 1. Brokers do not deduplicate; consumers know a repetition by the id among the headers.

    MQTT 3.1.1 has no headers: only bodies travel. `password` is the text of `place.password_secret`.

    Raises:
        ConfigurationMalformed: the URL is none of MQTT, or the topic has a wildcard.
    """

    def __init__(self, place: MqttPlace, password: str = "") -> None:
        if "+" in place.topic or "#" in place.topic:
            raise ConfigurationMalformed(
                f"{place.topic} has a wildcard, and messages are published to one topic", where="topic"
            )
        self._topic, self._max_body_bytes = place.topic, place.max_bytes
        self._unconfirmed: dict[str, _Confirmation] = {}
        self._by_packet: dict[int, _Confirmation] = {}
        self._early: dict[int, ReasonCode] = {}
        self._connection = MqttConnection(place, password, self)
        self._connection.client.on_publish = self._on_publish
        self._connection.start()

    @property
    def url(self) -> str:
        return self._connection.url

    @property
    def max_bytes(self) -> int:
        """The configured limit, or what fits into the broker's largest packet beside topic and headers."""
        packet = self._connection.max_packet_bytes
        overhead = min(packet // 2, _HEADER_BYTES + len(self._topic.encode()))
        return min(self._max_body_bytes, packet - overhead)

    def check(self) -> None:
        """See `isthmus.events.broker.Reachable.check`."""
        with self._connection.changed:
            self._connection.wait_ready()

    def publish(self, message: Message) -> None:
        """See `isthmus.events.broker.Publisher.publish`.

        A message whose confirmation is overdue is sent again by the client itself after the next connect: a second call
        with the same id waits for that confirmation, and sends nothing.
        """
        with self._connection.changed:
            self._connection.wait_ready()
            check_size(message, self.max_bytes)
            properties = self._properties(message)
            confirmation = self._unconfirmed.get(message.id)
            is_new = confirmation is None
            if confirmation is None:
                if len(self._unconfirmed) >= _MAX_UNCONFIRMED:
                    # Confirmations that came after their caller had left are of no use any more.
                    self._unconfirmed = {i: c for i, c in self._unconfirmed.items() if c.reason is None}
                if len(self._unconfirmed) >= _MAX_UNCONFIRMED:
                    raise self._unavailable(f"{_MAX_UNCONFIRMED} messages wait for the broker's confirmation")
                confirmation = self._unconfirmed[message.id] = _Confirmation()
        # Without the lock: paho calls `_on_publish` with a lock of its own that `publish` takes as well.
        if is_new:
            self._send(message, properties, confirmation)
        with self._connection.changed:
            is_confirmed = self._connection.wait_until(
                lambda: confirmation.reason is not None, time.monotonic() + _CONFIRM_S
            )
            if not is_confirmed:
                raise self._unavailable("the broker did not confirm")
            if self._unconfirmed.get(message.id) is confirmation:
                del self._unconfirmed[message.id]
        self._check(confirmation.reason, message)

    def close(self) -> None:
        """Disconnect."""
        self._connection.stop()

    def connected(self, client: Client, session_present: bool) -> bool:
        """A publisher needs no subscription."""
        return True

    def _send(self, message: Message, properties: Properties | None, confirmation: _Confirmation) -> None:
        try:
            packet_id = self._connection.client.publish(self._topic, message.body, 1, properties=properties).mid
        except ValueError as e:  # longer than the protocol takes, or a topic that is none
            with self._connection.changed:
                del self._unconfirmed[message.id]
            raise BrokerRefused(f"{self.url}: {e}", broker=self.url) from e
        with self._connection.changed:
            if packet_id in self._early:
                confirmation.reason = self._early.pop(packet_id)
            else:
                self._by_packet[packet_id] = confirmation

    def _on_publish(self, _: Client, __: Any, packet_id: int, reason: ReasonCode, ___: Properties) -> None:
        with self._connection.changed:
            confirmation = self._by_packet.pop(packet_id, None)
            if confirmation is None:
                self._early[packet_id] = reason
            else:
                confirmation.reason = reason
            self._connection.changed.notify_all()

    def _check(self, reason: ReasonCode | None, message: Message) -> None:
        if reason is None or not reason.is_failure:
            return
        if is_too_large(reason):
            raise MessageTooLarge(
                f"{self.url} refuses {len(message.body)} bytes", bytes=len(message.body), limit=self.max_bytes
            )
        if is_refusal(reason):
            raise BrokerRefused(f"{self.url}: {reason}", broker=self.url)
        raise self._unavailable(str(reason))

    def _properties(self, message: Message) -> Properties | None:
        if not self._connection.is_v5:
            return None
        headers = {printable(name): printable(value) for name, value in message.headers.items()}
        headers[_ID_HEADER] = message.id
        size = sum(len(name.encode()) + len(value.encode()) + 5 for name, value in headers.items())
        limit = self._connection.max_packet_bytes - len(message.body) - len(self._topic.encode()) - 16
        if size > min(limit, _MAX_HEADER_BYTES):
            raise MessageTooLarge(
                f"{size} bytes of headers exceed the limit of {min(limit, _MAX_HEADER_BYTES)} beside the body",
                bytes=size,
                limit=min(limit, _MAX_HEADER_BYTES),
            )
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        if content_type := headers.pop(CONTENT_TYPE, ""):
            properties.ContentType = content_type
        is_event = all(f"ce-{name}" in headers for name in _ATTRIBUTES)
        properties.UserProperty = [
            (name.removeprefix("ce-") if is_event else name, value) for name, value in headers.items()
        ]
        return properties

    def _unavailable(self, reason: str) -> BrokerUnavailable:
        return BrokerUnavailable(f"{self.url}: {reason}", broker=self.url)


def message_of(raw: MQTTMessage, fallback_id: str) -> Message:
    """The message of a packet; user properties are headers, attributes of a CloudEvent with the prefix `ce-`."""
    try:
        topic = raw.topic
    except UnicodeDecodeError:
        topic = ""
    headers = {name.lower(): value for name, value in getattr(raw.properties, "UserProperty", ())}
    if all(name in headers for name in _ATTRIBUTES):
        headers = {name if name == _ID_HEADER else f"ce-{name}": value for name, value in headers.items()}
    if content_type := getattr(raw.properties, "ContentType", ""):
        headers[CONTENT_TYPE] = content_type
    body = bytes(raw.payload)
    message_id = idempotency_key({**headers, **_structured_identity(body)}, fallback_id)
    return Message(body, message_id, topic, headers)


def _structured_identity(body: bytes) -> Mapping[str, str]:
    """Source and id of a CloudEvent in JSON; MQTT 3.1.1 has no other place for them."""
    if body[:1] == b"{" and len(body) <= _MAX_EVENT_BYTES and b'"specversion"' in body:
        with suppress(ValueError, RecursionError):
            event = json.loads(body)
            if isinstance(event.get("source"), str) and isinstance(event.get("id"), str):
                return {"ce-source": event["source"], "ce-id": event["id"]}
    return {}
