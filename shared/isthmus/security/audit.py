"""The audit log of a registry: changes and their authors, a chain in which each entry names its predecessor's digest.

Entry n is the key `audit/<n, twelve digits>`, written only where the key is absent, so that writers at the same time
make one linear chain. `audit/head` names number and digest of a late entry: where to append, and how many there were.
Layout and limits: docs/reference/audit.md.
"""

from __future__ import annotations

import builtins
import getpass
import hashlib
import re
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Protocol, TypeVar, cast

import msgspec

from isthmus.artifacts.constraints import Digest
from isthmus.errors import Missing, RegistryError

SCHEMA = "isthmus.audit/1"
FIRST_PREVIOUS = "sha256:" + "0" * 64
"""The predecessor's digest in the first entry."""
MAX_ENTRY_BYTES = 16 * 2**10
_PREFIX = "audit/"
_HEAD = "audit/head"
_NUMBER = re.compile(r"[0-9]{12}")
# A digit less than keys have: a forged head must not lead past the last key.
_HEAD_TEXT = re.compile(r"([0-9]{1,11}) (sha256:[0-9a-f]{64})")
_MAX_HEAD_BYTES = 128
# Reads of a verification at a time: enough to hide the round trips of S3, and 2 MiB at most.
_PARALLEL_READS, _BATCH = 8, 128

T = TypeVar("T")
_Text = Annotated[str, msgspec.Meta(max_length=1024)]


class AuditStore(Protocol):
    """The part of the registry's store that the log needs; see `BlobStore`."""

    @property
    def url(self) -> str:
        """The name of the store in messages."""
        ...

    def get(self, key: str, *, max_bytes: int) -> bytes:
        """All bytes of `key`."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Store `data` atomically."""
        ...

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Store `data` unless `key` exists; whether this call stored it."""
        ...

    def list(self, prefix: str) -> builtins.list[str]:
        """All keys under `prefix`, sorted."""
        ...


class Retries(Protocol):
    """Repeats one request of the store; see `RetryPolicy`."""

    def __call__(self, action: Callable[[], T]) -> T: ...


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A change. `who` is the writer's own statement; `id` is random: no two entries have the same bytes."""

    schema: str
    number: Annotated[int, msgspec.Meta(ge=1)]
    id: _Text
    at: _Text
    who: _Text
    what: _Text
    facts: dict[str, Any]
    previous: Digest


@dataclass(frozen=True)
class ChainMark:
    """A number of entries and the last entry's digest; a copy in another place shows a truncated log."""

    number: int = 0
    digest: str = FIRST_PREVIOUS

    @classmethod
    def parse(cls, text: str) -> ChainMark | None:
        """Of `NUMBER sha256:HEX`, or with a colon or an at sign between; None for any other text."""
        match = _HEAD_TEXT.fullmatch(re.sub("[:@](?=sha256:)", " ", text.strip()))
        return None if match is None else cls(int(match[1]), match[2])

    def __str__(self) -> str:
        return f"{self.number}@{self.digest}"


@dataclass(frozen=True)
class ChainBreak:
    """The first entry that differs from the appended entry, and the evidence."""

    number: int
    reason: str


@dataclass(frozen=True)
class ChainCheck:
    """The end of the verified part of the chain, and the break; None where every entry follows."""

    verified: ChainMark
    broken: ChainBreak | None


class AuditLog:
    """The audit log in `store`; `retry` repeats single reads and writes. Thread-safe and process-safe."""

    def __init__(self, store: AuditStore, retry: Retries) -> None:
        self._store, self._retry = store, retry

    def append(self, who: str, what: str, facts: Mapping[str, Any]) -> AuditEntry:
        """Append an entry; `facts` are JSON, of a few kilobytes.

        Raises:
            RegistryError: the entry exceeds MAX_ENTRY_BYTES, or the store refuses it.
        """
        return cast(AuditEntry, self._append(self._last(), who, what, facts, lambda _: False))

    def append_once(
        self, who: str, what: str, facts: Mapping[str, Any], same: Callable[[AuditEntry], bool]
    ) -> AuditEntry | None:
        """Append an entry unless one is the `same`, also where several writers try at once; None where one was.

        Raises:
            RegistryError: as `append`.
        """
        last = ChainMark()
        for number, data in self._contents(self._numbers()):
            if (entry := _parsed(data)) is not None and same(entry):
                return None
            last = ChainMark(number, _digest(data))
        # From the last entry that was looked at: whatever came since is met by the walk.
        return self._append(last, who, what, facts, same)

    def _append(
        self, last: ChainMark, who: str, what: str, facts: Mapping[str, Any], same: Callable[[AuditEntry], bool]
    ) -> AuditEntry | None:
        while True:
            entry = _entry(last, who, what, facts)
            data = msgspec.json.encode(entry, order="sorted")
            if len(data) > MAX_ENTRY_BYTES:
                raise RegistryError(
                    f"an entry of the audit log has at most {MAX_ENTRY_BYTES} bytes", limit=MAX_ENTRY_BYTES
                )
            if self._store.put_if_absent(_key(entry.number), data):
                break
            # Another writer was first: its entry is the predecessor.
            other = self._read(entry.number)
            if (parsed := _parsed(other)) is not None and same(parsed):
                return None
            last = ChainMark(entry.number, _digest(other))
        # Behind by some entries where writers overtake one another: the loop above walks on from there. Not written by
        # a killed writer: the next one walks on likewise.
        head = f"{entry.number} {_digest(data)}".encode()
        self._retry(lambda: self._store.put(_HEAD, head))
        return entry

    def count(self) -> int:
        """How many entries there are; nothing is verified."""
        return len(self._numbers())

    def entries(self, *, after: int = 0) -> Iterator[AuditEntry]:
        """The entries in order, with numbers above `after`.

        Raises:
            RegistryError: an entry is unreadable; `verify` names it.
        """
        numbers = [number for number in self._numbers() if number > after]
        for number, data in self._contents(numbers):
            if (entry := _parsed(data)) is None:
                raise RegistryError(
                    f"entry {number} of the audit log in {self._store.url} is unreadable",
                    blob=_key(number),
                    hint="isthmus audit --verify names the first entry that was altered",
                )
            yield entry

    def verify(self, checkpoint: ChainMark | None = None) -> ChainCheck:
        """Whether every entry follows its predecessor, through `audit/head` and `checkpoint`.

        Entries that were cut off at the end together with the head show by a checkpoint alone, and so does a chain
        that was written anew.
        """
        # Read before the entries: the head of a writer under way names an entry that is there already.
        marks = {mark.number: mark for mark in (self._head(), checkpoint) if mark is not None}
        end = ChainMark()
        for number, data in self._contents(self._numbers()):
            if number != end.number + 1:
                return ChainCheck(end, ChainBreak(end.number + 1, "it is missing"))
            if reason := _fault(number, data, end):
                return ChainCheck(end, ChainBreak(number, reason))
            entry = ChainMark(number, _digest(data))
            if number in marks and marks[number] != entry:
                return ChainCheck(end, ChainBreak(number, "it was altered: its digest was another"))
            end = entry
        if (known := max(marks, default=0)) > end.number:
            return ChainCheck(end, ChainBreak(end.number + 1, f"it is missing: there were {known} entries"))
        return ChainCheck(end, None)

    def _last(self) -> ChainMark:
        """Where to append. After lost entries still behind the head, so that the loss stays visible."""
        if (head := self._head()) is not None:
            return head
        numbers = self._numbers()
        return ChainMark(numbers[-1], _digest(self._read(numbers[-1]))) if numbers else ChainMark()

    def _head(self) -> ChainMark | None:
        try:
            data = self._retry(lambda: self._store.get(_HEAD, max_bytes=_MAX_HEAD_BYTES))
        except Missing:
            return None
        return ChainMark.parse(data.decode("ascii", "replace"))

    def _numbers(self) -> list[int]:
        names = [key.removeprefix(_PREFIX) for key in self._store.list(_PREFIX)]
        return [int(name) for name in names if _NUMBER.fullmatch(name)]

    def _read(self, number: int) -> bytes:
        try:
            return self._retry(lambda: self._store.get(_key(number), max_bytes=MAX_ENTRY_BYTES))
        except RegistryError as e:
            if "limit" not in e.facts:
                raise
            return b""  # longer than any entry: unreadable

    def _contents(self, numbers: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        with ThreadPoolExecutor(_PARALLEL_READS, thread_name_prefix="audit") as pool:
            for start in range(0, len(numbers), _BATCH):
                batch = numbers[start : start + _BATCH]
                yield from zip(batch, pool.map(self._read, batch), strict=True)


def local_user() -> str:
    """The user and the machine of this process: the author of a command's change, without proof."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError):  # a container without an entry for its user
        name = "unknown"
    return f"{name}@{socket.gethostname()}"[:200]


def _entry(last: ChainMark, who: str, what: str, facts: Mapping[str, Any]) -> AuditEntry:
    return AuditEntry(
        schema=SCHEMA,
        number=last.number + 1,
        id=secrets.token_hex(8),
        at=datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        who=who[:1024],
        what=what[:1024],
        facts=dict(facts),
        previous=last.digest,
    )


def _fault(number: int, data: bytes, before: ChainMark) -> str:
    """The evidence that the entry does not follow; empty where the entry follows."""
    if (entry := _parsed(data)) is None:
        return "it is unreadable"
    if entry.number != number:
        return f"it says that it is entry {entry.number}"
    return "" if entry.previous == before.digest else "the entry before it was altered, or it was"


def _parsed(data: bytes) -> AuditEntry | None:
    try:
        entry = msgspec.json.decode(data, type=AuditEntry)
    except (ValueError, RecursionError):
        return None
    return entry if entry.schema == SCHEMA else None


def _key(number: int) -> str:
    return f"{_PREFIX}{number:012d}"


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
