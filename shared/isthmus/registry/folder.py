"""A registry in a folder: a local disk, or a share that several machines mount.

Calls on a share are bounded in time; files are written aside under a lock and renamed into place.
"""

from __future__ import annotations

import builtins
import fcntl
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

from isthmus.errors import Denied, RegistryError, RegistryUnavailable
from isthmus.registry.blobs import check_key, check_range, ended_early, missing_blob, missing_registry, too_long
from isthmus.registry.retry_policy import RetryPolicy
from isthmus.retries import RetryBudget

MAX_HANGING = 16
"""Calls that may hang at a time; each keeps a thread until the share answers."""

T = TypeVar("T")


class FileCalls:
    """Makes each call in a thread of its own, which is left behind when the time is up; several threads may use it.

    The threads are daemons: one that hangs in the kernel must not keep the process from leaving.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._hanging = 0
        self._lock = threading.RLock()  # a callback may come from within

    def __call__(self, call: Callable[[], T], seconds: float, key: str) -> T:
        """`call`'s result, or what it raises.

        Raises:
            RegistryUnavailable: it took longer than `seconds`, or MAX_HANGING others have not come back.
        """
        if self._hanging >= MAX_HANGING:
            raise self._unavailable(f"{self._url} hangs: {MAX_HANGING} reads or writes have not come back", key)
        future: Future[T] = Future()
        threading.Thread(target=self._run, args=(future, call), name="registry file", daemon=True).start()
        try:
            return future.result(timeout=seconds)
        except FutureTimeout:
            with self._lock:
                if future.done():
                    return future.result()
                self._hanging += 1
                future.add_done_callback(self._came_back)
            raise self._unavailable(f"{self._url} did not answer within {seconds:.3g} s for {key}", key) from None

    @staticmethod
    def _run(future: Future[T], call: Callable[[], T]) -> None:
        try:
            future.set_result(call())
        except BaseException as e:
            future.set_exception(e)

    def _came_back(self, future: Future[T]) -> None:
        with self._lock:
            self._hanging -= 1

    def _unavailable(self, message: str, key: str) -> RegistryUnavailable:
        return RegistryUnavailable(
            message, registry=self._url, blob=key, hint="see whether the share is mounted and its server answers"
        )


class Staging:
    """A folder of files that are being written, each under an exclusive flock(2) of its writer.

    The lock ends with its process, however that ends: a file that nobody locks was left behind. The first file of each
    Staging is preceded by a sweep. Where locks do not reach other machines, a sweep may take another machine's file,
    which costs that publisher a retry.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._swept = False
        self._lock = threading.Lock()

    @contextmanager
    def file(self) -> Iterator[tuple[Path, BinaryIO]]:
        """A new empty file, open; its name is removed at the block's end, unless it was renamed.

        Raises:
            RegistryUnavailable: it was taken away before the block's end, which a retry mends.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._sweep_once()
        path, f = self._create()
        try:
            yield path, f
        except FileNotFoundError as e:
            if os.fstat(f.fileno()).st_nlink:
                raise
            raise RegistryUnavailable(f"{path} was swept while it was written", registry=str(self._folder)) from e
        finally:
            # The lock is held until the name is gone: a sweep in between would find nothing of ours.
            path.unlink(missing_ok=True)
            f.close()

    def _create(self) -> tuple[Path, BinaryIO]:
        while True:
            descriptor, name = tempfile.mkstemp(dir=self._folder)
            f = open(descriptor, "wb")  # noqa: SIM115 - closed by its user, with the lock
            with suppress(OSError):  # some shares have no locks; there nothing is swept either
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:
                return Path(name), f
            f.close()  # another process swept it before it was locked

    def _sweep_once(self) -> None:
        with self._lock:
            swept, self._swept = self._swept, True
        if swept:
            return
        for path in self._folder.iterdir():
            # Someone else's file that may not be opened, or one that is gone by now, is none of ours.
            with suppress(OSError):
                _remove_if_left(path)


def _remove_if_left(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_ino == path.stat(follow_symlinks=False).st_ino:
            path.unlink()
    finally:
        os.close(descriptor)


_STAGING = ".staging"
_SLOWEST = 2**20
"""Bytes a second below which a read or write counts as one that hangs."""


class FolderStore:
    """Keys are files under `root`. Writes go to a file aside, reach the disk, and are then renamed into place."""

    def __init__(self, root: Path | str, patience: RetryPolicy | None = None) -> None:
        self._root = Path(root).absolute()
        self._retry = patience or RetryPolicy()
        self._calls = FileCalls(self.url)
        self._staging = Staging(self._root / _STAGING)

    @property
    def url(self) -> str:
        return str(self._root)

    def get(self, key: str, *, max_bytes: int) -> bytes:
        data = self._within(lambda: self._read(key, 0, max_bytes + 1), key, max_bytes)
        if len(data) > max_bytes:
            raise too_long(self.url, key, max_bytes)
        return data

    def read(self, key: str, start: int, stop: int) -> bytes:
        check_range(start, stop)
        data = self._within(lambda: self._read(key, start, stop - start), key, stop - start)
        if len(data) < stop - start:
            raise ended_early(self.url, key, len(data), stop - start)
        return data

    def size(self, key: str) -> int | None:
        return self._within(lambda: self._size(key), key)

    def exists(self, key: str) -> bool:
        return self.size(key) is not None

    def put(self, key: str, data: bytes) -> None:
        self._within(lambda: self._place(key, lambda f: f.write(data), os.replace), key, len(data))

    def put_file(self, key: str, path: Path, budget: RetryBudget | None = None) -> None:
        # Not left behind in a thread, as the others may be: whoever interrupts a publish wants its file gone.
        def copy() -> None:
            with path.open("rb") as source:
                self._place(key, lambda f: shutil.copyfileobj(source, f, 2**20), os.replace)

        self._retry(copy, budget)

    def put_if_absent(self, key: str, data: bytes, budget: RetryBudget | None = None) -> bool:
        # A hard link fails where the name is taken, also when another process took it a moment ago.
        def link() -> bool:
            return self._place(key, lambda f: f.write(data), os.link)

        return self._retry(lambda: self._within(link, key, len(data)), budget)

    def delete(self, key: str) -> None:
        self._within(lambda: self._delete(key), key)

    def list(self, prefix: str) -> builtins.list[str]:
        folder = self._root / check_key(prefix.removesuffix("/")) if prefix else self._root
        # A walk is many calls; where it takes all of the time, it is not tried again.
        return self._retry(lambda: self._calls(lambda: self._list(prefix, folder), self._retry.timeout_s, prefix))

    def _within(self, call: Callable[[], T], key: str, size: int = 0) -> T:
        return self._calls(call, self._retry.try_s + size / _SLOWEST, key)

    def _read(self, key: str, start: int, size: int) -> bytes:
        with self._errors(key), self._path(key).open("rb", buffering=0) as f:
            f.seek(start)
            parts = []
            while size and (part := f.read(size)):
                parts.append(part)
                size -= len(part)
        return b"".join(parts)

    def _size(self, key: str) -> int | None:
        with self._errors(key):
            path = self._path(key)
            try:
                return path.stat().st_size if path.is_file() else None
            except FileNotFoundError:
                return None

    def _delete(self, key: str) -> None:
        with self._errors(key):
            self._path(key).unlink(missing_ok=True)

    def _list(self, prefix: str, folder: Path) -> builtins.list[str]:
        with self._errors(prefix):
            if not self._root.is_dir():
                raise self._no_folder()
            return sorted(
                (Path(parent) / name).relative_to(self._root).as_posix()
                for parent, _, names in os.walk(folder)
                if not Path(parent).is_relative_to(self._root / _STAGING)
                for name in names
            )

    def _no_folder(self) -> RegistryError:
        """The error for a root that is not there, or that no publish could make."""
        there = next((path for path in (self._root, *self._root.parents) if path.exists()), self._root)
        if there.is_file():
            return RegistryError(
                f"{there} is a file; a registry is a folder",
                registry=self.url,
                hint="check the setting registry: a folder's path, or s3://BUCKET/PREFIX",
            )
        return missing_registry(self.url)

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    def _place(self, key: str, write: Callable[[BinaryIO], object], into_place: Callable[[Path, Path], None]) -> bool:
        """Whether it was placed; `into_place` may find the name taken."""
        target = self._path(key)
        with self._errors(key):
            target.parent.mkdir(parents=True, exist_ok=True)
            with self._staging.file() as (staged, f):
                write(f)
                f.flush()
                os.fsync(f.fileno())
                os.fchmod(f.fileno(), 0o644)
                try:
                    into_place(staged, target)
                except FileExistsError:
                    return False
            _sync_folder(target.parent)
            return True

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as e:
            raise (missing_blob(self.url, key) if self._root.is_dir() else self._no_folder()) from e
        except PermissionError as e:
            raise Denied(
                f"{self.url} may not be used: {e.strerror} for {key}",
                registry=self.url,
                blob=key,
                hint="give this process's user the right to read (and, to publish, to write) the folder",
            ) from e
        except OSError as e:
            raise RegistryUnavailable(f"{self.url} failed for {key}: {e}", registry=self.url, blob=key) from e


def _sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
