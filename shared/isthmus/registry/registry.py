"""Bundles by name: immutable numbered versions, aliases that move, and content that is verified whenever it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from isthmus.artifacts import bundle as manifest
from isthmus.artifacts.bundle import MAX_MANIFEST_BYTES, Blob, Bundle, is_digest, is_model_name
from isthmus.errors import Corrupt, Missing, RegistryError
from isthmus.registry.blobs import BlobStore
from isthmus.registry.content import Bundles, blob_key, check_weights, corrupt, read_manifest
from isthmus.registry.documents import Documents
from isthmus.registry.retry_policy import RetryPolicy, in_parallel
from isthmus.registry.upload import Upload
from isthmus.retries import RetryBudget

PROD = "prod"
"""The alias that a bare model name means. A model's first version gets it."""

MAX_BLOB_BYTES = 64 * 2**20
"""Longest blob that is read into memory at once; weights are read by ranges instead."""

_POINTER_BYTES = 256
_MAX_DIGITS = 18
_MAX_SHOWN = 80


@dataclass(frozen=True)
class Version:
    """One published version: `version` counts from "1", `digest` is its manifest's."""

    name: str
    version: str
    digest: str


@dataclass(frozen=True)
class Resolved:
    """What a model reference stands for at this moment; a later `prod` may be another version."""

    name: str
    version: str
    digest: str
    bundle: Bundle


class Registry:
    """Models in a store. Every read and write is tried as often as `patience` allows."""

    def __init__(self, store: BlobStore, patience: RetryPolicy | None = None) -> None:
        self._store = store
        self.patience = patience or RetryPolicy()
        self._bundles = Bundles()
        self.documents = Documents(store, self.patience)

    @property
    def url(self) -> str:
        """Where this registry is, for messages."""
        return self._store.url

    def publish(self, bundle: Bundle, files: Mapping[str, Path], *, alias: str | None = None) -> Version:
        """Make `bundle` a version of the model of its name. Published once more, it stays the version that it is.

        `files` holds content by digest; what the registry has already may be left out. A model's first version gets
        the alias prod; `alias` moves to this version. A reader sees the version once all its content is there.

        Raises:
            Missing: content that is neither in `files` nor in the registry.
            Corrupt: a file's bytes do not hash to its digest; nothing refers to what was uploaded before.
        """
        if alias is not None:
            check_alias(alias)
        digest, budget = self.stage(bundle, files), self.patience.budget()
        version = self._number(bundle.name, digest, budget)
        if version.version == "1":
            self._store.put_if_absent(f"models/{bundle.name}/aliases/{PROD}", b"1", budget)
        if alias is not None:
            self.set_alias(bundle.name, alias, version.version)
        return version

    def stage(self, bundle: Bundle, files: Mapping[str, Path]) -> str:
        """Upload `bundle` without making it a version: functions load it by its digest, which is returned.

        Raises:
            As `publish`.
        """
        if not is_model_name(bundle.name):
            raise RegistryError(f"{bundle.name!r} cannot name a model: 1 to 63 of a-z, 0-9, '.', '_' and '-'")
        check_weights(bundle)
        data = manifest.to_json(bundle)
        digest = manifest.digest_of(data)
        read_manifest(data)  # what no reader could read is not published
        upload = Upload(self._store, self.patience, self.patience.budget())
        for _ in in_parallel(lambda digest: upload.file(digest, files.get(digest)), sorted(bundle.blobs())):
            pass
        upload.data(digest, data)
        return digest

    def resolve(self, reference: str) -> Resolved:
        """The version that `NAME`, `NAME:NUMBER` or `NAME:ALIAS` stands for now; a bare name is prod, else the newest.

        Raises:
            Missing: no such model, version or alias; names those that there are.
        """
        name, _, which = reference.partition(":")
        self._check_known(name)
        if _is_digits(which) and not _is_number(which):
            raise self._missing(name, "version", which, self._numbers(name))
        number = which if _is_number(which) else self._alias(name, which)
        try:
            digest = self._digest(name, number)
        except Missing:
            raise self._missing(name, "version", number, self._numbers(name)) from None
        return Resolved(name, number, digest, self.bundle(digest))

    def models(self) -> list[str]:
        """Names of all models that have a version."""
        keys = self._store.list("models/")
        return sorted({parts[1] for key in keys if (parts := key.split("/"))[2:3] == ["versions"]})

    def versions(self, name: str) -> list[Version]:
        """All versions of a model, oldest first.

        Raises:
            Missing: no such model; names those that there are.
        """
        return [Version(name, number, self._digest(name, number)) for number in self._numbers(name)]

    def aliases(self, name: str) -> dict[str, str]:
        """A model's aliases, and the number of the version that each means."""
        self._check_known(name)
        prefix = f"models/{name}/aliases/"
        keys = self._store.list(prefix)
        return {key.removeprefix(prefix): self._pointer(key) for key in keys}

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """Let `alias` mean `version` from now on; a reader sees the old version or the new one.

        Raises:
            Missing: the model has no such version.
            RegistryError: `alias` cannot be told from a version, or is no name.
        """
        check_alias(alias)
        numbers = self._numbers(name)
        if version not in numbers:
            raise self._missing(name, "version", version, numbers)
        self.patience(lambda: self._store.put(f"models/{name}/aliases/{alias}", version.encode()))

    def bundle(self, digest: str) -> Bundle:
        """The bundle whose manifest has that digest.

        Raises:
            Missing, Corrupt: there is none, or its bytes are not what was published.
            RegistryError: not a manifest, or one whose weights lie outside its weights file.
        """
        return self._bundles.get(digest, self.manifest)

    def manifest(self, digest: str) -> bytes:
        """A manifest's bytes, verified."""
        return self._verified(digest, MAX_MANIFEST_BYTES)

    def blob(self, blob: Blob) -> bytes:
        """A blob's bytes, verified; for graphs and labels, never for weights.

        Raises:
            RegistryError: longer than MAX_BLOB_BYTES.
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
        check: Callable[[bytes], None] | None = None,
        budget: RetryBudget | None = None,
    ) -> bytes:
        """Exactly the bytes `start` to `stop` of a blob; a part has no digest, so `check` says whether they are right.

        Raises:
            Corrupt: `check` raised it for every try, or the blob is shorter.
        """

        def one_try() -> bytes:
            data = self._store.read(blob_key(digest), start, stop)
            if check is not None:
                check(data)
            return data

        return self.patience(one_try, budget)

    def _verified(self, digest: str, max_bytes: int) -> bytes:
        key = blob_key(digest)

        def one_try() -> bytes:
            data = self._store.get(key, max_bytes=max_bytes)
            if manifest.digest_of(data) != digest:
                raise corrupt(self.url, digest)
            return data

        return self.patience(one_try)

    def _number(self, name: str, digest: str, budget: RetryBudget) -> Version:
        """The version of `digest`: one that is there, or the next free number."""
        try:
            known = self.versions(name)
        except Missing:
            known = []
        for version in known:
            if version.digest == digest:
                return version
        number = int(known[-1].version) if known else 0
        while True:
            number += 1
            key = f"models/{name}/versions/{number}"
            self._store.put_if_absent(key, digest.encode(), budget)
            # Whoever stored it, what is there now decides: another publisher of the same bundle is no rival, and a
            # try whose answer was lost has won all the same.
            if self._digest(name, str(number)) == digest:
                return Version(name, str(number), digest)

    def _numbers(self, name: str) -> list[str]:
        self._check_known(name)
        prefix = f"models/{name}/versions/"
        keys = self._store.list(prefix)
        numbers = sorted((number for key in keys if _is_number(number := key.removeprefix(prefix))), key=int)
        return numbers or self._refuse(name)

    def _check_known(self, name: str) -> None:
        """Refuse what cannot name a model before it becomes part of a key."""
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

    def _alias(self, name: str, alias: str) -> str:
        """The number that an alias means; for no alias, prod's or the newest."""
        try:
            if not alias or is_alias(alias):
                key = f"models/{name}/aliases/{alias or PROD}"
                number = self._pointer(key)
                if not _is_number(number):
                    raise Corrupt(f"{key} in {self.url} holds no version's number", registry=self.url, blob=key)
                return number
        except Missing:
            pass
        numbers = self._numbers(name)
        if not alias:
            return numbers[-1]
        raise self._missing(name, "alias", alias, sorted(self.aliases(name)))

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
        return self.patience(lambda: self._store.get(key, max_bytes=_POINTER_BYTES)).decode("ascii", "replace").strip()


def is_alias(text: str) -> bool:
    """Whether `text` can be an alias: as a model's name, but not only digits, which are versions."""
    return is_model_name(text) and not _is_digits(text)


def _is_number(text: str) -> bool:
    """Whether `text` can be a version: a whole number from 1, without leading zeros, that becomes part of a key."""
    return _is_digits(text) and len(text) <= _MAX_DIGITS and text[0] != "0"


def _is_digits(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def _shown(text: str) -> str:
    """A caller's text as errors repeat it."""
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def check_alias(text: str) -> None:
    """Refuse what can be no alias.

    Raises:
        RegistryError: so it is.
    """
    if not is_alias(text):
        raise RegistryError(
            f"{_shown(text)!r} cannot be an alias: 1 to 63 of a-z, 0-9, '.', '_' and '-', not only digits"
        )
