"""A registry in HDFS. The only module that imports hdfs-native.

HDFS renames atomically, and refuses to rename onto a file unless told to overwrite; it has no conditional overwrite.
So a key is a file, and its replacements by comparison are numbered files beside it: the replacement n + 1 is a rename
that fails if another writer made it first.

    PATH/models/m/aliases/prod               the content as first written
    PATH/.successors/models/m/aliases/prod/2 its replacement; the highest number is the content
    PATH/.staging/<random>                   files in progress
"""

from __future__ import annotations

import builtins
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from hdfs_native import Client, WriteOptions

from isthmus.errors import Denied, Missing, RegistryError, RegistryUnavailable
from isthmus.registry.blobs import (
    StoredKey,
    check_key,
    check_range,
    ended_early,
    missing_blob,
    missing_registry,
    replace_retried,
    store_full,
    too_long,
)
from isthmus.registry.folder import FileCalls
from isthmus.registry.retry_policy import RetryPolicy
from isthmus.retries import RetryBudget

_CHUNK_BYTES = 2**20
"""The memory of an upload, apart from hdfs-native's packets."""
_MIN_BYTES_PER_S = 2**20
"""A slower read or write counts as hanging."""
_ABANDONED_S = 24 * 3600.0
_MAX_RACES = 100
"""Writers of one key that were first, before a write or read gives up."""
# The policy repeats calls; hdfs-native's own 15 attempts take three minutes.
_CONFIG = {"dfs.client.failover.max.attempts": "1", "dfs.client.failover.sleep.base.millis": "50"}
_TRANSIENT = ("StandbyException", "RetriableException", "SafeModeException", "RetryStartFileException")

T = TypeVar("T")


class HdfsStore:
    """Keys are files under `/path` of the name node at `authority` (HOST:PORT, or a name service of HADOOP_CONF_DIR).

    The user is HADOOP_USER_NAME, or the owner of the Kerberos ticket. Calls are bounded in time, since hdfs-native's
    are not.
    """

    def __init__(self, authority: str, path: str = "", retry_policy: RetryPolicy | None = None) -> None:
        self._root = f"/{path.strip('/')}".rstrip("/")
        self._authority = authority
        self._retry = retry_policy or RetryPolicy()
        self._calls = FileCalls(self.url)
        self._made: Any = None
        self._swept = False

    @property
    def url(self) -> str:
        return f"hdfs://{self._authority}{self._root}"

    def close(self) -> None:
        """Drop the connection."""
        self._made = None

    def get(self, key: str, *, max_bytes: int) -> bytes:
        return self.get_tagged(key, max_bytes=max_bytes)[0]

    def get_tagged(self, key: str, *, max_bytes: int) -> tuple[bytes, str]:
        def whole(reader: Any, number: int) -> tuple[bytes, str]:
            if reader.size > max_bytes:
                raise too_long(self.url, key, max_bytes)
            data = reader.read_range(0, reader.size) if reader.size else b""
            return data, _tag(number, data)

        return self._opened(key, whole, max_bytes)

    def read(self, key: str, start: int, stop: int) -> bytes:
        check_range(start, stop)

        def part(reader: Any, _: int) -> bytes:
            # hdfs-native panics at a range beyond the end.
            if reader.size < stop:
                raise ended_early(self.url, key, max(0, reader.size - start), stop - start)
            return bytes(reader.read_range(start, stop - start)) if stop > start else b""

        return self._opened(key, part, stop - start)

    def size(self, key: str) -> int | None:
        try:
            return self._opened(key, lambda reader, _: int(reader.size), 0)
        except Missing:
            return None

    def exists(self, key: str) -> bool:
        return self.size(key) is not None

    def put(self, key: str, data: bytes) -> None:
        check_key(key)
        with self._staged(key, [data]) as staged:
            for _ in range(_MAX_RACES):
                # A file beside successors would be no reader's.
                if (number := self._last(key)) == 0:
                    self._rename(staged, self._path(key), key, overwrite=True)
                    return
                if self._rename(staged, self._successor(key, number + 1), key):
                    return
        raise self._contended(key)

    def put_file(self, key: str, path: Path, budget: RetryBudget | None = None) -> None:
        check_key(key)

        def copy() -> None:
            with path.open("rb") as f, self._staged(key, iter(lambda: f.read(_CHUNK_BYTES), b"")) as staged:
                self._rename(staged, self._path(key), key, overwrite=True)

        # One step, since a file is one stream; hdfs-native replaces a data node that fails during the stream.
        self._retry(copy, budget)

    def put_if_absent(self, key: str, data: bytes, budget: RetryBudget | None = None) -> bool:
        return self.put_if_match(key, data, "", budget)

    def put_if_match(self, key: str, data: bytes, tag: str, budget: RetryBudget | None = None) -> bool:
        return replace_retried(self, self._retry, key, data, tag, budget)

    def require_conditions(self) -> None:
        # Nothing to try: a name node refuses a rename onto a file.
        return

    def replace(self, key: str, data: bytes, tag: str) -> str | None:
        """Store `data` where `key` has that tag, or, for an empty one, where it is absent; the new tag, else None."""
        check_key(key)
        if not tag:
            if self._last(key):
                return None
            with self._staged(key, [data]) as staged:
                return _tag(0, data) if self._rename(staged, self._path(key), key) else None
        text = tag.partition(".")[0]
        number = int(text) if text.isdigit() else 0
        try:
            _, present = self.get_tagged(key, max_bytes=2**31)
        except Missing:
            return None
        if present != tag:
            return None
        with self._staged(key, [data]) as staged:
            if not self._rename(staged, self._successor(key, number + 1), key):
                return None
        with suppress(RegistryError):
            self._drop_old_successors(key)
        return _tag(number + 1, data)

    def _drop_old_successors(self, key: str) -> None:
        """Remove all but the last that are a day older; a younger one must stand in the way of a writer that compared
        before it was made, and is late.
        """

        def drop(client: Client) -> None:
            made = sorted(client.list_status(f"{self._root}/.successors/{key}"), key=lambda each: _number(each.path))
            for status in made[:-1]:
                if made[-1].modification_time - status.modification_time > 1000 * _ABANDONED_S:
                    client.delete(status.path)

        self._call(drop, key)

    def delete(self, key: str) -> None:
        path, folder = self._path(key), f"{self._root}/.successors/{key}"
        # In this order the present content is there until nothing is.
        self._call(lambda client: client.delete(path), key)
        self._call(lambda client: client.delete(folder, recursive=True), key)

    def list(self, prefix: str) -> builtins.list[str]:
        return [entry.key for entry in self.entries(prefix)]

    def entries(self, prefix: str) -> builtins.list[StoredKey]:
        if prefix:
            check_key(prefix.removesuffix("/"))
        return self._retry(lambda: self._entries(prefix.removesuffix("/")))

    def _entries(self, prefix: str) -> builtins.list[StoredKey]:
        entries = {each.key: each for each in self._walk(f"{self._root}/{prefix}".rstrip("/") or "/", self._root)}
        if not entries:
            self._check_root(prefix)
        successors = f"{self._root}/.successors"
        for each in sorted(self._walk(f"{successors}/{prefix}".rstrip("/"), successors), key=lambda e: _number(e.key)):
            key = each.key.rpartition("/")[0]
            entries[key] = StoredKey(key, each.size, each.written)
        return [entries[key] for key in sorted(entries)]

    def _walk(self, folder: str, root: str) -> builtins.list[StoredKey]:
        def walk(client: Client) -> builtins.list[StoredKey]:
            return [
                StoredKey(
                    status.path.removeprefix(f"{root}/"),
                    status.length,
                    datetime.fromtimestamp(status.modification_time / 1000, UTC),
                )
                for status in client.list_status(folder, recursive=True)
                if not status.isdir
            ]

        try:
            found = self._call(walk, "", seconds=self._retry.timeout_s)
        except Missing:
            return []
        return [entry for entry in found if not entry.key.startswith((".staging/", ".successors/"))]

    def _check_root(self, key: str) -> None:
        try:
            self._call(lambda client: client.get_file_info(self._root or "/"), key)
        except Missing as e:
            raise missing_registry(self.url) from e

    def _opened(self, key: str, use: Callable[[Any, int], T], size: int) -> T:
        """The result of `use` on a reader of the present content, and that content's number."""
        path = self._path(key)
        for _ in range(_MAX_RACES):
            number = self._last(key)
            name = self._successor(key, number) if number else path
            try:
                return self._call(partial(_use, use, name, number), key, size)
            except Missing:
                # Removed as its successors came, or with its key.
                if self._last(key) == number:
                    self._check_root(key)
                    raise
        raise self._contended(key)

    def _last(self, key: str) -> int:
        """The highest number of the successors of `key`; 0 without any."""
        folder = f"{self._root}/.successors/{check_key(key)}"
        try:
            numbers = self._call(
                lambda client: [_number(each.path) for each in client.list_status(folder) if not each.isdir], key
            )
        except Missing:
            return 0
        return max(numbers, default=0)

    @contextmanager
    def _staged(self, key: str, chunks: Any) -> Iterator[str]:
        """A complete file of a random name; removed at the end of the block unless renamed before."""
        self._sweep()
        staged = f"{self._root}/.staging/{uuid4().hex}"
        writer = self._call(lambda client: client.create(staged, WriteOptions(create_parent=True)), key)
        try:
            for chunk in chunks:
                self._call(partial(_write, writer, chunk), key, len(chunk))
            self._call(lambda _: writer.close(), key)
            yield staged
        finally:
            with suppress(RegistryError):
                self._call(lambda client: client.delete(staged), key)

    def _sweep(self) -> None:
        """Once for each store: remove files that a killed writer left a day ago."""
        if self._swept:
            return
        self._swept = True
        before = time.time() - _ABANDONED_S

        def sweep(client: Client) -> None:
            for status in client.list_status(f"{self._root}/.staging"):
                if status.modification_time / 1000 < before:
                    client.delete(status.path)

        with suppress(Missing):
            self._call(sweep, "", seconds=self._retry.timeout_s)

    def _rename(self, staged: str, target: str, key: str, *, overwrite: bool = False) -> bool:
        def rename(client: Client) -> bool:
            client.mkdirs(target.rpartition("/")[0], create_parent=True)
            try:
                client.rename(staged, target, overwrite)
            except FileExistsError:
                return False
            return True

        return self._call(rename, key)

    def _path(self, key: str) -> str:
        return f"{self._root}/{check_key(key)}"

    def _successor(self, key: str, number: int) -> str:
        return f"{self._root}/.successors/{check_key(key)}/{number}"

    def _contended(self, key: str) -> RegistryUnavailable:
        return RegistryUnavailable(f"others keep replacing {key} in {self.url}", registry=self.url, blob=key)

    def _call(self, use: Callable[[Client], T], key: str, size: int = 0, seconds: float = 0.0) -> T:
        """The result of one step, with a bound on its time; each step is short, or of `size` bytes."""

        def step() -> T:
            if self._made is None:
                self._made = Client(f"hdfs://{self._authority}", _CONFIG)
            return use(self._made)

        with self._errors(key):
            return self._calls(step, seconds or self._retry.try_s + size / _MIN_BYTES_PER_S, key)

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        try:
            yield
        except RegistryError:
            raise
        except FileNotFoundError as e:
            raise missing_blob(self.url, key) from e
        except BaseException as e:
            # A Rust panic is no subclass of Exception.
            if not isinstance(e, OSError | RuntimeError | ValueError) and type(e).__name__ != "PanicException":
                raise
            raise self._translated(e, key) from e

    def _translated(self, error: BaseException, key: str) -> RegistryError:
        # A Java exception's class and first line; the rest is a stack trace.
        text = str(error).partition("\\n")[0].partition("\n")[0][:300]
        facts = {"registry": self.url, "blob": key}
        if "AccessControlException" in text or "Sasl" in text or "Permission denied" in text:
            return Denied(
                f"{self.url} refused our user for {key}: {text}",
                hint="set HADOOP_USER_NAME, or get a Kerberos ticket (kinit), of a user with rights on the folder",
                **facts,
            )
        if "QuotaExceeded" in text:
            return store_full(self.url, key)
        # Other exceptions of the server, such as a file where a folder must be.
        if isinstance(error, RuntimeError) and "RPCError" in text and not any(each in text for each in _TRANSIENT):
            return RegistryError(f"{self.url} refused {key}: {text}", **facts)
        return RegistryUnavailable(f"{self.url} did not answer for {key}: {text}", **facts)


def _tag(number: int, data: bytes) -> str:
    """The hash tells a key that was removed and written again from the one before."""
    return f"{number}.{hashlib.sha256(data).hexdigest()}"


def _use(use: Callable[[Any, int], T], path: str, number: int, client: Client) -> T:
    return use(client.read(path), number)


def _write(writer: Any, chunk: bytes, client: Client) -> None:
    writer.write(chunk)


def _number(path: str) -> int:
    name = path.rpartition("/")[2]
    return int(name) if name.isdigit() else 0
