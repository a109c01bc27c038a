"""An SQLite file with one schema, for threads: private, in the log mode, with commits that threads share.

Writes of several threads are committed together, as one wait for the disk takes milliseconds.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from isthmus.errors import ConfigurationMalformed, EventError, IsthmusError, ResultStoreUnavailable, StoreDamaged

# How long another process may hold the file's lock; a commit takes milliseconds, a backup longer.
_BUSY_S = 5.0
_DAMAGE = frozenset((sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB))
Returned = TypeVar("Returned")
Operation = Callable[[sqlite3.Connection], Any]


@dataclass(frozen=True)
class SqliteSchema:
    """Statements that make the tables of a version. `where` is the configuration's key that names the file.

    `pragmas` are executed before the first table is made, and for each connection.
    """

    version: int
    statements: str
    where: str
    pragmas: Sequence[str] = ()


@dataclass
class _Write:
    """An operation that waits for a commit, and its outcome."""

    operation: Operation
    is_durable: bool
    outcome: Any = None
    is_over: bool = False
    error: sqlite3.Error | IsthmusError | None = None


class SqliteFile:
    """The file `path` with the tables of `schema`.

    Raises:
        ConfigurationMalformed: the file is another program's, or of a newer release.
        StoreDamaged: the file is damaged, or no database; from every method.
        ResultStoreUnavailable: the file cannot be opened, read or written; from every method.
    """

    def __init__(self, path: Path | str, schema: SqliteSchema) -> None:
        self.url = f"sqlite:{path}"
        self._waiting: list[_Write] = []
        self._level = ""
        self._waiting_lock, self._commit_lock, self._read_lock = threading.Lock(), threading.Lock(), threading.Lock()
        with self._translated():
            _create_private(Path(path))
            # In the log mode readers do not wait for writers: a connection for each, any thread by its lock.
            self._writer, self._reader = _connect(path, schema), _connect(path, schema)
        try:
            with self._translated():
                self._prepare(schema)
        except IsthmusError:
            self.close()
            raise

    def read(self, query: str, parameters: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """All rows."""
        with self._translated(), self._read_lock:
            return self._reader.execute(query, parameters).fetchall()

    def write(self, operation: Callable[[sqlite3.Connection], Returned], *, durable: bool = True) -> Returned:
        """Commit `operation` in one transaction with all waiting operations; the outcome of `operation`.

        An IsthmusError of an operation leaves the others valid: it must come before the first change.
        """
        write = _Write(operation, durable)
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
        return cast(Returned, write.outcome)

    def shrink(self) -> None:
        """Give free pages and the log back to the disk; the log stays while another process reads."""
        with self._translated(), self._commit_lock:
            # Python's `execute` runs a single step of this statement, and so frees a single page.
            self._writer.executescript("PRAGMA incremental_vacuum")
            self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def close(self) -> None:
        """Close the file."""
        with self._commit_lock, self._read_lock:
            self._writer.close()
            self._reader.close()

    def _commit(self, batch: list[_Write]) -> None:
        """One transaction: all writes happen, or none."""
        try:
            # In the log mode NORMAL syncs at checkpoints alone; the sync of a later FULL commit includes its commits.
            level = "FULL" if any(write.is_durable for write in batch) else "NORMAL"
            if level != self._level:
                self._level = ""
                self._writer.execute(f"PRAGMA synchronous = {level}")
                self._level = level
            with _transaction(self._writer):
                for write in batch:
                    try:
                        write.outcome = write.operation(self._writer)
                    except IsthmusError as e:
                        write.error = e
        except sqlite3.Error as e:
            for write in batch:
                write.error = write.error or e
        finally:
            for write in batch:
                write.is_over = True

    def _prepare(self, schema: SqliteSchema) -> None:
        with _transaction(self._writer):
            (version,) = self._writer.execute("PRAGMA user_version").fetchone()
            if version == 0 and not self._writer.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                for statement in filter(str.strip, schema.statements.split(";")):
                    self._writer.execute(statement)
                self._writer.execute(f"PRAGMA user_version = {schema.version}")
            elif version != schema.version:
                raise ConfigurationMalformed(
                    f"{self.url} has the schema {version}; this release reads {schema.version}",
                    where=schema.where,
                    hint="name another file, or use the release that wrote this file",
                )

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """SQLite's errors, and those of the file system, as ours: a full disk and a locked file among them."""
        try:
            yield
        except (sqlite3.Error, OSError) as e:
            raise self._error_of(e) from e

    def _error_of(self, error: Exception) -> EventError:
        # The lowest byte of an extended code is the primary code.
        is_damage = getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGE
        kind = StoreDamaged if is_damage else ResultStoreUnavailable
        return kind(f"{self.url}: {error}", store=self.url)


def is_full(error: IsthmusError) -> bool:
    """Whether the disk was full, or a quota or a bound on the file reached."""
    code = getattr(error.__cause__, "sqlite_errorcode", 0)
    return code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE)


def _connect(path: Path | str, schema: SqliteSchema) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        for pragma in (*schema.pragmas, "journal_mode = WAL"):
            connection.execute(f"PRAGMA {pragma}").fetchall()
    except sqlite3.Error:
        connection.close()
        raise
    return connection


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
