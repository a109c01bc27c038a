"""Records in an SQLite file: the store of one machine, shared by all its processes.

Writes of several threads are committed together, as one wait for the disk takes milliseconds.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from isthmus.errors import ConfigurationMalformed, ResultStoreUnavailable
from isthmus.events.records import Stored

SCHEMA_VERSION = 1
# How long another process may hold the file's lock; a commit takes milliseconds, a backup longer.
_BUSY_S = 5.0
_KEYS_PER_READ = 1000
# A transaction's log of a sweep stays small, and writers get their turn between the pieces.
_SWEEP_ROWS = 1000
_SCHEMA = f"""
CREATE TABLE records (key TEXT PRIMARY KEY, value BLOB NOT NULL, version TEXT NOT NULL, written REAL NOT NULL);
CREATE INDEX records_written ON records (written);
PRAGMA user_version = {SCHEMA_VERSION};
"""


@dataclass
class _Write:
    """A statement that waits for a commit, and its outcome."""

    statement: str
    parameters: tuple[object, ...]
    is_durable: bool
    rows: int = 0
    is_over: bool = False
    error: sqlite3.Error | None = None


class SqliteRecords:
    """A `RecordStore` in the file `path`; see there for the methods.

    Raises:
        ConfigurationMalformed: the file is another program's, or of a newer release.
        ResultStoreUnavailable: the file cannot be opened.
    """

    def __init__(self, path: Path | str, *, clock: Callable[[], float] = time.time) -> None:
        self.url = f"sqlite:{path}"
        self._clock = clock
        self._waiting: list[_Write] = []
        self._waiting_lock, self._commit_lock, self._read_lock = threading.Lock(), threading.Lock(), threading.Lock()
        with self._translated():
            _create_private(Path(path))
            # In the log mode readers do not wait for writers: a connection for each, any thread by its lock.
            self._writer, self._reader = self._connect(path), self._connect(path)
            self._prepare()

    def get(self, key: str) -> Stored | None:
        """See `RecordStore`."""
        with self._translated(), self._read_lock:
            row = self._reader.execute("SELECT value, version FROM records WHERE key = ?", (key,)).fetchone()
        return None if row is None else Stored(*row)

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
            with self._translated(), self._read_lock:
                statement = "SELECT key FROM records WHERE key > ? ORDER BY key LIMIT ?"
                page = [key for (key,) in self._reader.execute(statement, (last, _KEYS_PER_READ))]
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
        with self._commit_lock, self._read_lock:
            self._writer.close()
            self._reader.close()

    def _write(self, statement: str, parameters: tuple[object, ...], durable: bool) -> int:
        """Commit with all writes that wait, by whichever of their threads has the lock first; the changed rows."""
        write = _Write(statement, parameters, durable)
        with self._waiting_lock:
            self._waiting.append(write)
        with self._commit_lock:
            if not write.is_over:
                with self._waiting_lock:
                    batch, self._waiting = self._waiting, []
                self._commit(batch)
        with self._translated():
            if write.error is not None:
                raise write.error
        return write.rows

    def _commit(self, batch: list[_Write]) -> None:
        """One transaction: all of its writes happen, or none does."""
        try:
            # In the log mode NORMAL syncs at checkpoints alone; the sync of a later FULL commit includes its commits.
            level = "FULL" if any(write.is_durable for write in batch) else "NORMAL"
            self._writer.execute(f"PRAGMA synchronous = {level}")
            with _transaction(self._writer):
                for write in batch:
                    write.rows = self._writer.execute(write.statement, write.parameters).rowcount
        except sqlite3.Error as e:
            for write in batch:
                write.error = e
        finally:
            for write in batch:
                write.is_over = True

    def _connect(self, path: Path | str) -> sqlite3.Connection:
        connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = WAL")
        return connection

    def _prepare(self) -> None:
        with _transaction(self._writer):
            (version,) = self._writer.execute("PRAGMA user_version").fetchone()
            if version == 0 and not self._writer.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                for statement in filter(str.strip, _SCHEMA.split(";")):
                    self._writer.execute(statement)
            elif version != SCHEMA_VERSION:
                raise ConfigurationMalformed(
                    f"{self.url} has the schema {version}; this release reads {SCHEMA_VERSION}",
                    where="records.url",
                    hint="name another file, or the release that wrote this one",
                )

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """SQLite's errors, and those of the file system, as ours: a full disk and a locked file among them."""
        try:
            yield
        except (sqlite3.Error, OSError) as e:
            raise ResultStoreUnavailable(f"{self.url}: {e}", store=self.url) from e


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """A write transaction: immediate, since a lock that is taken later cannot be waited for."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        # SQLite has rolled back by itself after a full disk.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _create_private(path: Path) -> None:
    """The file, for its owner alone: results may be as private as the messages."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
