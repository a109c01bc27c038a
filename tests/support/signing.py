"""Keys, keyrings and signed registries for tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from isthmus.artifacts.version_statement import VERSION_TYPE, VersionStatement
from isthmus.artifacts.version_statement import to_json as statement_json
from isthmus.security.alias_counters import AliasCounters
from isthmus.security.dsse import sign
from isthmus.security.ed25519 import SigningKey, new_signing_key
from isthmus.security.keyring import Keyring, KeyringDocument, TrustedKey, parse_keyring
from isthmus.security.keyring import to_json as keyring_json
from isthmus.security.trust import Trust

NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)


@dataclass
class Clock:
    """Seconds since 1970 that a test sets."""

    now: float = NOW.timestamp()

    def __call__(self) -> float:
        return self.now


@dataclass
class TrustSetup:
    """A trust whose keyring and clock a test changes."""

    folder: Path
    keys: Sequence[TrustedKey] = ()
    revoked: Sequence[str] = ()
    clock: Clock = field(default_factory=Clock)

    def trust(self) -> Trust:
        return Trust(self.keyring, AliasCounters(self.folder), self.clock)

    def keyring(self) -> Keyring:
        return parse_keyring(keyring_json(KeyringDocument(tuple(self.keys), tuple(self.revoked))), "the test's keyring")


def new_key(folder: Path, name: str) -> SigningKey:
    return new_signing_key(folder / f"{name}.pem")


def trusted(key: SigningKey, name: str = "", **window: datetime) -> TrustedKey:
    return TrustedKey(key.public.pem(), name, **window)


def signed_statement(*keys: SigningKey, digest: str, name: str = "m", version: int | None = 1) -> bytes:
    return sign(statement_json(VersionStatement(name, version, digest, NOW)), VERSION_TYPE, keys)
