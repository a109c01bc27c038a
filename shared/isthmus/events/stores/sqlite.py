"""Records in an SQLite file: the store of one machine, shared by all its processes."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

from isthmus.events.records import Stored
from isthmus.events.stores.sqlite_file import SqliteFile, SqliteSchema

SCHEMA_VERSION = 1
_KEYS_PER_READ = 1000
# A transaction's log of a sweep stays small, and writers get their turn between the pieces.
_SWEEP_ROWS = 1000
_SCHEMA = SqliteSchema(
    SCHEMA_VERSION,
    """
    CREATE TABLE records (key TEXT PRIMARY KEY, value BLOB NOT NULL, version TEXT NOT NULL, written REAL NOT NULL);
    CREATE INDEX records_written ON records (written);
    """,
    "records.url",
)


class SqliteRecords:
    """A `RecordStore` in the file `path`; see there for the methods.

    Raises:
        As `SqliteFile`.
    """

    def __init__(self, path: Path | str, *, clock: Callable[[], float] = time.time) -> None:
        self._file, self._clock = SqliteFile(path, _SCHEMA), clock
        self.url = self._file.url

    def get(self, key: str) -> Stored | None:
        """See `RecordStore`."""
        rows = self._file.read("SELECT value, version FROM records WHERE key = ?", (key,))
        return Stored(*rows[0]) if rows else None

    def create(self, key: str, value: bytes, *, durable: bool = True) -> str | None:
        """See `RecordStore`."""
        version = uuid4().hex
        parameters = (key, value, version, self._clock())
        return (
            version if self._write("INSERT OR IGNORE INTO records VALUES (?, ?, ?, ?)", parameters, durable) else None
        )

    def update(self, key: str, value: bytes, version: str, *, durable: bool = True) -> str | None:
        """See `RecordStore`."""
        new = uuid4().hex
        statement = "UPDATE records SET value = ?, version = ?, written = ? WHERE key = ? AND version = ?"
        return new if self._write(statement, (value, new, self._clock(), key, version), durable) else None

    def delete(self, key: str, version: str) -> bool:
        """See `RecordStore`."""
        return bool(self._write("DELETE FROM records WHERE key = ? AND version = ?", (key, version), True))

    def keys(self) -> Iterator[str]:
        """See `RecordStore`; read in pages, so that no caller holds a lock."""
        last = ""
        while True:
            statement = "SELECT key FROM records WHERE key > ? ORDER BY key LIMIT ?"
            page = [key for (key,) in self._file.read(statement, (last, _KEYS_PER_READ))]
            yield from page
            if len(page) < _KEYS_PER_READ:
                return
            last = page[-1]

    def sweep(self, older_than_s: float) -> int:
        """See `RecordStore`."""
        statement = "DELETE FROM records WHERE rowid IN (SELECT rowid FROM records WHERE written < ? LIMIT ?)"
        before, removed = self._clock() - older_than_s, 0
        while rows := self._write(statement, (before, _SWEEP_ROWS), False):
            removed += rows
        return removed

    def close(self) -> None:
        """See `RecordStore`."""
        self._file.close()

    def _write(self, statement: str, parameters: tuple[object, ...], durable: bool) -> int:
        """The number of changed rows."""

        def execute(connection: sqlite3.Connection) -> int:
            return connection.execute(statement, parameters).rowcount

        return self._file.write(execute, durable=durable)
