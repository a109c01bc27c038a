"""Notifications of object stores about written objects, bare or in the envelopes of queues and webhooks.

Source: "Event message structure" (Amazon S3), MinIO's bucket notifications (webhook, NATS, MQTT: the same records),
Amazon SNS's HTTP and SQS envelopes, Lambda's batches of SQS and SNS, EventBridge's "Object Created".
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_plus

from isthmus.errors import EventMalformed

# SNS in SQS in a Lambda batch is three deep; a longer chain is no notification.
_MAX_WRAPPINGS = 4
_MAX_NAME = 1024
"""S3's limit on the length of a key, in bytes."""


@dataclass(frozen=True)
class WrittenObject:
    """An object that was written. Units: `size` in bytes, None where the notification does not say."""

    bucket: str
    key: str
    size: int | None = None

    @property
    def url(self) -> str:
        """s3://BUCKET/KEY, for messages."""
        return f"s3://{self.bucket}/{self.key}"


@dataclass(frozen=True)
class Notification:
    """The written objects, and the names of other events: removals, test events."""

    objects: tuple[WrittenObject, ...]
    ignored: tuple[str, ...] = ()


def read_notification(document: Mapping[str, Any]) -> Notification | None:
    """The notification in a JSON object; None where the object is none.

    Raises:
        EventMalformed: a notification without a bucket or key.
    """
    objects: list[WrittenObject] = []
    ignored: list[str] = []
    events = list(_events(document, 0))
    if not events:
        return None
    for event in events:
        if isinstance(event, WrittenObject):
            objects.append(event)
        else:
            ignored.append(event)
    return Notification(tuple(objects), tuple(ignored))


def _events(document: Any, depth: int) -> Iterator[WrittenObject | str]:
    """Objects written, and the names of events that tell of none; nothing for another kind of document."""
    if not isinstance(document, Mapping) or depth > _MAX_WRAPPINGS:
        return
    if document.get("Event") == "s3:TestEvent":
        yield "s3:TestEvent"
    elif document.get("Type") == "Notification" and "TopicArn" in document:
        yield from _wrapped(document.get("Message"), depth)
    elif document.get("source") == "aws.s3" and isinstance(detail := document.get("detail"), Mapping):
        kind = _kind(document.get("detail-type"))
        # EventBridge writes keys literally; notifications of S3 itself quote keys as in a form.
        yield _object(detail, unquoted=True) if kind == "Object Created" else kind
    elif isinstance(records := document.get("Records"), list):
        for record in records:
            yield from _record(record, depth)


def _record(record: Any, depth: int) -> Iterator[WrittenObject | str]:
    if not isinstance(record, Mapping):
        return
    if isinstance(s3 := record.get("s3"), Mapping):
        kind = _kind(record.get("eventName")).removeprefix("s3:")
        yield _object(s3, unquoted=False) if kind.startswith("ObjectCreated") else kind
    elif isinstance(sns := record.get("Sns"), Mapping):
        yield from _wrapped(sns.get("Message"), depth)
    elif record.get("eventSource") == "aws:sqs":
        yield from _wrapped(record.get("body"), depth)


def _kind(name: Any) -> str:
    """An event's name as responses and logs may have it."""
    return name[:80] if isinstance(name, str) and name.isprintable() else ""


def _is_text(text: str) -> bool:
    """Whether UTF-8 has the text: JSON's escapes may hold half a surrogate pair."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _wrapped(text: Any, depth: int) -> Iterator[WrittenObject | str]:
    """The events in a text of JSON within an envelope."""
    if not isinstance(text, str):
        return
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return
    yield from _events(document, depth + 1)


def _object(s3: Mapping[str, Any], *, unquoted: bool) -> WrittenObject:
    bucket, item = s3.get("bucket"), s3.get("object")
    name = bucket.get("name") if isinstance(bucket, Mapping) else None
    key = item.get("key") if isinstance(item, Mapping) else None
    if not (isinstance(name, str) and isinstance(key, str) and name and key):
        raise EventMalformed(
            "the notification of an object store names no bucket or no key", attribute="s3.bucket.name, s3.object.key"
        )
    if not unquoted:
        key = unquote_plus(key[: 3 * _MAX_NAME + 1])  # quoted, a byte is three long
    # Any printable or control character may be in a key: names of screenshots hold narrow spaces.
    if max(len(text.encode("utf-8", "replace")) for text in (name, key)) > _MAX_NAME or not _is_text(name + key):
        raise EventMalformed("the notification's bucket or key is too long or no text", attribute="s3.object.key")
    if not {".", ".."}.isdisjoint(key.split("/")):
        # Servers and proxies that resolve dots would read another bucket than the one that was checked.
        raise EventMalformed("the notification's key has the part . or ..", attribute="s3.object.key")
    size = item.get("size") if isinstance(item, Mapping) else None
    whole = isinstance(size, int) and not isinstance(size, bool) and size >= 0
    return WrittenObject(name, key, size if whole else None)
