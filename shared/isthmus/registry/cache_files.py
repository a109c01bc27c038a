"""Disk layout of the cache: sparse weights files with ledgers, and disk space shared between processes.

Processes coordinate through flock(2) alone: locks end with their process, also after a crash.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from isthmus.artifacts.bundle import WeightTensor
from isthmus.errors import CacheFull
from isthmus.files import write_whole

READ_BYTES = 4 * 2**20
"""Longest ranged read; longer tensors are read in parts. At 8 MiB, allocators of threads keep 75 MB in a pull."""

# Gaps are the padding that aligns tensors, never another tensor: of an encrypted one, this reader may lack the key.
_GAP_BYTES = 64
# Block size of common file systems; sparse files allocate whole blocks.
_BLOCK_BYTES = 4096
# Bounds the memory of a verification.
_HASH_BYTES = 2**20
_KEY = re.compile(r"[0-9a-f]{64}")
_TRASH = "trash."


@dataclass(frozen=True)
class Batch:
    """Adjacent tensors covered by one ranged read."""

    start: int
    stop: int
    tensors: tuple[WeightTensor, ...]


class WeightsFile:
    """A partially fetched weights file: sparse `weights.bin` of full length, and `ledger.json`, a list of fetched
    tensors.

    The ledger is replaced atomically, after the bytes of its tensors are synced; a crash costs at most a second fetch.
    An entry means "worth verifying", not "safe to run": see `intact`.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self._path, self._ledger, self._size = folder / "weights.bin", folder / "ledger.json", size

    def recorded(self) -> set[tuple[int, int]]:
        """Offset and length of each tensor in the ledger; empty if the ledger is unreadable."""
        try:
            return {(int(offset), int(length)) for offset, length in json.loads(self._ledger.read_bytes())}
        except (FileNotFoundError, ValueError, TypeError, OverflowError, RecursionError):
            return set()

    def intact(self, tensor: WeightTensor) -> bool:
        """Whether the tensor's bytes on disk hash to its digest, read from the file that a runtime maps."""
        try:
            descriptor = os.open(self._path, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            # A truncated file would kill any process that maps the file.
            if os.fstat(descriptor).st_size != self._size:
                return False
            digest = hashlib.sha256()
            at, stop = tensor.offset, tensor.offset + tensor.length
            while at < stop and (part := os.pread(descriptor, min(_HASH_BYTES, stop - at), at)):
                digest.update(part)
                at += len(part)
            return f"sha256:{digest.hexdigest()}" == tensor.digest
        finally:
            os.close(descriptor)

    def prepare(self) -> None:
        """Create the file, or restore its full length, without allocating disk space."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if os.fstat(descriptor).st_size != self._size:
                os.ftruncate(descriptor, self._size)
        finally:
            os.close(descriptor)

    def write(self, pieces: Iterable[tuple[int, bytes | memoryview]]) -> None:
        """Write each piece at its offset; a tensor counts as fetched only after `record`."""
        descriptor = os.open(self._path, os.O_WRONLY)
        try:
            for offset, data in pieces:
                view = memoryview(data)
                while view:
                    written = os.pwrite(descriptor, view, offset)
                    view, offset = view[written:], offset + written
        finally:
            os.close(descriptor)

    def record(self, tensors: Iterable[WeightTensor]) -> None:
        """Add verified tensors to the ledger. Not safe against concurrent writers: the caller holds the fill lock."""
        descriptor = os.open(self._path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        present = self.recorded() | {(t.offset, t.length) for t in tensors}
        write_whole(self._ledger, json.dumps(sorted(present)).encode())


def batches(tensors: Sequence[WeightTensor]) -> list[Batch]:
    """Group tensors into few ranged reads of at most READ_BYTES; a longer tensor is a batch of its own."""
    reads: list[Batch] = []
    for t in sorted(tensors, key=lambda t: t.offset):
        last, stop = reads[-1] if reads else None, t.offset + t.length
        if last and t.offset - last.stop <= _GAP_BYTES and stop - last.start <= READ_BYTES:
            reads[-1] = Batch(last.start, stop, (*last.tensors, t))
        else:
            reads.append(Batch(t.offset, stop, (t,)))
    return reads


def parts(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Split `start` to `stop` into ranges of at most READ_BYTES."""
    for at in range(start, stop, READ_BYTES):
        yield at, min(at + READ_BYTES, stop)


def disk_bytes(tensors: Iterable[WeightTensor]) -> int:
    """Disk space of these tensors in a sparse file, in whole blocks."""
    total = end = 0
    for t in sorted(tensors, key=lambda t: t.offset):
        start = max(end, t.offset // _BLOCK_BYTES * _BLOCK_BYTES)
        stop = -(-(t.offset + t.length) // _BLOCK_BYTES) * _BLOCK_BYTES
        if t.length and stop > start:
            total, end = total + stop - start, stop
    return total


@dataclass(frozen=True)
class _DiskEntry:
    path: Path
    used: float
    bytes: int


class CacheSpace:
    """Disk space under `root`, bounded by `limit` bytes.

    `root` holds one folder per weights file, named by `key` (the digest in hex), and folders of small files. Each key
    has three files in locks/: KEY.pin is locked shared by users of the folder and exclusively for deletion; KEY.fill is
    locked exclusively during a fetch; KEY.target holds the folder's size after the fetch in progress.
    """

    def __init__(self, root: Path, limit: int) -> None:
        self._root, self._limit, self._locks = root, limit, root / "locks"

    def pin(self, key: str) -> int:
        """Lock a key's folder against deletion until the returned descriptor is closed, and mark the key as used."""
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
        """Hold the fill lock of a key. The wait is bounded, since the reads of another holder are."""
        with self._exclusive(f"{key}.fill"):
            yield

    @contextmanager
    def reserved(self, key: str, needed: int) -> Iterator[None]:
        """Reserve `needed` more bytes for a key under fetch, and evict the least recently used other keys as necessary.

        Raises:
            CacheFull: pinned keys leave too little space.
        """
        target = self._locks / f"{key}.target"
        with self._exclusive("room"):
            self._make_room(needed, keep=key)
            write_whole(target, str(_allocated(self._root / key) + needed).encode())
        try:
            yield
        finally:
            target.unlink(missing_ok=True)

    def make_room(self, needed: int) -> None:
        """Evict until a small file of `needed` bytes fits.

        Raises:
            CacheFull: pinned keys leave too little space.
        """
        self._locks.mkdir(parents=True, exist_ok=True)
        with self._exclusive("room"):
            self._make_room(needed, keep="")

    def clear(self, key: str, pin: int) -> bool:
        """Empty a key's folder if `pin` is the only pin, and return whether the folder was emptied."""
        with self._exclusive("room"):
            try:
                fcntl.flock(pin, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                # The refused conversion may have dropped the shared lock. Deletion needs the lock "room", which this
                # process holds.
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

    def _entries(self, keep: str) -> Iterator[_DiskEntry]:
        for path in self._root.iterdir():
            if _KEY.fullmatch(path.name):
                used = 0.0
                with suppress(FileNotFoundError):
                    used = (self._locks / f"{path.name}.pin").stat().st_mtime
                # A target of the caller's own key is the remains of a process that died: the caller holds the fill
                # lock.
                target = 0 if path.name == keep else self._target(path.name)
                yield _DiskEntry(path, used, max(_allocated(path), target))
            elif path.is_dir() and path != self._locks and not path.name.startswith(_TRASH):
                for small in path.iterdir():
                    with suppress(FileNotFoundError):
                        yield _DiskEntry(small, small.stat().st_mtime, _allocated(small))

    def _target(self, key: str) -> int:
        """The size after the fetch in progress in a key's folder; 0 without one."""
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
        # A rename removes the folder atomically; a process killed afterwards leaves only trash for the next eviction.
        trash = Path(tempfile.mkdtemp(dir=self._root, prefix=_TRASH))
        with suppress(FileNotFoundError):
            path.rename(trash / path.name)
        shutil.rmtree(trash)

    def _open(self, name: str) -> int:
        return os.open(self._locks / name, os.O_RDWR | os.O_CREAT, 0o644)

    @contextmanager
    def _exclusive(self, name: str) -> Iterator[None]:
        descriptor = self._open(name)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _allocated(path: Path) -> int:
    """Disk space of a file, or of the files in a folder."""
    total = 0
    with suppress(FileNotFoundError):
        for file in path.iterdir() if path.is_dir() else (path,):
            with suppress(FileNotFoundError):
                # POSIX counts st_blocks in units of 512 bytes; st_size would count the holes of a sparse file.
                total += file.stat().st_blocks * 512
    return total
