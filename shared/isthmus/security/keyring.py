"""The keys whose signatures count: a JSON keyring with validity windows and revoked ids, or public keys as PEM."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

from isthmus.artifacts.constraints import Moment, Text, matching
from isthmus.artifacts.json_documents import DocumentKind, builtins
from isthmus.errors import SettingsError
from isthmus.files import file_stamp
from isthmus.security.ed25519 import PublicKey, parse_public_keys

SETTING = "trusted_keys"
# Every signature is tried with at most so many keys; Kubernetes bounds a secret at 1 MiB.
MAX_KEYS, MAX_REVOKED, MAX_KEYRING_BYTES = 64, 1024, 2**18
# A changed file takes effect within so many seconds: as fast as an alias is resolved again.
_RELOAD_S = 5.0

KeyId = Annotated[str, matching("[0-9a-f]{64}")]
_log = logging.getLogger(__name__)


class TrustedKey(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A public key as PEM, a name for readers, and the times between which its signatures count."""

    public_key: Annotated[str, Meta(max_length=1000)]
    name: Text = ""
    not_before: Moment | None = None
    not_after: Moment | None = None


class KeyringDocument(Struct, frozen=True, forbid_unknown_fields=True, tag_field="format", tag="isthmus.keyring/1"):
    """The keyring as a file: trusted keys, and the ids of keys whose signatures count for nothing."""

    keys: Annotated[tuple[TrustedKey, ...], Meta(max_length=MAX_KEYS)] = ()
    revoked: Annotated[tuple[KeyId, ...], Meta(max_length=MAX_REVOKED)] = ()


KEYRING = DocumentKind(
    KeyringDocument, "keyring", MAX_KEYRING_BYTES, SettingsError, hint="docs/reference/signatures.md has the format"
)


@dataclass(frozen=True)
class Keyring:
    """Trusted keys by id, the window of each, and revoked ids."""

    keys: Mapping[str, PublicKey]
    windows: Mapping[str, TrustedKey]
    revoked: frozenset[str]

    def refusal(self, key_id: str, now: float) -> str:
        """The reason for which signatures of a key do not count at a time, seconds since 1970; empty if they count."""
        if key_id in self.revoked:
            return "revoked"
        if (key := self.windows.get(key_id)) is None:
            return "unknown_key"
        at = datetime.fromtimestamp(now, UTC)
        if (key.not_before is not None and at < key.not_before) or (key.not_after is not None and at >= key.not_after):
            return "expired"
        return ""

    def name_of(self, key_id: str) -> str:
        """A key's name, or the first digits of its id."""
        key = self.windows.get(key_id)
        return key.name if key is not None and key.name else key_id[:16]


def parse_keyring(data: bytes, where: str) -> Keyring:
    """A keyring from JSON, or from public keys as PEM.

    Raises:
        SettingsError: neither, or a key that is none; the message names `where`.
    """
    try:
        if data.lstrip().startswith(b"{"):
            return _keyring(KEYRING.decode(data))
        pems = parse_public_keys(data[: MAX_KEYRING_BYTES + 1])
        return _keyring(KeyringDocument(tuple(TrustedKey(key.pem()) for key in pems)))
    except (SettingsError, ValueError) as e:
        reason = e.message if isinstance(e, SettingsError) else str(e)
        raise SettingsError(
            f"{where} is no keyring: {reason[:300]}",
            variable=SETTING,
            hint="it holds public keys as PEM, or is JSON made by: isthmus key trust KEYRING PUBLIC.pem",
        ) from e


def _keyring(document: KeyringDocument) -> Keyring:
    keys, windows = dict[str, PublicKey](), dict[str, TrustedKey]()
    for entry in document.keys:
        (key,) = parse_public_keys(entry.public_key.encode())
        if key.id in keys:
            raise ValueError(f"the key {key.id} is there twice")
        keys[key.id], windows[key.id] = key, entry
    if len(keys) > MAX_KEYS:
        raise ValueError(f"it holds {len(keys)} keys; at most {MAX_KEYS} are taken")
    return Keyring(keys, windows, frozenset(document.revoked))


class KeyringFile:
    """A keyring in a file, read again when the file changes; thread-safe.

    A changed file that is no keyring leaves the earlier one in force and is logged: half a write must not stop a
    function, and must not let anything unsigned run.

    Raises:
        SettingsError: at start, the file cannot be read or is no keyring.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock, self._lock = path, clock, threading.Lock()
        self._keyring, self._stamp = self._read()
        self._looked_at = clock()

    def current(self) -> Keyring:
        """The keyring of the file, at most some seconds old."""
        if self._clock() - self._looked_at >= _RELOAD_S and self._lock.acquire(blocking=False):
            try:
                self._looked_at = self._clock()
                self._reload()
            finally:
                self._lock.release()
        return self._keyring

    def _reload(self) -> None:
        try:
            if file_stamp(self._path) != self._stamp:
                self._keyring, self._stamp = self._read()
        except SettingsError as e:
            _log.warning("the earlier keyring stays in force: %s", e.message)

    def _read(self) -> tuple[Keyring, tuple[int, int, int] | None]:
        # Before the content: a file that is replaced in between is read again.
        stamp = file_stamp(self._path)
        try:
            with self._path.open("rb") as f:
                data = f.read(MAX_KEYRING_BYTES + 1)
        except OSError as e:
            raise SettingsError(
                f"the keyring {self._path} of the setting {SETTING} cannot be read: {e.strerror}",
                variable=SETTING,
                value=str(self._path),
                hint="give the function the secret trusted-keys: docs/how-to/signing.md",
            ) from e
        return parse_keyring(data, str(self._path)), stamp


def to_json(document: KeyringDocument) -> bytes:
    """A keyring as JSON that people read and change."""
    return (json.dumps(builtins(document), indent=1, sort_keys=True) + "\n").encode()
