"""Bundles by name: immutable numbered versions, aliases that move, and content that is verified whenever it is read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from isthmus import bundle as manifest
from isthmus.bundle import MAX_MANIFEST_BYTES, Blob, Bundle, is_digest, is_model_name
from isthmus.errors import Corrupt, Missing, RegistryError
from isthmus.registry.blobs import BlobStore
from isthmus.registry.patience import Patience, in_parallel

PROD = "prod"
"""The alias that a bare model name means. A model's first version gets it."""

MAX_BLOB_BYTES = 64 * 2**20
"""Longest blob that is read into memory at once; weights are read by ranges instead."""

_POINTER_BYTES = 256


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

    def __init__(self, store: BlobStore, patience: Patience | None = None) -> None:
        self._store = store
        self.patience = patience or Patience()

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
        _check_name(bundle.name)
        check_weights(bundle)
        for _ in in_parallel(lambda digest: self._upload(digest, files.get(digest)), sorted(bundle.blobs())):
            pass
        data = manifest.to_json(bundle)
        digest = manifest.digest_of(data)
        self.patience(lambda: self._store.put(blob_key(digest), data))
        version = self._number(bundle.name, digest)
        if version.version == "1":
            self.patience(lambda: self._store.put_if_absent(_alias_key(bundle.name, PROD), b"1"))
        if alias is not None:
            self.set_alias(bundle.name, alias, version.version)
        return version

    def resolve(self, reference: str) -> Resolved:
        """The version that `NAME`, `NAME:NUMBER` or `NAME:ALIAS` stands for now; a bare name means prod, else the newest.

        Raises:
            Missing: no such model, version or alias; names those that there are.
        """
        name, _, which = reference.partition(":")
        numbers = self._numbers(name)
        aliases = {} if which.isdecimal() else self.aliases(name)
        if not which:
            which = aliases.get(PROD, numbers[-1])
        elif which in aliases:
            which = aliases[which]
        if which not in numbers:
            kind = "version" if which.isdecimal() else "alias"
            raise Missing(
                f"model {name} has no {kind} {which!r}",
                kind=kind,
                name=which,
                exists=numbers if kind == "version" else sorted(aliases),
                registry=self.url,
            )
        digest = self._digest(name, which)
        return Resolved(name, which, digest, self.bundle(digest))

    def models(self) -> list[str]:
        """Names of all models that have a version."""
        keys = self.patience(lambda: self._store.list("models/"))
        return sorted({parts[1] for key in keys if (parts := key.split("/"))[2:3] == ["versions"]})

    def versions(self, name: str) -> list[Version]:
        """All versions of a model, oldest first.

        Raises:
            Missing: no such model; names those that there are.
        """
        return [Version(name, number, self._digest(name, number)) for number in self._numbers(name)]

    def aliases(self, name: str) -> dict[str, str]:
        """A model's aliases, and the number of the version that each means."""
        prefix = f"models/{_check_name(name)}/aliases/"
        keys = self.patience(lambda: self._store.list(prefix))
        return {key.removeprefix(prefix): self._pointer(key) for key in keys}

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """Let `alias` mean `version` from now on; a reader sees the old version or the new one.

        Raises:
            Missing: the model has no such version.
            RegistryError: `alias` cannot be told from a version, or is no name.
        """
        numbers = self._numbers(name)
        if version not in numbers:
            raise Missing(
                f"model {name} has no version {version!r}",
                kind="version",
                name=version,
                exists=numbers,
                registry=self.url,
            )
        key = _alias_key(name, alias)
        self.patience(lambda: self._store.put(key, version.encode()))

    def bundle(self, digest: str) -> Bundle:
        """The bundle whose manifest has that digest.

        Raises:
            Missing, Corrupt: there is none, or its bytes are not what was published.
            RegistryError: not a manifest, or one whose weights lie outside its weights file.
        """
        return read_manifest(self.manifest(digest))

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

    def read(self, digest: str, start: int, stop: int, check: Callable[[bytes], None] | None = None) -> bytes:
        """Exactly the bytes `start` to `stop` of a blob; a part has no digest, so `check` says whether they are right.

        Raises:
            Corrupt: `check` raised it for every try, or the blob is shorter.
        """

        def one_try() -> bytes:
            data = self._store.read(blob_key(digest), start, stop)
            if check is not None:
                check(data)
            return data

        return self.patience(one_try)

    def _verified(self, digest: str, max_bytes: int) -> bytes:
        key = blob_key(digest)

        def one_try() -> bytes:
            data = self._store.get(key, max_bytes=max_bytes)
            if manifest.digest_of(data) != digest:
                raise corrupt(self.url, digest)
            return data

        return self.patience(one_try)

    def _upload(self, digest: str, path: Path | None) -> None:
        key = blob_key(digest)
        there = self.patience(lambda: self._store.size(key))
        if path is None:
            if there is None:
                raise Missing(
                    f"content {digest} is neither given nor in {self.url}", kind="blob", name=digest, exists=[]
                )
            return
        # A blob of another length is what an interrupted copy left behind.
        if there == path.stat().st_size:
            return
        with path.open("rb") as f:
            if f"sha256:{hashlib.file_digest(f, 'sha256').hexdigest()}" != digest:
                raise corrupt(str(path), digest)
        self._store.put_file(key, path)

    def _number(self, name: str, digest: str) -> Version:
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
            self.patience(lambda key=key: self._store.put_if_absent(key, digest.encode()))  # type: ignore[misc]
            # Whoever stored it, what is there now decides: another publisher of the same bundle is no rival, and a
            # try whose answer was lost has won all the same.
            if self._digest(name, str(number)) == digest:
                return Version(name, str(number), digest)

    def _numbers(self, name: str) -> list[str]:
        prefix = f"models/{_check_name(name)}/versions/"
        keys = self.patience(lambda: self._store.list(prefix))
        if not keys:
            raise Missing(
                f"there is no model {name} in {self.url}",
                kind="model",
                name=name,
                exists=self.models(),
                registry=self.url,
            )
        return sorted((key.removeprefix(prefix) for key in keys), key=int)

    def _digest(self, name: str, number: str) -> str:
        key = f"models/{name}/versions/{number}"
        digest = self._pointer(key)
        if not is_digest(digest):
            raise Corrupt(f"{key} in {self.url} holds no digest", registry=self.url, blob=key)
        return digest

    def _pointer(self, key: str) -> str:
        return self.patience(lambda: self._store.get(key, max_bytes=_POINTER_BYTES)).decode("ascii", "replace").strip()


def blob_key(digest: str) -> str:
    """Where content lives in a store.

    Raises:
        RegistryError: not a digest.
    """
    if not is_digest(digest):
        raise RegistryError(f"{digest!r} is not a sha256 digest")
    return f"blobs/sha256/{digest.removeprefix('sha256:')}"


def corrupt(where: str, digest: str, **facts: str) -> Corrupt:
    """The error for bytes that are not what their digest says."""
    return Corrupt(f"the bytes of {digest} in {where} do not hash to it", registry=where, blob=digest, **facts)


def read_manifest(data: bytes) -> Bundle:
    """The bundle of a manifest whose weights are known to lie inside its weights file.

    Raises:
        RegistryError: not such a manifest.
    """
    bundle = manifest.from_json(data)
    check_weights(bundle)
    return bundle


def check_weights(bundle: Bundle) -> None:
    """Refuse a bundle whose tensors leave the weights file or overlap, or whose segments refer to none of them.

    Raises:
        RegistryError: names the tensor or segment.
    """
    end = 0
    for t in bundle.weights.tensors:
        if not is_digest(t.digest) or t.length < 0 or not end <= t.offset <= bundle.weights.blob.size - t.length:
            raise RegistryError(f"bundle {bundle.name}: the place of weight {t.name!r} in the weights file is wrong")
        end = t.offset + t.length
    count = len(bundle.weights.tensors)
    for s in bundle.segments.values():
        if any(not 0 <= start <= stop <= count for start, stop in s.weights):
            raise RegistryError(f"bundle {bundle.name}: segment {s.id} refers to weights that are not there")


def _alias_key(name: str, alias: str) -> str:
    if not is_model_name(alias) or alias.isdecimal():
        raise RegistryError(f"{alias!r} cannot be an alias: letters a-z, digits, '.', '_', '-', and not only digits")
    return f"models/{_check_name(name)}/aliases/{alias}"


def _check_name(name: str) -> str:
    if not is_model_name(name):
        raise RegistryError(
            f"{name!r} cannot be a model's name: 1 to 63 of a-z, 0-9, '.', '_' and '-'", kind="model", name=name
        )
    return name
