"""The interface of record stores: small values with versions, on which several processes agree.

Implementations: SQLite (a single machine), JetStream's key-value store, S3 by conditional writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

MAX_RECORD_BYTES = 256 * 2**10
"""A record with an inline result; NATS allows 1 MB by default, larger results go by reference (claim check)."""


class Stored(NamedTuple):
    """A value and its version; every write changes the version."""

    value: bytes
    version: str


class RecordStore(Protocol):
    """Values by key, each written only over the expected version.

    A write is durable once the call returns. With `durable=False` a write survives the death of every process, but not
    of the machine: a store on a disk saves the wait for the disk; other stores make no difference.

    Keys are as `isthmus.events.message.storable` makes them. Every method raises ResultStoreUnavailable where the store
    does not answer.
    """

    @property
    def url(self) -> str:
        """The name of the store in messages to people, without credentials."""
        ...

    def get(self, key: str) -> Stored | None:
        """The value of `key`; None where absent or expired."""
        ...

    def create(self, key: str, value: bytes, *, durable: bool = True) -> str | None:
        """Write unless `key` exists; the version, or None where `key` exists."""
        ...

    def update(self, key: str, value: bytes, version: str, *, durable: bool = True) -> str | None:
        """Replace the value written as `version`; the new version, or None where another write was first."""
        ...

    def delete(self, key: str, version: str) -> bool:
        """Remove the value written as `version`; False where another write was first."""
        ...

    def keys(self) -> Iterator[str]:
        """All keys, in no order."""
        ...

    def sweep(self, older_than_s: float) -> int:
        """Remove records whose last write is more than `older_than_s` seconds old; the number of removed records."""
        ...

    def close(self) -> None:
        """Release connections and files."""
        ...
