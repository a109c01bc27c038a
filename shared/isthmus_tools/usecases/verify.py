"""Verification of a published version: the digest of every blob, and a run of every segment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Blob
from isthmus.errors import Corrupt, Missing, ModelError, RegistryMissing
from isthmus.registry import Registry, Resolved, Version, open_registry
from isthmus.registry.blob_copies import verify_blob, version_content
from isthmus.settings import RegistrySettings
from isthmus_tools.progress import Progress, silent
from isthmus_tools.usecases.segment_runs import TrialRequest, TrialRun, run_segments
from isthmus_tools.usecases.signing import VersionSigner, demanded_keyring, signers


@dataclass(frozen=True, kw_only=True)
class VerifyRequest:
    """A version to verify: `model`, NAME, NAME:VERSION or NAME:ALIAS; `arrays` are inputs for the run.

    Where the settings name trusted keys, one of these must have signed the version, and the alias where one is named.
    """

    model: str
    registry: RegistrySettings
    arrays: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class BlobFault:
    """A blob that cannot be used, and the reason."""

    digest: str
    reason: str


@dataclass(frozen=True)
class VerifyResult:
    """What was verified: blobs and their bytes, faults of blobs, runs of segments, and the reason of a failed run.

    With faults of blobs nothing was run. `signers` are by the registry's envelopes, trusted or not.
    """

    version: Version
    blobs: int
    bytes: int
    faults: Sequence[BlobFault] = ()
    runs: Sequence[TrialRun] = ()
    run_fault: str = ""
    signers: Sequence[VersionSigner] = ()

    @property
    def is_good(self) -> bool:
        """Whether every blob is what was published and every segment ran."""
        return not self.faults and not self.run_fault


def verify(request: VerifyRequest, progress: Progress = silent) -> VerifyResult:
    """Read every blob that a version reaches, compare digests, and run every segment once through frames.

    Raises:
        Missing: unknown model or version.
        Untrusted: signatures are demanded, and none counts.
        RegistryError: the registry cannot be read, or the manifest is damaged.
    """
    store = open_registry(request.registry)
    keyring = demanded_keyring(request.registry)
    model = store.resolve(request.model)
    version = Version(model.name, model.version, model.digest)
    blobs, read, faults = _blobs(store, model), 0, list[BlobFault]()
    for count, blob in enumerate(blobs):
        progress(f"reading {blob.digest[:19]}…", count, len(blobs))
        try:
            verify_blob(store, blob)
            read += blob.size
        except RegistryMissing:  # a share that went away is no fault of a blob
            raise
        except (Corrupt, Missing) as e:
            faults.append(BlobFault(blob.digest, e.message))
    signed_by = signers(store, model.digest, keyring)
    # A run would fail for the same reason, or hide it behind a fetch of another copy.
    if faults:
        return VerifyResult(version, len(blobs), read, faults, signers=signed_by)
    try:
        runs = run_segments(store, TrialRequest(request.registry, model.digest, request.arrays), progress)
    except ModelError as e:
        return VerifyResult(version, len(blobs), read, run_fault=e.message, signers=signed_by)
    return VerifyResult(version, len(blobs), read, runs=runs, signers=signed_by)


def _blobs(store: Registry, model: Resolved) -> list[Blob]:
    """The blobs of a version; those that its plan names only where the plan is readable."""
    try:
        return list(version_content(store, model.digest).values())
    except (Corrupt, Missing):  # of the plan, which is among the blobs that are read
        return [Blob(digest, size) for digest, size in model.bundle.content.items()]
