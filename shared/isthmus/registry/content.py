"""Content-addressed blobs: keys, verification of manifests, the cache of parsed bundles, and verified upload."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cachetools import LRUCache

from isthmus.artifacts import bundle as manifest
from isthmus.artifacts.alias import Alias
from isthmus.artifacts.bundle import Bundle, is_digest
from isthmus.artifacts.tensors import DTYPE_NAMES
from isthmus.errors import Corrupt, Missing, ModelError, RegistryError
from isthmus.processing import classify_spec, image_spec
from isthmus.registry.blobs import BlobStore
from isthmus.registry.retry_policy import RetryPolicy
from isthmus.retries import RetryBudget

_COMPARE_BYTES = 8 * 2**20
_MAX_BUNDLES = 16
_MAX_PADDING = 2**16
"""Bound on the bytes after the last tensor of a weights file."""


def blob_key(digest: str) -> str:
    """The key of a blob in a store.

    Raises:
        RegistryError: `digest` is malformed.
    """
    if not is_digest(digest):
        raise RegistryError(f"{digest[:100]!r} is not a sha256 digest")
    return f"blobs/sha256/{digest.removeprefix('sha256:')}"


def file_digest(path: Path) -> str:
    """`sha256:<hex>` of a file, streamed."""
    with path.open("rb") as f:
        return f"sha256:{hashlib.file_digest(f, 'sha256').hexdigest()}"


def corrupt(where: str, digest: str, **facts: str) -> Corrupt:
    """The error for bytes that do not hash to their digest."""
    return Corrupt(f"the bytes of {digest} in {where} do not hash to it", registry=where, blob=digest, **facts)


def read_manifest(data: bytes) -> Bundle:
    """Parse a manifest and check its weights, dtypes and processing specs.

    Raises:
        RegistryError: malformed, or a rule is broken.
    """
    bundle = manifest.from_json(data)
    check_weights(bundle)
    _check_served(bundle)
    return bundle


def _check_served(bundle: Bundle) -> None:
    """Refuse a bundle whose every request would fail as if the caller were at fault.

    Raises:
        RegistryError: a segment without outputs, a dtype without an encoding in requests, or a malformed processing
            spec.
    """
    if mute := next((s.id for s in bundle.runnable.values() if not s.outputs), None):
        raise RegistryError(f"bundle {bundle.name}: segment {mute} has no outputs")
    if unsupported := next((s for s in (*bundle.inputs, *bundle.outputs) if s.dtype not in DTYPE_NAMES), None):
        raise RegistryError(
            f"bundle {bundle.name}: {unsupported.name[:80]!r} is {unsupported.dtype[:80]!r}, which no request carries"
        )
    specs = ((bundle.preprocess, "image", image_spec), (bundle.postprocess, "classify", classify_spec))
    for doc, kind, processing in specs:
        # A later version may add kinds; such a model still serves tensors.
        if doc is not None and doc.get("kind") == kind:
            try:
                processing.validate_spec(doc)
            except ModelError as e:
                raise RegistryError(f"bundle {bundle.name}: {e.message[:300]}") from e


def check_weights(bundle: Bundle) -> None:
    """Refuse a bundle with overlapping or out-of-range tensors, or with segments that refer to absent tensors.

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
        # The cache creates a sparse file of this length.
        raise RegistryError(
            f"bundle {bundle.name}: the weights file has {bundle.weights.blob.size} bytes, and its last weight ends at"
            f" {end}"
        )
    count = len(bundle.weights.tensors)
    for s in bundle.runnable.values():
        last = 0
        for start, stop in s.weights:
            # Ascending and disjoint, so that a segment never lists more weights than the bundle has.
            if not last <= start <= stop <= count:
                raise RegistryError(
                    f"bundle {bundle.name}: segment {s.id} refers to weights that are not there, or to some twice"
                )
            last = stop


class RegistryTrust(Protocol):
    """Whose signatures count: `security.trust.Trust`, whose library is loaded where a keyring is there."""

    def check_manifest(self, digest: str, envelopes: Callable[[], Iterable[bytes]]) -> None:
        """Refuse a manifest without a signature that counts.

        Raises:
            Untrusted: with the reason.
        """
        ...

    def check_version(self, name: str, number: str, digest: str, envelopes: Callable[[], Iterable[bytes]]) -> None:
        """Refuse a number that no trusted key gave to the digest.

        Raises:
            Untrusted: with the reason.
        """
        ...

    def check_alias(self, registry: str, name: str, alias: str, data: bytes) -> Alias:
        """The document of a signed alias.

        Raises:
            Untrusted: with the reason.
        """
        ...

    def trusts(self, digest: str) -> bool:
        """Whether a manifest that was checked is trusted still; no I/O."""
        ...

    def stands(self, registry: str, name: str, alias: str) -> bool:
        """Whether an alias that was checked counts still; no I/O."""
        ...


class Bundles:
    """LRU cache of parsed bundles; thread-safe. The one place where a manifest becomes a bundle that can run.

    With `trust` only a manifest that a trusted key signed; `envelopes` gives the signatures of a digest.
    """

    def __init__(
        self, trust: RegistryTrust | None = None, envelopes: Callable[[str], Iterable[bytes]] = lambda _digest: ()
    ) -> None:
        self._trust, self._envelopes = trust, envelopes
        self._bundles: LRUCache[str, Bundle] = LRUCache(_MAX_BUNDLES)
        self._lock = threading.Lock()

    def with_blob(self, digest: str) -> list[tuple[str, Bundle]]:
        """The cached bundles that hold a blob, each with its own digest."""
        with self._lock:
            return [(name, bundle) for name, bundle in self._bundles.items() if digest in bundle.content]

    def get(
        self,
        digest: str,
        read: Callable[[str], bytes],
        envelopes: Callable[[str], Iterable[bytes]] | None = None,
    ) -> Bundle:
        """The cached bundle of `digest`, else the parsed manifest that `read` returns for the digest.

        `envelopes` takes the place of the constructor's.

        Raises:
            Untrusted: no signature counts; the manifest was not read.
        """
        if self._trust is not None:
            # Before the cache: a key may have been revoked since.
            self._trust.check_manifest(digest, lambda: (envelopes or self._envelopes)(digest))
        with self._lock:
            if (bundle := self._bundles.get(digest)) is not None:
                return bundle
        # Outside of the lock: a slow read must not block readers of cached bundles.
        bundle = read_manifest(read(digest))
        with self._lock:
            self._bundles[digest] = bundle
        return bundle

    def trusts(self, digest: str) -> bool:
        """Whether a bundle that was read is trusted still, its key neither revoked nor past its window; no I/O."""
        return self._trust is None or self._trust.trusts(digest)


def send_until_right(
    store: BlobStore,
    retry_policy: RetryPolicy,
    budget: RetryBudget,
    key: str,
    send: Callable[[], None],
    compare: Callable[[], None],
) -> None:
    """Upload to `key`, read back, and upload again what `compare` finds wrong, with as many attempts as a request has.

    Raises:
        Corrupt: every upload read back differently; the last one is removed.
    """
    for attempts_left in reversed(range(max(1, retry_policy.attempts))):
        # A range of an object cannot be replaced in place: only here does a fault repeat the whole upload.
        send()
        try:
            compare()
        except Corrupt:
            retry_policy(lambda: store.delete(key), budget)
            if not attempts_left:
                raise
        else:
            return


@dataclass(frozen=True)
class Upload:
    """Verified upload of blobs; all requests of one publish share a retry budget.

    Some servers store a bit flipped in transit, and content of the right length is never uploaded a second time. Every
    upload is therefore read back once and compared.
    """

    store: BlobStore
    retry_policy: RetryPolicy
    budget: RetryBudget

    def file(self, digest: str, path: Path | None) -> None:
        """Upload a file, unless the store has content of the same length under its digest.

        Raises:
            Missing: no file, and the store lacks the content.
            Corrupt: the file does not hash to `digest`, or every upload read back differently.
            RegistryUnavailable: one request exhausted its attempts, or all requests the budget.
        """
        stored_size = self.retry_policy(lambda: self.store.size(blob_key(digest)), self.budget)
        if path is None or not path.is_file():
            if stored_size is None:
                raise Missing(
                    f"content {digest} is neither among the files nor in {self.store.url}",
                    kind="blob",
                    name=digest,
                    exists=[],
                )
            return
        # A different length is the remains of an interrupted copy.
        if stored_size == path.stat().st_size:
            return
        if file_digest(path) != digest:
            raise corrupt(str(path), digest)
        key = blob_key(digest)
        self._until_right(
            digest, lambda: self.store.put_file(key, path, self.budget), lambda: self._compare(digest, path)
        )

    def data(self, digest: str, data: bytes) -> None:
        """Upload bytes.

        Raises:
            Corrupt: every upload read back differently.
        """

        key = blob_key(digest)
        self._until_right(
            digest,
            lambda: self.retry_policy(lambda: self.store.put(key, data), self.budget),
            lambda: self._compare_step(digest, lambda: self.store.get(key, max_bytes=len(data)), data),
        )

    def _until_right(self, digest: str, send: Callable[[], None], compare: Callable[[], None]) -> None:
        send_until_right(self.store, self.retry_policy, self.budget, blob_key(digest), send, compare)

    def _compare(self, digest: str, path: Path) -> None:
        size = path.stat().st_size
        with path.open("rb") as f:
            for start in range(0, size, _COMPARE_BYTES):
                self._compare_range(digest, start, f.read(_COMPARE_BYTES))

    def _compare_range(self, digest: str, start: int, expected: bytes) -> None:
        stop = start + len(expected)
        self._compare_step(digest, lambda: self.store.read(blob_key(digest), start, stop), expected)

    def _compare_step(self, digest: str, read: Callable[[], bytes], expected: bytes) -> None:
        def one_try() -> None:
            if read() != expected:
                raise corrupt(self.store.url, digest)

        self.retry_policy(one_try, self.budget)
