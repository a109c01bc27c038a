"""The cache's disk space, shared by processes that know of each other only through locks on files.

Locks are flock(2): they end with the process that holds them, however it ends.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from isthmus.errors import CacheFull
from isthmus.registry.weights import write_whole

_KEY = re.compile(r"[0-9a-f]{64}")
_TRASH = "trash."


@dataclass(frozen=True)
class _CachedSegment:
    path: Path
    used: float
    bytes: int


class Space:
    """`limit` bounds what all files under `root` take on disk, in bytes.

    `root` holds one folder for each weights file, under its key (the hex of its digest), and folders of small files.
    A key has three files in locks/: KEY.pin is held shared by all who use the folder, and alone by who deletes it;
    KEY.fill by who adds to it; KEY.target says how much that one will make of it.
    """

    def __init__(self, root: Path, limit: int) -> None:
        self._root, self._limit, self._locks = root, limit, root / "locks"

    def pin(self, key: str) -> int:
        """Keep a key's folder from deletion until the descriptor that is returned is closed, and note its use."""
        self._locks.mkdir(parents=True, exist_ok=True)
        descriptor = self._open(f"{key}.pin")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            os.utime(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    @contextmanager
    def filling(self, key: str) -> Iterator[None]:
        """Be the only one who adds to a key's folder; waits for another, whose reads are bounded."""
        with self._alone(f"{key}.fill"):
            yield

    @contextmanager
    def reserved(self, key: str, needed: int) -> Iterator[None]:
        """Hold `needed` more bytes for a key's folder, which is being filled; the least recently used others go for it.

        Raises:
            CacheFull: too much is in use.
        """
        target = self._locks / f"{key}.target"
        with self._alone("room"):
            self._make_room(needed, keep=key)
            write_whole(target, str(_allocated(self._root / key) + needed).encode())
        try:
            yield
        finally:
            target.unlink(missing_ok=True)

    def make_room(self, needed: int) -> None:
        """Let `needed` bytes for a small file fit.

        Raises:
            CacheFull: too much is in use.
        """
        self._locks.mkdir(parents=True, exist_ok=True)
        with self._alone("room"):
            self._make_room(needed, keep="")

    def clear(self, key: str, pin: int) -> bool:
        """Empty a key's folder if `pin` is its only one; whether it was."""
        with self._alone("room"):
            try:
                fcntl.flock(pin, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                # The refused conversion may have dropped the shared lock; nobody deletes while "room" is held.
                fcntl.flock(pin, fcntl.LOCK_SH)
                return False
            self._discard(self._root / key)
            fcntl.flock(pin, fcntl.LOCK_SH)
            return True

    def _make_room(self, needed: int, keep: str) -> None:
        for trash in self._root.glob(f"{_TRASH}*"):
            shutil.rmtree(trash, ignore_errors=True)
        entries = sorted(self._entries(keep), key=lambda e: e.used)
        total = sum(e.bytes for e in entries)
        for entry in entries:
            if total + needed <= self._limit:
                return
            if entry.path.name != keep and self._drop(entry.path):
                total -= entry.bytes
        if total + needed > self._limit:
            raise CacheFull(
                f"{needed} bytes more do not fit the cache {self._root}: segments in use take {total} of its"
                f" {self._limit} bytes",
                cache_dir=str(self._root),
                bytes=needed,
                limit=self._limit,
                hint="raise the setting cache_bytes, or serve fewer segments from this cache",
            )

    def _entries(self, keep: str) -> Iterator[_CachedSegment]:
        for path in self._root.iterdir():
            if _KEY.fullmatch(path.name):
                used = 0.0
                with suppress(FileNotFoundError):
                    used = (self._locks / f"{path.name}.pin").stat().st_mtime
                # A target of the caller's own key is what a process that died left: the caller fills now.
                target = 0 if path.name == keep else self._target(path.name)
                yield _CachedSegment(path, used, max(_allocated(path), target))
            elif path.is_dir() and path != self._locks and not path.name.startswith(_TRASH):
                for small in path.iterdir():
                    with suppress(FileNotFoundError):
                        yield _CachedSegment(small, small.stat().st_mtime, _allocated(small))

    def _target(self, key: str) -> int:
        """What a process that is filling a key's folder will make of it; 0 if none is."""
        try:
            target = int((self._locks / f"{key}.target").read_bytes())
        except (FileNotFoundError, ValueError):
            return 0
        descriptor = self._open(f"{key}.fill")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return target
        finally:
            os.close(descriptor)
        return 0

    def _drop(self, path: Path) -> bool:
        if not path.is_dir():
            path.unlink(missing_ok=True)
            return True
        descriptor = self._open(f"{path.name}.pin")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._discard(path)
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
        return True

    def _discard(self, path: Path) -> None:
        # One rename takes the folder away as a whole; a process killed after it leaves only trash.
        trash = Path(tempfile.mkdtemp(dir=self._root, prefix=_TRASH))
        with suppress(FileNotFoundError):
            path.rename(trash / path.name)
        shutil.rmtree(trash)

    def _open(self, name: str) -> int:
        return os.open(self._locks / name, os.O_RDWR | os.O_CREAT, 0o644)

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        descriptor = self._open(name)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _allocated(path: Path) -> int:
    """Bytes on disk of a file, or of a folder's files."""
    total = 0
    with suppress(FileNotFoundError):
        for file in path.iterdir() if path.is_dir() else (path,):
            with suppress(FileNotFoundError):
                total += file.stat().st_blocks * 512
    return total
