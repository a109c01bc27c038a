"""Releases: a version copied to another registry or checked in place, and aliases that move to what was run."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Bundle
from isthmus.errors import RegistryError, RequestMalformed
from isthmus.registry import Registry, Resolved, Version, open_registry
from isthmus.registry.aliases import PROD, AliasSigner, Move, check_alias
from isthmus.registry.blob_copies import fetch_blob, local_blob, version_content
from isthmus.registry.content import blob_key
from isthmus.registry.run_records import never_run, record_runs
from isthmus.registry.sealed_content import grants_of
from isthmus.registry.signatures import copy_signatures
from isthmus.settings import RegistrySettings
from isthmus_tools.progress import Progress, silent
from isthmus_tools.usecases.encrypted_copies import copy_encrypted
from isthmus_tools.usecases.segment_runs import TrialRequest, TrialRun, run_segments
from isthmus_tools.usecases.signing import sign_version


@dataclass(frozen=True, kw_only=True)
class PublishRequest:
    """A version to publish: `model`, NAME, NAME:VERSION or NAME:ALIAS of `registry`, to the registry `target`.

    With `encrypt_for`, recipients as of `isthmus encrypt --for`, the target gets the content sealed; that of an
    encrypted version it gets as it is. Without `target` the version is run where it is. `alias` moves to the version in
    the end; empty for none. `arrays` are inputs for the run; without, noise in the shapes of the model's example.
    `signer` signs version and alias.
    """

    model: str
    registry: RegistrySettings
    target: RegistrySettings | None = None
    alias: str = ""
    encrypt_for: Sequence[str] = ()
    arrays: Mapping[str, Array] = field(default_factory=dict)
    signer: AliasSigner | None = None


@dataclass(frozen=True)
class PublishResult:
    """A version in its registry, the runs of its segments, the bytes copied, and the alias's move, if any.

    `serves`: requests without a version reach it, as they do a model's first version.
    """

    version: Version
    bundle: Bundle
    runs: Sequence[TrialRun]
    copied_bytes: int = 0
    move: Move | None = None
    serves: bool = False


@dataclass(frozen=True, kw_only=True)
class PromoteRequest:
    """An alias to move to `model`, NAME:VERSION or NAME:ALIAS, of `registry`.

    With `expected`, only if the alias's counter is still this one. `arrays` and `signer` as for `PublishRequest`.
    """

    model: str
    registry: RegistrySettings
    alias: str = PROD
    expected: int | None = None
    arrays: Mapping[str, Array] = field(default_factory=dict)
    signer: AliasSigner | None = None


@dataclass(frozen=True)
class PromoteResult:
    """The alias's move, and the runs of segments that had never run."""

    move: Move
    runs: Sequence[TrialRun]


def publish(request: PublishRequest, progress: Progress = silent) -> PublishResult:
    """Publish a version: copy its content, run each segment once through frames, give it a number, move the alias.

    Nothing is visible before the number. A later publish resumes: content that arrived is not copied again.

    Raises:
        ModelError: a segment does not run; nothing was numbered or moved.
        RegistryError: unknown model, malformed alias, or a registry cannot be read or written.
    """
    if request.alias:
        check_alias(request.alias)
    if request.encrypt_for and request.target is None:
        raise RequestMalformed(
            "in place there is plain content, which another command seals and removes",
            option="--encrypt-for",
            hint=f"isthmus encrypt {request.model} --for {request.encrypt_for[0]}",
        )
    source = open_registry(request.registry)
    found = source.resolve(request.model)
    settings = request.target or request.registry
    target, copied = open_registry(settings), 0
    with tempfile.TemporaryDirectory(prefix="isthmus-publish-") as folder:
        files: Mapping[str, Path] = {}
        if request.target is not None:
            # Before the first byte: a store that cannot number versions safely gets none.
            target.store.require_conditions()
            if request.encrypt_for or grants_of(source.store, found.digest):
                return _publish_encrypted(request, source, target, found, progress)
            files, copied = _content(source, target, found.digest, Path(folder), progress)
            progress(f"uploading {found.name} to {settings.registry}")
            for digest in reached_manifests(source, found):
                target.stage(source.bundle(digest), files)
                copy_signatures(source.signatures, digest, target.signatures)
        # From the target's own bytes: what is numbered is what ran.
        runs = run_segments(target, TrialRequest(settings, found.digest, request.arrays), progress)
        version = Version(found.name, found.version, found.digest)
        if request.target is not None:
            # Uploads nothing more, and gives the number that is free in the target.
            version = target.publish(found.bundle, files)
    move = _signed_and_moved(request, target, version)
    return PublishResult(version, found.bundle, runs, copied, move, _serves(target, version))


def _publish_encrypted(
    request: PublishRequest, source: Registry, target: Registry, found: Resolved, progress: Progress
) -> PublishResult:
    """Publish a version whose content the target gets sealed.

    Its segments run in the source, since nobody here may be able to read the target: the digests are the same.
    """
    runs = run_missing(source, request.registry, found.digest, request.arrays, progress)
    copied = copy_encrypted(source, target, found.digest, request.encrypt_for, progress)
    copy_signatures(source.signatures, found.digest, target.signatures)
    record_runs(target, found.bundle, found.bundle.runnable.values())
    version = target.publish(found.bundle, {})
    move = _signed_and_moved(request, target, version)
    return PublishResult(version, found.bundle, runs, copied, move, _serves(target, version))


def _serves(target: Registry, version: Version) -> bool:
    return target.aliases(version.name).get(PROD) == version.version


def _signed_and_moved(request: PublishRequest, target: Registry, version: Version) -> Move | None:
    """Sign a version that has its number, and move the alias; the move, if the request names an alias."""
    if request.signer is not None:
        # After the number, which is in what is signed: until then functions with trusted keys refuse the version.
        sign_version(target, target.resolve(f"{version.name}:{version.version}"), request.signer.key)
    if not request.alias:
        return None
    return target.move_alias(version.name, request.alias, version.version, signer=request.signer)


def promote(request: PromoteRequest, progress: Progress = silent) -> PromoteResult:
    """Move an alias to a version; segments that have never run are run first.

    Raises:
        ModelError: a segment does not run; the alias did not move.
        AliasMoved: the alias's counter is not `expected`.
        RegistryError: unknown model or version, malformed alias, or the registry cannot be written.
    """
    check_alias(request.alias)
    store = open_registry(request.registry)
    # Resolved once: the alias in the request may move while segments run.
    version = store.resolve(request.model)
    runs = run_missing(store, request.registry, version.digest, request.arrays, progress)
    if request.signer is not None:
        sign_version(store, version, request.signer.key)
    move = store.move_alias(
        version.name, request.alias, version.version, expected=request.expected, signer=request.signer
    )
    return PromoteResult(move, runs)


def run_missing(
    store: Registry,
    settings: RegistrySettings,
    digest: str,
    arrays: Mapping[str, Array] | None = None,
    progress: Progress = silent,
) -> list[TrialRun]:
    """Run those segments of a bundle that have never run.

    Raises:
        As `run_segments`.
    """
    missing = never_run(store, store.bundle(digest))
    return run_segments(store, TrialRequest(settings, digest, arrays or {}, missing), progress) if missing else []


def reached_manifests(source: Registry, found: Resolved) -> list[str]:
    """The digests of a version's manifest and of the variants that its plan serves."""
    content = version_content(source, found.digest)
    return [digest for digest in content if digest not in found.bundle.content and _is_manifest(source, digest)]


def _is_manifest(source: Registry, digest: str) -> bool:
    try:
        source.bundle(digest)
    except RegistryError:
        return False
    return True


def _content(
    source: Registry, target: Registry, digest: str, folder: Path, progress: Progress
) -> tuple[dict[str, Path], int]:
    """Files of a version's content by digest, and the bytes of those that the target lacks."""
    files, copied = dict[str, Path](), 0
    for each, blob in version_content(source, digest).items():
        absent = target.retry_policy(lambda each=each: target.store.size(blob_key(each))) != blob.size  # type: ignore[misc]
        copied += blob.size * absent
        # A folder's files are uploaded as they are; their digests are verified on the way.
        if (path := local_blob(source, blob)) is not None:
            files[each] = path
        elif absent:
            files[each] = folder / each.removeprefix("sha256:")
            fetch_blob(source, blob, files[each], lambda done, total: progress("fetching", done, total))
    return files, copied
