"""Records in a key-value bucket of NATS JetStream: the store of several machines that share a broker."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar, cast
from urllib.parse import urlsplit

import nats.js.errors
from nats.aio.client import Client
from nats.js import JetStreamContext, api
from nats.js.kv import KeyValue

from isthmus.errors import BrokerRefused, BrokerUnavailable, ConfigurationMalformed, ResultStoreUnavailable
from isthmus.events.brokers.nats_connection import REQUEST_TIMEOUT_S, NatsConnection
from isthmus.events.records import MAX_RECORD_BYTES, Stored

_NAME_IN_USE = 10058  # JSStreamNameExistErr: the bucket exists with another lifetime
_HEADER_BYTES = 1024  # the server counts the headers of an update as well
_WRONG_REVISION = (10071, 10164)  # JSStreamWrongLastSequenceErr and its form without a number
T = TypeVar("T")


class JetStreamRecords:
    """A `RecordStore` in the bucket of `url`, nats://HOST:PORT/BUCKET; see there for the methods.

    The bucket is made where it is absent. The server removes a record `keep_s` seconds after its last write; a bucket
    that exists keeps its own lifetime. The server refuses values of more than MAX_RECORD_BYTES.

    Raises:
        ConfigurationMalformed: the URL names no bucket.
    """

    def __init__(self, url: str, keep_s: float, credentials: str = "") -> None:
        server, _, bucket = url.rpartition("/")
        if not urlsplit(server).netloc or not bucket.replace("-", "").replace("_", "").isalnum():
            raise ConfigurationMalformed(
                "a record store at NATS is nats://HOST:PORT/BUCKET; the bucket has letters, digits, - and _",
                where="records.url",
            )
        self._bucket, self._keep_s = bucket, keep_s
        self._store: KeyValue | None = None
        self._epoch = ""
        self._connection = NatsConnection(server, credentials, self._open)
        self._connection.start()
        self.url = f"{self._connection.url}/{bucket}"

    def get(self, key: str) -> Stored | None:
        """See `RecordStore`."""

        async def read(store: KeyValue) -> Stored | None:
            try:
                entry = await store.get(key)
            except nats.js.errors.KeyNotFoundError:
                return None
            return Stored(entry.value or b"", self._version(entry.revision))

        return self._run(read)

    def create(self, key: str, value: bytes, *, durable: bool = True) -> str | None:
        """See `RecordStore`."""
        return self._run(lambda store: self._written(store.create(key, value)))

    def update(self, key: str, value: bytes, version: str, *, durable: bool = True) -> str | None:
        """See `RecordStore`."""

        async def write(store: KeyValue) -> str | None:
            last = self._revision(version)
            return await self._written(store.update(key, value, last=last)) if last else None

        return self._run(write)

    def delete(self, key: str, version: str) -> bool:
        """See `RecordStore`; the server keeps a mark without a value for the record's lifetime."""

        async def write(store: KeyValue) -> bool:
            last = self._revision(version)
            return bool(last) and await _is_unchanged(store.delete(key, last=last))

        return self._run(write)

    def keys(self) -> Iterator[str]:
        """See `RecordStore`."""
        return iter([key for key, _, _ in self._run(_entries)])

    def sweep(self, older_than_s: float) -> int:
        """See `RecordStore`."""
        before = time.time() - older_than_s

        async def remove(store: KeyValue) -> int:
            old = [(key, revision) for key, revision, written in await _entries(store) if written < before]
            return sum([await _is_unchanged(store.delete(key, last=revision)) for key, revision in old])

        return self._run(remove)

    def close(self) -> None:
        """See `RecordStore`."""
        self._connection.stop()

    async def _open(self, client: Client) -> None:
        js = client.jetstream(timeout=REQUEST_TIMEOUT_S)
        store = await self._find_or_make(js)
        created = (await store.status()).stream_info.created
        self._store, self._epoch = store, str(created.timestamp() if created else "")

    async def _find_or_make(self, js: JetStreamContext) -> KeyValue:
        with contextlib.suppress(nats.js.errors.BucketNotFoundError):
            return await js.key_value(self._bucket)
        try:
            return await js.create_key_value(
                api.KeyValueConfig(
                    self._bucket,
                    description="records of Isthmus",
                    history=1,
                    ttl=self._keep_s,
                    max_value_size=MAX_RECORD_BYTES + _HEADER_BYTES,
                    storage=api.StorageType.FILE,
                )
            )
        except nats.js.errors.BadRequestError as e:
            if e.err_code != _NAME_IN_USE:
                raise
            return await js.key_value(self._bucket)  # another process was first

    def _version(self, revision: object) -> str:
        # With the bucket's age: the revisions of a lost bucket begin again in the next bucket.
        return f"{self._epoch}/{revision}"

    def _revision(self, version: str) -> int:
        """The revision in a version of this bucket; 0, no record's revision, in any other."""
        epoch, _, revision = version.rpartition("/")
        return int(revision) if epoch == self._epoch and revision.isdigit() else 0

    async def _written(self, write: Awaitable[int]) -> str | None:
        """The version of a write, or None where another write was first."""
        try:
            return self._version(await write)
        except nats.js.errors.KeyWrongLastSequenceError:
            return None

    def _run(self, work: Callable[[KeyValue], Awaitable[T]]) -> T:
        async def opened(client: Client) -> T:
            if self._store is None:
                await self._open(client)
            try:
                return await work(cast(KeyValue, self._store))
            except nats.js.errors.NoStreamResponseError:  # somebody removed the bucket
                await self._open(client)
                return await work(cast(KeyValue, self._store))

        try:
            return self._connection.run(opened)
        except (BrokerUnavailable, BrokerRefused) as e:
            raise ResultStoreUnavailable(e.message, hint=e.hint, store=self.url) from e


async def _is_unchanged(deletion: Awaitable[bool]) -> bool:
    """Whether the record was deleted; False where another write was first."""
    try:
        return await deletion
    except nats.js.errors.APIError as e:  # of a deletion, nats-py translates no further
        if e.err_code in _WRONG_REVISION:
            return False
        raise


async def _entries(store: KeyValue) -> list[tuple[str, int, float]]:
    """Key, revision and moment of the last write of every record."""
    entries = await _watched(store)
    # nats-py takes a bucket for empty if all its entries are sent, and none has arrived when it looks.
    if not entries and (await store.status()).values:
        entries = await _watched(store)
    return entries


async def _watched(store: KeyValue) -> list[tuple[str, int, float]]:
    watcher = await store.watchall(ignore_deletes=True, meta_only=True)
    entries = []
    with contextlib.suppress(nats.js.errors.NoKeysError):
        async for entry in watcher:
            if entry is None:  # all that there was at the start
                break
            entries.append((entry.key, entry.revision or 0, entry.created.timestamp()))
    await watcher.stop()  # type: ignore[no-untyped-call]
    return entries
