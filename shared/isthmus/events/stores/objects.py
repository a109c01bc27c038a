"""Records as objects, by conditional writes: a store that triggers on several machines share."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

from isthmus.errors import (
    ConditionsIgnored,
    ConfigurationMalformed,
    Missing,
    RegistryError,
    RegistryMissing,
    ResultStoreUnavailable,
)
from isthmus.events.records import MAX_RECORD_BYTES, Stored
from isthmus.registry import RemoteStore, RetryPolicy

_PREFIX = "records"
# An ETag is a hash of the content on most servers: a nonce gives equal values different versions.
_NONCE_BYTES = 16
# Removed records stay as empty objects until a sweep: S3 has no conditional removal everywhere.
_REMOVED = b""


class ObjectRecords:
    """A `RecordStore` in a store that enforces conditional writes; see there for the methods.

    Raises:
        ConfigurationMalformed: the server ignores conditions, and would lose records.
        ResultStoreUnavailable: the server does not answer.
    """

    def __init__(self, store: RemoteStore, retry_policy: RetryPolicy | None = None) -> None:
        self._store = store
        self._retry = retry_policy or RetryPolicy()
        self._check_conditions()

    @property
    def url(self) -> str:
        """See `RecordStore`."""
        return self._store.url

    def get(self, key: str) -> Stored | None:
        """See `RecordStore`."""
        stored = self._read(key)
        return None if stored is None or stored.value == _REMOVED else stored

    def create(self, key: str, value: bytes, *, durable: bool = True) -> str | None:
        """See `RecordStore`."""
        if (version := self._replace(key, value, "")) is not None:
            return version
        stored = self._read(key)
        return self._replace(key, value, stored.version) if stored is not None and stored.value == _REMOVED else None

    def update(self, key: str, value: bytes, version: str, *, durable: bool = True) -> str | None:
        """See `RecordStore`."""
        return self._replace(key, value, version)

    def delete(self, key: str, version: str) -> bool:
        """See `RecordStore`."""
        return self._replace(key, _REMOVED, version) is not None

    def keys(self) -> Iterator[str]:
        """See `RecordStore`."""
        with self._translated():
            listed = self._listed()
        yield from (key for key, size, _ in listed if size > _NONCE_BYTES)

    def sweep(self, older_than_s: float) -> int:
        """See `RecordStore`; by the server's clock."""
        before, removed = time.time() - older_than_s, 0
        with self._translated():
            for key, size, written in self._listed():
                # Between this look and the removal lie milliseconds, between two writes of an old record its age.
                if written < before:
                    self._store.delete(f"{_PREFIX}/{key}")
                    removed += size > _NONCE_BYTES
        return removed

    def close(self) -> None:
        """See `RecordStore`."""
        self._store.close()

    def _read(self, key: str) -> Stored | None:
        with self._translated():
            found = self._found(key)
        return None if found is None else Stored(found[0][_NONCE_BYTES:], found[1])

    def _found(self, key: str) -> tuple[bytes, str] | None:
        try:
            return self._retry(
                lambda: self._store.get_tagged(f"{_PREFIX}/{key}", max_bytes=MAX_RECORD_BYTES + _NONCE_BYTES)
            )
        except RegistryMissing:
            raise
        except Missing:
            return None

    def _replace(self, key: str, value: bytes, version: str) -> str | None:
        data = uuid4().bytes + value
        with self._translated():
            etag = self._retry(lambda: self._store.replace(f"{_PREFIX}/{key}", data, version))
            if etag is not None:
                return etag
            # The first try may have been stored although its response was lost; the nonce tells.
            found = self._found(key)
        return found[1] if found is not None and found[0] == data else None

    def _listed(self) -> list[tuple[str, int, float]]:
        try:
            entries = self._store.entries(f"{_PREFIX}/")
        except Missing:
            return []
        return [(e.key.removeprefix(f"{_PREFIX}/"), e.size, e.written.timestamp()) for e in entries]

    def _check_conditions(self) -> None:
        try:
            with self._translated():
                self._store.require_conditions()
        except ResultStoreUnavailable as e:
            if not isinstance(e.__cause__, ConditionsIgnored):
                raise
            raise ConfigurationMalformed(
                f"{self.url} does not enforce conditional writes, so that two triggers could lose each other's records",
                where="records.url",
                hint="keep records in nats://HOST/BUCKET or sqlite:PATH",
            ) from e

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except RegistryError as e:
            raise ResultStoreUnavailable(f"{self.url}: {e.message}", store=self.url) from e
