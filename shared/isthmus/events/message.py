"""A message as every broker delivers it, and its idempotency key."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self
from urllib.parse import quote

# Ids become keys of stores, headers and log lines.
MAX_ID_CHARACTERS = 128
CONTENT_TYPE = "content-type"
FILE = "x-isthmus-file"
"""Header with the name of the file that was sent, as in a URL; results have it too."""
CONTINUATION = "application/vnd.isthmus.continuation"
"""Media type of a request that the router finishes later. Source: docs/reference/continuation.md."""
REASON = "x-isthmus-reason"
"""Header of dead letters. A dead letter that is sent to the source again begins anew."""
DEATHS = "x-isthmus-deaths"
"""Header of dead letters: how often the message has been one."""
# In order of precedence: the event's own identity survives forwarding; the id of a queue does not.
# Source: docs/how-to/events.md, "The id of a message".
_ID_HEADERS = (
    "idempotency-key",
    "nats-msg-id",
    "x-sqs-message-id",
    "x-rabbitmq-msg-id",
    "x-call-id",
)
_KAFKA = ("x-kafka-topic", "x-kafka-partition", "x-kafka-offset")
# Control characters, halves of characters, and those that Unicode keeps for processes' own use.
_NOT_PRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
_CLOUDEVENT = ("ce-source", "ce-id")


@dataclass(frozen=True)
class Message:
    """A body with headers, from the place `source`: a subject, topic, queue or stream.

    `headers` have lower-case names. `id` is the idempotency key: two deliveries of the same id are the same message.
    Messages with equal `key` are processed in order where the configuration asks for order. Units: `published` is
    seconds since the epoch by the broker's clock, 0.0 if unknown.
    """

    body: bytes
    id: str
    source: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    key: str = ""
    published: float = 0.0

    @property
    def content_type(self) -> str:
        """The media type, without parameters, in lower case; empty where the message states none."""
        return self.headers.get(CONTENT_TYPE, "").partition(";")[0].strip().lower()

    @property
    def deaths(self) -> int:
        """How often the message has been a dead letter; a foreign text counts as once."""
        text = self.headers.get(DEATHS, "")
        if not text:
            return 0
        return int(text) if text.isascii() and text.isdigit() and len(text) < 4 else 1

    @property
    def deduplication_id(self) -> str:
        """What a broker deduplicates by: two dead letters of one message, each after a new start, are not the same."""
        return f"{self.id}.{self.deaths}" if self.deaths else self.id

    def with_body(self, body: bytes) -> Self:
        """The same message with another body."""
        return replace(self, body=body)


def idempotency_key(headers: Mapping[str, str], fallback: str) -> str:
    """The id of a message from its headers (lower-case names), else `fallback`, the broker's own message id.

    Source and id of a CloudEvent come first, then an Idempotency-Key, then the ids that OpenFaaS's connectors pass on.
    Ids with other characters than a key of a store allows, and long ones, are hashed.
    """
    for names in (_CLOUDEVENT, *((name,) for name in _ID_HEADERS), _KAFKA):
        parts = [headers.get(name, "") for name in names]
        if all(parts):
            return storable("/".join(parts) if len(parts) > 1 else parts[0])
    return storable(fallback)


def printable(text: str) -> str:
    """`text` as a header of any broker: characters that are not interchanged are percent-encoded.

    A line break would begin another header in NATS, and a control character ends the connection of MQTT.
    """
    return _NOT_PRINTABLE.sub(lambda match: quote(match[0], safe="", errors="replace"), text)


def storable(text: str) -> str:
    """`text` if valid as a store's key and as a header's value, else its SHA-256 as `sha256-<hex>`."""
    plain = text.isascii() and text.replace("-", "").replace("_", "").replace(".", "").isalnum()
    # A leading dot would hide a file, and `.` as a whole would be a folder.
    if plain and len(text) <= MAX_ID_CHARACTERS and not text.startswith("."):
        return text
    return f"sha256-{hashlib.sha256(text.encode(errors='backslashreplace')).hexdigest()}"
