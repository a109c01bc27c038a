"""Signatures of manifests in a registry: an envelope for each key, beside the content and never part of it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from isthmus.errors import Missing, Untrusted
from isthmus.files import write_whole
from isthmus.registry.blobs import BlobStore
from isthmus.registry.content import blob_key
from isthmus.registry.retry_policy import RetryPolicy, in_parallel
from isthmus.security.dsse import MAX_ENVELOPE_BYTES

# Whoever writes to the store chooses how many there are; an operator rotates among a few keys.
MAX_ENVELOPES = 16

SIGNATURES = "signatures/"
"""Where the envelopes of manifests are in a registry."""


class Signatures:
    """The envelopes in a store, under `signatures/<hex of the manifest's digest>/<key id>`."""

    def __init__(self, store: BlobStore, retry_policy: RetryPolicy) -> None:
        self._store, self._retry = store, retry_policy

    def of(self, digest: str) -> list[bytes]:
        """The envelopes of a manifest, at most MAX_ENVELOPES; unverified.

        Raises:
            RegistryError: the registry does not give them.
        """
        return list(self.by_key(digest).values())

    def by_key(self, digest: str) -> dict[str, bytes]:
        """The envelopes of a manifest by the ids of their keys, as the store names them; unverified.

        Raises:
            RegistryError: the registry does not give them.
        """
        prefix = _prefix(digest)
        keys = self._store.list(prefix)[:MAX_ENVELOPES]
        envelopes = dict(in_parallel(lambda key: (key, self._read(key)), keys))
        return {key.removeprefix(prefix): envelopes[key] for key in keys if envelopes[key]}

    def put(self, digest: str, key_id: str, envelope: bytes) -> None:
        """Store the envelope of a key; an earlier one of the same key is replaced."""
        self._retry(lambda: self._store.put(f"{_prefix(digest)}{key_id}", envelope))

    def _read(self, key: str) -> bytes:
        # Of another length than an envelope's, or removed meanwhile: as if it were not there.
        with suppress(Missing):
            size = self._retry(lambda: self._store.size(key))
            if size is not None and size <= MAX_ENVELOPE_BYTES:
                return self._retry(lambda: self._store.get(key, max_bytes=MAX_ENVELOPE_BYTES))
        return b""


def copy_signatures(source: Signatures, digest: str, target: Signatures) -> None:
    """Copy the envelopes of a manifest to another registry, where it has the same number.

    Raises:
        RegistryError: either registry fails.
    """
    for key_id, envelope in source.by_key(digest).items():
        target.put(digest, key_id, envelope)


def not_signed(what: str) -> Untrusted:
    """The error for an alias that is demanded and is not there."""
    return Untrusted(
        f"there is no signed alias {what}",
        reason="not_signed",
        model=what,
        hint="sign it: isthmus sign NAME:ALIAS --key FILE",
    )


def read_envelopes(path: Path) -> Sequence[bytes]:
    """The envelopes of a file, as `write_envelopes` wrote them; none for a file that is absent or something else."""
    try:
        with path.open("rb") as f:
            data = f.read(2 * MAX_ENVELOPES * MAX_ENVELOPE_BYTES)
        return [text.encode() for text in msgspec.json.decode(data, type=list[str])][:MAX_ENVELOPES]
    except (FileNotFoundError, msgspec.MsgspecError, UnicodeError, RecursionError):
        return []


def write_envelopes(path: Path, envelopes: Sequence[bytes]) -> None:
    """Write envelopes to a file, for `read_envelopes`."""
    write_whole(path, msgspec.json.encode([data.decode("utf-8", "replace") for data in envelopes]))


def _prefix(digest: str) -> str:
    return f"{SIGNATURES}{blob_key(digest).rpartition('/')[2]}/"
