"""The interface of record stores: small values with versions, by which several processes agree on a message.

Implementations: SQLite (one machine), JetStream's key-value store, S3 by conditional writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

MAX_RECORD_BYTES = 256 * 2**10
"""A record with an inline result; NATS allows 1 MB by default, larger results go by reference (claim check)."""


class Stored(NamedTuple):
    """A value and its version, which changes with every write."""

    value: bytes
    version: str


class RecordStore(Protocol):
    """Values by key, each written only where the version is the expected one.

    A write is durable once the call returns. With `durable=False` it survives the death of every process, and may be
    lost with the machine: a store on a disk then saves the wait for the disk; other stores make no difference.

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
        """Write unless `key` exists; the version, or None where it does."""
        ...

    def update(self, key: str, value: bytes, version: str, *, durable: bool = True) -> str | None:
        """Replace the value written as `version`; the new version, or None where another write was first."""
        ...

    def delete(self, key: str, version: str) -> bool:
        """Remove what was written as `version`; False where another write was first."""
        ...

    def keys(self) -> Iterator[str]:
        """All keys, in no order."""
        ...

    def sweep(self, older_than_s: float) -> int:
        """Remove what was written last more than `older_than_s` seconds ago; the number of removed records."""
        ...

    def close(self) -> None:
        """Release connections and files."""
        ...
