"""A registry in a folder: a local disk, or a network share mounted by several machines.

Calls are bounded in time, since a share may hang; files are staged under a lock and renamed into place.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, TypeVar

from isthmus.errors import Denied, RegistryError, RegistryUnavailable
from isthmus.files import sync_folder
from isthmus.registry.blobs import (
    StoredKey,
    check_key,
    check_range,
    conditions_ignored,
    ended_early,
    missing_blob,
    missing_registry,
    store_full,
    too_long,
)
from isthmus.registry.retry_policy import RetryPolicy
from isthmus.retries import RetryBudget

MAX_HANGING = 16
"""Calls that may hang at a time; each occupies a thread until the share answers."""

T = TypeVar("T")


class FileCalls:
    """Runs file system calls with a timeout, each in a thread of its own; thread-safe.

    Threads are daemons: a call that hangs in the kernel must not block the exit of the process.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._hanging = 0
        # Reentrant: a done-callback runs at once, under the lock, if the future has completed meanwhile.
        self._lock = threading.RLock()

    def __call__(self, call: Callable[[], T], seconds: float, key: str) -> T:
        """The result or exception of `call`.

        Raises:
            RegistryUnavailable: longer than `seconds`, or MAX_HANGING earlier calls still hang.
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
                future.add_done_callback(self._returned)
            raise self._unavailable(f"{self._url} did not answer within {seconds:.3g} s for {key}", key) from None

    @staticmethod
    def _run(future: Future[T], call: Callable[[], T]) -> None:
        try:
            future.set_result(call())
        except BaseException as e:
            future.set_exception(e)

    def _returned(self, future: Future[T]) -> None:
        with self._lock:
            self._hanging -= 1

    def _unavailable(self, message: str, key: str) -> RegistryUnavailable:
        return RegistryUnavailable(
            message, registry=self._url, blob=key, hint="see whether the share is mounted and its server answers"
        )


class Staging:
    """A folder of files in progress, each under an exclusive flock(2) of its writer.

    The lock ends with the writer's process, so that an unlocked file is abandoned. The first file of each Staging is
    preceded by a sweep of abandoned files. On shares without locks across machines, a sweep may remove another
    machine's file and cost that publisher a retry.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._swept = False
        self._lock = threading.Lock()

    @contextmanager
    def file(self) -> Iterator[tuple[Path, BinaryIO]]:
        """A new empty file, open for writing; its name is removed at the end of the block unless renamed before.

        Raises:
            RegistryUnavailable: the file was swept before the end of the block; a retry succeeds.
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
            # Unlink before unlock: a sweep in between must not see an abandoned file.
            path.unlink(missing_ok=True)
            f.close()

    def _create(self) -> tuple[Path, BinaryIO]:
        while True:
            descriptor, name = tempfile.mkstemp(dir=self._folder)
            f = open(descriptor, "wb")  # noqa: SIM115 - closed by the caller, with the lock
            # Some shares have no locks; on these a sweep cannot lock, and so removes, anything either.
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:
                return Path(name), f
            f.close()  # swept by another process between creation and lock

    def _sweep_once(self) -> None:
        with self._lock:
            swept, self._swept = self._swept, True
        if swept:
            return
        for path in self._folder.iterdir():
            # Another user's file may be unreadable, and a concurrent sweep may remove a file first; neither is an error
            # here.
            with suppress(OSError):
                _remove_if_abandoned(path)


def _remove_if_abandoned(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The name may already belong to a newer file.
        if os.fstat(descriptor).st_ino == path.stat(follow_symlinks=False).st_ino:
            path.unlink()
    finally:
        os.close(descriptor)


_STAGING, _LOCKS, _PULLS = ".staging", ".locks", ".pulls"
_MIN_BYTES_PER_S = 2**20
"""A slower read or write counts as hanging."""


class FolderStore:
    """Keys are files under `root`, written to a staged file, synced to disk and renamed into place."""

    def __init__(self, root: Path | str, retry_policy: RetryPolicy | None = None) -> None:
        self._root = Path(root).absolute()
        self._retry = retry_policy or RetryPolicy()
        self._calls = FileCalls(self.url)
        self._staging = Staging(self._root / _STAGING)

    @property
    def url(self) -> str:
        return str(self._root)

    def get(self, key: str, *, max_bytes: int) -> bytes:
        data = self._bounded(lambda: self._read(key, 0, max_bytes + 1), key, max_bytes)
        if len(data) > max_bytes:
            raise too_long(self.url, key, max_bytes)
        return data

    def get_tagged(self, key: str, *, max_bytes: int) -> tuple[bytes, str]:
        data = self.get(key, max_bytes=max_bytes)
        return data, _tag(data)

    def read(self, key: str, start: int, stop: int) -> bytes:
        check_range(start, stop)
        data = self._bounded(lambda: self._read(key, start, stop - start), key, stop - start)
        if len(data) < stop - start:
            raise ended_early(self.url, key, len(data), stop - start)
        return data

    def size(self, key: str) -> int | None:
        return self._bounded(lambda: self._size(key), key)

    def exists(self, key: str) -> bool:
        return self.size(key) is not None

    def put(self, key: str, data: bytes) -> None:
        self._bounded(lambda: self._place(key, lambda f: f.write(data), os.replace), key, len(data))

    def put_file(self, key: str, path: Path, budget: RetryBudget | None = None) -> None:
        # In the calling thread, unlike the calls above: an interrupted publish must remove its staged file.
        def copy() -> None:
            with path.open("rb") as source:
                self._place(key, lambda f: shutil.copyfileobj(source, f, 2**20), os.replace)

        self._retry(copy, budget)

    def put_if_absent(self, key: str, data: bytes, budget: RetryBudget | None = None) -> bool:
        # os.link fails atomically if the name exists, also against other processes.
        def link() -> bool:
            return self._place(key, lambda f: f.write(data), os.link)

        return self._retry(lambda: self._bounded(link, key, len(data)), budget)

    def put_if_match(self, key: str, data: bytes, tag: str, budget: RetryBudget | None = None) -> bool:
        def swap() -> bool:
            with self._locked(key):
                present = self._tag(key)
                # Content equal to `data` is an earlier attempt's, whose time was up before it returned.
                return present == _tag(data) or (
                    present == tag and self._place(key, lambda f: f.write(data), os.replace)
                )

        return self._retry(lambda: self._bounded(swap, key, len(data)), budget)

    def require_conditions(self) -> None:
        # Nothing to try: each comparison takes a lock, and fails on a share without locks.
        return

    def delete(self, key: str) -> None:
        self._bounded(lambda: self._delete(key), key)

    def list(self, prefix: str) -> builtins.list[str]:
        folder = self._root / check_key(prefix.removesuffix("/")) if prefix else self._root
        # A walk is many calls; after a walk of the full timeout there is no time for a second attempt.
        return self._retry(lambda: self._calls(lambda: self._list(prefix, folder), self._retry.timeout_s, prefix))

    def entries(self, prefix: str) -> builtins.list[StoredKey]:
        keys = self.list(prefix)
        return self._retry(lambda: self._calls(lambda: self._entries(keys), self._retry.timeout_s, prefix))

    def adopt(self, key: str, path: Path) -> None:
        """Rename a file of the same disk into place."""
        target = self._path(key)
        with self._errors(key):
            target.parent.mkdir(parents=True, exist_ok=True)
            path.chmod(0o644)
            os.replace(path, target)
            sync_folder(target.parent)

    @property
    def pulls(self) -> Path:
        """The folder of files that a pull fetches; no key is there."""
        return self._root / _PULLS

    def forget_pull(self, key: str) -> None:
        """Remove what an interrupted pull fetched of a blob."""

        def forget() -> None:
            with self._errors(key):
                (self.pulls / key.rpartition("/")[2]).unlink(missing_ok=True)

        self._bounded(forget, key)

    def _bounded(self, call: Callable[[], T], key: str, size: int = 0) -> T:
        return self._calls(call, self._retry.try_s + size / _MIN_BYTES_PER_S, key)

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

    def _tag(self, key: str) -> str:
        """The tag of the whole content of `key`; empty if the key is absent."""
        path = self._path(key)
        with self._errors(key):
            try:
                with path.open("rb", buffering=0) as f:
                    return hashlib.file_digest(f, "sha256").hexdigest()
            except FileNotFoundError:
                return ""

    @contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        """Writers that compare have the key to themselves for the block; a killed writer's lock ends with it.

        Source: flock(2): over NFS the lock is the server's, unless the mount has `nolock` or `local_lock`.

        Raises:
            ConditionsIgnored: a share without locks.
        """
        # A bounded number of files: a lock that is removed may be another writer's already.
        path = self._root / _LOCKS / hashlib.sha256(check_key(key).encode()).hexdigest()[:2]
        with self._errors(key):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError as e:
                raise conditions_ignored(self.url) from e
            yield
        finally:
            os.close(descriptor)

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
                if not any(Path(parent).is_relative_to(self._root / own) for own in (_STAGING, _LOCKS, _PULLS))
                for name in names
            )

    def _entries(self, keys: builtins.list[str]) -> builtins.list[StoredKey]:
        entries = []
        for key in keys:
            with suppress(FileNotFoundError):  # removed since the listing
                status = (self._root / key).stat()
                entries.append(StoredKey(key, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC)))
        return entries

    def _no_folder(self) -> RegistryError:
        existing = next((path for path in (self._root, *self._root.parents) if path.exists()), self._root)
        if existing.is_file():
            return RegistryError(
                f"{existing} is a file; a registry is a folder",
                registry=self.url,
                hint="check the setting registry: a folder's path, or s3://BUCKET/PREFIX",
            )
        return missing_registry(self.url)

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    def _place(self, key: str, write: Callable[[BinaryIO], object], into_place: Callable[[Path, Path], None]) -> bool:
        """Write a staged file and move it to `key`; False if `into_place` finds an existing name."""
        target = self._path(key)
        with self._errors(key):
            target.parent.mkdir(parents=True, exist_ok=True)
            with self._staging.file() as (staged, f):
                write(f)
                f.flush()
                os.fsync(f.fileno())
                # mkstemp creates files of mode 0600, unreadable to functions of another user.
                os.fchmod(f.fileno(), 0o644)
                try:
                    into_place(staged, target)
                except FileExistsError:
                    return False
            sync_folder(target.parent)
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
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                raise store_full(self.url, key) from e
            raise RegistryUnavailable(f"{self.url} failed for {key}: {e}", registry=self.url, blob=key) from e


def _tag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
