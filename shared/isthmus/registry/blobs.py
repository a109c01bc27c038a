"""The interface of blob stores.

A store makes one attempt at each request and raises Isthmus errors only: `Missing`, `Denied`, `Corrupt` for truncated
content, `RegistryUnavailable` for transient failures. `RetryPolicy` repeats single requests; methods of several
requests take a retry budget and repeat each request by itself.
"""

from __future__ import annotations

import builtins
import re
import secrets
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from isthmus.errors import ConditionsIgnored, Corrupt, Denied, Missing, RegistryError, RegistryMissing, StoreFull
from isthmus.registry.retry_policy import RetryPolicy
from isthmus.retries import RetryBudget

_KEY_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")
"""File systems are the narrower limit: S3 would accept more characters and longer names."""
_MAX_KEY = 900
"""S3 allows 1,024 bytes; the rest is for the prefix of the registry."""
PROBES = "leases/probes/"
"""Where `probe_conditions` writes."""


@dataclass(frozen=True)
class StoredKey:
    """A key in a store, the length of its content in bytes, and the time of its last write by the store's clock."""

    key: str
    size: int
    written: datetime


class BlobStore(Protocol):
    """Bytes under keys such as `blobs/sha256/<hex>`; thread-safe and process-safe."""

    @property
    def url(self) -> str:
        """The name of this store in messages: a folder path, or an address such as s3://BUCKET/PREFIX."""
        ...

    def get(self, key: str, *, max_bytes: int) -> bytes:
        """All bytes of `key`.

        Raises:
            Missing: no such key or registry.
            RegistryError: longer than `max_bytes`; the rest was not read.
        """
        ...

    def get_tagged(self, key: str, *, max_bytes: int) -> tuple[bytes, str]:
        """All bytes of `key`, and the store's tag of this content (an ETag or digest) for `put_if_match`.

        Raises:
            As `get`.
        """
        ...

    def read(self, key: str, start: int, stop: int) -> bytes:
        """The bytes of `key` in the half-open range `start` to `stop`.

        Raises:
            Missing: no such key.
            Corrupt: `key` ends before `stop`.
        """
        ...

    def size(self, key: str) -> int | None:
        """Length in bytes; None if the key is absent."""
        ...

    def exists(self, key: str) -> bool:
        """Whether `key` is present."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Store `data` atomically: a reader gets either the previous bytes or all of the new ones."""
        ...

    def put_file(self, key: str, path: Path, budget: RetryBudget | None = None) -> None:
        """Stream a file to `key`, atomically as `put` does; each request has its own retries."""
        ...

    def put_if_absent(self, key: str, data: bytes, budget: RetryBudget | None = None) -> bool:
        """Store `data` unless `key` exists, and return whether this call stored the data; each request has its own
        retries.
        """
        ...

    def put_if_match(self, key: str, data: bytes, tag: str, budget: RetryBudget | None = None) -> bool:
        """Replace the content of `key` if its tag is still `tag`, or, for an empty tag, if the key is absent.

        Each request has its own retries. A write whose response was lost is read back: the result is whether `key`
        holds `data` by this call's attempts, so that `data` should differ from all earlier content.

        Raises:
            ConditionsIgnored: the store cannot compare before it writes.
        """
        ...

    def require_conditions(self) -> None:
        """Refuse a store that does not enforce the conditions of `put_if_match`; tried once, by own writes.

        Raises:
            ConditionsIgnored: the store accepted a write whose condition was false.
        """
        ...

    def delete(self, key: str) -> None:
        """Remove `key`; no-op if the key is absent."""
        ...

    def list(self, prefix: str) -> builtins.list[str]:
        """All keys under `prefix` (empty, or ending with '/'), sorted; each request has its own retries.

        Raises:
            Missing: no such registry.
        """
        ...

    def entries(self, prefix: str) -> builtins.list[StoredKey]:
        """As `list`, with the length and time of each key; keys removed meanwhile are left out.

        Raises:
            Missing: no such registry.
        """
        ...


class RemoteStore(BlobStore, Protocol):
    """A store on a server, whose connections can be closed."""

    def replace(self, key: str, data: bytes, tag: str) -> str | None:
        """One attempt of `put_if_match`: the tag of what was stored, or None where the condition failed."""
        ...

    def close(self) -> None:
        """Close idle connections."""
        ...


def replace_retried(
    store: RemoteStore, retry_policy: RetryPolicy, key: str, data: bytes, tag: str, budget: RetryBudget | None
) -> bool:
    """`put_if_match` by repeated attempts of `replace`."""
    return retry_policy.conditional(
        lambda: store.replace(key, data, tag) is not None,
        lambda: store.get(key, max_bytes=max(len(data), 2**20)) == data,
        budget,
    )


def probe_conditions(store: BlobStore, retry_policy: RetryPolicy) -> None:
    """Write to a key of this call's own with true and false conditions.

    Raises:
        ConditionsIgnored: a write with a false condition was accepted.
    """
    key = f"{PROBES}{secrets.token_hex(8)}"
    try:
        created = store.put_if_match(key, b"1", "") and not store.put_if_match(key, b"2", "")
        _, tag = retry_policy(lambda: store.get_tagged(key, max_bytes=16))
        if not (created and store.put_if_match(key, b"3", tag)) or store.put_if_match(key, b"4", tag):
            raise conditions_ignored(store.url)
    finally:
        # Publishers may lack the right to delete; a collection removes what is left.
        with suppress(RegistryError):
            store.delete(key)


def check_key(key: str) -> str:
    """`key`, if no part of the path can leave the store.

    Parts hold at most 255 letters, digits, '.', '_' and '-', and none starts with a dot.

    Raises:
        RegistryError: any other key.
    """
    if len(key) <= _MAX_KEY and all(_KEY_PART.fullmatch(part) for part in key.split("/")):
        return key
    raise RegistryError(f"{key[:100]!r} is not a key of a registry", blob=key[:100])


def check_range(start: int, stop: int) -> None:
    """Refuse a reversed or negative byte range.

    Raises:
        RegistryError: `start` is negative or after `stop`.
    """
    if not 0 <= start <= stop:
        raise RegistryError(f"{start}..{stop} is not a range of bytes")


def missing_blob(registry: str, key: str) -> Missing:
    """The error for an absent key."""
    return Missing(f"{registry} has no {key}", kind="blob", name=key, exists=[], registry=registry, blob=key)


def missing_registry(registry: str) -> RegistryMissing:
    """The error for an absent folder or bucket."""
    return RegistryMissing(
        f"there is no registry at {registry}",
        kind="registry",
        name=registry,
        exists=[],
        registry=registry,
        hint="isthmus import makes the folder, a bucket must be there; --registry or ISTHMUS_REGISTRY names another"
        " one, in a function the setting registry",
    )


def conditions_ignored(registry: str) -> ConditionsIgnored:
    """The error for a store that would let two writers overwrite one another."""
    return ConditionsIgnored(
        f"{registry} does not compare before it writes, so that two publishers could lose one another's version",
        registry=registry,
        hint="publish to a folder, or to a server with conditional writes (AWS, MinIO, R2, Ceph); reading works here",
    )


def store_full(registry: str, key: str) -> StoreFull:
    """The error for a full disk; what was begun is removed."""
    return StoreFull(
        f"the disk of {registry} is full; {key} was not written",
        registry=registry,
        blob=key,
        hint="free space there (isthmus gc lists content that no version reaches), then run the same command again",
    )


def clock_refused(registry: str, key: str) -> Denied:
    """The error for a request whose signature is of another time than the server's."""
    return Denied(
        f"{registry} refuses this machine's clock for {key}",
        hint="set the clock (NTP): a request is refused where it differs by more than some minutes",
        registry=registry,
        blob=key,
    )


def too_long(registry: str, key: str, max_bytes: int) -> RegistryError:
    """The error for content beyond the bound of its reader."""
    return RegistryError(f"{key} in {registry} exceeds {max_bytes} bytes", registry=registry, blob=key, limit=max_bytes)


def ended_early(registry: str, key: str, got: int, expected: int) -> Corrupt:
    """The error for content shorter than the requested range."""
    return Corrupt(
        f"{registry} gave {got} of {expected} bytes of {key}", registry=registry, blob=key, got=got, wanted=expected
    )
