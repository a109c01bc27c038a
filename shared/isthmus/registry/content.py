"""What content is under a digest: its key, its bundle, and the error when it is not what it should be."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

from cachetools import LRUCache

from isthmus.artifacts import bundle as manifest
from isthmus.artifacts.bundle import Bundle, is_digest
from isthmus.errors import Corrupt, ModelError, RegistryError

_MAX_BUNDLES = 16
_MAX_PADDING = 2**16
"""Bytes after the last weight in a weights file."""


def blob_key(digest: str) -> str:
    """Where content lives in a store.

    Raises:
        RegistryError: not a digest.
    """
    if not is_digest(digest):
        raise RegistryError(f"{digest[:100]!r} is not a sha256 digest")
    return f"blobs/sha256/{digest.removeprefix('sha256:')}"


def file_digest(path: Path) -> str:
    """`sha256:<hex>` of a file, streamed."""
    with path.open("rb") as f:
        return f"sha256:{hashlib.file_digest(f, 'sha256').hexdigest()}"


def corrupt(where: str, digest: str, **facts: str) -> Corrupt:
    """The error for bytes that are not what their digest says."""
    return Corrupt(f"the bytes of {digest} in {where} do not hash to it", registry=where, blob=digest, **facts)


def read_manifest(data: bytes) -> Bundle:
    """The bundle of a manifest, once its weights are known to lie inside its weights file.

    Raises:
        RegistryError: not such a manifest.
    """
    bundle = manifest.from_json(data)
    check_weights(bundle)
    _check_served(bundle)
    return bundle


def _check_served(bundle: Bundle) -> None:
    """Refuse what would only fail at a request, as if that were the caller's fault.

    Raises:
        RegistryError: a segment without outputs, a dtype that no request carries, or processing that is not as written.
    """
    from isthmus.arrays import DTYPES
    from isthmus.processing import classify, image_spec

    if bad := next((s.id for s in bundle.segments.values() if not s.outputs), None):
        raise RegistryError(f"bundle {bundle.name}: segment {bad} has no outputs")
    if odd := next((s for s in (*bundle.inputs, *bundle.outputs) if s.dtype not in DTYPES), None):
        raise RegistryError(f"bundle {bundle.name}: {odd.name[:80]!r} is {odd.dtype[:80]!r}, which no request carries")
    known = ((bundle.preprocess, "image", image_spec), (bundle.postprocess, "classify", classify))
    for doc, kind, processing in known:
        # Another kind may be a later version's; tensors are served without it.
        if doc is not None and doc.get("kind") == kind:
            try:
                processing.validate_spec(doc)
            except ModelError as e:
                raise RegistryError(f"bundle {bundle.name}: {e.message[:300]}") from e


def check_weights(bundle: Bundle) -> None:
    """Refuse a bundle whose tensors leave the weights file or overlap, or whose segments refer to none of them.

    Raises:
        RegistryError: names the tensor or segment.
    """
    end = 0
    for t in bundle.weights.tensors:
        if not is_digest(t.digest) or t.length < 0 or not end <= t.offset <= bundle.weights.blob.size - t.length:
            raise RegistryError(
                f"bundle {bundle.name}: the place of weight {t.name[:80]!r} in the weights file is wrong"
            )
        end = t.offset + t.length
    if bundle.weights.blob.size - end > _MAX_PADDING:
        # A cache makes a file of that length.
        raise RegistryError(
            f"bundle {bundle.name}: the weights file has {bundle.weights.blob.size} bytes, and its last weight ends at"
            f" {end}"
        )
    count = len(bundle.weights.tensors)
    for s in bundle.segments.values():
        last = 0
        for start, stop in s.weights:
            # In order and apart, so that a segment never has more weights than the bundle.
            if not last <= start <= stop <= count:
                raise RegistryError(
                    f"bundle {bundle.name}: segment {s.id} refers to weights that are not there, or to some twice"
                )
            last = stop


class Bundles:
    """A cache of parsed bundles; safe to use from several threads."""

    def __init__(self) -> None:
        self._bundles: LRUCache[str, Bundle] = LRUCache(_MAX_BUNDLES)
        self._lock = threading.Lock()

    def get(self, digest: str, read: Callable[[str], bytes]) -> Bundle:
        """The bundle of that digest, from memory or from the manifest that `read` gives, verified."""
        with self._lock:
            if (bundle := self._bundles.get(digest)) is not None:
                return bundle
        bundle = read_manifest(read(digest))
        with self._lock:
            self._bundles[digest] = bundle
        return bundle
