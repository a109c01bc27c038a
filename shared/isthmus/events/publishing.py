"""Results to their places, dead letters to their own: each place once, by reference where a body is too large there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from isthmus.errors import (
    BrokerRefused,
    BrokerUnavailable,
    ClaimExpired,
    EventError,
    EventMalformed,
    IsthmusError,
    MessageTooLarge,
    ResultStoreUnavailable,
)
from isthmus.events.broker import Publisher
from isthmus.events.call import Call, CallLease
from isthmus.events.calls import Calls
from isthmus.events.claims import ClaimStore
from isthmus.events.limits import Availability, Value
from isthmus.events.message import CONTENT_TYPE, DEATHS, FILE, REASON, Message

PATH = "x-isthmus-trigger"
"""Header of results: the triggers that a message has come through, against loops."""
MAX_PATH = 16
"""Triggers on the way of a message, and deaths of a message: beyond is a loop."""
MAX_HEADER = 1000
"""Characters of a header of ours: foreign texts may have any length."""
_MAX_BACKOFF_S = 60.0
_STORE = (ResultStoreUnavailable,)
_log = logging.getLogger(__name__)


class ResultPlace(NamedTuple):
    """A place of results or of dead letters, and its name in records."""

    name: str
    publisher: Publisher


@dataclass(frozen=True, kw_only=True)
class Publishing:
    """The places of the trigger `name`; any thread may call. `count` adds to a count of messages."""

    name: str
    calls: Calls
    availability: Availability
    results: Sequence[ResultPlace]
    dead_letters: ResultPlace | None
    claims: ClaimStore | None
    max_attempts: int
    retry_after_s: float
    count: Callable[[str], None]

    def _targets(self, call: Call) -> Sequence[ResultPlace]:
        """The places of a call's result; of an error the dead letters, where there is a place for dead letters."""
        if call.state == "failed" and self.dead_letters is not None:
            return [self.dead_letters]
        return self.results

    def missing(self, call: Call) -> list[ResultPlace]:
        """The places that lack the result of a call that is over."""
        served = (*call.published, *call.refused)
        return [place for place in self._targets(call) if place.name not in served]

    def publish(self, message: Message, lease: CallLease) -> None:
        """Send the result of `message` to each place without the result, noting place after place.

        Raises:
            Stopping: the trigger ends; notes stay.
        """
        missing = self.missing(lease.call)
        for i, place in enumerate(missing):
            is_sent = True
            if place is self.dead_letters:
                self.bury(message, lease.call)
            else:
                is_sent = self._send(place, message, lease.call)
            options = {"durable": i + 1 == len(missing), "is_refusal": not is_sent}
            lease = self._stored(partial(self.calls.publish, lease, place.name, **options))

    def _deliver(self, place: ResultPlace, message: Message, waits: tuple[type[EventError], ...]) -> None:
        """Publish to a place, by reference where the message is too large there; repeated while `waits` are raised."""
        sendable = self._sendable(message, place.publisher.max_bytes)
        self.availability.until(place.name, lambda: place.publisher.publish(sendable), waits)

    def _send(self, place: ResultPlace, message: Message, call: Call) -> bool:
        """Publish a result; False where the place refuses for good: then the message is a dead letter."""
        error: IsthmusError
        for attempt in range(1, self.max_attempts + 1):
            try:
                self._deliver(place, self._result(message, call), (BrokerUnavailable,))
                return True
            except (MessageTooLarge, ClaimExpired, EventMalformed) as e:  # the last two of the recorded result
                error = e
                break
            except BrokerRefused as e:
                error = e
                self.availability.pause(min(_MAX_BACKOFF_S, self.retry_after_s * 2.0 ** (attempt - 1)))
        _log.error("%s refuses the result of message %s: %s", place.name, call.id, error.message)
        self.count("refused")
        self.bury(message, call, f"{place.name}: {error.message}")
        return False

    def _result(self, message: Message, call: Call) -> Message:
        result = call.result
        body = b"" if result is None else self._stored(lambda: self.calls.body(result))
        headers = {
            CONTENT_TYPE: "" if result is None else result.content_type,
            PATH: ",".join(filter(None, (message.headers.get(PATH, ""), self.name))),
            "x-isthmus-status": "" if result is None else str(result.status),
            "x-isthmus-source": message.source[:MAX_HEADER],
            FILE: message.headers.get(FILE, "")[:MAX_HEADER],
            "traceparent": message.headers.get("traceparent", "")[:MAX_HEADER],
        }
        return Message(body, call.id, self.name, {n: text for n, text in headers.items() if text}, message.key)

    def bury(self, message: Message, call: Call, reason: str = "") -> None:
        """Send a message to the dead letters, with the reason; without body or headers that are too large there."""
        if self.dead_letters is None:
            return
        if message.deaths >= MAX_PATH:
            _log.error("message %s is no dead letter any more, after %d times: a loop", message.id, message.deaths)
            return
        status = "" if call.result is None else str(call.result.status)
        own = {
            REASON: _header_text(reason or call.reason or "failed"),
            "x-isthmus-attempts": str(call.attempts),
            "x-isthmus-status": status,
            "x-isthmus-source": message.source[:MAX_HEADER],
            "x-isthmus-bytes": str(len(message.body)),
            DEATHS: str(message.deaths + 1),
        }
        own = {name: text for name, text in own.items() if text}
        headers = {name: text for name, text in {**message.headers, **own}.items() if text}
        letter = Message(message.body, message.id, self.name, headers, message.key)
        # A refusal is waited out as well: without a dead letter the message would be lost.
        waits = (BrokerUnavailable, BrokerRefused)
        # Foreign headers may be too large by themselves.
        smaller = letter.with_body(b""), replace(letter, headers=own), replace(letter, headers=own, body=b"")
        for variant in (letter, *smaller):
            try:
                self._deliver(self.dead_letters, variant, waits)
            except MessageTooLarge as e:
                _log.error("dead letter %s is sent without body or headers: %s", message.id, e.message)
            else:
                self.count("dead_letters")
                return

    def _sendable(self, message: Message, limit: int) -> Message:
        """The message, or a claim for its body where that exceeds the limit of a place and there is a store."""
        claims = self.claims
        if claims is None or len(message.body) <= limit:
            return message
        return self.availability.until("claims", lambda: claims.shortened(message), _STORE)

    def _stored(self, operation: Callable[[], Value]) -> Value:
        return self.availability.until("records", operation, _STORE)


def _header_text(text: str) -> str:
    """Text that every transport takes as a header: printable ASCII, bounded."""
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text)[:MAX_HEADER]
