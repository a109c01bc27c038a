"""CloudEvents 1.0 over HTTP: attributes and data in both content modes, and the event of a response.

Source: CloudEvents specification 1.0.2; HTTP protocol binding 1.0.2; the package `cloudevents` checks attributes.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from cloudevents.core.bindings.http import HTTPMessage, from_binary, to_binary
from cloudevents.core.exceptions import BaseCloudEventException
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent

from isthmus.errors import EventMalformed, MediaUnsupported

STRUCTURED = "application/cloudevents+json"
_BATCH = "application/cloudevents-batch+json"
_PREFIX = "ce-"
# Attributes become headers of the response and facts of logs.
_MAX_ATTRIBUTE = 1024
_REQUIRED = ("id", "source", "type", "specversion")
_FORMAT = JSONFormat()
RESPONSE_TYPE = "io.isthmus.prediction"


class HeaderItems(Protocol):
    """HeaderItems of a request."""

    def items(self) -> Iterable[tuple[str, str]]:
        """Names, in any case, and values."""
        ...


@dataclass(frozen=True)
class ReceivedEvent:
    """An event's attributes, as texts, and its data; `body` is None where the data is the request's body itself."""

    attributes: Mapping[str, str]
    body: bytes | None = None

    @property
    def content_type(self) -> str:
        """The media type of the data; empty where the event states none."""
        return self.attributes.get("datacontenttype", "")

    def response_headers(self, call_id: str, source: str) -> dict[str, str]:
        """Attributes of the response as an event in binary content mode; its subject is this event's id."""
        event = CloudEvent(
            {
                "id": call_id,
                "source": source,
                "type": RESPONSE_TYPE,
                "specversion": "1.0",
                "time": datetime.now(UTC),
                "subject": self.attributes["id"],
            },
            None,
        )
        return to_binary(event, _FORMAT).headers


def read_binary(headers: HeaderItems) -> ReceivedEvent | None:
    """The event in binary content mode: attributes are headers `ce-…`; None without such headers.

    Raises:
        EventMalformed: a required attribute is missing, or a value breaks its type.
    """
    named = {name.lower(): value for name, value in headers.items() if name.lower().startswith(_PREFIX)}
    # Proxies add headers of their own under any prefix; every event has these two.
    if not named.keys() & {"ce-specversion", "ce-type"}:
        return None
    _check_required({name.removeprefix(_PREFIX): value for name, value in named.items()})
    try:
        event = from_binary(HTTPMessage(named, b""), _FORMAT, CloudEvent)
    except (BaseCloudEventException, ValueError, OverflowError) as e:
        raise _refused(e) from e
    return ReceivedEvent(_texts(event.get_attributes(), "ce-time" in named))


def read_structured(document: Mapping[str, Any]) -> ReceivedEvent | None:
    """The event in structured content mode, from its JSON object; None where the object is no event.

    Data in JSON is encoded again; `data_base64` is decoded.

    Raises:
        EventMalformed: a required attribute is missing, a value breaks its type, or the event has no data.
    """
    if not ("specversion" in document and document.keys() & {"type", "source", "data", "data_base64"}):
        return None
    _check_required(document)
    attributes = {k: v for k, v in document.items() if k not in ("data", "data_base64")}
    try:
        if "time" in attributes:
            attributes["time"] = datetime.fromisoformat(str(attributes["time"]))
        event = CloudEvent(attributes, None)
    except (BaseCloudEventException, ValueError, TypeError, OverflowError) as e:
        raise _refused(e) from e
    return ReceivedEvent(_texts(event.get_attributes(), "time" in attributes), _data(document))


def check_no_batch(content_type: str) -> None:
    """Refuse events in batched content mode; the HTTP binding makes this mode optional.

    Raises:
        MediaUnsupported: application/cloudevents-batch+json.
    """
    if content_type.partition(";")[0].strip().lower() == _BATCH:
        raise MediaUnsupported(
            "events in batched content mode are not taken",
            accepted=[STRUCTURED, "binary content mode (ce-… headers)"],
            hint="send each event in a request of its own",
        )


def _check_required(attributes: Mapping[str, Any]) -> None:
    # The package generates an absent id, since the package also writes events.
    for name in _REQUIRED:
        if not attributes.get(name):
            raise EventMalformed(
                f"the event has no {name}", attribute=name, hint=f"a CloudEvent has {', '.join(_REQUIRED)}"
            )
    if (version := attributes["specversion"]) != "1.0":
        raise EventMalformed(f"the event's specversion is {str(version)[:20]!r}; 1.0 is taken", attribute="specversion")


def _refused(error: Exception) -> EventMalformed:
    """The error with the first attribute at fault."""
    faults = getattr(error, "errors", {})
    attribute = next(iter(faults), "")
    reason = f"{faults[attribute][0]}" if attribute else str(error)
    return EventMalformed(
        f"the event is no CloudEvent 1.0: {reason[:200]}",
        attribute=str(attribute)[:80],
    )


def _texts(attributes: Mapping[str, Any], has_time: bool) -> dict[str, str]:
    """Attributes as texts; without a time of its own, the event has none, though the package adds the present one."""
    if not has_time:
        attributes = {name: value for name, value in attributes.items() if name != "time"}
    texts = {k: v.isoformat() if isinstance(v, datetime) else str(v) for k, v in attributes.items() if v is not None}
    for name, text in texts.items():
        if len(text) > _MAX_ATTRIBUTE or not text.isprintable():
            raise EventMalformed(
                f"the event's attribute {name[:40]} is not printable, or longer than {_MAX_ATTRIBUTE} characters",
                attribute=name[:80],
            )
    return texts


def _data(document: Mapping[str, Any]) -> bytes:
    if "data_base64" in document:
        try:
            return base64.b64decode(document["data_base64"], validate=True)
        except (binascii.Error, ValueError, TypeError) as e:
            raise EventMalformed("the event's data_base64 is no base64", attribute="data_base64") from e
    data = document.get("data")
    if data is None:
        raise EventMalformed("the event has no data", attribute="data", hint="send a photo in data_base64")
    try:
        return data.encode() if isinstance(data, str) else json.dumps(data).encode()
    except UnicodeEncodeError as e:
        raise EventMalformed("the event's data holds half a surrogate pair", attribute="data") from e
