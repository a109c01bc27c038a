"""Claim check: a body that is too large for a transport goes to an object store, and a reference travels.

The reference is a small JSON document with the body's digest, size and expiry. The redeemer verifies digest and
size. Source: Hohpe and Woolf, "Enterprise Integration Patterns", Claim Check; docs/reference/claim-check.md.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from isthmus.artifacts.constraints import Count, matching
from isthmus.errors import (
    CacheFull,
    ClaimExpired,
    Corrupt,
    EventMalformed,
    MessageTooLarge,
    Missing,
    RegistryError,
    RegistryMissing,
    ResultStoreUnavailable,
)
from isthmus.events.message import CONTENT_TYPE as HEADER
from isthmus.events.message import Message
from isthmus.registry import BlobStore, RetryPolicy

CONTENT_TYPE = "application/vnd.isthmus.claim+json"
_FAMILY = "isthmus.claim/"
FORMAT = f"{_FAMILY}1"
MAX_CLAIM_BYTES = 2048
_PREFIX = "claims"
# Keys name the hour of their expiry: a sweep removes whole hours, and never an object that a later claim refers to.
_HOUR_S = 3600


class Claim(Struct, frozen=True, forbid_unknown_fields=True, tag_field="format", tag=FORMAT):
    """A reference to a stored body. Units: `size` in bytes, `expires` in seconds since the epoch."""

    digest: Annotated[str, matching("[0-9a-f]{64}")]
    size: Count
    expires: Annotated[int, Meta(ge=0, le=2**40)]
    content_type: Annotated[str, Meta(max_length=256)] = ""

    @property
    def key(self) -> str:
        """The object's key, below the store's prefix."""
        return f"{_PREFIX}/{self.expires // _HOUR_S}/{self.digest}"

    def encode(self) -> bytes:
        """The document that travels in place of the body."""
        return msgspec.json.encode(self)


def looks_like_claim(body: bytes | memoryview) -> bool:
    """Whether a body is a claim, of this version or another, by content: queues lose Content-Type."""
    if len(body) > MAX_CLAIM_BYTES or bytes(body[:1]) != b"{":
        return False
    try:
        document = json.loads(bytes(body))
    except (ValueError, RecursionError):
        return False
    return isinstance(document, dict) and str(document.get("format", "")).startswith(_FAMILY)


def parse_claim(data: bytes | memoryview) -> Claim:
    """Read a claim.

    Raises:
        EventMalformed: too long, another version, or a field that breaks its rule.
    """
    if len(data) > MAX_CLAIM_BYTES:
        raise EventMalformed(f"a claim of {len(data)} bytes; at most {MAX_CLAIM_BYTES}", attribute="format")
    try:
        return msgspec.json.decode(data, type=Claim)
    except msgspec.DecodeError as e:
        raise EventMalformed(f"the claim check is malformed: {e}", attribute="claim") from e


class ClaimStore:
    """Bodies in `store`, each kept at least `keep_s` seconds. Any thread may call; see `ResultObjects`.

    Units: max_bytes bounds a body, stored or redeemed.
    """

    def __init__(
        self,
        store: BlobStore,
        *,
        max_bytes: int,
        keep_s: float,
        retry_policy: RetryPolicy | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store, self.max_bytes, self._keep_s = store, max_bytes, keep_s
        self._retry = retry_policy or RetryPolicy()
        self._clock = clock

    @property
    def url(self) -> str:
        """The store's name in messages."""
        return self._store.url

    def deposit(self, body: bytes, content_type: str = "") -> Claim:
        """Store a body.

        Raises:
            MessageTooLarge: beyond `max_bytes`; nothing was stored.
            ResultStoreUnavailable: the store refuses the body.
        """
        if len(body) > self.max_bytes:
            raise MessageTooLarge(
                f"a body of {len(body)} bytes exceeds the {self.max_bytes} of the object store for large bodies",
                bytes=len(body),
                limit=self.max_bytes,
                hint="raise max_bytes of [claims], or send less",
            )
        # Whole hours: equal bodies of the same hour are the same object.
        expires = math.ceil((self._clock() + self._keep_s) / _HOUR_S) * _HOUR_S
        claim = Claim(hashlib.sha256(body).hexdigest(), len(body), expires, content_type[:256])
        try:
            self._retry(lambda: self._store.put(claim.key, body))
        except CacheFull as e:
            raise ResultStoreUnavailable(f"{self.url} is full: {e.message}", store=self.url) from e
        except RegistryError as e:
            raise ResultStoreUnavailable(f"{self.url}: {e.message}", store=self.url) from e
        return claim

    def shortened(self, message: Message) -> Message:
        """The message with a claim in place of its body; errors as `deposit`."""
        claim = self.deposit(message.body, message.content_type)
        return replace(message, body=claim.encode(), headers={**message.headers, HEADER: CONTENT_TYPE})

    def redeem(self, claim: Claim) -> bytes:
        """The body of a claim, verified.

        Raises:
            MessageTooLarge: the claim's size exceeds `max_bytes`; nothing was read.
            ClaimExpired: past its time, or the object is gone or another.
            ResultStoreUnavailable: the store does not answer.
        """
        if claim.size > self.max_bytes:
            raise MessageTooLarge(
                f"a claim of {claim.size} bytes; at most {self.max_bytes} are taken",
                bytes=claim.size,
                limit=self.max_bytes,
            )
        if claim.expires <= self._clock():
            raise ClaimExpired("the claim check has expired", reference=claim.key, expires=claim.expires)
        try:
            body = self._retry(lambda: self._store.read(claim.key, 0, claim.size))
        except RegistryMissing as e:  # a share that is not mounted: the object may be there
            raise ResultStoreUnavailable(f"{self.url}: {e.message}", store=self.url) from e
        except (Missing, Corrupt) as e:
            raise ClaimExpired("the object of the claim check is gone", reference=claim.key, registry=self.url) from e
        except RegistryError as e:
            raise ResultStoreUnavailable(f"{self.url}: {e.message}", store=self.url) from e
        if hashlib.sha256(body).hexdigest() != claim.digest:
            raise ClaimExpired("the object of the claim check is another than was stored", reference=claim.key)
        return body

    def put(self, body: bytes, content_type: str) -> str:
        """`deposit`; the claim as text."""
        return self.deposit(body, content_type).encode().decode()

    def get(self, reference: str) -> bytes:
        """`redeem` for the text of a claim.

        Raises:
            EventMalformed: the text is no claim. Others as `redeem`.
        """
        return self.redeem(parse_claim(reference.encode()))

    def sweep(self) -> int:
        """Remove the objects of past hours; their number.

        Raises:
            ResultStoreUnavailable: the store does not answer.
        """
        now, removed = self._clock() // _HOUR_S, 0
        try:
            for key in self._store.list(f"{_PREFIX}/"):
                hour = key.split("/")[1]
                if hour.isdigit() and int(hour) <= now:
                    self._store.delete(key)
                    removed += 1
        except Missing:  # nothing has been stored yet
            return removed
        except RegistryError as e:
            raise ResultStoreUnavailable(f"{self.url}: {e.message}", store=self.url) from e
        return removed
