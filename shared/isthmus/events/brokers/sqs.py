"""Amazon SQS, and servers with its API: standard and FIFO queues.

Bodies are texts in SQS: binary bodies go as base64, marked by the attribute `isthmus-encoding`. Headers go as
message attributes, or, beyond the limit of SQS, as a single JSON attribute.

Source: AWS, "Amazon SQS API Reference" (ReceiveMessage, SendMessage), "Amazon SQS message quotas".
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import boto3
from botocore import exceptions
from botocore.config import Config

from isthmus.errors import BrokerRefused, BrokerUnavailable, ConfigurationMalformed, EventError, MessageTooLarge
from isthmus.events.broker import Backlog, check_size
from isthmus.events.configuration import SqsPlace, where_of
from isthmus.events.message import Message, idempotency_key, storable

_MAX_BATCH = 10  # of SQS
_MAX_WAIT_S = 20  # of SQS' long polling
_MAX_VISIBILITY_S = 12 * 3600
_DEFAULT_LIMIT = 2**20  # since August 2025; a queue may state less
# Attributes count as the body does. A share for headers keeps the limit of a body apart from its headers.
_HEADER_BYTES = 16 * 2**10
_ENCODING, _HEADERS = "isthmus-encoding", "isthmus-headers"
_BASE64, _EMPTY = "base64", "empty"
_MAX_ATTRIBUTES = 10 - 1  # of SQS, without the encoding
_ATTRIBUTE = re.compile(r"(?!aws\.|amazon\.)[a-z0-9_-]+(?:\.[a-z0-9_-]+)*", re.IGNORECASE)
# The characters of XML 1.0, accepted by SQS; other characters would be refused or changed.
_NOT_TEXT = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_ID_HEADER = "idempotency-key"
_REGION = re.compile(r"https://sqs\.([a-z0-9-]+)\.amazonaws\.com")
_DEFAULT_REGION = "us-east-1"
_TRANSIENT = frozenset(
    (
        "InternalError",
        "InternalFailure",
        "KmsThrottled",
        "OverLimit",
        "RequestThrottled",
        "ServiceUnavailable",
        "Throttling",
        "ThrottlingException",
    )
)
_NO_QUEUE = ("AWS.SimpleQueueService.NonExistentQueue", "QueueDoesNotExist")
_CONFIG = Config(
    connect_timeout=5,
    read_timeout=_MAX_WAIT_S + 10,
    # A SendMessage without a reply is sent again: FIFO queues store the message once, standard queues perhaps twice.
    retries={"mode": "standard", "total_max_attempts": 2},
    max_pool_connections=64,
)


class SqsDelivery:
    """A received message with its receipt; SQS delivers again where the visibility timeout ends first."""

    def __init__(self, consumer: SqsConsumer, raw: Mapping[str, Any]) -> None:
        self._consumer = consumer
        self.raw_id, self.receipt = str(raw["MessageId"]), str(raw["ReceiptHandle"])
        self.message = message_of(consumer.queue_name, raw)
        self.attempt = int(raw.get("Attributes", {}).get("ApproximateReceiveCount", 1))

    def ack(self) -> None:
        """See `isthmus.events.broker.Delivery.ack`."""
        self._consumer.delete(self)

    def retry(self, after_s: float) -> None:
        """See `isthmus.events.broker.Delivery.retry`; whole seconds, at most 12 hours."""
        self._consumer.hide(self, after_s, is_end=True)

    def extend(self) -> None:
        """See `isthmus.events.broker.Delivery.extend`."""
        self._consumer.hide(self, self._consumer.visibility_s, is_end=False)


class SqsConsumer:
    """Receives by long polling; consumers of a queue share its messages.

    Raises:
        ConfigurationMalformed: the queue's URL or the endpoint is none.
    """

    def __init__(self, place: SqsPlace) -> None:
        self._queue = _Queue(place)
        self.queue_name = place.queue_url.rpartition("/")[2]
        self.visibility_s = max(1, math.ceil(place.visibility))
        self._lock = threading.Lock()
        self._unfinished: dict[str, str] = {}
        """Receipts by message id."""

    @property
    def url(self) -> str:
        return self._queue.where

    @property
    def extend_every_s(self) -> float:
        return self.visibility_s / 3

    def fetch(self, count: int, wait_s: float) -> Sequence[SqsDelivery]:
        """See `isthmus.events.broker.Consumer.fetch`; `wait_s` is rounded up to whole seconds, as SQS waits."""
        until = time.monotonic() + wait_s
        deliveries: list[SqsDelivery] = []
        while len(deliveries) < count:
            left_s = 0.0 if deliveries else max(0.0, until - time.monotonic())
            batch = self._receive(min(_MAX_BATCH, count - len(deliveries)), min(_MAX_WAIT_S, math.ceil(left_s)))
            deliveries += batch
            if not batch and time.monotonic() >= until:
                break
            # SQS samples its servers: a further request would often find more, and is not worth its time.
            if deliveries and len(batch) < _MAX_BATCH:
                break
        with self._lock:
            self._unfinished.update({delivery.raw_id: delivery.receipt for delivery in deliveries})
        return deliveries

    def backlog(self) -> Backlog:
        """Messages that wait, that are delayed and that are in work, as estimated by SQS, without an age."""
        names = [f"ApproximateNumberOfMessages{state}" for state in ("", "Delayed", "NotVisible")]
        counts = self._queue.attributes(names)
        return Backlog(sum(int(counts.get(name, 0)) for name in names))

    def close(self) -> None:
        """Make unfinished messages visible again, and disconnect."""
        with self._lock:
            receipts, self._unfinished = list(self._unfinished.values()), {}
        for start in range(0, len(receipts), _MAX_BATCH):
            batch = receipts[start : start + _MAX_BATCH]
            entries = [
                {"Id": str(n), "ReceiptHandle": receipt, "VisibilityTimeout": 0} for n, receipt in enumerate(batch)
            ]
            with suppress(EventError):
                self._queue.call("change_message_visibility_batch", Entries=entries)
        self._queue.close()

    def delete(self, delivery: SqsDelivery) -> None:
        """Delete a message; where SQS is gone, another delivery follows."""
        self._end(delivery)
        with suppress(EventError):
            self._queue.call("delete_message", ReceiptHandle=delivery.receipt)

    def hide(self, delivery: SqsDelivery, seconds: float, *, is_end: bool) -> None:
        """Hide a message for whole seconds from now on."""
        if is_end:
            self._end(delivery)
        timeout_s = min(_MAX_VISIBILITY_S, max(0, math.ceil(seconds)))
        with suppress(EventError):
            self._queue.call("change_message_visibility", ReceiptHandle=delivery.receipt, VisibilityTimeout=timeout_s)

    def _receive(self, count: int, wait_s: int) -> list[SqsDelivery]:
        reply = self._queue.call(
            "receive_message",
            MaxNumberOfMessages=count,
            WaitTimeSeconds=wait_s,
            VisibilityTimeout=self.visibility_s,
            MessageAttributeNames=["All"],
            MessageSystemAttributeNames=["All"],
        )
        return [SqsDelivery(self, raw) for raw in reply.get("Messages", ())]

    def _end(self, delivery: SqsDelivery) -> None:
        with self._lock:
            self._unfinished.pop(delivery.raw_id, None)


class SqsPublisher:
    """Sends to a queue; a FIFO queue deduplicates by the message's id for five minutes and keeps order by its key.

    Messages without a key are groups of their own, without an order and without waits between messages.

    Raises:
        ConfigurationMalformed: the queue's URL or the endpoint is none.
    """

    def __init__(self, place: SqsPlace) -> None:
        self._queue = _Queue(place)
        self._is_fifo = place.queue_url.endswith(".fifo")
        self._limit: int | None = None

    @property
    def url(self) -> str:
        return self._queue.where

    @property
    def max_bytes(self) -> int:
        """Three quarters, as base64 takes the rest, of the queue's limit without the share of headers."""
        return (self._queue_limit() - self._header_bytes()) // 4 * 3

    def check(self) -> None:
        """See `isthmus.events.broker.Reachable.check`."""
        self._queue.attributes(["MaximumMessageSize"])

    def publish(self, message: Message) -> None:
        """See `isthmus.events.broker.Publisher.publish`.

        Raises:
            MessageTooLarge: also for headers beyond their share, 16 KiB.
        """
        check_size(message, self.max_bytes)
        body, encoding = encoded(message.body)
        attributes = _attributes(dict(message.headers) | {_ID_HEADER: message.id})
        if encoding:
            attributes[_ENCODING] = _string(encoding)
        size = sum(len(n.encode()) + len("String") + len(a["StringValue"].encode()) for n, a in attributes.items())
        if size > self._header_bytes():
            raise MessageTooLarge(
                f"{size} bytes of headers exceed the limit of {self._header_bytes()}",
                bytes=size,
                limit=self._header_bytes(),
            )
        fifo = {}
        if self._is_fifo:
            fifo = {
                "MessageDeduplicationId": storable(message.deduplication_id),
                "MessageGroupId": storable(message.key or message.id),
            }
        self._queue.call("send_message", MessageBody=body, MessageAttributes=attributes, **fifo)

    def close(self) -> None:
        """Disconnect."""
        self._queue.close()

    def _header_bytes(self) -> int:
        return min(_HEADER_BYTES, self._queue_limit() // 4)

    def _queue_limit(self) -> int:
        if self._limit is None:
            try:
                self._limit = int(self._queue.attributes(["MaximumMessageSize"]).get("MaximumMessageSize", 0))
            except BrokerUnavailable:
                return _DEFAULT_LIMIT
            except BrokerRefused:  # the right to send does not include the right to read attributes
                self._limit = 0
            self._limit = self._limit or _DEFAULT_LIMIT
        return self._limit


class _Queue:
    """A queue's API; botocore's errors become errors of brokers."""

    def __init__(self, place: SqsPlace) -> None:
        self._url, self.where = place.queue_url, where_of(place)
        self._was_there = False
        session = boto3.session.Session()  # the default session is not safe for threads
        match = _REGION.match(place.queue_url)
        region = place.region or (match[1] if match else None) or session.region_name or _DEFAULT_REGION
        try:
            self._client: Any = session.client(
                "sqs", endpoint_url=place.endpoint or None, region_name=region, config=_CONFIG
            )
        except (ValueError, exceptions.BotoCoreError) as e:
            raise ConfigurationMalformed(f"{self.where}: {e}", where="endpoint") from e

    def call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        with self._errors():
            reply: dict[str, Any] = getattr(self._client, operation)(QueueUrl=self._url, **arguments)
            self._was_there = True
            return reply

    def attributes(self, names: Sequence[str]) -> Mapping[str, str]:
        reply = self.call("get_queue_attributes", AttributeNames=list(names))
        return dict(reply.get("Attributes", {}))

    def close(self) -> None:
        self._client.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except exceptions.ClientError as e:
            raise self._error(BrokerUnavailable if self._is_transient(e) else BrokerRefused, e) from e
        except (
            exceptions.NoCredentialsError,
            exceptions.PartialCredentialsError,
            exceptions.CredentialRetrievalError,
            exceptions.ParamValidationError,
        ) as e:
            raise self._error(BrokerRefused, e) from e
        except exceptions.BotoCoreError as e:  # connections, time-outs, replies that are none of SQS
            raise self._error(BrokerUnavailable, e) from e

    def _is_transient(self, error: exceptions.ClientError) -> bool:
        code = error.response.get("Error", {}).get("Code", "")
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        # A queue that never was there is a wrong name; a queue that was may be made again.
        return code in _TRANSIENT or status >= 500 or (self._was_there and code in _NO_QUEUE)

    def _error(self, kind: type[EventError], error: Exception) -> EventError:
        return kind(f"{self.where}: {str(error)[:300]}", broker=self.where)


def encoded(body: bytes) -> tuple[str, str]:
    """A body in the form for SQS, and its encoding: empty for a text."""
    if not body:
        return "-", _EMPTY  # SQS takes no empty body
    try:
        text = body.decode()
    except UnicodeDecodeError:
        text = ""
    if not text or _NOT_TEXT.search(text):
        return base64.b64encode(body).decode(), _BASE64
    return text, ""


def message_of(queue_name: str, raw: Mapping[str, Any]) -> Message:
    """The message that SQS delivered; text attributes are headers."""
    attributes = raw.get("MessageAttributes", {})
    texts = {_text(name).lower(): _text(a["StringValue"]) for name, a in attributes.items() if "StringValue" in a}
    encoding = texts.pop(_ENCODING, "")
    packed = texts.pop(_HEADERS, "")
    headers = texts | _json_headers(packed)
    sent_ms = float(raw.get("Attributes", {}).get("SentTimestamp", 0))
    return Message(
        _decoded(str(raw.get("Body", "")), encoding),
        idempotency_key(headers, str(raw["MessageId"])),
        queue_name,
        headers,
        key=str(raw.get("Attributes", {}).get("MessageGroupId", "")),
        published=sent_ms / 1000,
    )


def _decoded(body: str, encoding: str) -> bytes:
    if encoding == _EMPTY:
        return b""
    if encoding == _BASE64:
        with suppress(binascii.Error, ValueError):  # else another producer's text under our attribute
            return base64.b64decode(body, validate=True)
    return body.encode(errors="replace")


def _attributes(headers: Mapping[str, str]) -> dict[str, dict[str, str]]:
    is_plain = len(headers) <= _MAX_ATTRIBUTES and all(
        _ATTRIBUTE.fullmatch(name) and value and not _NOT_TEXT.search(value) for name, value in headers.items()
    )
    return {n: _string(v) for n, v in headers.items()} if is_plain else {_HEADERS: _string(json.dumps(headers))}


def _json_headers(text: str) -> dict[str, str]:
    try:
        headers = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return {_text(name).lower(): _text(value) for name, value in headers.items()} if isinstance(headers, dict) else {}


def _text(value: object) -> str:
    """A text that can be encoded: JSON may hold halves of characters."""
    return str(value).encode(errors="replace").decode()


def _string(value: str) -> dict[str, str]:
    return {"DataType": "String", "StringValue": value}
