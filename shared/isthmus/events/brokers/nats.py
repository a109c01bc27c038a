"""NATS JetStream: a durable pull consumer, and a publisher that waits for the stream's acknowledgement."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from urllib.parse import quote

import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext, api

from isthmus.errors import BrokerRefused, BrokerUnavailable, ConfigurationMalformed, MessageTooLarge
from isthmus.events.broker import Backlog
from isthmus.events.brokers.nats_connection import REQUEST_TIMEOUT_S, NatsConnection
from isthmus.events.configuration import NatsPlace
from isthmus.events.message import Message, idempotency_key, printable

DUPLICATE_WINDOW_S = 600.0
"""How long the server knows the ids of a stream's messages: longer than the retries of a message last."""
# The server's limit counts headers too. Without a fixed share for headers, a body's limit would depend on its id.
HEADER_BYTES = 4096
_DEFAULT_MAX_PAYLOAD = 2**20  # of nats-server
_MAX_FETCH = 256  # messages in memory; of 1 MB each by default
_MIN_WAIT_S = 0.05  # shorter than a round trip, a fetch would leave its messages to the next fetch
_NAME_IN_USE, _OVERLAP = 10058, 10065  # JSStreamNameExistErr, JSStreamSubjectOverlapErr
# What other transports have in names of headers.
_NOT_NAME = re.compile(r"[^!-9;-~]")
_MSG_ID = api.Header.MSG_ID.value
# Of a source: an acknowledged message is removed, a full stream refuses messages. Of other places: the oldest go.
_WORK_QUEUE = api.StreamConfig(retention=api.RetentionPolicy.WORK_QUEUE, discard=api.DiscardPolicy.NEW)
_LATEST = api.StreamConfig(retention=api.RetentionPolicy.LIMITS, discard=api.DiscardPolicy.OLD)


@dataclass(frozen=True, kw_only=True)
class StreamLimits:
    """Limits of a stream that is made here; a stream that exists keeps its own. Units: seconds; -1 is no limit."""

    max_messages: int = -1
    max_bytes: int = 2**30
    max_age_s: float = 7 * 86_400.0


class NatsDelivery:
    """See `isthmus.events.broker.Delivery`."""

    def __init__(self, consumer: NatsConsumer, raw: Msg) -> None:
        metadata = raw.metadata
        headers = {name.lower(): value for name, value in (raw.headers or {}).items()}
        published = metadata.timestamp.timestamp()
        # The time tells messages of equal numbers apart: a server with an empty store numbers from 1 again.
        fallback = f"{metadata.stream}.{metadata.sequence.stream}.{published:.6f}"
        self.message = Message(
            raw.data, idempotency_key(headers, fallback), source=raw.subject, headers=headers, published=published
        )
        self.attempt = metadata.num_delivered
        self._consumer, self._raw = consumer, raw

    def ack(self) -> None:
        """See `Delivery.ack`."""
        self._consumer.end(self, self._raw.ack)

    def retry(self, after_s: float) -> None:
        """See `Delivery.retry`."""
        self._consumer.end(self, lambda: self._raw.nak(max(0.0, after_s)))

    def extend(self) -> None:
        """See `Delivery.extend`."""
        self._consumer.post(self._raw.in_progress)


class NatsConsumer:
    """A durable pull consumer with explicit acknowledgement; see `isthmus.events.broker.Consumer`.

    The stream of the subject is looked up, else made as a work queue: an acknowledged message is removed, a full stream
    refuses messages, and a subject has a single consumer name. Missing streams and consumers are made again.
    """

    def __init__(self, place: NatsPlace, credentials: str = "", limits: StreamLimits = StreamLimits()) -> None:
        self._place, self._limits = place, limits
        self._fetching = threading.Lock()
        self._unfinished: dict[NatsDelivery, None] = {}
        self._stream = ""
        self._subscription: JetStreamContext.PullSubscription | None = None
        self._connection = NatsConnection(place.url, credentials, self._subscribe)
        self._connection.start()

    @property
    def url(self) -> str:
        """See `Consumer.url`."""
        return f"{self._connection.url}/{self._place.subject}"

    @property
    def extend_every_s(self) -> float:
        """Half of the server's time before redelivery."""
        return self._place.ack_wait / 2

    def fetch(self, count: int, wait_s: float) -> Sequence[NatsDelivery]:
        """See `Consumer.fetch`; at most 256 messages."""
        until = time.monotonic() + wait_s
        # Concurrent fetches of a subscription would take each other's status messages.
        if not self._fetching.acquire(timeout=max(0.0, wait_s)):
            return ()
        try:
            left_s = max(_MIN_WAIT_S, until - time.monotonic())
            messages = self._connection.run(lambda client: self._pull(client, min(count, _MAX_FETCH), left_s), left_s)
        finally:
            self._fetching.release()
        deliveries = [NatsDelivery(self, message) for message in messages]
        self._unfinished.update(dict.fromkeys(deliveries))
        return deliveries

    def backlog(self) -> Backlog:
        """See `Consumer.backlog`; the age by the server's record of the first message that is not acknowledged."""
        return self._connection.run(self._backlog)

    def close(self) -> None:
        """See `Consumer.close`."""
        for delivery in list(self._unfinished):
            delivery.retry(0.0)
        self._connection.stop()

    def end(self, delivery: NatsDelivery, answer: Callable[[], Awaitable[None]]) -> None:
        """Send the answer that ends a delivery; further answers are ignored."""
        with contextlib.suppress(KeyError):
            self._unfinished.pop(delivery)
            self._connection.post(answer)

    def post(self, answer: Callable[[], Awaitable[None]]) -> None:
        """Send an answer that does not end the delivery."""
        self._connection.post(answer)

    async def _subscribe(self, client: Client) -> None:
        """Find or make stream and consumer, on each connection."""
        js, place = client.jetstream(timeout=REQUEST_TIMEOUT_S), self._place
        self._stream = await _ensure_stream(js, place, _WORK_QUEUE, self._limits)
        try:
            existing = (await js.consumer_info(self._stream, place.durable)).config
            if existing.filter_subject != place.subject:
                raise BrokerRefused(
                    f"{self.url}: the consumer {place.durable!r} of the stream {self._stream!r} reads"
                    f" {existing.filter_subject or 'all subjects'!r}",
                    hint="choose another `durable`",
                    broker=self.url,
                )
        except nats.js.errors.NotFoundError:
            pass
        # Makes the consumer, or updates its ack_wait.
        await js.add_consumer(
            self._stream,
            api.ConsumerConfig(
                name=place.durable,
                durable_name=place.durable,
                filter_subject=place.subject,
                deliver_policy=api.DeliverPolicy.ALL,
                ack_policy=api.AckPolicy.EXPLICIT,
                ack_wait=float(place.ack_wait),
            ),
        )
        self._subscription = await js.pull_subscribe_bind(durable=place.durable, stream=self._stream)

    async def _pull(self, client: Client, count: int, wait_s: float) -> list[Msg]:
        if self._subscription is None:
            return []
        try:
            return await self._subscription.fetch(count, timeout=wait_s)
        except TimeoutError:  # of nats-py, whose own is a subclass, or of asyncio
            return []
        except (nats.js.errors.NotFoundError, nats.js.errors.ServiceUnavailableError):
            # Somebody removed the consumer or its stream.
            await self._subscription.unsubscribe()
            await self._subscribe(client)
            return []

    async def _backlog(self, client: Client) -> Backlog:
        js = client.jetstream(timeout=REQUEST_TIMEOUT_S)
        info = await js.consumer_info(self._stream, self._place.durable)
        messages = (info.num_pending or 0) + (info.num_ack_pending or 0)
        if not messages:
            return Backlog(0, 0.0)
        first = (info.ack_floor.stream_seq if info.ack_floor else 0) + 1
        try:
            oldest = await js.get_msg(self._stream, seq=first, subject=self._place.subject, next=True)
        except nats.js.errors.NotFoundError:  # acknowledged meanwhile
            return Backlog(messages, 0.0)
        age_s = time.time() - oldest.time.timestamp() if oldest.time else None
        return Backlog(messages, None if age_s is None else max(0.0, age_s))


class NatsPublisher:
    """Publishes to a subject with the message's id; see `isthmus.events.broker.Publisher`.

    A subject without a stream gets a stream that drops its oldest messages beyond 1 GiB or seven days, unless
    `makes_stream` is False because the consumer makes the stream. Where a consumer of the place `read_by` reads the
    subject, its stream is made, with all of its subjects: a stream of this subject alone would keep the others out.
    """

    def __init__(
        self,
        place: NatsPlace,
        credentials: str = "",
        *,
        makes_stream: bool = True,
        read_by: NatsPlace | None = None,
    ) -> None:
        if re.search(r"(^|\.)[*>](\.|$)", place.subject):
            raise ConfigurationMalformed(
                f"{place.subject} has a wildcard, and messages are published to one subject", where="subject"
            )
        self._place, self._makes_stream, self._read_by = place, makes_stream, read_by
        self._max_payload: int | None = None
        self._connection = NatsConnection(place.url, credentials, self._note_limit)
        self._connection.start()

    @property
    def url(self) -> str:
        """See `Publisher.url`."""
        return f"{self._connection.url}/{self._place.subject}"

    @property
    def max_bytes(self) -> int:
        """The server's max_payload less 4 KiB for headers; nats-server's default where no server can be reached."""
        if self._max_payload is None:
            with contextlib.suppress(BrokerUnavailable, BrokerRefused):
                self._connection.run(self._note_limit)
        return (self._max_payload or _DEFAULT_MAX_PAYLOAD) - HEADER_BYTES

    def check(self) -> None:
        """See `isthmus.events.broker.Reachable.check`."""
        self._connection.run(self._note_limit)

    def publish(self, message: Message) -> None:
        """See `Publisher.publish`.

        The server deduplicates by subject and id within ten minutes, or the window of a stream that exists.
        """
        # A stream may hold several subjects: the result of a message has the message's own id, and so its reason to
        # be a dead letter; neither is a duplicate of the other.
        headers = {**message.headers, "idempotency-key": message.id}
        headers = {_NOT_NAME.sub(_quoted, n): printable(v) for n, v in headers.items() if n}
        headers = {name: value for name, value in headers.items() if not name.startswith("nats-")}
        headers[_MSG_ID] = f"{self._place.subject}/{message.deduplication_id}"
        self._connection.run(lambda client: self._publish(client, message.body, headers))

    def close(self) -> None:
        """See `Publisher.close`."""
        self._connection.stop()

    async def _note_limit(self, client: Client) -> None:
        self._max_payload = client.max_payload

    async def _publish(self, client: Client, body: bytes, headers: dict[str, str]) -> None:
        size = sum(len(f"{name}: {value}\r\n".encode()) for name, value in headers.items()) + len("NATS/1.0\r\n\r\n")
        limit = client.max_payload - max(size, HEADER_BYTES)
        if len(body) > limit:
            raise MessageTooLarge(
                f"a message of {len(body)} bytes; {self.url} takes {limit}",
                hint="a [claims] table sends larger bodies by reference",
                bytes=len(body),
                limit=limit,
            )
        js = client.jetstream(timeout=REQUEST_TIMEOUT_S)
        subject, stream = self._place.subject, self._place.stream or None
        try:
            await js.publish(subject, body, stream=stream, headers=headers)
        except nats.js.errors.NoStreamResponseError:
            if not self._makes_stream:
                raise
            if self._read_by is not None:
                await _ensure_stream(js, self._read_by, _WORK_QUEUE, StreamLimits())
            else:
                await _ensure_stream(js, self._place, _LATEST, StreamLimits())
            await js.publish(subject, body, stream=stream, headers=headers)


async def _ensure_stream(js: JetStreamContext, place: NatsPlace, config: api.StreamConfig, limits: StreamLimits) -> str:
    """The name of the subject's stream, made where absent."""
    if (name := await _find_stream(js, place)) is not None:
        return name
    name = place.stream or _stream_name(place.subject)
    try:
        await js.add_stream(
            config.evolve(
                name=name,
                subjects=[place.subject],
                storage=api.StorageType.FILE,
                max_msgs=limits.max_messages,
                max_bytes=limits.max_bytes,
                max_age=limits.max_age_s,
                duplicate_window=DUPLICATE_WINDOW_S,
            )
        )
    except nats.js.errors.BadRequestError as e:
        # Another process may have been first, with other limits.
        if e.err_code not in (_NAME_IN_USE, _OVERLAP) or (found := await _find_stream(js, place)) is None:
            raise
        return found
    return name


async def _find_stream(js: JetStreamContext, place: NatsPlace) -> str | None:
    try:
        if place.stream:
            await js.stream_info(place.stream)
            return place.stream
        return await js.find_stream_name_by_subject(place.subject)
    except nats.js.errors.NotFoundError:
        return None


def _quoted(match: re.Match[str]) -> str:
    return quote(match[0], safe="", errors="replace")


def _stream_name(subject: str) -> str:
    """A stream's name; dots and wildcards are not allowed there."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", subject.replace("*", "any").replace(">", "all"))
