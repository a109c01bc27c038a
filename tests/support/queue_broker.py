"""A broker in this process, for tests of the trigger's loop alone: at least once, with redelivery and retries."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence

from isthmus.errors import BrokerUnavailable, IsthmusError, MessageTooLarge
from isthmus.events.broker import Backlog, Delivery
from isthmus.events.message import Message


class QueueDelivery:
    """A delivery of the queue; how it ended is in `ended`."""

    def __init__(self, broker: QueueBroker, message: Message, attempt: int) -> None:
        self.message, self.attempt = message, attempt
        self.ended = ""
        self.extensions = 0
        self._broker = broker

    def ack(self) -> None:
        self._end("ack", None)

    def retry(self, after_s: float) -> None:
        self._end("retry", after_s)

    def extend(self) -> None:
        self.extensions += 1

    def _end(self, how: str, after_s: float | None) -> None:
        assert not self.ended, f"{self.message.id} ended twice: {self.ended}, {how}"
        self.ended = how
        self._broker.end(self, after_s)


class QueueBroker:
    """A queue that is also its own consumer; what was delivered and not ended comes again by `redeliver`."""

    url = "queue:source"
    extend_every_s = math.inf

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[tuple[float, Message, int]] = []
        self.delivered: list[QueueDelivery] = []
        self.error: IsthmusError | None = None
        self.is_closed = False
        self.max_in_work = 0

    def send(self, *messages: Message) -> None:
        with self._changed:
            self._waiting += [(0.0, message, 1) for message in messages]
            self._changed.notify_all()

    def fetch(self, count: int, wait_s: float) -> Sequence[Delivery]:
        until = time.monotonic() + wait_s
        with self._changed:
            while True:
                if self.error is not None:
                    raise self.error
                now = time.monotonic()
                due = [entry for entry in self._waiting if entry[0] <= now][:count]
                if due or now >= until:
                    break
                self._changed.wait(0.01)
            for entry in due:
                self._waiting.remove(entry)  # one of it: a message may wait twice
            deliveries = [QueueDelivery(self, message, attempt) for _, message, attempt in due]
            self.delivered += deliveries
            self.max_in_work = max(self.max_in_work, len(self.unended))
            return deliveries

    def backlog(self) -> Backlog:
        with self._changed:
            return Backlog(len(self._waiting) + len(self.unended), 0.0)

    def close(self) -> None:
        self.is_closed = True

    @property
    def unended(self) -> list[QueueDelivery]:
        return [delivery for delivery in self.delivered if not delivery.ended]

    def redeliver(self) -> None:
        """As after the death of a consumer: its deliveries come again, in order."""
        with self._changed:
            for delivery in self.unended:
                delivery.ended = "lost"
                self._waiting.append((0.0, delivery.message, delivery.attempt + 1))

    def end(self, delivery: QueueDelivery, after_s: float | None) -> None:
        with self._changed:
            if after_s is not None:
                self._waiting.append((time.monotonic() + after_s, delivery.message, delivery.attempt + 1))
            self._changed.notify_all()


class MessageList:
    """A publisher that keeps what it was sent."""

    def __init__(self, name: str = "results", max_bytes: int = 2**20) -> None:
        self.url, self.max_bytes = f"list:{name}", max_bytes
        self.messages: list[Message] = []
        self.errors: list[IsthmusError] = []
        self.refuses: dict[str, IsthmusError] = {}
        self._lock = threading.Lock()

    def publish(self, message: Message) -> None:
        with self._lock:
            if self.errors:
                raise self.errors.pop(0)
            if message.id in self.refuses:
                raise self.refuses[message.id]
            if len(message.body) > self.max_bytes:
                raise MessageTooLarge("too large", bytes=len(message.body), limit=self.max_bytes)
            self.messages.append(message)

    def close(self) -> None:
        """Nothing to close."""

    @property
    def ids(self) -> list[str]:
        return [message.id for message in self.messages]


def away(name: str) -> BrokerUnavailable:
    return BrokerUnavailable(f"{name} does not answer", broker=name)
