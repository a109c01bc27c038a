"""What content is under a digest: its key, its bundle, and the error when it is not what it should be."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from isthmus import bundle as manifest
from isthmus.bundle import Bundle, is_digest
from isthmus.errors import Corrupt, RegistryError

_REMEMBERED = 16


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


class Bundles:
    """The bundles used last, parsed; safe to use from several threads."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Bundle] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, digest: str, read: Callable[[str], bytes]) -> Bundle:
        """The bundle of that digest, from memory or from the manifest that `read` gives, verified."""
        with self._lock:
            if (known := self._known.get(digest)) is not None:
                self._known.move_to_end(digest)
                return known
        found = read_manifest(read(digest))
        with self._lock:
            self._known[digest] = found
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        return found
