"""Opens the store of records and the object store for large bodies by their URLs."""

from __future__ import annotations

from pathlib import Path

from isthmus.errors import ConfigurationMalformed
from isthmus.events.claims import ClaimStore
from isthmus.events.configuration import ClaimsTable, RecordsTable
from isthmus.events.open import blob_store, client_installed, secret_text
from isthmus.events.records import RecordStore
from isthmus.registry import FolderStore
from isthmus.settings import RegistrySettings


def open_records(table: RecordsTable, settings: RegistrySettings) -> RecordStore:
    """The store of calls: sqlite:PATH, nats://HOST:PORT/BUCKET, or in objects (s3://, gs://, az://, hdfs://).

    Raises:
        ConfigurationMalformed: another URL. Others as `isthmus.events.assembly.open_trigger`.
    """
    with client_installed():
        if table.url.startswith("sqlite:"):
            from isthmus.events.stores.sqlite import SqliteRecords

            return SqliteRecords(Path(table.url.removeprefix("sqlite:")))
        if table.url.startswith(("nats://", "tls://")):
            from isthmus.events.stores.jetstream import JetStreamRecords

            return JetStreamRecords(table.url, float(table.keep), secret_text(table.credentials_secret, settings))
        if table.url.startswith(("s3://", "gs://", "az://", "hdfs://")):
            from isthmus.events.stores.objects import ObjectRecords

            store = blob_store(table.url, settings, "records")
            if not isinstance(store, FolderStore):
                return ObjectRecords(store)
    raise ConfigurationMalformed(
        f"records.url is {table.url!r}; it is sqlite:PATH, nats://HOST:PORT/BUCKET, or a store of objects: s3://BUCKET/PREFIX,"
        " gs://BUCKET/PREFIX, az://CONTAINER/PREFIX or hdfs://HOST:PORT/PATH",
        where="records.url",
    )


def open_claims(table: ClaimsTable | None, settings: RegistrySettings) -> ClaimStore | None:
    """The object store for large bodies; None where none is configured.

    Raises:
        ConfigurationMalformed: the URL is no store's.
    """
    if table is None:
        return None
    store = blob_store(table.url, settings, "claims")
    return ClaimStore(store, max_bytes=table.max_bytes, keep_s=float(table.keep))
