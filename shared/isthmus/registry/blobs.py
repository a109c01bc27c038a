"""Where bytes live: keys, and the one Protocol that a folder and S3 both fulfil.

A store makes one try; where a method takes several steps, it tries each of them again. It raises our errors, never its
library's: `Missing`, `Denied`, `Corrupt` for content shorter than asked for, and `RegistryUnavailable` for what another
try may mend. isthmus.registry.patience tries again.
"""

from __future__ import annotations

import builtins
import re
from pathlib import Path
from typing import Protocol

from isthmus.errors import Corrupt, Missing, RegistryError, RegistryMissing
from isthmus.retries import RetryBudget

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")
"""What file systems take for a name; S3 takes more."""
_MAX_KEY = 900
"""Of S3's 1,024 bytes, with room for a registry's prefix."""


class BlobStore(Protocol):
    """Bytes under keys such as `blobs/sha256/<hex>`; safe to use from several threads and processes."""

    @property
    def url(self) -> str:
        """What to call this store in messages: a folder's path, or s3://BUCKET/PREFIX."""
        ...

    def get(self, key: str, *, max_bytes: int) -> bytes:
        """All bytes of `key`.

        Raises:
            Missing: no such key, or no such registry.
            RegistryError: longer than `max_bytes`; the rest was not read.
        """
        ...

    def read(self, key: str, start: int, stop: int) -> bytes:
        """Exactly the bytes `start` to `stop` (half open) of `key`.

        Raises:
            Missing: no such key.
            Corrupt: `key` ends before `stop`.
        """
        ...

    def size(self, key: str) -> int | None:
        """Length in bytes, or None if there is no such key."""
        ...

    def exists(self, key: str) -> bool:
        """Whether `key` is there."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Store `data`; a reader sees what was there before, or all of it."""
        ...

    def put_file(self, key: str, path: Path, budget: RetryBudget | None = None) -> None:
        """Store a file's bytes as `put` does, streamed; each step is tried again by itself."""
        ...

    def put_if_absent(self, key: str, data: bytes, budget: RetryBudget | None = None) -> bool:
        """Store `data` unless `key` is there; whether it was stored. Each step is tried again by itself."""
        ...

    def delete(self, key: str) -> None:
        """Remove `key`; nothing happens if it is not there."""
        ...

    def list(self, prefix: str) -> builtins.list[str]:
        """All keys under `prefix`, which is empty or ends with '/', sorted. Each step is tried again by itself.

        Raises:
            Missing: no such registry.
        """
        ...


def check_key(key: str) -> str:
    """`key` itself, once it cannot leave the store: parts of letters, digits, '.', '_', '-', none starting with a dot.

    A part has at most 255 characters.

    Raises:
        RegistryError: any other key.
    """
    if len(key) <= _MAX_KEY and all(_PART.fullmatch(part) for part in key.split("/")):
        return key
    raise RegistryError(f"{key[:100]!r} is not a key of a registry", blob=key[:100])


def check_range(start: int, stop: int) -> None:
    """Refuse a range that runs backwards.

    Raises:
        RegistryError: start is negative or after stop.
    """
    if not 0 <= start <= stop:
        raise RegistryError(f"{start}..{stop} is not a range of bytes")


def missing_blob(registry: str, key: str) -> Missing:
    """The error for a key that is not there."""
    return Missing(f"{registry} has no {key}", kind="blob", name=key, exists=[], registry=registry, blob=key)


def missing_registry(registry: str) -> RegistryMissing:
    """The error for a folder or bucket that is not there."""
    return RegistryMissing(
        f"there is no registry at {registry}",
        kind="registry",
        name=registry,
        exists=[],
        registry=registry,
        hint="check the setting registry; a folder is made by the first publish, a bucket must be there",
    )


def too_long(registry: str, key: str, max_bytes: int) -> RegistryError:
    """The error for content longer than its reader bears."""
    return RegistryError(f"{key} in {registry} exceeds {max_bytes} bytes", registry=registry, blob=key, limit=max_bytes)


def ended_early(registry: str, key: str, got: int, wanted: int) -> Corrupt:
    """The error for content that ends before the bytes asked for."""
    return Corrupt(
        f"{registry} gave {got} of {wanted} bytes of {key}", registry=registry, blob=key, got=got, wanted=wanted
    )
