"""Aliases of models: read, moved by compare-and-set, and the history of their documents.

A move stores the present document under its counter in the history, then replaces the document if nobody did so
meanwhile. So the history is linear and without gaps whatever is killed: the document of every counter but the present
one's is in it. A document that is taken over from another registry keeps its counter, and so may leave a gap.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from isthmus.artifacts import alias as documents
from isthmus.artifacts.alias import ALIAS_TYPE, MAX_ALIAS_BYTES, Alias
from isthmus.artifacts.bundle import is_model_name
from isthmus.artifacts.canary import Canary
from isthmus.errors import (
    AliasMoved,
    Corrupt,
    Missing,
    RegistryError,
    RegistryMissing,
    RegistryUnavailable,
    Untrusted,
)
from isthmus.registry.blobs import BlobStore
from isthmus.registry.change_log import ChangeLog
from isthmus.registry.content import RegistryTrust
from isthmus.registry.retry_policy import RetryPolicy
from isthmus.security.audit import local_user
from isthmus.security.dsse import Signer, is_envelope, read_envelope, sign

PROD = "prod"
"""The alias of a bare model name; the first version of a model receives this alias."""
MAX_HISTORY = 500
"""Documents kept of one alias beside the present one; older ones are removed."""
# Each of many simultaneous moves of one alias succeeds before the next: a minute is hundreds of moves.
_CONTEND_S = 60.0
_PAUSE_S = 0.05
# A signed document is in base64, with some hundred bytes around it.
_MAX_STORED_BYTES = 2 * MAX_ALIAS_BYTES


@dataclass(frozen=True)
class Target:
    """What an alias shall mean: a version, its digest, and perhaps a canary; no version for nothing.

    `restores` is the counter of the document that a rollback goes back to.
    """

    version: int | None
    digest: str | None
    canary: Canary | None = None
    restores: int | None = None


@dataclass(frozen=True)
class Move:
    """The documents of an alias before and after; the same one where the alias had the target already."""

    before: Alias
    after: Alias

    @property
    def moved(self) -> bool:
        """Whether this call moved the alias."""
        return self.before != self.after


@dataclass(frozen=True)
class AliasSigner:
    """Signs documents, each valid for `expires_s` seconds from its move; 0 is without end."""

    key: Signer
    expires_s: float

    def until(self, moved_at: datetime) -> datetime | None:
        """The end of the validity of a document."""
        return moved_at + timedelta(seconds=self.expires_s) if self.expires_s else None


@dataclass(frozen=True)
class _Stored:
    """A document with its bytes in the store and their tag."""

    document: Alias
    data: bytes
    tag: str

    @property
    def is_signed(self) -> bool:
        """Whether the document is in an envelope; whose, its reader's trust says."""
        return is_envelope(self.data)


class Aliases:
    """The aliases in a store; thread-safe and process-safe. With `trust` signed ones alone."""

    def __init__(
        self,
        store: BlobStore,
        retry_policy: RetryPolicy,
        log: ChangeLog | None = None,
        trust: RegistryTrust | None = None,
    ) -> None:
        self._store, self._retry, self._trust = store, retry_policy, trust
        self._log = log or ChangeLog(store, retry_policy)

    def get(self, name: str, alias: str) -> Alias:
        """The document of an alias.

        Raises:
            Missing: no such alias, or a removed one.
            Corrupt: the key holds no alias document.
            Untrusted: no trusted key signed the document, or it is older than one before, or expired.
        """
        if is_model_name(name) and is_alias(alias):
            document = self._present(name, alias).document
            if document.version is not None:
                return document
        raise Missing(
            f"model {name[:80]} has no alias {alias[:80]!r}",
            kind="alias",
            name=alias[:80],
            exists=[],
            registry=self._store.url,
        )

    def all(self, name: str) -> dict[str, Alias]:
        """The aliases of a model, without removed and untrusted ones."""
        prefix = f"models/{name}/aliases/"
        found = {}
        for alias in (key.removeprefix(prefix) for key in self._store.list(prefix)):
            with suppress(Missing, Untrusted):
                found[alias] = self.get(name, alias)
        return found

    def move(
        self,
        name: str,
        alias: str,
        target: Target | Callable[[Alias], Target],
        *,
        moved_by: str = "",
        expected: int | None = None,
        signer: AliasSigner | None = None,
    ) -> Move:
        """Let an alias have the target; a target that the alias has already is no move, except with a signer.

        A function as the target gets the present document, again after each move by somebody else. `expected` is the
        counter that the present document must have (0 for an alias that never was).

        Raises:
            AliasMoved: the counter is not `expected`.
            ConditionsIgnored: the store does not enforce conditional writes.
            RegistryUnavailable: others move the alias all the time.
            Untrusted: the present document is signed, and there is no signer.
        """
        self._store.require_conditions()
        deadline = time.monotonic() + _CONTEND_S
        while time.monotonic() < deadline:
            present = self._present(name, alias)
            before = present.document
            if expected is not None and before.counter != expected:
                raise AliasMoved(
                    f"{name}:{alias} was moved meanwhile{f' by {before.moved_by}' if before.moved_by else ''}: its"
                    f" counter is {before.counter}, not {expected}",
                    registry=self._store.url,
                    alias=f"{name}:{alias}",
                    counter=before.counter,
                    expected=expected,
                    hint=f"see what it means now, and its counter: isthmus versions {name}",
                )
            wanted = target(before) if callable(target) else target
            same = (before.version, before.digest, before.canary) == (wanted.version, wanted.digest, wanted.canary)
            if same and signer is None:
                return Move(before, before)
            if signer is None and present.is_signed and wanted.version is not None:
                raise _unsigned_move(name, alias)
            after = self._after(before, wanted, moved_by, signer)
            if self._swap(present, after, _bytes_of(after, signer)):
                self._log.moved(after, before.number)
                return Move(before, after)
            time.sleep(random.uniform(0, _PAUSE_S))  # noqa: S311 - writers shall not meet again, nothing is secret
        raise RegistryUnavailable(
            f"{name}:{alias} was moved by others for {_CONTEND_S:g} s", registry=self._store.url, blob=alias
        )

    def refuse_signed(self, name: str, alias: str) -> None:
        """Refuse an alias that moves with a key alone, before anything is published for it.

        Raises:
            Untrusted: the present document is signed.
        """
        try:
            present = self._present(name, alias)
        except RegistryMissing:
            return  # a folder that the first publish makes
        if present.is_signed and present.document.version is not None:
            raise _unsigned_move(name, alias)

    def mirror(self, source: Aliases, name: str, alias: str) -> None:
        """Take over the document of an alias of another registry, byte for byte, with its counter.

        Raises:
            AliasMoved: the document here has a higher counter.
            Missing: `source` has no such alias.
            RegistryUnavailable: somebody else moved the alias here meanwhile.
        """
        theirs, ours = source._present(name, alias), self._present(name, alias)
        if not theirs.tag:
            source.get(name, alias)
        if theirs.data == ours.data:
            return
        if theirs.document.counter <= ours.document.counter and ours.tag:
            raise AliasMoved(
                f"{name}:{alias} in {self._store.url} is at move {ours.document.counter}, and in {source._store.url} at"
                f" {theirs.document.counter}",
                hint="promote the version in one of the two",
                registry=self._store.url,
                alias=f"{name}:{alias}",
                counter=ours.document.counter,
                expected=theirs.document.counter,
            )
        if not self._swap(ours, theirs.document, theirs.data):
            raise RegistryUnavailable(f"{name}:{alias} moved meanwhile", registry=self._store.url, blob=alias)
        self._log.moved(theirs.document, ours.document.number)

    def stored(self, name: str) -> Iterator[Alias]:
        """The present document of every alias of a model, trusted or not, removed aliases' too.

        For removals: an alias that expired keeps its version, for it may be signed anew.
        """
        prefix = f"models/{name}/aliases/"
        for alias in (key.removeprefix(prefix) for key in self._store.list(prefix)):
            if is_alias(alias):
                yield self._present(name, alias, trusted=False).document

    def documents(self, name: str) -> Iterator[Alias]:
        """Every document of every alias of a model: those that are stored now, and their histories."""
        for present in self.stored(name):
            yield present
            yield from self.history(name, present.alias)

    def history(self, name: str, alias: str) -> list[Alias]:
        """The documents of an alias before the present one, newest first."""
        counters = sorted(self._counters(name, alias), reverse=True)
        present = self._present(name, alias, trusted=False).document.counter
        # A move that was killed before its write leaves the present document in the history.
        return [self._read(name, alias, _place(name, alias, i)).document for i in counters if i < present]

    def _present(self, name: str, alias: str, *, trusted: bool = True) -> _Stored:
        """The document of an alias; for an alias that never was, a void one without bytes and tag."""
        trust = self._trust if trusted else None
        try:
            stored = self._read(name, alias, f"models/{name}/aliases/{alias}", trust)
        except RegistryMissing:
            raise
        except Missing:
            return _Stored(Alias(name, alias, None, None, 0, None, ""), b"", "")
        return stored

    def _read(self, name: str, alias: str, key: str, trust: RegistryTrust | None = None) -> _Stored:
        """The document under a key; the history's are read without trust, as they are no alias any more."""
        data, tag = self._retry(lambda: self._store.get_tagged(key, max_bytes=_MAX_STORED_BYTES))
        if trust is not None:
            return _Stored(trust.check_alias(self._store.url, name, alias, data), data, tag)
        try:
            payload = read_envelope(data).payload if is_envelope(data) else data
            return _Stored(documents.from_json(payload, name, alias), data, tag)
        except RegistryError as e:
            raise Corrupt(f"{key} in {self._store.url}: {e.message}", registry=self._store.url, blob=key) from e

    def _after(self, before: Alias, target: Target, moved_by: str, signer: AliasSigner | None) -> Alias:
        moved_at = datetime.now(UTC)
        return Alias(
            before.name,
            before.alias,
            target.version,
            target.digest,
            before.counter + 1,
            moved_at,
            (moved_by or local_user())[:200],
            target.canary,
            target.restores,
            None if signer is None else signer.until(moved_at),
        )

    def _swap(self, present: _Stored, after: Alias, data: bytes) -> bool:
        name, alias, counter = after.name, after.alias, present.document.counter
        if present.tag:
            # Whoever sees this document stores the same bytes, so that no condition is needed here.
            self._retry(lambda: self._store.put(_place(name, alias, counter), present.data))
        swapped = self._store.put_if_match(f"models/{name}/aliases/{alias}", data, present.tag)
        if swapped and counter >= MAX_HISTORY:
            with suppress(RegistryError):
                self._store.delete(_place(name, alias, counter - MAX_HISTORY))
        return swapped

    def _counters(self, name: str, alias: str) -> list[int]:
        prefix = _place(name, alias, "")
        texts = [key.removeprefix(prefix) for key in self._store.list(prefix)]
        return [int(text) for text in texts if text.isascii() and text.isdecimal()]


def _bytes_of(document: Alias, signer: AliasSigner | None) -> bytes:
    data = documents.to_json(document)
    return data if signer is None else sign(data, ALIAS_TYPE, [signer.key])


def _unsigned_move(name: str, alias: str) -> Untrusted:
    return Untrusted(
        f"the alias {name}:{alias} is signed; moved without a key, functions that demand signatures would refuse it",
        reason="not_signed",
        model=f"{name}:{alias}",
        hint="give this command the key: --sign-with FILE, or ISTHMUS_SIGN_WITH",
    )


def _place(name: str, alias: str, counter: int | str) -> str:
    return f"models/{name}/history/{alias}/{counter}"


def is_alias(text: str) -> bool:
    """Whether `text` is a valid alias: a valid model name, not only digits (which denote version numbers)."""
    return is_model_name(text) and not (text.isascii() and text.isdecimal())


def check_alias(text: str) -> None:
    """Refuse a malformed alias.

    Raises:
        RegistryError: `is_alias` is false.
    """
    if not is_alias(text):
        shown = text if len(text) <= 80 else f"{text[:80]}…"
        raise RegistryError(f"{shown!r} cannot be an alias: 1 to 63 of a-z, 0-9, '.', '_' and '-', not only digits")
