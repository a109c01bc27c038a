"""The interface of brokers: a consumer delivers messages at least once, a publisher sends messages.

Everything here may be called by any thread. Implementations translate their client's errors at each call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from isthmus.errors import MessageTooLarge
from isthmus.events.message import Message


class Delivery(Protocol):
    """One delivery of a message. Either `ack` or `retry` ends a delivery; without either the broker delivers again.

    Neither raises while the broker is away: the next delivery of the message has the same id, and so is recognised.
    """

    @property
    def message(self) -> Message:
        """The message."""
        ...

    @property
    def attempt(self) -> int:
        """Deliveries of this message so far, this one included; 1 where the broker does not count."""
        ...

    def ack(self) -> None:
        """Tell the broker that the message is done."""
        ...

    def retry(self, after_s: float) -> None:
        """Give the message back, to be delivered again after `after_s` seconds or later."""
        ...

    def extend(self) -> None:
        """Tell the broker that work goes on, so that the broker delivers to no other consumer yet."""
        ...


@dataclass(frozen=True)
class Backlog:
    """Messages at a broker that are not delivered or not acknowledged yet, and the age of the oldest message.

    Units: seconds. None where the broker does not say.
    """

    messages: int | None = None
    oldest_s: float | None = None


class Consumer(Protocol):
    """A durable consumer: unacknowledged messages are delivered again, to any consumer of the same name."""

    @property
    def url(self) -> str:
        """The place in messages to people, without credentials, for example nats://127.0.0.1:4222/photos.*."""
        ...

    @property
    def extend_every_s(self) -> float:
        """Call `Delivery.extend` at least this often during long work; infinity where work may take any time."""
        ...

    def fetch(self, count: int, wait_s: float) -> Sequence[Delivery]:
        """Up to `count` messages; an empty sequence after `wait_s` seconds without a message.

        Raises:
            BrokerUnavailable: the broker does not answer; call again later, the consumer reconnects by itself.
            BrokerRefused: credentials, or an error that no second attempt can change.
        """
        ...

    def backlog(self) -> Backlog:
        """The backlog.

        Raises:
            BrokerUnavailable: the broker does not answer.
        """
        ...

    def close(self) -> None:
        """Return unended deliveries to the broker, as far as its protocol can, and disconnect."""
        ...


class Publisher(Protocol):
    """Sends messages; a broker with deduplication stores two messages of the same id once."""

    @property
    def url(self) -> str:
        """The place in messages to people, without credentials."""
        ...

    @property
    def max_bytes(self) -> int:
        """The largest body that the broker accepts, stated at connect or documented."""
        ...

    def publish(self, message: Message) -> None:
        """Send and wait until the broker has confirmed; `message.id` is the deduplication key.

        Raises:
            MessageTooLarge: the body exceeds `max_bytes`. Facts: `bytes`, `limit`.
            BrokerUnavailable: not confirmed; the message may have arrived nevertheless.
            BrokerRefused: credentials, or an error that no second attempt can change.
        """
        ...

    def close(self) -> None:
        """Disconnect."""
        ...


@runtime_checkable
class Reachable(Protocol):
    """A publisher that can show without sending that its place answers."""

    def check(self) -> None:
        """Connect.

        Raises:
            BrokerUnavailable: no answer.
            BrokerRefused: credentials, or an unknown place.
        """
        ...


def check_size(message: Message, limit: int) -> None:
    """Refuse a body beyond a place's limit, before sending.

    Raises:
        MessageTooLarge: more than `limit` bytes.
    """
    if len(message.body) > limit:
        raise MessageTooLarge(
            f"a body of {len(message.body)} bytes exceeds the limit of {limit}", bytes=len(message.body), limit=limit
        )
