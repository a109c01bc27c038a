"""Bundles by name: immutable numbered versions, movable aliases, verified content, and profiles beside the versions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from isthmus.artifacts import bundle as manifest
from isthmus.artifacts.alias import Alias
from isthmus.artifacts.bundle import MAX_MANIFEST_BYTES, Blob, Bundle, is_digest, is_model_name
from isthmus.artifacts.canary import Canary
from isthmus.errors import AliasMoved, Corrupt, Missing, RegistryError, RegistryMissing, RegistryUnavailable
from isthmus.registry.aliases import PROD, Aliases, AliasSigner, Move, Target, check_alias
from isthmus.registry.blobs import BlobStore
from isthmus.registry.change_log import ChangeLog
from isthmus.registry.content import Bundles, RegistryTrust, Upload, check_weights, corrupt, read_manifest
from isthmus.registry.leases import publish_lease
from isthmus.registry.retry_policy import RetryPolicy, in_parallel
from isthmus.registry.sealed_content import Content, is_encrypted, refuse_sealed
from isthmus.registry.signatures import Signatures, not_signed
from isthmus.retries import RetryBudget
from isthmus.security.recipients import Unwrapper

MAX_BLOB_BYTES = 64 * 2**20
"""Bound on a blob in memory. Weights exceed this bound and are read by ranges."""

# A pointer is a digest of 71 characters or a version number; anything longer is damaged.
_POINTER_BYTES = 256
# Version numbers stay within 63 bits.
_MAX_DIGITS = 18
_MAX_SHOWN = 80
_TIER = re.compile(r"[a-z0-9]([a-z0-9_]{0,31})")
_DEVICE = re.compile(r"[0-9a-f]{12}")


@dataclass(frozen=True)
class Version:
    """A published version: `version` counts from "1", `digest` is the digest of the manifest."""

    name: str
    version: str
    digest: str


@dataclass(frozen=True)
class Resolved:
    """The target of a model reference at the time of the look-up; an alias may move later.

    `alias` is the document of the alias in the reference; None for a number, and for a name without the alias prod.
    """

    name: str
    version: str
    digest: str
    bundle: Bundle
    alias: Alias | None = None


class Registry:
    """Models in a store; `retry_policy` repeats every read and write, and sealed content opens by the recipient key.

    With `trust` no bundle is read, and no number or alias resolved, without a signature of a trusted key.
    """

    def __init__(
        self,
        store: BlobStore,
        retry_policy: RetryPolicy | None = None,
        recipient_key: Unwrapper | None = None,
        trust: RegistryTrust | None = None,
    ) -> None:
        self._store = store
        self.retry_policy = retry_policy or RetryPolicy()
        self.trust = trust
        self.signatures = Signatures(store, self.retry_policy)
        self.bundles = Bundles(trust, self.signatures.of)
        self.content = Content(store, self.bundles, recipient_key)
        self.documents = Documents(store, self.retry_policy)
        self.changes = ChangeLog(store, self.retry_policy)
        self._aliases = Aliases(store, self.retry_policy, self.changes, trust)

    @property
    def url(self) -> str:
        """The location of this registry, for messages."""
        return self._store.url

    @property
    def store(self) -> BlobStore:
        """The store of all keys."""
        return self._store

    def publish(
        self, bundle: Bundle, files: Mapping[str, Path], *, alias: str | None = None, published_by: str = ""
    ) -> Version:
        """Publish `bundle` as a version of its model; a bundle published before keeps its version number.

        `files` maps digests to files; content already in the registry may be absent. The first version of a model
        receives the alias prod, and `alias` moves to this version. The version becomes visible after all content is
        uploaded. Of a bundle whose content is there sealed, with a grant of everything, no content is uploaded.
        `published_by` is for the audit log; empty for the user of this process.

        Raises:
            Missing: content neither in `files` nor in the registry, or the version was removed meanwhile.
            Corrupt: a file does not hash to its digest; no reference to earlier uploads exists.
            ConditionsIgnored: the store does not enforce conditional writes; nothing was written.
            Untrusted: `alias` is signed, and so moves with a key alone; nothing was written.
        """
        if alias is not None:
            check_alias(alias)
        data = self._checked(bundle)
        if alias is not None:
            self._aliases.refuse_signed(bundle.name, alias)
        self._store.require_conditions()
        with publish_lease(self._store, self.retry_policy):
            self._upload(bundle, data, files)
            budget = self.retry_policy.budget()
            version, first = self._number(bundle.name, manifest.digest_of(data), published_by, budget)
            if first:
                self._name_first(version, published_by)
        if alias is not None:
            self.move_alias(bundle.name, alias, version.version, moved_by=published_by)
        return version

    def stage(self, bundle: Bundle, files: Mapping[str, Path]) -> str:
        """Upload `bundle` without a version number and return its digest, by which functions can load the bundle.

        Raises:
            As `publish`.
        """
        data = self._checked(bundle)
        with publish_lease(self._store, self.retry_policy):
            self._upload(bundle, data, files)
        return manifest.digest_of(data)

    def _checked(self, bundle: Bundle) -> bytes:
        """The manifest of a bundle that every reader can read."""
        if not is_model_name(bundle.name):
            raise RegistryError(f"{bundle.name!r} cannot name a model: 1 to 63 of a-z, 0-9, '.', '_' and '-'")
        check_weights(bundle)
        data = manifest.to_json(bundle)
        read_manifest(data)  # an unreadable manifest must not be published
        return data

    def _upload(self, bundle: Bundle, data: bytes, files: Mapping[str, Path]) -> None:
        digest = manifest.digest_of(data)
        upload = Upload(self._store, self.retry_policy, self.retry_policy.budget())
        if not is_encrypted(self._store, self.retry_policy, digest, bundle):
            refuse_sealed(self._store, bundle)
            for _ in in_parallel(lambda each: upload.file(each, files.get(each)), sorted(bundle.blobs())):
                pass
        upload.data(digest, data)

    def resolve(self, reference: str) -> Resolved:
        """Resolve `NAME`, `NAME:NUMBER` or `NAME:ALIAS`; a bare name is the alias prod, else the newest version.

        Raises:
            Missing: no such model, version or alias; facts list the existing names.
            Untrusted: the registry's trust demands a signature of the alias, or of the number, and none counts.
        """
        name, _, selector = reference.partition(":")
        self._check_name(name)
        # `NAME:01` is neither a version nor an alias; a look-up would miss a leading zero or build an overlong key.
        if _is_digits(selector) and not _is_number(selector):
            raise self._missing(name, "version", selector, self._numbers(name))
        alias = None if _is_number(selector) else self._alias(name, selector)
        number = selector if _is_number(selector) else (alias and alias.number) or self._numbers(name)[-1]
        try:
            # The alias's document is one write: its version and digest cannot disagree.
            digest = (alias and alias.digest) or self._digest(name, number)
        except Missing:
            raise self._missing(name, "version", number, self._numbers(name)) from None
        if self.trust is not None and alias is None:
            # The newest version is whichever the registry shows: without prod there is nothing to trust.
            if not selector:
                raise not_signed(f"{name}:{PROD}")
            self.trust.check_version(name, number, digest, lambda: self.signatures.of(digest))
        return Resolved(name, number, digest, self.bundle(digest), alias)

    def stands(self, reference: str) -> bool:
        """Whether a reference that was resolved before means a version still, without a request to the registry.

        An alias stands until its document expires or its key is revoked: whoever holds a newer document back, or takes
        the registry away, has an old version served for so long at most.
        """
        name, _, selector = reference.partition(":")
        return self.trust is None or _is_number(selector) or self.trust.stands(self.url, name, selector or PROD)

    def models(self) -> list[str]:
        """Names of all models with at least one version."""
        keys = self._store.list("models/")
        return sorted({parts[1] for key in keys if (parts := key.split("/"))[2:3] == ["versions"]})

    def versions(self, name: str) -> list[Version]:
        """All versions of a model, oldest first.

        Raises:
            Missing: no such model; facts list the existing models.
        """
        return [Version(name, number, self._digest(name, number)) for number in self._numbers(name)]

    def all_versions(self) -> list[Version]:
        """All versions of all models."""
        return [version for name in self.models() for version in self.versions(name)]

    def alias(self, name: str, alias: str) -> Alias:
        """The document of an alias.

        Raises:
            Missing: no such model or alias; facts list the existing names.
        """
        try:
            return self._aliases.get(name, alias)
        except RegistryMissing:
            raise
        except Missing:
            self._numbers(name)
            raise self._missing(name, "alias", alias, sorted(self.aliases(name))) from None

    def aliases(self, name: str) -> dict[str, str]:
        """The aliases of a model, with the version number of each."""
        self._check_name(name)
        return {alias: document.number for alias, document in self._aliases.all(name).items()}

    def alias_digests(self, name: str) -> set[str]:
        """The digests that the model's aliases name, canaries' and untrusted aliases' included."""
        documents = list(self._aliases.stored(name))
        canaries = {document.canary.digest for document in documents if document.canary is not None}
        return canaries | {document.digest for document in documents if document.digest}

    def alias_documents(self, name: str) -> Iterator[Alias]:
        """Every document of every alias of a model, of the past too."""
        return self._aliases.documents(name)

    def alias_history(self, name: str, alias: str) -> list[Alias]:
        """The documents of an alias before the present one, newest first: at most MAX_HISTORY.

        Raises:
            As `alias`.
        """
        self.alias(name, alias)
        return self._aliases.history(name, alias)

    def move_alias(
        self,
        name: str,
        alias: str,
        version: str,
        *,
        canary: Canary | None = None,
        restores: int | None = None,
        moved_by: str = "",
        expected: int | None = None,
        signer: AliasSigner | None = None,
    ) -> Move:
        """Let `alias` mean `version`, by compare-and-set: moves at the same time happen one after the other.

        `restores` is the counter of the move that a rollback goes back to. With `expected`, the alias moves only if
        its counter is still this one; 0 for an alias that never was. `signer` signs the document, also where the
        alias means the version already.

        Raises:
            Missing: no such version, or removed meanwhile; the alias means what it meant before.
            AliasMoved: the counter is not `expected`.
            ConditionsIgnored: the store does not enforce conditional writes.
            RegistryUnavailable: the version is being removed; the alias means what it meant before.
            Untrusted: the alias is signed, and there is no signer.
            RegistryError: `alias` is malformed, or only digits.
        """
        check_alias(alias)
        numbers = self._numbers(name)
        if version not in numbers:
            raise self._missing(name, "version", version, numbers)
        target = Target(int(version), self._digest(name, version), canary, restores)
        move = self._aliases.move(name, alias, target, moved_by=moved_by, expected=expected, signer=signer)
        self._undo_if_withdrawn(move, signer)
        return move

    def mirror(self, source: Registry, version: Version, alias: str = "") -> None:
        """Take over a version of another registry with its number, and an alias's document; the content is here.

        Raises:
            RegistryError: the number means another bundle here, or was removed.
            As `Aliases.mirror`.
        """
        name, number, digest = version.name, version.version, version.digest
        key, budget = f"models/{name}/versions/{number}", self.retry_policy.budget()
        if number in self._removed(name):
            raise RegistryError(f"{name}:{number} was removed from {self.url}", registry=self.url)
        if self._store.put_if_absent(key, digest.encode(), budget):
            self.changes.published("", name, number, digest)
        elif (present := self._digest(name, number)) != digest:
            raise RegistryError(
                f"{name}:{number} in {self.url} is {present[:19]}…, and in {source.url} {digest[:19]}…",
                registry=self.url,
                hint="isthmus publish --to gives it a number of its own",
            )
        if alias:
            self._aliases.mirror(source._aliases, name, alias)

    def remove_aliases(self, name: str, *, moved_by: str = "") -> None:
        """Remove all aliases of a model. Their counters go on, should the model get aliases again."""
        for alias in self._aliases.all(name):
            self._aliases.move(name, alias, Target(None, None), moved_by=moved_by)

    def _name_first(self, version: Version, published_by: str) -> None:
        """Let prod mean a model's first version, unless prod means a version."""
        first = Target(int(version.version), version.digest)

        def target(present: Alias) -> Target:
            return first if present.version is None else Target(present.version, present.digest, present.canary)

        self._undo_if_withdrawn(self._aliases.move(version.name, PROD, target, moved_by=published_by))

    def withdraw(self, name: str, number: str, *, removed_by: str = "") -> None:
        """Remove a version that no alias means; a marker keeps its number from being given again.

        Raises:
            RegistryError: an alias means the version.
        """
        self._refuse_meant(name, number)
        marker = f"models/{name}/removed/{number}"
        # The marker precedes the look at the aliases, and a move of an alias precedes its look at the marker: of the
        # two at the same time at least one sees the other (Dekker's mutual exclusion).
        digest = self._digest(name, number)
        self._put(marker, digest)
        try:
            self._refuse_meant(name, number)
            self.retry_policy(lambda: self._store.delete(f"models/{name}/versions/{number}"))
        except RegistryError:
            # An empty marker is void; to overwrite takes no right to delete.
            self._put(marker, "")
            raise
        self.changes.removed(removed_by, name, number, digest)

    def _refuse_meant(self, name: str, number: str) -> None:
        if aliases := sorted(each.alias for each in self._aliases.stored(name) if number in each.versions):
            raise RegistryError(
                f"{name}:{number} is what {' and '.join(aliases)} mean{'s' * (len(aliases) == 1)}",
                registry=self.url,
                hint=f"let another version be that first: isthmus promote {name}:NUMBER --as {aliases[0]}",
            )

    def _undo_if_withdrawn(self, move: Move, signer: AliasSigner | None = None) -> None:
        """Let an alias mean what it meant before if a version that it was moved to is removed."""
        if not move.moved:
            return
        name, before = move.after.name, move.before
        gone = next((number for number in sorted(move.after.versions) if self._is_withdrawn(name, number)), None)
        if gone is None:
            return
        # The version before may have been removed too, once the alias had left it.
        lost = any(self._is_withdrawn(name, number) for number in before.versions)
        back = Target(None, None) if lost else Target(before.version, before.digest, before.canary, before.restores)
        with suppress(AliasMoved):  # somebody moved the alias on, and looks for themselves
            self._aliases.move(
                name, move.after.alias, back, moved_by="isthmus", expected=move.after.counter, signer=signer
            )
        if not self._has_version(name, gone):
            raise self._missing(name, "version", gone, self._numbers(name))
        raise RegistryUnavailable(
            f"{name}:{gone} is being removed",
            registry=self.url,
            hint=f"a removal that was interrupted is finished by: isthmus rm {name}:{gone}",
        )

    def _is_withdrawn(self, name: str, number: str) -> bool:
        try:
            marker = self._pointer(f"models/{name}/removed/{number}")
        except Missing:
            marker = ""
        return bool(marker) or not self._has_version(name, number)

    def _has_version(self, name: str, number: str) -> bool:
        return self.retry_policy(lambda: self._store.exists(f"models/{name}/versions/{number}"))

    def _put(self, key: str, text: str) -> None:
        self.retry_policy(lambda: self._store.put(key, text.encode()))

    def bundle(self, digest: str) -> Bundle:
        """The bundle whose manifest has the digest `digest`.

        Raises:
            Missing, Corrupt: absent, or the bytes do not hash to the digest.
            RegistryError: not a manifest, or the weights lie outside of the weights file.
        """
        return self.bundles.get(digest, self.manifest)

    def manifest(self, digest: str) -> bytes:
        """The verified bytes of a manifest."""
        return self._verified(digest, MAX_MANIFEST_BYTES)

    def blob(self, blob: Blob) -> bytes:
        """The verified bytes of a blob: graphs, tables and labels, never weights.

        Raises:
            RegistryError: longer than MAX_BLOB_BYTES.
            NotGranted: sealed, and this process has no grant for it.
        """
        if blob.size > MAX_BLOB_BYTES:
            raise RegistryError(
                f"blob {blob.digest} of {blob.size} bytes is too long to read at once", blob=blob.digest
            )
        return self._verified(blob.digest, blob.size)

    def read(
        self,
        digest: str,
        start: int,
        stop: int,
        check: Callable[[bytes | bytearray], None] | None = None,
        budget: RetryBudget | None = None,
    ) -> bytes | bytearray:
        """The bytes `start` to `stop` of a blob. A range has no digest of its own, so that `check` verifies the bytes.

        Raises:
            Corrupt: every attempt failed `check`, or the blob is too short.
            NotGranted: as `blob`.
        """

        def one_try() -> bytes | bytearray:
            data = self.content.read(digest, start, stop)
            if check is not None:
                check(data)
            return data

        return self.retry_policy(one_try, budget)

    def _verified(self, digest: str, max_bytes: int) -> bytes:
        def one_try() -> bytes:
            data = bytes(self.content.get(digest, max_bytes))
            if manifest.digest_of(data) != digest:
                raise corrupt(self.url, digest)
            return data

        return self.retry_policy(one_try)

    def _number(self, name: str, digest: str, published_by: str, budget: RetryBudget) -> tuple[Version, bool]:
        """The version of `digest`, existing or with the next free number, and whether it is the model's first."""
        try:
            versions = self.versions(name)
        except Missing:
            versions = []
        for version in versions:
            if version.digest == digest:
                return version, version.version == "1"
        numbers = [*(version.version for version in versions), *self._removed(name)]
        highest = number = max(map(int, numbers), default=0)
        while True:
            number += 1
            key = f"models/{name}/versions/{number}"
            stored = self._store.put_if_absent(key, digest.encode(), budget)
            # Compare the stored digest, not the result of the write: a second publisher of the same bundle is no
            # conflict, and a write whose response was lost has still succeeded.
            if self._digest(name, str(number)) == digest:
                if stored:
                    self.changes.published(published_by, name, str(number), digest)
                return Version(name, str(number), digest), not versions and number == highest + 1

    def _removed(self, name: str) -> list[str]:
        """Numbers of removed versions."""
        prefix = f"models/{name}/removed/"
        return [number for key in self._store.list(prefix) if _is_number(number := key.removeprefix(prefix))]

    def _numbers(self, name: str) -> list[str]:
        self._check_name(name)
        prefix = f"models/{name}/versions/"
        keys = self._store.list(prefix)
        numbers = sorted((number for key in keys if _is_number(number := key.removeprefix(prefix))), key=int)
        return numbers or self._refuse(name)

    def _check_name(self, name: str) -> None:
        if not is_model_name(name):
            self._refuse(name)

    def _refuse(self, name: str) -> NoReturn:
        raise Missing(
            f"there is no model {_shown(name)!r} in {self.url}",
            kind="model",
            name=_shown(name),
            exists=self.models(),
            registry=self.url,
        )

    def _alias(self, name: str, alias: str) -> Alias | None:
        """The document of an alias; of an empty one, prod's or None."""
        try:
            return self.alias(name, alias or PROD)
        except RegistryMissing:
            raise
        except Missing:
            if alias:
                raise
            return None

    def _missing(self, name: str, kind: str, what: str, exists: list[str]) -> Missing:
        what = _shown(what)
        return Missing(f"model {name} has no {kind} {what!r}", kind=kind, name=what, exists=exists, registry=self.url)

    def _digest(self, name: str, number: str) -> str:
        key = f"models/{name}/versions/{number}"
        digest = self._pointer(key)
        if not is_digest(digest):
            raise Corrupt(f"{key} in {self.url} holds no digest", registry=self.url, blob=key)
        return digest

    def _pointer(self, key: str) -> str:
        return (
            self.retry_policy(lambda: self._store.get(key, max_bytes=_POINTER_BYTES)).decode("ascii", "replace").strip()
        )


def _is_number(text: str) -> bool:
    """A positive integer without leading zeros, since the text becomes part of a key."""
    return _is_digits(text) and len(text) <= _MAX_DIGITS and text[0] != "0"


def _is_digits(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def _shown(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


class Documents:
    """Profiles in the store of a registry, by measured content, tier and device.

    Profiles are mutable: a later upload replaces an earlier profile, and no request depends on one.
    """

    def __init__(self, store: BlobStore, retry_policy: RetryPolicy) -> None:
        self._store, self._retry = store, retry_policy

    def put_profile(self, model: str, content: str, tier: str, device: str, data: bytes) -> None:
        """Store the profile by `device`, as `tier`, of the content with the digest `content`.

        Raises:
            RegistryError: a name, digest, tier or device id is no valid part of a key.
        """
        key = _profile_key(model, content, tier, device)
        self._retry(lambda: self._store.put(key, data))

    def profile(self, model: str, content: str, tier: str, device: str, *, max_bytes: int) -> bytes:
        """The bytes of a stored profile.

        Raises:
            Missing: no such profile.
            RegistryError: longer than `max_bytes`.
        """
        key = _profile_key(model, content, tier, device)
        return self._retry(lambda: self._store.get(key, max_bytes=max_bytes))

    def profiles(self, model: str, content: str) -> list[tuple[str, str]]:
        """Tier and device of each profile of the content."""
        folder = _folder(model, content)
        try:
            keys = self._store.list(folder)
        except Missing:
            return []
        names = (key.removeprefix(folder).removesuffix(".json").rpartition("-") for key in keys)
        return [(tier, device) for tier, _, device in names if _TIER.fullmatch(tier) and _DEVICE.fullmatch(device)]


def is_tier(text: str) -> bool:
    """Whether `text` is a valid tier name: 1 to 32 of a-z, 0-9 and '_', with an alphanumeric first character."""
    return _TIER.fullmatch(text) is not None


def _profile_key(model: str, content: str, tier: str, device: str) -> str:
    if not is_tier(tier) or not _DEVICE.fullmatch(device):
        raise RegistryError(f"a profile of tier {tier!r} and device {device!r} cannot be stored")
    return f"{_folder(model, content)}{tier}-{device}.json"


def _folder(model: str, content: str) -> str:
    if not is_model_name(model) or not is_digest(content):
        raise RegistryError(f"a profile of model {model!r} with content {content!r} cannot be stored")
    return f"models/{model}/profiles/{content.removeprefix('sha256:')}/"
