"""Calls into the queue of a trigger's own source: first a record, then the message.

The record comes first, so that whoever has the id of a call can ask for it. A caller that repeats an id gets the call
of that id; one that is still queued is sent again, as the process may have ended between record and message.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Mapping

from msgspec.structs import replace as replace_fields

from isthmus.errors import BrokerRefused, EventMalformed, MessageTooLarge, Overloaded
from isthmus.events.broker import Backlog, Publisher
from isthmus.events.call import Call, CallLease
from isthmus.events.calls import Calls
from isthmus.events.claims import ClaimStore
from isthmus.events.configuration import Broker, MqttPlace, NatsPlace, TriggerConfiguration
from isthmus.events.loops import topic_filter
from isthmus.events.message import Message, idempotency_key
from isthmus.events.publishing import PATH
from isthmus.events.route import forwarded

WILDCARD_LEVEL = "http"
"""The level of a subject or topic in place of a wildcard, which can be read and not written."""
# As often as a trigger looks at its backlog: before, a further call would be refused as well.
_RETRY_AFTER_S = 2
_LEASE_S = 5.0


class CallIntake:
    """Queues calls, at most `max_backlog` where the broker says how many wait. Any thread may call.

    `name` is the trigger's: its own results are no calls.
    `backlog` gives the latest observation; calls since then are counted here.
    """

    def __init__(
        self,
        configuration: TriggerConfiguration,
        calls: Calls,
        publisher: Publisher,
        claims: ClaimStore | None,
        *,
        name: str,
        backlog: Callable[[], Backlog],
        max_backlog: int,
    ) -> None:
        self._source, self._order_by = place_of_calls(configuration.source), configuration.order_by
        self._calls, self._publisher, self._claims = calls, publisher, claims
        self._name, self._backlog, self._max_backlog = name, backlog, max_backlog
        self._lock = threading.Lock()
        self._observed, self._queued_since = Backlog(), 0

    def queue(self, body: bytes, headers: Mapping[str, str], fallback_id: str) -> Call:
        """Queue a request; the call of its id where there is one. `headers` have lower-case names.

        The id is that of a message with these headers, else `fallback_id`.

        Raises:
            EventMalformed: a result of this trigger.
            MessageTooLarge: neither the broker nor the store for large bodies takes it.
            Overloaded: the queue is at its bound.
            BrokerUnavailable, BrokerRefused, ResultStoreUnavailable: not confirmed; repeat it with the same id.
        """
        if self._name in headers.get(PATH, "").split(","):
            raise EventMalformed(f"a loop: the event is a result of the trigger {self._name}", attribute=PATH)
        message = self._message(body, headers, fallback_id)
        self._check_size(len(body))
        self._check_backlog()
        call = self._calls.queue(message.id, message.source)
        if call.state == "queued":
            try:
                self._publisher.publish(self._sendable(message))
            except MessageTooLarge as e:
                # The headers took the place: no repetition helps, and the record says so.
                self._fail(call, e)
                raise
        return call

    def close(self) -> None:
        """Disconnect."""
        self._publisher.close()

    def _message(self, body: bytes, headers: Mapping[str, str], fallback_id: str) -> Message:
        """A message for the source; headers that mean nothing to the router and to the trigger are left out."""
        order_by = self._order_by.removeprefix("header:").lower() if self._order_by.startswith("header:") else ""
        kept = {name: headers[name] for name in ("traceparent", PATH, order_by) if headers.get(name)}
        message_id = idempotency_key(headers, fallback_id)
        # Whatever the broker calls the message: its consumer reads this id.
        own = {"idempotency-key": message_id}
        return Message(body, message_id, _address(self._source), {**dict(forwarded(headers)), **kept, **own})

    def _check_size(self, size: int) -> None:
        limit = max(self._publisher.max_bytes, 0 if self._claims is None else self._claims.max_bytes)
        if size > limit:
            raise MessageTooLarge(
                f"a body of {size} bytes exceeds the {limit} that this trigger takes",
                bytes=size,
                limit=limit,
                hint="" if self._claims else "a [claims] table in the trigger's configuration takes larger bodies",
            )

    def _check_backlog(self) -> None:
        backlog = self._backlog()
        with self._lock:
            if backlog is not self._observed:
                self._observed, self._queued_since = backlog, 0
            if backlog.messages is not None and backlog.messages + self._queued_since >= self._max_backlog:
                raise Overloaded(
                    f"{backlog.messages + self._queued_since} messages wait; at most {self._max_backlog} are queued",
                    limit=self._max_backlog,
                    retry_after_s=_RETRY_AFTER_S,
                )
            self._queued_since += 1

    def _sendable(self, message: Message) -> Message:
        if self._claims is None or len(message.body) <= self._publisher.max_bytes:
            return message
        return self._claims.shortened(message)

    def _fail(self, call: Call, error: MessageTooLarge) -> None:
        lease = self._calls.begin(call.id, secrets.token_hex(8), _LEASE_S)
        if isinstance(lease, CallLease):
            self._calls.fail(lease, 413, error.message)


def place_of_calls(source: Broker) -> Broker:
    """The place of calls for `source`: see `writable`.

    Raises:
        BrokerRefused: messages of this place carry no id.
    """
    if isinstance(source, MqttPlace) and source.version == "3.1.1":
        raise BrokerRefused(
            "MQTT 3.1.1 has no headers, and so no ids of calls",
            hint='set version = "5" in the [source] of the trigger\'s configuration',
        )
    return writable(source, WILDCARD_LEVEL)


def writable(source: Broker, level: str) -> Broker:
    """The place for messages that `source` reads; `level` fills the wildcards of its subject or topic."""
    match source:
        case NatsPlace():
            return replace_fields(source, subject=_filled(source.subject, ".", ("*", ">"), level))
        case MqttPlace():
            topic = _filled(topic_filter(source.topic), "/", ("+", "#"), level)
            # A second session of one client id would end the first.
            return replace_fields(source, topic=topic, client_id="", group="")
    return source


def _filled(address: str, separator: str, wildcards: tuple[str, ...], level: str) -> str:
    return separator.join(level if part in wildcards else part for part in address.split(separator))


def _address(place: Broker) -> str:
    match place:
        case NatsPlace():
            return place.subject
        case MqttPlace():
            return place.topic
    return ""
