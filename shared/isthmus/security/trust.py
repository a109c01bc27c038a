"""Trust in what a registry gives: signatures over manifests and aliases, checked once and remembered.

Source: docs/reference/signatures.md; the threats are those of TUF (specification, 1.5.2).
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from cachetools import LRUCache

from isthmus.artifacts import alias as alias_documents
from isthmus.artifacts.alias import ALIAS_TYPE, Alias
from isthmus.artifacts.bundle import digest_of
from isthmus.artifacts.version_statement import VERSION_STATEMENT, VERSION_TYPE, VersionStatement
from isthmus.errors import RegistryError, Untrusted
from isthmus.security.alias_counters import MAX_ALIASES, AliasCounters
from isthmus.security.dsse import Envelope, is_envelope, read_envelope
from isthmus.security.keyring import Keyring, KeyringFile

# As many as a registry's cache has bundles, and for each as many statements as an operator's keys.
_MAX_VERIFIED = 256
# Of several refusals the one that says most to its reader.
_REASONS = ("revoked", "expired", "altered", "unknown_key", "not_signed")
_SIGN = "sign it with a key that the function trusts: isthmus sign MODEL:VERSION_OR_ALIAS --key FILE"
_HINTS = {
    "not_signed": _SIGN,
    "unknown_key": f"{_SIGN}; or add the public key to the keyring: isthmus key trust KEYRING PUBLIC.pem",
    "revoked": f"find out who signed it; then {_SIGN}",
    "expired": "renew it: isthmus sign MODEL:ALIAS --key FILE signs an alias anew; a key's window is in the keyring",
    "altered": "somebody changed the registry: publish and sign the version again",
}

Statements = tuple[tuple[str, VersionStatement], ...]
"""Verified statements of one manifest, each with the id of its key."""


class Trust:
    """Which manifests and aliases are trusted; thread-safe.

    A statement is verified once for each digest, and a look-up in memory afterwards; whether its key still counts is
    asked each time.
    """

    def __init__(
        self, keyring: Callable[[], Keyring], counters: AliasCounters, clock: Callable[[], float] = time.time
    ) -> None:
        self._keyring, self._counters, self._clock = keyring, counters, clock
        self._lock = threading.Lock()
        self._verified: LRUCache[str, Statements] = LRUCache(_MAX_VERIFIED)
        # Of each alias the keys that signed the latest document, and its expiry.
        self._standing: LRUCache[str, tuple[list[str], float]] = LRUCache(MAX_ALIASES)

    def check_manifest(self, digest: str, envelopes: Callable[[], Iterable[bytes]]) -> None:
        """Refuse the manifest of a digest that no trusted key signed; `envelopes` is called on the first check.

        Raises:
            Untrusted: no signature counts; the fact `reason` says why.
        """
        self._statement(digest, envelopes, lambda _: True)

    def check_version(self, name: str, number: str, digest: str, envelopes: Callable[[], Iterable[bytes]]) -> None:
        """Refuse a number that no trusted key gave to the digest: whoever may write could exchange two versions.

        Raises:
            Untrusted: as `check_manifest`; reason `altered` where the signed name or number is another.
        """
        self._statement(digest, envelopes, lambda each: (each.name, each.version) == (name, int(number)))

    def trusts(self, digest: str) -> bool:
        """Whether a signature that was verified in this process counts still; no envelope is read."""
        with self._lock:
            statements = self._verified.get(digest, ())
        return self._valid(statements, lambda _: True) is not None

    def check_alias(self, registry: str, name: str, alias: str, data: bytes) -> Alias:
        """The document of a signed alias. Its counter is remembered.

        Raises:
            Untrusted: not signed by a trusted key, the document of another alias, expired, or older than one before.
        """
        facts = {"model": f"{name}:{alias}"}
        if not is_envelope(data):
            raise _untrusted(f"the alias {name}:{alias} is not signed", "not_signed", **facts)
        envelope = read_envelope(data)
        what = f"the alias {name}:{alias}"
        keys = self._signers(envelope, ALIAS_TYPE, what, facts)
        try:
            document = alias_documents.from_json(envelope.payload, name, alias)
        except RegistryError as e:
            # A signed document that stands in another alias's place: mix and match.
            raise _untrusted(f"{what} holds another document: {e.message}", "altered", **facts) from e
        if not document.counter:
            raise _untrusted(f"{what} is signed without its name and counter", "altered", **facts)
        expires_at = math.inf if document.expires is None else document.expires.timestamp()
        if expires_at <= self._clock():
            raise _untrusted(f"{what} expired at {document.expires:%Y-%m-%d %H:%M} UTC", "expired", **facts)
        place = f"{registry} {name}:{alias}"
        self._counters.accept(place, document.counter, digest_of(envelope.payload))
        with self._lock:
            self._standing[place] = (keys, expires_at)
        return document

    def stands(self, registry: str, name: str, alias: str) -> bool:
        """Whether the latest document of an alias counts still: not expired, a key not revoked; no envelope is read."""
        with self._lock:
            keys, expires_at = self._standing.get(f"{registry} {name}:{alias}", ([], 0.0))
        keyring, now = self._keyring(), self._clock()
        return now < expires_at and any(not keyring.refusal(key, now) for key in keys)

    def _statement(
        self,
        digest: str,
        envelopes: Callable[[], Iterable[bytes]],
        accepts: Callable[[VersionStatement], bool],
    ) -> VersionStatement:
        with self._lock:
            statements = self._verified.get(digest, ())
        if (statement := self._valid(statements, accepts)) is not None:
            return statement
        refusals: list[Untrusted] = []
        for data in envelopes():
            try:
                statements += self._read(digest, data)
            except Untrusted as e:
                refusals.append(e)
                continue
            if (statement := self._valid(statements, accepts)) is not None:
                with self._lock:
                    self._verified[digest] = tuple(dict.fromkeys(statements))
                return statement
        if statements or not refusals:
            refusals.append(self._refused(statements, digest))
        raise min(refusals, key=lambda e: _REASONS.index(e.facts["reason"]))

    def _valid(self, statements: Statements, accepts: Callable[[VersionStatement], bool]) -> VersionStatement | None:
        keyring, now = self._keyring(), self._clock()
        usable = (statement for key, statement in statements if not keyring.refusal(key, now))
        return next((statement for statement in usable if accepts(statement)), None)

    def _refused(self, statements: Statements, digest: str) -> Untrusted:
        """The error for statements of which none counts, or none is the demanded one."""
        keyring, now = self._keyring(), self._clock()
        what = f"bundle {digest}"
        if not statements:
            return _untrusted(f"{what} is not signed", "not_signed", bundle=digest)
        reasons = {keyring.refusal(key, now): key for key, _ in statements}
        if "" in reasons:
            signed = sorted({f"{each.name}:{each.version or 'no number'}" for _, each in statements})
            return _untrusted(f"{what} is signed as {', '.join(signed)}, not as this one", "altered", bundle=digest)
        reason = min(reasons, key=_REASONS.index)
        return _untrusted(_of_key(what, reason, reasons[reason]), reason, bundle=digest, key=reasons[reason])

    def _read(self, digest: str, data: bytes) -> Statements:
        """The statement of an envelope, once for each trusted key that signed it."""
        facts = {"bundle": digest}
        envelope = read_envelope(data)
        keys = self._signers(envelope, VERSION_TYPE, f"bundle {digest}", facts)
        try:
            statement = VERSION_STATEMENT.decode(envelope.payload)
        except Untrusted as e:
            raise _untrusted(e.message, "altered", **facts) from e
        if statement.digest != digest:
            raise _untrusted(f"the signature beside {digest} is of {statement.digest}", "altered", **facts)
        return tuple((key, statement) for key in keys)

    def _signers(self, envelope: Envelope, payload_type: str, what: str, facts: dict[str, str]) -> list[str]:
        """The ids of the trusted keys that signed an envelope; at least one.

        Raises:
            Untrusted: none did.
        """
        keyring, now = self._keyring(), self._clock()
        if not envelope.signatures:
            raise _untrusted(f"{what} has an envelope without signatures", "not_signed", **facts)
        if envelope.payload_type != payload_type:
            # A good signature over something else proves nothing here.
            raise _untrusted(f"{what} has the signature of a {envelope.payload_type[:80]!r}", "altered", **facts)
        verified = envelope.verified_by(keyring.keys)
        if usable := [key for key in verified if not keyring.refusal(key, now)]:
            return usable
        named = verified or [key for key, _ in envelope.signatures]
        reasons = {keyring.refusal(key, now) or "altered": key for key in named}
        reason = min(reasons, key=_REASONS.index)
        raise _untrusted(_of_key(what, reason, reasons[reason]), reason, key=reasons[reason][:64], **facts)


def _of_key(what: str, reason: str, key: str) -> str:
    shown = f"the key {key[:64]!r}"
    return {
        "revoked": f"{what} is signed by {shown}, which is revoked",
        "expired": f"{what} is signed by {shown}, outside of the times for which that key is trusted",
        "unknown_key": f"{what} is signed by {shown}, which is not among the trusted keys",
        "altered": f"{what} has a signature that {shown} did not make over it",
    }[reason]


def _untrusted(message: str, reason: str, **facts: str) -> Untrusted:
    return Untrusted(message, reason=reason, hint=_HINTS[reason], **facts)


def open_trust(keyring: Path, cache_dir: Path) -> Trust:
    """The trust of the keyring in a file, with the memory of aliases in the cache folder.

    Raises:
        SettingsError: the keyring cannot be used, or the folder is not writable.
    """
    return Trust(KeyringFile(keyring).current, AliasCounters(cache_dir))
