"""A connection to an MQTT broker for threads: paho's client, its network thread, and what waiting threads need to know.

paho connects again by itself. A session that another client takes over is not fought for: the two would disconnect
each other for ever.
"""

from __future__ import annotations

import hashlib
import re
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol
from urllib.parse import urlsplit

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTv5, MQTTv311
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from isthmus.errors import BrokerRefused, BrokerUnavailable, ConfigurationMalformed
from isthmus.events.configuration import MqttPlace, where_of

KEEPALIVE_S = 30
SESSION_EXPIRY_S = 7 * 86_400
"""How long a broker keeps the session of a consumer that is away, where it speaks MQTT 5."""
RECEIVE_MAXIMUM = 128
"""Messages that are unacknowledged at a time: in work, waiting, or paused for a retry."""
MAX_PACKET_BYTES = 268_435_455
"""Limit of the protocol: four bytes of seven bits for a packet's length."""
_CONNECT_S, _MAX_INFLIGHT = 5.0, 20
_MIN_RECONNECT_S, _MAX_RECONNECT_S = 1, 8
# Reason codes of MQTT 5, to which paho converts those of 3.1.1.
_PACKET_TOO_LARGE, _TAKEN_OVER = 0x95, 0x8E
_REFUSALS = frozenset((0x84, 0x85, 0x86, 0x87, 0x8A, 0x8C, 0x8F, 0x90, 0x99, 0x9C, 0x9D, 0x9E, 0xA2))
# MQTT 3.1.1 has no reason for a takeover, and mosquitto 2.0 tells none: clients of one id end each other's connections.
_QUICK_S, _MAX_QUICK_ENDS = 3.0, 10
_FLUSH_S = 2.0
_DEFAULT_PORTS = {"mqtt": 1883, "mqtts": 8883}


class MqttListener(Protocol):
    """Whom a connection serves; called in the network thread, and must not raise."""

    def connected(self, client: Client, session_present: bool) -> bool:
        """The broker accepted the connection; whether it can be used at once, without a subscription."""
        ...


class MqttConnection:
    """A client that connects, and connects again whenever the connection ends.

    Without `client_id` the broker forgets the session with the connection. `password` is the secret's text.

    Raises:
        ConfigurationMalformed: the URL is none of MQTT.
    """

    def __init__(self, place: MqttPlace, password: str, listener: MqttListener, client_id: str = "") -> None:
        self.url, self.is_v5 = where_of(place), place.version == "5"
        self.changed = threading.Condition()
        """Notified on every change; guards the state of connection and listener."""
        self.max_packet_bytes = MAX_PACKET_BYTES
        self._listener: MqttListener | None = listener
        self._is_ready = self._is_settled = False
        self._reason, self._hint, self._is_refused = "the broker does not answer", "", False
        self._quick_ends, self._connected_at = 0, 0.0
        self.client = self._make_client(place, password, client_id)

    def start(self) -> None:
        """Connect in a thread of its own."""
        self.client.loop_start()

    def stop(self) -> None:
        """Disconnect; the session stays with the broker until it expires."""
        if self.client.is_connected():
            self._flush()
        self.client.disconnect()
        self.client.loop_stop()
        if (open_socket := self.client.socket()) is not None:
            open_socket.close()
        # Without cycles of references the client closes its own pair of sockets as soon as it is not used any more.
        self._listener = None
        self.client.on_connect = self.client.on_connect_fail = self.client.on_disconnect = None
        self.client.on_message = self.client.on_subscribe = self.client.on_publish = None
        self._lost("the connection is closed")

    def _flush(self) -> None:
        """Wait until the broker has processed what was sent.

        Else acknowledgements are lost where the next client of this id connects at once. A broker processes packets of
        a connection in order, so that a response to any request comes last.
        """
        responded = threading.Event()
        self.client.on_unsubscribe = lambda *_: responded.set()
        self.client.unsubscribe("isthmus/no-such-subscription")
        responded.wait(_FLUSH_S)
        self.client.on_unsubscribe = None

    def check(self) -> None:
        """Raise the reason for which there is no connection; call with `changed` held.

        Raises:
            BrokerRefused: credentials, a subscription, or a session that another client has.
            BrokerUnavailable: any other reason.
        """
        if not self._is_ready:
            # A new error each time: one that is raised again would gather tracebacks.
            kind = BrokerRefused if self._is_refused else BrokerUnavailable
            raise kind(f"{self.url}: {self._reason}", broker=self.url, hint=self._hint)

    def wait_until(self, condition: Callable[[], bool], until: float) -> bool:
        """Whether `condition` holds before the monotonic time `until`; call with `changed` held.

        Raises:
            BrokerRefused: the broker refused meanwhile.
        """
        while not condition():
            if self._is_refused:
                self.check()
            left_s = until - time.monotonic()
            if left_s <= 0:
                return False
            self.changed.wait(left_s)
        return True

    def wait_settled(self, or_until: Callable[[], bool]) -> None:
        """Wait until the first connect has succeeded or failed, or for `or_until`; call with `changed` held.

        Raises:
            BrokerRefused: as `wait_until`.
        """
        self.wait_until(lambda: self._is_settled or or_until(), time.monotonic() + _CONNECT_S)

    def wait_ready(self) -> None:
        """Wait for a connection; call with `changed` held.

        Raises:
            BrokerRefused, BrokerUnavailable: as `check`.
        """
        if not self.wait_until(lambda: self._is_ready, time.monotonic() + _CONNECT_S):
            self.check()

    def ready(self) -> None:
        """Note that the connection can be used."""
        self._become(is_ready=True)

    def refused(self, reason: str, hint: str = "") -> None:
        """Note a refusal; later operations raise it until a connection succeeds."""
        self._become(is_refused=True, reason=reason, hint=hint)

    def _make_client(self, place: MqttPlace, password: str, client_id: str) -> Client:
        host, port, tls = _address(place)
        client = Client(
            CallbackAPIVersion.VERSION2,
            client_id,
            clean_session=None if self.is_v5 else not client_id,
            protocol=MQTTv5 if self.is_v5 else MQTTv311,
            manual_ack=True,
        )
        client.connect_timeout = _CONNECT_S
        # paho heeds no receive maximum of a broker; this is the smallest that common brokers state.
        client.max_inflight_messages_set(_MAX_INFLIGHT)
        client.reconnect_delay_set(_MIN_RECONNECT_S, _MAX_RECONNECT_S)
        if place.user:
            client.username_pw_set(place.user, password or None)
        if tls:
            client.tls_set_context(ssl.create_default_context())
        client.on_connect, client.on_connect_fail = self._on_connect, self._on_connect_fail
        client.on_disconnect = self._on_disconnect
        if self.is_v5:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.ReceiveMaximum = RECEIVE_MAXIMUM
            if client_id:
                properties.SessionExpiryInterval = SESSION_EXPIRY_S
            client.connect_async(host, port, KEEPALIVE_S, clean_start=not client_id, properties=properties)
        else:
            client.connect_async(host, port, KEEPALIVE_S)
        return client

    def _on_connect(
        self, client: Client, _: Any, flags: ConnectFlags, reason: ReasonCode, properties: Properties | None
    ) -> None:
        if reason.is_failure:
            if reason.value in _REFUSALS:
                self.refused(f"the broker refuses the connection: {reason}")
            else:
                self._lost(f"the broker refuses the connection: {reason}")
            return
        with self.changed:
            self._connected_at = time.monotonic()
            self.max_packet_bytes = min(MAX_PACKET_BYTES, getattr(properties, "MaximumPacketSize", MAX_PACKET_BYTES))
        if self._listener is not None and self._listener.connected(client, flags.session_present):
            self.ready()

    def _on_connect_fail(self, _: Client, __: Any) -> None:
        self._quick_ends = 0
        self._lost("the broker cannot be reached")

    def _on_disconnect(
        self, client: Client, _: Any, flags: DisconnectFlags, reason: ReasonCode, __: Properties | None
    ) -> None:
        is_quick = self._is_ready and time.monotonic() - self._connected_at < _QUICK_S
        self._quick_ends = self._quick_ends + 1 if is_quick else 0
        is_taken_over = flags.is_disconnect_packet_from_server and reason.value == _TAKEN_OVER
        if is_taken_over or self._quick_ends >= _MAX_QUICK_ENDS:
            client.disconnect()  # paho does not connect again
            self.refused(
                "another client uses the same client id",
                "give each trigger its own client_id; triggers of one `group` share the messages",
            )
        elif not self._is_refused:  # a refused connection ends as well
            self._lost(f"the connection ended: {reason}")

    def _lost(self, reason: str) -> None:
        self._become(reason=reason)

    def _become(self, *, is_ready: bool = False, is_refused: bool = False, reason: str = "", hint: str = "") -> None:
        with self.changed:
            self._is_settled = True
            self._is_ready, self._is_refused, self._reason, self._hint = is_ready, is_refused, reason, hint
            self.changed.notify_all()


def is_too_large(reason: ReasonCode) -> bool:
    """Whether a broker refused a message for its size."""
    return bool(reason.value == _PACKET_TOO_LARGE)


def is_refusal(reason: ReasonCode) -> bool:
    """Whether a second try fails as well."""
    return reason.value in _REFUSALS


def stable_client_id(*parts: str) -> str:
    """A client id made of `parts`: every broker takes 23 characters (MQTT 3.1.1, 3.1.3.1)."""
    return f"isthmus-{hashlib.sha256('/'.join(parts).encode()).hexdigest()[:14]}"


def check_filter(topic: str) -> None:
    """Refuse a topic filter with a wildcard inside a level, or with levels after `#`.

    Raises:
        ConfigurationMalformed: as said.
    """
    *levels, last = topic.split("/")
    if any(re.search(r"[+#].|.[+#]", level) for level in (*levels, last)) or "#" in levels:
        raise ConfigurationMalformed(f"{topic} is no topic filter of MQTT, such as sensors/+/readings", where="topic")


def _address(place: MqttPlace) -> tuple[str, int, bool]:
    try:
        parts = urlsplit(place.url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or parts.scheme not in _DEFAULT_PORTS or parts.username or parts.path.strip("/"):
        raise ConfigurationMalformed(
            f"{where_of(place)}: the URL is mqtt://HOST:PORT or mqtts://HOST:PORT", where="url"
        )
    return host, port or _DEFAULT_PORTS[parts.scheme], parts.scheme == "mqtts"
