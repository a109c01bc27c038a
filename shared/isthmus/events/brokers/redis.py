"""Redis and Valkey streams: a consumer group that claims what others left, and a publisher that appends once.

An entry stays in its consumer's pending list until it is acknowledged. Redis has no negative acknowledgement: an entry
that waits for a retry stays pending here, and its idle time is renewed so that nobody claims it meanwhile. A process
that dies renews nothing, and another consumer has its entries after `claim_after`.

Source: redis.io, "Streams" (XREADGROUP, XAUTOCLAIM, XCLAIM, XPENDING); docs/reference/trigger.md.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import redis
from redis import exceptions
from redis.backoff import NoBackoff
from redis.retry import Retry

from isthmus.errors import BrokerRefused, BrokerUnavailable, ConfigurationMalformed, EventError
from isthmus.events.broker import Backlog, check_size
from isthmus.events.configuration import RedisPlace, where_of
from isthmus.events.message import CONTENT_TYPE, Message, idempotency_key

_TIMEOUT_S, _CONNECT_S = 10.0, 5.0
# A read blocks the server's reply, not the server; short enough for pauses and claims in between, and for `close`.
_MAX_BLOCK_S = 1.0
_MAX_CLAIM_PAUSE_S = 5.0
_RELEASED = "isthmus-released"
"""The consumer that entries belong to after `close`, until somebody claims them."""
# Names of fields that hold the body, as producers write them; all others are headers.
_BODY_FIELDS = (b"body", b"data", b"payload", b"message")
_DEFAULT_BULK_BYTES = 512 * 2**20
"""Redis' default for proto-max-bulk-len, where CONFIG GET is not permitted."""
_ID_HEADER = "idempotency-key"
_REMEMBER_S = 3600
"""How long an appended id is remembered by the server: longer than a trigger takes to restart and try again."""
# Appends unless the id was appended before. A script runs as one step; where XADD fails nothing is remembered.
_APPEND_ONCE = """
if redis.call('EXISTS', KEYS[2]) == 1 then return false end
local entry = redis.call('XADD', KEYS[1], unpack(ARGV, 2))
redis.call('SET', KEYS[2], entry, 'EX', ARGV[1])
return entry
"""
_REFUSED = (exceptions.AuthenticationError, exceptions.AuthorizationError, exceptions.NoPermissionError)
_TRANSIENT = (
    exceptions.ConnectionError,
    exceptions.TimeoutError,
    exceptions.ReadOnlyError,  # a replica that is about to be the primary, or was
    exceptions.ClusterDownError,
    exceptions.TryAgainError,
    exceptions.OutOfMemoryError,
)
# Codes of replies without a class of their own: a disk that is full, replicas that are away, a script that blocks.
_TRANSIENT_CODES = ("MISCONF", "NOREPLICAS", "BUSY", "LOADING")
_NO_GROUP = ("NOGROUP", "UNBLOCKED", "no such key", "ERR no such key")

T = TypeVar("T")


class RedisDelivery:
    """An entry of the stream in this consumer's pending list."""

    def __init__(self, consumer: RedisConsumer, entry: str, message: Message, attempt: int) -> None:
        self._consumer, self._entry = consumer, entry
        self._message, self._attempt = message, attempt

    @property
    def message(self) -> Message:
        return self._message

    @property
    def attempt(self) -> int:
        return self._attempt

    def ack(self) -> None:
        self._consumer.acknowledge(self._entry)

    def retry(self, after_s: float) -> None:
        self._consumer.pause(self._entry, after_s)

    def extend(self) -> None:
        self._consumer.renew([self._entry])


class RedisConsumer:
    """A consumer, with a name of its own, in the group `place.group`; the group is made where it is absent.

    A new group starts with the oldest entry of the stream. `password` is the text of `place.password_secret`.

    Raises:
        ConfigurationMalformed: the URL is none of Redis.
    """

    def __init__(self, place: RedisPlace, password: str = "") -> None:
        self._url, self._stream, self._group = where_of(place), place.stream, place.group
        self._claim_after_s = place.claim_after
        self._client = _client(place, password)
        # Unique: two processes of one name would take each other's pending entries for their own.
        self._name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._lock = threading.Lock()
        self._pending: set[str] = set()
        self._due: dict[str, float] = {}
        self._claim_at = self._renew_at = 0.0
        self._cursor = b"0-0"

    @property
    def url(self) -> str:
        return self._url

    @property
    def extend_every_s(self) -> float:
        return self._claim_after_s / 3

    def fetch(self, count: int, wait_s: float) -> Sequence[RedisDelivery]:
        """Entries whose pause is over, then what other consumers left, then new entries."""
        until = time.monotonic() + wait_s
        while True:
            self._renew_paused()
            deliveries = self._retried(count)
            if len(deliveries) < count and time.monotonic() >= self._claim_at:
                deliveries += self._claimed(count - len(deliveries))
            left_s = until - time.monotonic()
            if len(deliveries) < count:
                deliveries += self._new(count - len(deliveries), 0.0 if deliveries else self._block_s(left_s))
            if deliveries or left_s <= 0:
                return deliveries

    def backlog(self) -> Backlog:
        """Entries that were not delivered or not acknowledged; their number is None after deletions in the stream."""
        group = self._call(self._group_facts)
        pending, lag = int(group["pending"]), group.get("lag")
        oldest = None
        if pending:
            oldest = self._call(lambda: self._client.xpending(self._stream, self._group))["min"]
        elif lag != 0:
            after = f"({group['last-delivered-id'].decode()}"
            entries = self._call(lambda: self._client.xrange(self._stream, min=after, count=1))
            oldest = entries[0][0] if entries else None
        seconds, microseconds = self._call(self._client.time)
        age_s = None if oldest is None else max(0.0, seconds + microseconds / 1e6 - _seconds(oldest.decode()))
        return Backlog(None if lag is None else pending + int(lag), age_s)

    def close(self) -> None:
        """Leave what is pending to whoever claims first, and remove this consumer's name from the group."""
        with self._lock:
            entries, self._pending, self._due = sorted(self._pending), set(), {}
        idle_ms = _milliseconds(self._claim_after_s)
        with suppress(exceptions.RedisError):
            if entries:
                self._client.xclaim(
                    self._stream,
                    self._group,
                    _RELEASED,
                    min_idle_time=0,
                    message_ids=entries,
                    idle=idle_ms,
                    justid=True,
                )
            # Removal of a consumer would lose its pending entries, for example some that another thread fetched.
            if not self._client.xpending_range(self._stream, self._group, "-", "+", 1, self._name):
                self._client.xgroup_delconsumer(self._stream, self._group, self._name)
        self._client.close()

    def acknowledge(self, entry: str) -> None:
        """Remove an entry from the pending list; where the server is gone, the entry comes again."""
        self._forget(entry)
        with suppress(exceptions.RedisError):
            self._client.xack(self._stream, self._group, entry)

    def pause(self, entry: str, after_s: float) -> None:
        """Deliver a pending entry again after the pause."""
        with self._lock:
            self._due[entry] = time.monotonic() + after_s

    def renew(self, entries: Sequence[str]) -> None:
        """Set the idle time of own pending entries to zero; their number of deliveries stays."""
        with suppress(BrokerUnavailable, BrokerRefused):
            if own := self._own(entries):
                owner = (self._stream, self._group, self._name)
                self._call(lambda: self._client.xclaim(*owner, min_idle_time=0, message_ids=own, idle=0, justid=True))

    def _block_s(self, left_s: float) -> float:
        """How long a read may block: until a pause is over or it is time to claim."""
        with self._lock:
            moments = [*self._due.values(), self._claim_at]
        return max(0.0, min(left_s, _MAX_BLOCK_S, min(moments) - time.monotonic()))

    def _renew_paused(self) -> None:
        now = time.monotonic()
        with self._lock:
            paused = list(self._due)
        if paused and now >= self._renew_at:
            self._renew_at = now + self.extend_every_s
            self.renew(paused)

    def _retried(self, count: int) -> list[RedisDelivery]:
        now = time.monotonic()
        with self._lock:
            due = sorted(entry for entry, moment in self._due.items() if moment <= now)[:count]
        if not due:
            return []
        own = self._own(due)
        entries = self._call(
            lambda: own and self._client.xclaim(self._stream, self._group, self._name, min_idle_time=0, message_ids=own)
        )
        with self._lock:
            for entry in due:
                self._due.pop(entry, None)
                self._pending.discard(entry)
        return self._deliveries(entries)

    def _claimed(self, count: int) -> list[RedisDelivery]:
        """Entries that a consumer has neither acknowledged nor renewed for `claim_after`."""
        idle_ms = _milliseconds(self._claim_after_s)
        reply = self._call(
            lambda: self._client.xautoclaim(
                self._stream, self._group, self._name, min_idle_time=idle_ms, start_id=self._cursor, count=count
            )
        )
        self._cursor = reply[0]
        if self._cursor == b"0-0":  # the scan is over; else the next fetch goes on at once
            self._claim_at = time.monotonic() + min(_MAX_CLAIM_PAUSE_S, self._claim_after_s / 4)
        return self._deliveries(reply[1])

    def _new(self, count: int, block_s: float) -> list[RedisDelivery]:
        block_ms = int(block_s * 1000) or None  # zero would block without an end
        reply = self._call(
            lambda: self._client.xreadgroup(self._group, self._name, {self._stream: ">"}, count=count, block=block_ms)
        )
        entries = reply[0][1] if reply else []
        return [self._delivery(entry, fields, 1) for entry, fields in entries]

    def _deliveries(self, entries: Sequence[tuple[bytes, Mapping[bytes, bytes] | None]]) -> list[RedisDelivery]:
        present = [(entry, fields) for entry, fields in entries if fields]  # others were deleted from the stream
        owners = self._owners([entry.decode() for entry, _ in present])
        return [self._delivery(entry, fields, owners.get(entry.decode(), ("", 1))[1]) for entry, fields in present]

    def _own(self, entries: Sequence[str]) -> list[str]:
        """Entries that no other consumer has claimed, as happens where this process hangs for `claim_after`."""
        return [entry for entry, (owner, _) in self._owners(entries).items() if owner == self._name]

    def _owners(self, entries: Sequence[str]) -> dict[str, tuple[str, int]]:
        """Consumer and number of deliveries of each pending entry."""
        if not entries:
            return {}
        with _errors(self._url), self._client.pipeline(transaction=False) as pipeline:
            for entry in entries:
                pipeline.xpending_range(self._stream, self._group, entry, entry, 1)
            replies = pipeline.execute(raise_on_error=False)
        # Errors stand in the places of replies: without the group nothing is pending.
        rows = [reply[0] for reply in replies if isinstance(reply, list) and reply]
        return {row["message_id"].decode(): (row["consumer"].decode(), row["times_delivered"]) for row in rows}

    def _delivery(self, entry: bytes, fields: Mapping[bytes, bytes], attempt: int) -> RedisDelivery:
        name = entry.decode()
        with self._lock:
            self._pending.add(name)
        return RedisDelivery(self, name, message_of(self._stream, name, fields), attempt)

    def _forget(self, entry: str) -> None:
        with self._lock:
            self._pending.discard(entry)
            self._due.pop(entry, None)

    def _group_facts(self) -> Mapping[str, Any]:
        for group in self._client.xinfo_groups(self._stream):
            if group["name"] == self._group.encode():
                return dict(group)
        raise exceptions.ResponseError("NOGROUP")  # as other commands respond

    def _call(self, action: Callable[[], Any]) -> Any:
        """The reply; a group that is absent, as after a loss of the server's data, is made first."""
        with _errors(self._url):
            try:
                return action()
            except exceptions.ResponseError as e:
                if not str(e).startswith(_NO_GROUP):
                    raise
            with suppress(exceptions.ResponseError):  # BUSYGROUP: another consumer was first
                self._client.xgroup_create(self._stream, self._group, id="0", mkstream=True)
            return action()


class RedisPublisher:
    """Appends messages to a stream: the body as the field `body`, headers as fields of their names.

    `max_length` trims the stream to about so many entries.

    Raises:
        ConfigurationMalformed: the URL is none of Redis.
    """

    def __init__(self, place: RedisPlace, password: str = "") -> None:
        self._url, self._stream = where_of(place), place.stream
        self._trim = ["MAXLEN", "~", place.max_length] if place.max_length else []
        self._client = _client(place, password)
        self._append_once = self._client.register_script(_APPEND_ONCE)
        self._max_bytes: int | None = None

    @property
    def url(self) -> str:
        return self._url

    @property
    def max_bytes(self) -> int:
        if self._max_bytes is None:
            try:
                reply = self._client.config_get("proto-max-bulk-len")
                self._max_bytes = int(reply.get("proto-max-bulk-len", _DEFAULT_BULK_BYTES))
            except exceptions.ResponseError:  # managed servers refuse CONFIG
                self._max_bytes = _DEFAULT_BULK_BYTES
            except exceptions.RedisError:
                return _DEFAULT_BULK_BYTES
        return self._max_bytes

    def check(self) -> None:
        """See `isthmus.events.broker.Reachable.check`."""
        with _errors(self._url):
            self._client.ping()

    def publish(self, message: Message) -> None:
        """Append unless `message.id` was appended within the last hour.

        Raises: as `isthmus.events.broker.Publisher.publish`.
        """
        check_size(message, self.max_bytes)
        fields: list[str | bytes] = ["body", message.body, _ID_HEADER, message.id]
        for name, value in message.headers.items():
            if name != _ID_HEADER and name.encode() not in _BODY_FIELDS:
                fields += [name, value]
        # Braces: in a cluster both keys are on the node of the stream.
        seen = f"{{{self._stream}}}:published:{message.deduplication_id}"
        with _errors(self._url):
            self._append_once(keys=[self._stream, seen], args=[_REMEMBER_S, *self._trim, "*", *fields])

    def close(self) -> None:
        """Disconnect."""
        self._client.close()


def message_of(stream: str, entry: str, fields: Mapping[bytes, bytes]) -> Message:
    """The message of an entry.

    The body is the field `body`, `data`, `payload` or `message`, or the only field; the other fields are headers. An
    entry without such a field is a JSON object of its fields.
    """
    body_field = next((name for name in _BODY_FIELDS if name in fields), None)
    if body_field is None and len(fields) == 1:
        body_field = next(iter(fields))
    texts = {_text(name).lower(): _text(value) for name, value in fields.items() if name != body_field}
    if body_field is None:
        body, headers = json.dumps(texts).encode(), {CONTENT_TYPE: "application/json"}
    else:
        body, headers = fields[body_field], texts
    # Entry ids of two streams may be equal.
    return Message(body, idempotency_key(headers, f"{stream}.{entry}"), stream, headers, published=_seconds(entry))


def _client(place: RedisPlace, password: str) -> Any:
    # The client's types describe replies of sync and async clients at once, so that every reply would need a cast.
    options = {"password": password} if password else {}
    try:
        return redis.Redis.from_url(
            place.url,
            socket_timeout=_TIMEOUT_S,
            socket_connect_timeout=_CONNECT_S,
            # An idle connection that the server closed is replaced; appending twice has no effect.
            retry=Retry(NoBackoff(), 1, supported_errors=(exceptions.ConnectionError,)),
            protocol=2,
            **options,
        )
    except ValueError as e:
        raise ConfigurationMalformed(f"{where_of(place)}: {e}", where="url") from e


@contextmanager
def _errors(url: str) -> Iterator[None]:
    try:
        yield
    except _REFUSED as e:
        raise _error(BrokerRefused, url, e) from e
    except _TRANSIENT as e:
        raise _error(BrokerUnavailable, url, e) from e
    except exceptions.ResponseError as e:
        is_transient = str(e).startswith(_TRANSIENT_CODES)
        raise _error(BrokerUnavailable if is_transient else BrokerRefused, url, e) from e
    except exceptions.RedisError as e:
        raise _error(BrokerUnavailable, url, e) from e


def _error(kind: type[EventError], url: str, error: Exception) -> EventError:
    return kind(f"{url}: {str(error)[:300]}", broker=url)


def _seconds(entry: str) -> float:
    """Seconds since the epoch in an entry's id, which begins with milliseconds by the server's clock."""
    return int(entry.partition("-")[0]) / 1000


def _milliseconds(seconds: float) -> int:
    return max(1, int(seconds * 1000))


def _text(data: bytes) -> str:
    return data.decode(errors="replace")
