"""Keys of signers and recipients, created; keyrings of trusted signers: list, trust, revoke."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from isthmus.errors import RequestMalformed, SettingsError
from isthmus.files import write_whole
from isthmus.security.ed25519 import new_signing_key, parse_public_keys, write_private_key
from isthmus.security.keyring import (
    KEYRING,
    MAX_KEYRING_BYTES,
    KeyringDocument,
    TrustedKey,
    parse_keyring,
    to_json,
)
from isthmus.security.recipients import new_pair, read_recipient


@dataclass(frozen=True)
class NewKey:
    """A new key: its id, the file of the private key, and that of the public key beside it."""

    id: str
    private: Path
    public: Path


@dataclass(frozen=True)
class ListedKey:
    """A key of a keyring, and whether its signatures count now: `trusted`, `expired` or `revoked`."""

    id: str
    name: str
    state: str
    not_before: datetime | None
    not_after: datetime | None

    def document(self) -> dict[str, Any]:
        """The key, JSON-ready."""
        window = {"not_before": self.not_before, "not_after": self.not_after}
        times = {name: None if at is None else at.isoformat() for name, at in window.items()}
        return {"id": self.id, "name": self.name, "state": self.state, **times}


class KeyKind(StrEnum):
    """What a key is for: to sign, or to read encrypted versions, by X25519 or by RSA for modules and key services."""

    SIGNING = "signing"
    RECIPIENT = "recipient"
    RECIPIENT_RSA = "recipient-rsa"


def new_key(path: Path, kind: KeyKind = KeyKind.SIGNING) -> NewKey:
    """Create a key: the private one in `path`, for its owner alone, the public one in `path` with `.pub` before `.pem`.

    Raises:
        RequestMalformed: either file is there already, or cannot be written.
    """
    # Beside the private key, and named so that nobody takes one for the other.
    public = path.with_name(f"{path.name.removesuffix('.pem')}.pub.pem")
    if public.exists():
        raise RequestMalformed(
            f"{public} is there already, and would be the public key",
            path=str(public),
            hint="name another file, or remove this pair if nothing is signed or encrypted with it",
        )
    if kind is KeyKind.SIGNING:
        key = new_signing_key(path)
        public.write_text(key.public.pem())
        return NewKey(key.id, path, public)
    private_pem, public_pem = new_pair("hpke-x25519" if kind is KeyKind.RECIPIENT else "rsa-oaep-sha256")
    write_private_key(path, private_pem)
    public.write_bytes(public_pem)
    return NewKey(read_recipient(public_pem, where=str(public)).id, path, public)


def list_keys(path: Path) -> list[ListedKey]:
    """The keys of a keyring or of a PEM file of public keys; revoked ids last.

    Raises:
        SettingsError: the file cannot be read, or holds neither.
    """
    keyring, now = parse_keyring(_content(path), str(path)), datetime.now(UTC).timestamp()
    keys = [
        ListedKey(key, entry.name, keyring.refusal(key, now) or "trusted", entry.not_before, entry.not_after)
        for key, entry in keyring.windows.items()
    ]
    return [*keys, *(ListedKey(key, "", "revoked", None, None) for key in sorted(keyring.revoked - {*keyring.keys}))]


def trust_key(keyring: Path, public: Path, name: str, not_before: datetime | None, not_after: datetime | None) -> str:
    """Add a public key to a keyring, which is created where absent; returns the key's id.

    A key that is there already gets the new name and window.

    Raises:
        RequestMalformed: the file holds no single public key, the key is revoked, or the window is empty.
        SettingsError: the keyring cannot be read or written.
    """
    if not_before is not None and not_after is not None and not_after <= not_before:
        raise RequestMalformed(f"the key would be trusted from {not_before} until {not_after}: never")
    try:
        (key,) = parse_public_keys(_content(public))
    except ValueError as e:
        raise RequestMalformed(
            f"{public} holds no single Ed25519 public key as PEM: {e}",
            path=str(public),
            hint="`isthmus key new NAME.pem` writes the public key to NAME.pub.pem",
        ) from e
    # A key that was lost once is anybody's: an entry beside its revocation would count for nothing.
    if keyring.exists() and key.id in parse_keyring(_content(keyring), str(keyring)).revoked:
        raise RequestMalformed(
            f"the key {key.id} is revoked in {keyring}, for good",
            key=key.id,
            hint="create another key: isthmus key new FILE",
        )
    entry = TrustedKey(key.pem(), name, not_before, not_after)

    def add(document: KeyringDocument) -> KeyringDocument:
        others = [each for each in document.keys if each.public_key != entry.public_key]
        return KeyringDocument((*others, entry), document.revoked)

    _change(keyring, add)
    return key.id


def revoke_key(keyring: Path, key_id: str) -> str:
    """Revoke the key whose id is, or begins with, `key_id`; returns its id.

    Raises:
        RequestMalformed: no key of the keyring has such an id, or several have; a whole id may be of any key.
        SettingsError: the keyring cannot be read or written.
    """
    matches = [each.id for each in list_keys(keyring) if each.id.startswith(key_id)]
    # A key that was lost may have left the keyring before: a whole id is revoked in any case.
    whole = len(key_id) == 64 and set(key_id) <= set("0123456789abcdef")
    if not whole and (len(matches) != 1 or len(key_id) < 8):
        raise RequestMalformed(
            f"{key_id[:80]!r} is the id of {len(matches)} keys of {keyring}; an id begins with at least 8 digits",
            exists=[each.id for each in list_keys(keyring)],
        )
    revoked = key_id if whole else matches[0]

    def revoke(document: KeyringDocument) -> KeyringDocument:
        return KeyringDocument(document.keys, tuple(sorted({*document.revoked, revoked})))

    _change(keyring, revoke)
    return revoked


def _change(path: Path, change: Callable[[KeyringDocument], KeyringDocument]) -> None:
    """Replace a keyring as a whole: a function that reads it meanwhile gets the old or the new one."""
    data = to_json(change(_document(path) if path.exists() else KeyringDocument()))
    parse_keyring(data, str(path))  # too many keys, for example
    try:
        # A keyring is public, and functions run as other users.
        write_whole(path, data, mode=0o644)
    except OSError as e:
        raise SettingsError(f"the keyring {path} cannot be written: {e.strerror}", value=str(path)) from e


def _document(path: Path) -> KeyringDocument:
    """A keyring as a document; public keys as PEM become one."""
    data = _content(path)
    if data.lstrip().startswith(b"{"):
        return KEYRING.decode(data)
    return KeyringDocument(tuple(parse_keyring(data, str(path)).windows.values()))


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as f:
            return f.read(MAX_KEYRING_BYTES + 1)
    except OSError as e:
        raise SettingsError(f"{path} cannot be read: {e.strerror}", value=str(path)) from e
