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


@dataclass(frozen=True, kw_only=True)
class VerifyRequest:
    """A version to verify: `model`, NAME, NAME:VERSION or NAME:ALIAS; `arrays` are inputs for the run."""

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

    With faults of blobs nothing was run.
    """

    version: Version
    blobs: int
    bytes: int
    faults: Sequence[BlobFault] = ()
    runs: Sequence[TrialRun] = ()
    run_fault: str = ""

    @property
    def is_good(self) -> bool:
        """Whether every blob is what was published and every segment ran."""
        return not self.faults and not self.run_fault


def verify(request: VerifyRequest, progress: Progress = silent) -> VerifyResult:
    """Read every blob that a version reaches, compare digests, and run every segment once through frames.

    Raises:
        Missing: unknown model or version.
        RegistryError: the registry cannot be read, or the manifest is damaged.
    """
    store = open_registry(request.registry)
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
    # A run would fail for the same reason, or hide it behind a fetch of another copy.
    if faults:
        return VerifyResult(version, len(blobs), read, faults)
    try:
        runs = run_segments(store, TrialRequest(request.registry, model.digest, request.arrays), progress)
    except ModelError as e:
        return VerifyResult(version, len(blobs), read, run_fault=e.message)
    return VerifyResult(version, len(blobs), read, runs=runs)


def _blobs(store: Registry, model: Resolved) -> list[Blob]:
    """The blobs of a version; those that its plan names only where the plan is readable."""
    try:
        return list(version_content(store, model.digest).values())
    except (Corrupt, Missing):  # of the plan, which is among the blobs that are read
        return [Blob(digest, size) for digest, size in model.bundle.content.items()]
