"""A registry in a folder: a local disk, or a share that several machines mount."""

from __future__ import annotations

import builtins
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

from isthmus.errors import Denied, RegistryError, RegistryUnavailable
from isthmus.registry.blobs import check_key, check_range, ended_early, missing_blob, missing_registry, too_long
from isthmus.registry.file_calls import FileCalls
from isthmus.registry.patience import Patience
from isthmus.registry.staging import Staging
from isthmus.retries import RetryBudget

_STAGING = ".staging"
_SLOWEST = 2**20
"""Bytes a second below which a read or write counts as one that hangs."""

T = TypeVar("T")


class FolderStore:
    """Keys are files under `root`. Writes go to a file aside, reach the disk, and are then renamed into place."""

    def __init__(self, root: Path | str, patience: Patience | None = None) -> None:
        self._root = Path(root).absolute()
        self._patience = patience or Patience()
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

        self._patience(copy, budget)

    def put_if_absent(self, key: str, data: bytes, budget: RetryBudget | None = None) -> bool:
        # A hard link fails where the name is taken, also when another process took it a moment ago.
        def link() -> bool:
            return self._place(key, lambda f: f.write(data), os.link)

        return self._patience(lambda: self._within(link, key, len(data)), budget)

    def delete(self, key: str) -> None:
        self._within(lambda: self._delete(key), key)

    def list(self, prefix: str) -> builtins.list[str]:
        folder = self._root / check_key(prefix.removesuffix("/")) if prefix else self._root
        # A walk is many calls; where it takes all of the time, it is not tried again.
        return self._patience(lambda: self._calls(lambda: self._list(prefix, folder), self._patience.timeout_s, prefix))

    def _within(self, call: Callable[[], T], key: str, size: int = 0) -> T:
        return self._calls(call, self._patience.try_s + size / _SLOWEST, key)

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
