"""The spool: requests that wait on this machine's disk for a cloud that cannot be reached, first in, first out.

An entry is an acknowledged message, as a continuation (the head has run) or whole. The disk has the entry before the
acknowledgement, and until the result is published.
"""

from __future__ import annotations

import fcntl
import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from isthmus.errors import ConfigurationMalformed, ResultStoreUnavailable, SpoolFull, StoreDamaged
from isthmus.events.message import Message
from isthmus.events.stores.sqlite_file import SqliteFile, SqliteSchema, is_full

SCHEMA_VERSION = 1
_PAGE_BYTES = 4096
# An entry's share of inner pages, of two indices and of a page that is not full.
_ENTRY_PAGES = 4
# The disk is given back in pieces of a megabyte, and once half of the file is free: further entries reuse free pages.
_MIN_FREE_PAGES = 256
# The size of the log at which SQLite moves pages into the file, and to which a larger log shrinks.
_LOG_BYTES = 2**20
_COLUMNS = "id, lane, source, key, headers, published, spooled_at, body"
_STATEMENTS = """
CREATE TABLE entries (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, lane TEXT, source TEXT NOT NULL, key TEXT NOT NULL,
    headers TEXT NOT NULL, published REAL NOT NULL, spooled_at REAL NOT NULL, body BLOB NOT NULL
);
CREATE INDEX entries_lane ON entries (lane)
"""
_log = logging.getLogger(__name__)


class SpoolEntry(NamedTuple):
    """A message that waits. `seq` orders entries; `spooled_at` is seconds since the epoch."""

    seq: int
    lane: str | None
    message: Message
    spooled_at: float


@dataclass(frozen=True)
class SpoolStatus:
    """The state of a spool. `bytes` counts pages of the file in use; `away` is the reason to wait for the cloud.

    Units: seconds since the oldest entry was spooled; 0 where there is none.
    """

    entries: int
    bytes: int
    max_bytes: int
    oldest_s: float
    away: str = ""


class EventSpool:
    """The entries in `folder`, whose file has at most `max_bytes`. Any thread may call; one process has the folder.

    Beside the file its log takes about as much as the entries that are written at the same time.

    Every method but `add` raises ResultStoreUnavailable where the disk gives an error, and StoreDamaged.

    Raises:
        ConfigurationMalformed: another process has the folder, or its file is of a newer release.
        ResultStoreUnavailable: the folder or the file cannot be opened.
    """

    def __init__(self, folder: Path | str, max_bytes: int, *, clock: Callable[[], float] = time.time) -> None:
        self.max_bytes, self._clock = max_bytes, clock
        self._max_pages = max_bytes // _PAGE_BYTES
        path = Path(folder) / "spool.sqlite"
        self._lock = _own(path.parent)
        try:
            self._file = self._open(path)
            self._count = int(self._file.read("SELECT count(*) FROM entries")[0][0])
        except BaseException:
            self._lock.close()
            raise
        self.url = self._file.url
        self._count_lock = threading.Lock()
        self.grew = threading.Event()
        """Set by each addition; the reader clears it."""

    def __len__(self) -> int:
        return self._count

    def add(self, message: Message, lane: str | None = None) -> bool:
        """Append a message, on the disk once this returns; False where its id is here already.

        Raises:
            SpoolFull: the spool is as before. Its fact `of` is `bound`, `disk`, or `entry` for a message that is too
                large for an empty spool.
            ResultStoreUnavailable, StoreDamaged: the disk gives another error.
        """
        row = (lane, message.source, message.key, _encoded(message.headers), message.published, self._clock())
        size = len(message.body) + len(row[3])

        def insert(connection: sqlite3.Connection) -> bool:
            self._check_room(connection, size)
            statement = f"INSERT OR IGNORE INTO entries ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608
            return connection.execute(statement, (message.id, *row, message.body)).rowcount > 0

        try:
            added = self._file.write(insert)
        except ResultStoreUnavailable as e:
            if not is_full(e):
                raise
            reason = f"the disk of the spool is full: {e.message}"
            raise SpoolFull(reason, bytes=size, limit=self.max_bytes, of="disk") from e
        if added:
            with self._count_lock:
                self._count += 1
            self.grew.set()
        return added

    def contains(self, message_id: str) -> bool:
        """Whether an entry of this id waits."""
        return self._count > 0 and bool(self._file.read("SELECT 1 FROM entries WHERE id = ?", (message_id,)))

    def has_lane(self, lane: str) -> bool:
        """Whether entries of this lane wait."""
        return self._count > 0 and bool(self._file.read("SELECT 1 FROM entries WHERE lane = ? LIMIT 1", (lane,)))

    def after(self, seq: int, count: int, max_bytes: int) -> list[SpoolEntry]:
        """The first `count` entries behind `seq`, fewer where their bodies exceed `max_bytes`, at least an entry."""
        sizes = self._file.read(
            "SELECT seq, length(body) FROM entries WHERE seq > ? ORDER BY seq LIMIT ?", (seq, count)
        )
        last, total = seq, 0
        for next_seq, size in sizes:
            total += size
            if total > max_bytes and last > seq:
                break
            last = next_seq
        query = f"SELECT seq, {_COLUMNS} FROM entries WHERE seq > ? AND seq <= ? ORDER BY seq"  # noqa: S608
        return [_entry(row) for row in self._file.read(query, (seq, last))]

    def remove(self, message_id: str) -> bool:
        """Remove an entry whose result is published; False where there is none."""

        def delete(connection: sqlite3.Connection) -> bool:
            return connection.execute("DELETE FROM entries WHERE id = ?", (message_id,)).rowcount > 0

        if removed := self._file.write(delete):
            with self._count_lock:
                self._count -= 1
            pages, free = self._page_counts()
            if free >= max(_MIN_FREE_PAGES, pages // 2) or (not self._count and pages > _MIN_FREE_PAGES):
                self._file.shrink()
        return removed

    def status(self, away: str = "") -> SpoolStatus:
        """The state at this moment."""
        pages, free = self._page_counts()
        oldest = self._file.read("SELECT spooled_at FROM entries ORDER BY seq LIMIT 1")
        oldest_s = max(0.0, self._clock() - oldest[0][0]) if oldest else 0.0
        return SpoolStatus(self._count, (pages - free) * _PAGE_BYTES, self.max_bytes, oldest_s, away)

    def close(self) -> None:
        """Close the file, and let another process have the folder."""
        self._file.close()
        self._lock.close()

    def _page_counts(self) -> tuple[int, int]:
        """Pages of the file, and free pages among these."""
        ((pages,),), ((free,),) = self._file.read("PRAGMA page_count"), self._file.read("PRAGMA freelist_count")
        return pages, free

    def _open(self, path: Path) -> SqliteFile:
        """The checked file; a damaged file is moved aside after its readable entries were copied."""
        try:
            return _checked(path, self._max_pages)
        except StoreDamaged as e:
            aside = _move_aside(path)
            # Without the bound: inner pages that are filled in another order take more.
            with closing(_checked(path)) as file:
                taken = sum(file.write(partial(_restore, row=row)) for row in _readable(aside))
            _log.error("the spool is damaged (%s): %d entries are taken over, see %s", e.message, taken, aside)
            return _checked(path, self._max_pages)

    def _check_room(self, connection: sqlite3.Connection, size: int) -> None:
        used = _pragma(connection, "page_count") - _pragma(connection, "freelist_count")
        if used + _pages(size) + _ENTRY_PAGES > self._max_pages:
            raise SpoolFull(
                f"the spool has {used * _PAGE_BYTES} of its {self.max_bytes} bytes, and {size} more do not fit",
                bytes=size,
                limit=self.max_bytes,
                of="bound" if _pages(size) + 2 * _ENTRY_PAGES <= self._max_pages else "entry",
                hint="raise max_bytes of [spool], or see full",
            )


def _own(folder: Path) -> IO[bytes]:
    """The lock of the folder: two processes would send its entries twice. The lock ends with the process."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (folder / "lock").open("wb")
    except OSError as e:
        raise ResultStoreUnavailable(f"the folder of the spool cannot be used: {e}", store=str(folder)) from e
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        lock.close()
        raise ConfigurationMalformed(
            f"the spool {folder} is another running trigger's",
            where="spool.folder",
            hint="give each trigger a folder of its own",
        ) from e
    return lock


def _checked(path: Path, max_pages: int = 2**31) -> SqliteFile:
    """The opened file, all of whose pages were read.

    Raises:
        StoreDamaged: as `SqliteFile`, or `quick_check` finds an inconsistent page.
    """
    pragmas = (
        f"page_size = {_PAGE_BYTES}",
        "auto_vacuum = INCREMENTAL",
        f"wal_autocheckpoint = {_LOG_BYTES // _PAGE_BYTES}",
        f"journal_size_limit = {_LOG_BYTES}",
        # A second bound behind the check before each addition.
        f"max_page_count = {max_pages}",
    )
    file = SqliteFile(path, SqliteSchema(SCHEMA_VERSION, _STATEMENTS, "spool.folder", pragmas))
    try:
        ((verdict,),) = file.read("PRAGMA quick_check(1)")
        if verdict != "ok":
            raise StoreDamaged(f"{file.url}: {verdict}", store=file.url)
    except BaseException:
        file.close()
        raise
    return file


def _move_aside(path: Path) -> Path:
    aside = path.with_name(f"damaged-{time.time_ns()}.sqlite")
    for suffix in ("", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(aside.with_name(aside.name + suffix))
    return aside


def _readable(path: Path) -> Iterator[tuple[Any, ...]]:
    """Rows of a damaged file, from both ends up to the damage."""
    for order in ("ASC", "DESC"):
        with suppress(sqlite3.Error), closing(sqlite3.connect(path)) as connection:
            yield from connection.execute(f"SELECT seq, {_COLUMNS} FROM entries ORDER BY seq {order}")  # noqa: S608


def _restore(connection: sqlite3.Connection, row: tuple[Any, ...]) -> int:
    statement = f"INSERT OR IGNORE INTO entries (seq, {_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608
    return connection.execute(statement, row).rowcount


def _entry(row: tuple[Any, ...]) -> SpoolEntry:
    seq, message_id, lane, source, key, headers, published, spooled_at, body = row
    return SpoolEntry(seq, lane, Message(body, message_id, source, json.loads(headers), key, published), spooled_at)


def _encoded(headers: Mapping[str, str]) -> str:
    return json.dumps(dict(headers))


def _pages(size: int) -> int:
    # An overflow page begins with the number of the next page.
    return size // (_PAGE_BYTES - 4) + 1


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    (value,) = connection.execute(f"PRAGMA {name}").fetchone()
    return int(value)
