"""Copies of versions near to where they run: to a registry in a folder, or to a function's cache."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from isthmus.artifacts.bundle import Blob
from isthmus.errors import RequestMalformed, StoreFull
from isthmus.registry import NO_KEYRING, FolderStore, Registry, Resolved, Version, open_cache, open_registry
from isthmus.registry.blob_copies import fetch_blob, version_content
from isthmus.registry.content import blob_key
from isthmus.registry.leases import publish_lease
from isthmus.registry.sealed_content import grants_of
from isthmus.registry.signatures import copy_signatures
from isthmus.settings import RegistrySettings
from isthmus.units import format_size
from isthmus_tools.progress import Progress, silent
from isthmus_tools.usecases.encrypted_copies import copy_encrypted
from isthmus_tools.usecases.publish import reached_manifests

_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, kw_only=True)
class PullRequest:
    """A version to copy: `model`, NAME, NAME:VERSION or NAME:ALIAS of `registry`.

    With `folder`, the whole version to the registry there. Without, to `cache_dir` of the settings: the segment of the
    id `segment`, or for none those of the default cuts.
    """

    model: str
    registry: RegistrySettings
    folder: str = ""
    segment: str = ""


@dataclass(frozen=True)
class PullResult:
    """A version, the segments whose files are complete (none for a registry), and the bytes that were fetched."""

    version: Version
    place: str
    segments: Sequence[str] = ()
    fetched_bytes: int = 0


def pull(request: PullRequest, progress: Progress = silent) -> PullResult:
    """Copy a version, or one segment with its bytes alone; the same call again resumes an interrupted one.

    The version keeps its number. Of a reference to an alias, the alias's document is taken over as well.

    Raises:
        Missing: unknown model, version or segment.
        StoreFull, CacheFull: the disk or the cache is full; what was begun there is removed.
        AliasMoved: the alias in the folder is at a later move.
        RegistryError: a registry cannot be read or written, or the number means another bundle in the folder.
        SettingsError: the cache is read-only.
    """
    source = open_registry(request.registry)
    model = source.resolve(request.model)
    version = Version(model.name, model.version, model.digest)
    if not request.folder:
        return _to_cache(request, source, model, version, progress)
    if request.segment:
        raise RequestMalformed(
            "a registry holds whole versions, a cache single segments",
            hint=f"isthmus pull {request.model} --segment {request.segment} --cache FOLDER",
        )
    # What was there before may be unsigned; signatures are demanded of what comes.
    target = open_registry(replace(request.registry, registry=request.folder, trusted_keys=NO_KEYRING))
    if not isinstance(target.store, FolderStore):
        raise RequestMalformed(
            f"{request.folder} is no folder", hint="isthmus publish --to copies to every other store"
        )
    # Made here, as by an import: a first pull has no registry to find.
    Path(target.url).mkdir(parents=True, exist_ok=True)
    # A collection of the target waits, or the pull does: it relies on blobs that are there.
    with publish_lease(target.store, target.retry_policy):
        manifests = [model.digest]
        if grants_of(source.store, model.digest):
            fetched = _sealed_to_folder(source, target, model.digest, progress)
        else:
            fetched = _to_folder(source, target, target.store, model.digest, progress)
            manifests = reached_manifests(source, model)
        for digest in manifests:
            copy_signatures(source.signatures, digest, target.signatures)
        # The number last: from now on the version is visible, and complete.
        target.mirror(source, version, model.alias.alias if model.alias is not None else "")
    return PullResult(version, request.folder, fetched_bytes=fetched)


def _to_cache(
    request: PullRequest, source: Registry, model: Resolved, version: Version, progress: Progress
) -> PullResult:
    cache, bundle, fetched = open_cache(request.registry, source), model.bundle, _Fetched(progress)
    segments = [bundle.segment(request.segment)] if request.segment else list(bundle.partition())
    # Manifest and small blobs first: with them the function starts without the registry.
    cache.bundle(model.digest)
    for blob in _small_blobs(model, tail=any(not segment.id.stop for segment in segments)):
        cache.blob(blob)
    for segment in segments:
        fetched.begin(f"fetching segment {segment.id} of {model.name}")
        # Released at once: the files stay until the cache needs their space.
        cache.locate(model.digest, str(segment.id), progress=fetched).release()
    return PullResult(version, request.registry.cache_dir, [str(s.id) for s in segments], fetched.bytes)


def _small_blobs(model: Resolved, *, tail: bool) -> Iterator[Blob]:
    """The blobs beside segments that a function reads: tables of codecs; with the tail what makes predictions of it."""
    bundle = model.bundle
    yield from bundle.tables.values()
    if tail:
        texts = [each.tokenizer for each in (bundle.text, bundle.embedding) if each is not None]
        yield from (blob for blob in (bundle.labels, *texts) if blob is not None)


def _to_folder(source: Registry, target: Registry, store: FolderStore, digest: str, progress: Progress) -> int:
    """Fetch what the target lacks; the bytes fetched."""
    absent = [
        blob for blob in version_content(source, digest).values() if store.size(blob_key(blob.digest)) != blob.size
    ]
    # The manifest last: it is small, and its presence says that the rest arrived.
    absent.sort(key=lambda blob: blob.digest == digest)
    _check_space(store, absent)
    total, fetched = sum(blob.size for blob in absent), _Fetched(progress)
    fetched.begin(f"fetching {format_size(total)}", total)
    for blob in absent:
        path = store.pulls / blob.digest.removeprefix("sha256:")
        with _cleaned_up(store, path):
            fetch_blob(source, blob, path, fetched)
            store.adopt(blob_key(blob.digest), path)
        fetched.end(blob.size)
    return fetched.bytes


def _sealed_to_folder(source: Registry, target: Registry, digest: str, progress: Progress) -> int:
    """Copy an encrypted version as it is, its manifest last; the bytes of sealed content fetched."""
    fetched = copy_encrypted(source, target, digest, (), progress)
    target.retry_policy(lambda: target.store.put(blob_key(digest), source.manifest(digest)))
    return fetched


def _check_space(store: FolderStore, absent: Sequence[Blob]) -> None:
    # What an interrupted pull left counts as fetched.
    needed = sum(blob.size - _size(store.pulls / blob.digest.removeprefix("sha256:")) for blob in absent)
    free = shutil.disk_usage(store.url).free
    if needed > free:
        raise StoreFull(
            f"the disk of {store.url} has {format_size(free)} free; {format_size(needed)} are to be fetched",
            registry=store.url,
            hint="free space there, or pull a segment alone to a cache: --segment",
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


@contextlib.contextmanager
def _cleaned_up(store: FolderStore, path: Path) -> Iterator[None]:
    """A full disk becomes StoreFull, and what was fetched of the file is removed: it fills the disk for others."""
    try:
        yield
    except OSError as e:
        if e.errno not in _FULL:
            raise
        path.unlink(missing_ok=True)
        raise StoreFull(
            f"the disk of {store.url} is full; what was fetched of {path.name[:12]}… is removed",
            registry=store.url,
            hint="free space there, then run the same command again: it goes on with what is complete",
        ) from e


@dataclass
class _Fetched:
    """Counts fetched bytes over several files, and reports them."""

    report: Progress
    stage: str = ""
    total: int = 0
    bytes: int = 0
    _before: int = field(default=0)

    def begin(self, stage: str, total: int = 0) -> None:
        self.stage, self.total, self._before = stage, total, self.bytes
        self.report(stage, 0, total)

    def __call__(self, done: int, total: int) -> None:
        self.bytes = self._before + done
        self.report(self.stage, self.bytes if self.total else done, self.total or total)

    def end(self, size: int) -> None:
        self._before = self.bytes = self._before + size
