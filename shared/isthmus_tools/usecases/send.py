"""Sending files to the queue that a trigger reads, by reference where they are too large for its broker."""

from __future__ import annotations

import hashlib
import mimetypes
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from isthmus.errors import IsthmusError, MessageTooLarge, RequestMalformed
from isthmus.events.broker import Publisher
from isthmus.events.claims import ClaimStore
from isthmus.events.configuration import TriggerConfiguration
from isthmus.events.intake import writable
from isthmus.events.message import CONTENT_TYPE, FILE, Message, storable
from isthmus.events.open import open_publisher
from isthmus.events.stores.open import open_claims
from isthmus.settings import RegistrySettings

WILDCARD_LEVEL = "file"
"""The level of a subject or topic in place of a wildcard: photos.* is read, photos.file is written."""


@dataclass(frozen=True, kw_only=True)
class SendRequest:
    """Files to send to the source of a trigger's configuration; `settings` have secrets and the S3 server.

    A message's id is made of its file's name and content: a file that is sent again is one message. `key` is what
    order is kept by, `headers` go along with each message.
    """

    configuration: TriggerConfiguration
    settings: RegistrySettings
    files: Iterable[Path]
    headers: Mapping[str, str] = field(default_factory=dict)
    key: str = ""


class SentFile(NamedTuple):
    """A file that was sent, or its error. Units: `size` is the file's bytes; `by_claim` where a reference travelled."""

    file: str
    id: str = ""
    size: int = 0
    by_claim: bool = False
    error: IsthmusError | None = None


def send_files(request: SendRequest) -> Iterator[SentFile]:
    """Send each file and wait until the broker has it; a file that cannot be read or is too large is its error.

    Raises:
        BrokerUnavailable, BrokerRefused, ConfigurationMalformed, ResultStoreUnavailable: no further file can be sent.
    """
    claims = open_claims(request.configuration.claims, request.settings)
    source = request.configuration.source
    publisher = open_publisher(writable(source, WILDCARD_LEVEL), request.settings, read_by=source)
    try:
        for file in request.files:
            try:
                yield _send(file, request, publisher, claims)
            except (MessageTooLarge, RequestMalformed) as e:
                yield SentFile(str(file), error=e)
    finally:
        publisher.close()


def _send(file: Path, request: SendRequest, publisher: Publisher, claims: ClaimStore | None) -> SentFile:
    largest = publisher.max_bytes if claims is None else max(publisher.max_bytes, claims.max_bytes)
    try:
        # A file of any size is refused before it is in memory.
        _check_size(file, file.stat().st_size, largest, claims)
        # Devices and growing files have another size than they state.
        with file.open("rb") as opened:
            body = opened.read(largest + 1)
        _check_size(file, len(body), largest, claims)
    except OSError as e:
        raise RequestMalformed(f"{file} cannot be read: {e.strerror}") from e
    content_type = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
    digest = hashlib.sha256(os.fsencode(file.name) + b"\0" + body).hexdigest()
    headers = {**request.headers, CONTENT_TYPE: content_type, FILE: quote(os.fsencode(file.name))}
    message = Message(body, storable(f"file-{digest}"), publisher.url, headers, request.key)
    by_claim = claims is not None and len(body) > publisher.max_bytes
    publisher.publish(claims.shortened(message) if claims is not None and by_claim else message)
    return SentFile(str(file), message.id, len(body), by_claim)


def _check_size(file: Path, size: int, largest: int, claims: ClaimStore | None) -> None:
    if size > largest:
        raise MessageTooLarge(
            f"{file} has {size} bytes; {largest} are taken",
            bytes=size,
            limit=largest,
            hint="" if claims else "configure an object store for large bodies: [claims] of the configuration",
        )
