"""Signing of versions and aliases: statements beside the manifests, and alias documents that expire."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from isthmus.artifacts.plan import read_plan
from isthmus.artifacts.version_statement import VERSION_STATEMENT, VERSION_TYPE, VersionStatement, to_json
from isthmus.errors import NotGranted, PlanMalformed, PlanMismatch, Untrusted
from isthmus.registry import Registry, Resolved, keyring_file, open_registry
from isthmus.registry.aliases import AliasSigner
from isthmus.security.dsse import Envelope, Signer, read_envelope, sign
from isthmus.security.ed25519 import read_signing_key
from isthmus.security.keyring import Keyring, KeyringFile
from isthmus.settings import RegistrySettings

DAY_S = 86_400.0
# As Let's Encrypt's certificates: long enough for a forgotten job to be noticed, short enough for a bound.
EXPIRY_S = 90 * DAY_S
"""Validity of a signed alias: a registry that is frozen serves old versions for so long at most."""


@dataclass(frozen=True, kw_only=True)
class SignRequest:
    """A version to sign: NAME:NUMBER; with NAME:ALIAS, or NAME for prod, the alias is signed anew as well.

    `expires_s` is the validity of the alias from now on; 0 is without end.
    """

    model: str
    key: Path
    registry: RegistrySettings
    expires_s: float = EXPIRY_S


@dataclass(frozen=True)
class SignResult:
    """The signed version, the digests of its manifest and of those that its plan names, and the alias."""

    name: str
    version: str
    digest: str
    key: str
    manifests: tuple[str, ...]
    alias: str
    counter: int
    expires: datetime | None

    def document(self) -> dict[str, Any]:
        """The result, JSON-ready."""
        return {
            "name": self.name,
            "version": self.version,
            "digest": self.digest,
            "key": self.key,
            "manifests": list(self.manifests),
            "alias": self.alias,
            "counter": self.counter,
            "expires": None if self.expires is None else self.expires.isoformat(),
        }


def sign_model(request: SignRequest) -> SignResult:
    """Sign a version, and the alias by which it was named.

    Raises:
        RequestMalformed: the file holds no signing key.
        RegistryError: no such version, or the registry cannot be written.
    """
    key = read_signing_key(request.key)
    registry = open_registry(request.registry)
    model = registry.resolve(request.model)
    manifests = sign_version(registry, model, key)
    result = SignResult(model.name, model.version, model.digest, key.id, tuple(manifests), "", 0, None)
    if model.alias is None:
        return result
    signer = AliasSigner(key, request.expires_s)
    # The version and canary that were read above: an alias that somebody moved since is not signed.
    present = model.alias
    move = registry.move_alias(
        model.name,
        present.alias,
        model.version,
        canary=present.canary,
        restores=present.origin,
        expected=present.counter,
        signer=signer,
    )
    return replace(result, alias=present.alias, counter=move.after.counter, expires=move.after.expires)


def open_signer(key: Path | None, expires_days: float) -> AliasSigner | None:
    """The signer of the key in a file, with the validity of the aliases that it signs; None without a file.

    Raises:
        RequestMalformed: the file holds no signing key.
    """
    return None if key is None else AliasSigner(read_signing_key(key), expires_days * DAY_S)


def sign_version(registry: Registry, model: Resolved, key: Signer) -> list[str]:
    """Sign a version's manifest, and the manifests of variants that its plan names; returns their digests.

    Raises:
        RegistryError: the registry cannot be read or written.
    """
    now = datetime.now(UTC)
    statements = [VersionStatement(model.name, int(model.version), model.digest, now)]
    statements += [VersionStatement(name, None, digest, now) for digest, name in _variants(registry, model)]
    for statement in statements:
        # A variant is a model of its own: a statement of its number says more than one without.
        if statement.version is not None or not _is_numbered(registry, statement.digest, key.id):
            registry.signatures.put(statement.digest, key.id, sign(to_json(statement), VERSION_TYPE, [key]))
    return [statement.digest for statement in statements]


def _variants(registry: Registry, model: Resolved) -> Iterator[tuple[str, str]]:
    """Digest and model name of each manifest that the version's plan names: without a signature no function runs it."""
    try:
        plan = read_plan(model.bundle, registry.blob)
    except (PlanMalformed, PlanMismatch):
        return  # no router serves by it
    except NotGranted:
        return  # of an encrypted version: whoever can read its plan signs what it names
    for digest in sorted({each.variant for each in plan.candidates if each.variant} if plan is not None else set()):
        yield digest, registry.bundle(digest).name


def _is_numbered(registry: Registry, digest: str, key_id: str) -> bool:
    return any(
        each.key == key_id and each.statement is not None and each.statement.version is not None
        for each in signers(registry, digest, None)
    )


@dataclass(frozen=True)
class VersionSigner:
    """A signature of a manifest: its key's id and name, and the state of the signature.

    `state` is `trusted`, or the reason why the signature does not count; `unverified` without a keyring.
    """

    key: str
    name: str
    state: str
    statement: VersionStatement | None

    def document(self) -> dict[str, Any]:
        """The signature, JSON-ready."""
        statement = self.statement
        return {
            "key": self.key,
            "name": self.name,
            "state": self.state,
            "version": None if statement is None else statement.version,
            "signed_at": None if statement is None else statement.signed_at.isoformat(),
        }


def signers(registry: Registry, digest: str, keyring: Keyring | None) -> list[VersionSigner]:
    """Who signed a manifest, by the envelopes in the registry.

    Raises:
        RegistryError: the registry cannot be read.
    """
    return [each for data in registry.signatures.of(digest) for each in _signers_of(data, digest, keyring)]


def demanded_keyring(settings: RegistrySettings) -> Keyring | None:
    """The keyring whose signatures the settings demand; None where they demand none.

    Raises:
        SettingsError: the file cannot be read or is no keyring.
    """
    path = keyring_file(settings)
    return None if path is None else KeyringFile(path).current()


def _signers_of(data: bytes, digest: str, keyring: Keyring | None) -> Iterator[VersionSigner]:
    try:
        envelope = read_envelope(data)
        statement = VERSION_STATEMENT.decode(envelope.payload)
    except Untrusted:
        yield VersionSigner("", "", "altered", None)
        return
    is_of_digest = statement.digest == digest and envelope.payload_type == VERSION_TYPE
    for key, _ in envelope.signatures:
        state = _state(key, envelope, keyring) if is_of_digest else "altered"
        yield VersionSigner(key, "" if keyring is None else keyring.name_of(key), state, statement)


def _state(key: str, envelope: Envelope, keyring: Keyring | None) -> str:
    if keyring is None:
        return "unverified"
    if refusal := keyring.refusal(key, datetime.now(UTC).timestamp()):
        return refusal
    return "trusted" if key in envelope.verified_by({key: keyring.keys[key]}) else "altered"
