"""The source of a function's segments: the protocol, and a segment baked into the function's image."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from isthmus.artifacts.bundle import MAX_MANIFEST_BYTES, Blob, Bundle, Segment, digest_of, is_digest
from isthmus.artifacts.segment_id import SegmentId
from isthmus.errors import BundleMismatch, Missing, RegistryError, SettingsError
from isthmus.registry.content import Bundles, RegistryTrust, corrupt, file_digest
from isthmus.registry.signatures import read_envelopes

Progress = Callable[[int, int], None]
"""Callback with the bytes fetched so far and the total bytes to fetch."""


class Located:
    """A segment on local disk: `path` is the .onnx file, beside its weights.

    The files stay in the cache until `release`, the end of a `with` block, or the end of this object or the process.
    """

    def __init__(self, path: Path, segment: Segment, bundle: Bundle, pin: int | None = None) -> None:
        self.path = path
        self.segment = segment
        self.bundle = bundle
        # weakref.finalize closes the descriptor once, also at interpreter exit; a descriptor closed twice may be
        # another file's.
        self._release = weakref.finalize(self, os.close, pin) if pin is not None else None

    def release(self) -> None:
        """Allow eviction of the files; call after the last memory map is closed. A second call is a no-op."""
        if self._release is not None:
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class SegmentSource(Protocol):
    """A source of segments: a cache in front of a registry, or a folder baked into the image."""

    def bundle(self, digest: str) -> Bundle:
        """The bundle with the digest `digest`.

        Raises:
            BundleMismatch: the source has one bundle, and that is another.
            RegistryError: Missing, or any other reason for a failed read.
        """
        ...

    def trusts(self, digest: str) -> bool:
        """Whether a bundle in use is trusted still; no file is read, and nobody asked. Where not, `bundle` says why."""
        ...

    def blob(self, blob: Blob) -> bytes:
        """The verified bytes of a small blob, such as the table of a codec.

        Raises:
            RegistryError: Missing, or any other reason for a failed read.
        """
        ...

    def locate(self, bundle_digest: str, segment_id: str) -> Located:
        """The files of a segment, complete and verified.

        Raises:
            RegistryError: Missing, or any other reason for a failed read.
        """
        ...


MANIFEST, SEGMENT, GRAPH, WEIGHTS = "manifest.json", "segment.json", "segment.onnx", "weights.bin"
SIGNATURES = "signatures.json"
"""The envelopes of the manifest; absent for an unsigned bundle."""
BLOBS = "blobs"
"""Folder of the codec tables for decoding the segment's inputs, and of the graph of the exit behind a head; file names
are digests in hex."""


class BakedSegment:
    """One segment of one bundle in a folder, and the branch of the exit behind it, verified when opened.

    The folder holds manifest.json (the published bytes, whose digest is the bundle's), segment.json, segment.onnx and
    weights.bin (the tensors of this segment alone). Source: docs/reference/registry.md, "A baked segment".

    Raises:
        SettingsError: the folder or one of its files is absent.
        Corrupt: a file does not hash to its digest.
        Untrusted: `trust` demands a signature, and none of the folder's counts.
        RegistryError: segment.json or manifest.json does not follow its format.
    """

    def __init__(self, folder: Path | str, trust: RegistryTrust | None = None) -> None:
        self._folder = Path(folder)
        self._bundles = Bundles(trust, lambda _digest: read_envelopes(self._folder / SIGNATURES))
        try:
            with (self._folder / MANIFEST).open("rb") as f:
                # One byte beyond the bound is enough for the parser to refuse the rest unread.
                self._manifest = f.read(MAX_MANIFEST_BYTES + 1)
            doc = (self._folder / SEGMENT).read_bytes()
            self.digest = digest_of(self._manifest)
            self._bundle = self.bundle(self.digest)
            self.segment_id, graph, weights = _read(doc)
            self._segment = self._bundle.segment(self.segment_id)
            _verify(self._folder / GRAPH, graph)
            _verify(self._folder / WEIGHTS, weights)
            self.branch = self._baked_branch()
        except OSError as e:
            raise SettingsError(
                f"the setting segment_dir is {str(folder)!r}, which is not a baked segment: {e}",
                variable="segment_dir",
                value=str(folder),
                hint="make one with: isthmus package",
            ) from e

    def bundle(self, digest: str) -> Bundle:
        if digest != self.digest:
            raise BundleMismatch(
                f"this function holds segment {self.segment_id} of {self._bundle.name} ({self.digest}) and no other;"
                f" a segment of {digest} was asked for",
                has=[self.digest],
                wanted=digest,
                hint="unset segment_dir to serve any bundle of a registry",
            )
        # The parsed manifest stays in memory; its signature is asked for each time.
        return self._bundles.get(digest, lambda _digest: self._manifest)

    def trusts(self, digest: str) -> bool:
        return self._bundles.trusts(digest)

    def blob(self, blob: Blob) -> bytes:
        path = self._blob_path(blob)
        try:
            data = path.read_bytes()
        except OSError:
            raise self._missing("blob", blob.digest, "none of that digest") from None
        if digest_of(data) != blob.digest:
            raise corrupt(str(path), blob.digest)
        return data

    def locate(self, bundle_digest: str, segment_id: str) -> Located:
        bundle = self.bundle(bundle_digest)
        if self.branch is not None and segment_id == self.branch.id:
            return Located(self._blob_path(self.branch.graph), self.branch, bundle)
        if segment_id != self.segment_id:
            raise self._missing("segment", segment_id, self.segment_id)
        return Located(self._folder / GRAPH, self._segment, bundle)

    def _baked_branch(self) -> Segment | None:
        """The branch of the exit behind a head, where the folder holds its graph, with the weights in it."""
        found = self._bundle.exit_at(self._segment.id.stop)
        if found is None or not (path := self._blob_path(found.segment.graph)).exists():
            return None
        _verify(path, found.segment.graph)
        return found.segment

    def _blob_path(self, blob: Blob) -> Path:
        return self._folder / BLOBS / blob.digest.removeprefix("sha256:")

    def _missing(self, kind: str, name: str, existing: str) -> Missing:
        return Missing(
            f"this function holds segment {self.segment_id} of {self._bundle.name} ({self.digest}) and no other;"
            f" {kind} {name!r} was asked for",
            kind=kind,
            name=name,
            exists=[existing],
            hint="unset segment_dir to serve any bundle of a registry",
        )


def _verify(path: Path, blob: Blob) -> None:
    if file_digest(path) != blob.digest:
        raise corrupt(str(path), blob.digest)


def _read(data: bytes) -> tuple[SegmentId, Blob, Blob]:
    try:
        doc = json.loads(data)
        graph, weights = (Blob(str(doc[part]["digest"]), int(doc[part]["size"])) for part in ("graph", "weights"))
        if not is_digest(graph.digest) or not is_digest(weights.digest):
            raise ValueError("a digest is not sha256:<hex>")
        return SegmentId.parse(str(doc["segment"])), graph, weights
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as e:
        raise RegistryError(f"not a {SEGMENT}: {type(e).__name__}: {e}") from e
