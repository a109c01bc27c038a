"""The local cache of segments: fetches only the byte ranges of a segment, once, and verifies the files at each use."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from isthmus.artifacts.bundle import Blob, Bundle, Segment, WeightTensor, digest_of
from isthmus.errors import CacheFull, RegistryError, SettingsError
from isthmus.files import write_whole
from isthmus.registry.cache_files import (
    READ_BYTES,
    Batch,
    CacheSpace,
    WeightsFile,
    batches,
    disk_bytes,
    parts,
)
from isthmus.registry.content import blob_key, corrupt
from isthmus.registry.registry import Registry
from isthmus.registry.retry_policy import in_parallel
from isthmus.registry.signatures import read_envelopes, write_envelopes
from isthmus.registry.source import Located, Progress
from isthmus.retries import RetryBudget

# Each ledger update syncs the weights file; an interrupted fetch repeats at most this much.
_RECORD_BYTES = 32 * 2**20
_SLACK_BYTES = 2**16
"""Bound on the ledger and on the folder's own blocks."""


class SegmentCache:
    """A `SegmentSource` in front of a registry; several processes may share `cache_dir`.

    `cache_bytes` bounds the allocated disk space of `cache_dir`. Eviction is least-recently-used by weights file, and
    never touches files `Located` by a living process.

    Raises:
        SettingsError: `cache_dir` is not writable.
    """

    def __init__(self, registry: Registry, cache_dir: Path | str, cache_bytes: int) -> None:
        self._registry = registry
        self._dir, self._limit = Path(cache_dir).absolute(), cache_bytes
        self._space = CacheSpace(self._dir, cache_bytes)
        with self._disk_errors():
            (self._dir / "locks").mkdir(parents=True, exist_ok=True)
            # A probe write: a read-only volume must stop the start, not the first request.
            tempfile.TemporaryFile(dir=self._dir).close()

    def bundle(self, digest: str) -> Bundle:
        """The bundle with the digest `digest`, from memory, this cache or the registry.

        Raises:
            Missing, Denied, Corrupt, RegistryUnavailable: the error of the registry.
            Untrusted: no signature of the bundle counts; nothing of it was fetched.
        """
        # The registry's: a sealed blob is opened by a grant of a bundle that is among these.
        return self._registry.bundles.get(
            digest,
            lambda d: self._small("manifests", ".json", d, lambda: self._registry.manifest(d)),
            self._envelopes,
        )

    def trusts(self, digest: str) -> bool:
        """Whether a bundle in use is trusted still, its key neither revoked nor past its window; no I/O."""
        return self._registry.bundles.trusts(digest)

    def blob(self, blob: Blob) -> bytes:
        """The verified bytes of a small blob, such as the labels of a model."""
        return self._small("blobs", "", blob.digest, lambda: self._registry.blob(blob))

    def locate(self, bundle_digest: str, segment_id: str, *, progress: Progress | None = None) -> Located:
        """The graph and weights of a segment, complete, verified at this call, and pinned until released.

        Fetches absent or damaged tensors only, and waits for another process that fetches into the same file.

        Raises:
            Missing: no such bundle or segment.
            CacheFull: more than `cache_bytes`, or more than the free disk space.
            Denied, Corrupt, RegistryUnavailable: the error of the registry.
            SettingsError: `cache_dir` is no longer writable.
        """
        bundle = self.bundle(bundle_digest)
        segment = bundle.segment(segment_id)
        key = _hex(bundle.weights.blob)
        graph = self._dir / key / f"{_hex(segment.graph)}.onnx"
        with self._disk_errors():
            pin = self._space.pin(key)
            try:
                absent = self._absent(bundle, bundle.weight_ranges(segment))
                if absent or not _is_intact(graph, segment.graph):
                    # Verified first without the lock: a complete segment must not wait for another segment's fetch.
                    with self._space.filling(key):
                        self._fill(bundle, segment, graph, absent, pin, progress)
            except BaseException:
                # The pin belongs to the caller only once `Located` exists.
                os.close(pin)
                raise
        return Located(graph, segment, bundle, pin)

    def _fill(
        self,
        bundle: Bundle,
        segment: Segment,
        graph: Path,
        absent: Sequence[WeightTensor],
        pin: int,
        progress: Progress | None,
    ) -> None:
        key, weights, complete = graph.parent.name, self._weights(bundle), bundle.weight_ranges(segment)
        self._check_fits(segment, disk_bytes(complete))
        graph.parent.mkdir(exist_ok=True)
        weights.prepare()
        # Another process may have fetched some of these while this one waited for the lock.
        absent = self._absent(bundle, absent)
        try:
            with self._space.reserved(key, _needed(segment, absent)):
                self._fetch(bundle, segment, graph, absent, progress)
        except CacheFull:
            # Tensors of other segments in the same sparse file may take the space: without other users, start from an
            # empty file.
            if not self._space.clear(key, pin):
                raise
            graph.parent.mkdir(exist_ok=True)
            weights.prepare()
            with self._space.reserved(key, _needed(segment, complete)):
                self._fetch(bundle, segment, graph, complete, progress)

    def _fetch(
        self,
        bundle: Bundle,
        segment: Segment,
        graph: Path,
        absent: Sequence[WeightTensor],
        progress: Progress | None,
    ) -> None:
        if not _is_intact(graph, segment.graph):
            write_whole(graph, self._registry.blob(segment.graph))
        weights = self._weights(bundle)
        total, done, fresh = sum(t.length for t in absent), 0, list[WeightTensor]()
        try:
            budget = self._registry.retry_policy.budget()
            for batch in self._fetch_batches(weights, bundle.weights.blob, batches(absent), budget):
                fresh.extend(batch.tensors)
                done += sum(t.length for t in batch.tensors)
                if progress is not None:
                    progress(done, total)
                if sum(t.length for t in fresh) >= _RECORD_BYTES:
                    weights.record(fresh)
                    fresh.clear()
        finally:
            if fresh:
                weights.record(fresh)

    def _fetch_batches(
        self, weights: WeightsFile, blob: Blob, pending: Sequence[Batch], budget: RetryBudget
    ) -> Iterator[Batch]:
        short = [b for b in pending if b.stop - b.start <= READ_BYTES]
        yield from in_parallel(lambda batch: self._fetch_batch(weights, blob, batch, budget), short)
        for batch in pending:
            if batch.stop - batch.start > READ_BYTES:
                yield self._fetch_tensor(weights, blob, batch, budget)

    def _fetch_batch(self, weights: WeightsFile, blob: Blob, batch: Batch, budget: RetryBudget) -> Batch:
        def pieces(data: bytes | bytearray) -> Iterator[tuple[WeightTensor, memoryview]]:
            for t in batch.tensors:
                yield t, memoryview(data)[t.offset - batch.start : t.offset - batch.start + t.length]

        def check(data: bytes | bytearray) -> None:
            for t, piece in pieces(data):
                if digest_of(piece) != t.digest:
                    raise corrupt(self._registry.url, blob.digest, tensor=t.name)

        data = self._registry.read(blob.digest, batch.start, batch.stop, check, budget)
        weights.write((t.offset, piece) for t, piece in pieces(data))
        return batch

    def _fetch_tensor(self, weights: WeightsFile, blob: Blob, batch: Batch, budget: RetryBudget) -> Batch:
        # The parts of a long tensor have no digests: each is written on arrival, with retries of its own, and the
        # tensor is hashed from disk. A wrong byte therefore costs the whole tensor again, at most as often as one read
        # is retried.
        for _ in range(max(1, self._registry.retry_policy.attempts)):
            for _ in in_parallel(
                lambda part: weights.write(
                    [(part[0], memoryview(self._registry.read(blob.digest, *part, budget=budget)))]
                ),
                parts(batch.start, batch.stop),
            ):
                pass
            if weights.intact(batch.tensors[0]):
                return batch
        raise corrupt(self._registry.url, blob.digest, tensor=batch.tensors[0].name)

    def _absent(self, bundle: Bundle, tensors: Sequence[WeightTensor]) -> list[WeightTensor]:
        """The tensors that are absent or damaged."""
        weights = self._weights(bundle)
        recorded = weights.recorded()
        present = [t for t in tensors if (t.offset, t.length) in recorded]
        intact = {t for t, ok in in_parallel(lambda t: (t, weights.intact(t)), present) if ok}
        return [t for t in tensors if t not in intact]

    def _weights(self, bundle: Bundle) -> WeightsFile:
        return WeightsFile(self._dir / _hex(bundle.weights.blob), bundle.weights.blob.size)

    def _small(self, folder: str, suffix: str, digest: str, fetch: Callable[[], bytes]) -> bytes:
        path = self._dir / folder / (blob_key(digest).rpartition("/")[2] + suffix)
        with self._disk_errors():
            try:
                data = path.read_bytes()
                if digest_of(data) == digest:
                    # Eviction of small files orders by modification time.
                    os.utime(path)
                    return data
            except FileNotFoundError:
                path.parent.mkdir(parents=True, exist_ok=True)
            data = fetch()
            self._space.make_room(len(data) + _SLACK_BYTES)
            write_whole(path, data)
            return data

    def _envelopes(self, digest: str) -> Iterator[bytes]:
        """The signatures of a manifest: of this cache, then, where none of these counts, the registry's."""
        path = self._dir / "signatures" / blob_key(digest).rpartition("/")[2]
        with self._disk_errors():
            # Verified as the registry's are: the folder proves nothing, and spares a start the registry.
            yield from read_envelopes(path)
            envelopes = self._registry.signatures.of(digest)
            if envelopes:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._space.make_room(sum(map(len, envelopes)) + _SLACK_BYTES)
                write_envelopes(path, envelopes)
        yield from envelopes

    def _check_fits(self, segment: Segment, size: int) -> None:
        if (total := size + segment.graph.size + _SLACK_BYTES) > self._limit:
            raise CacheFull(
                f"segment {segment.id} takes {total} bytes, more than the cache {self._dir} may hold ({self._limit})",
                cache_dir=str(self._dir),
                bytes=total,
                limit=self._limit,
                hint="raise the setting cache_bytes",
            )

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                raise CacheFull(
                    f"the disk of the cache {self._dir} is full",
                    cache_dir=str(self._dir),
                    bytes=None,
                    limit=None,
                    hint="free space there, lower the setting cache_bytes, or set cache_dir to a larger disk",
                ) from e
            if e.errno in (errno.EFBIG, errno.EINVAL, errno.EOVERFLOW):
                # The file is created with the size in the manifest, and the manifest may be damaged.
                raise CacheFull(
                    f"a file of the bundle is longer than one may be on the disk of the cache {self._dir}",
                    cache_dir=str(self._dir),
                    bytes=None,
                    limit=None,
                    hint="the bundle's manifest may be damaged; publish the model again",
                ) from e
            if e.errno == errno.EIO:
                raise RegistryError(f"the disk of the cache {self._dir} fails: {e}", cache_dir=str(self._dir)) from e
            raise SettingsError(
                f"the setting cache_dir is {str(self._dir)!r}, where this process cannot write: {e}",
                variable="cache_dir",
                value=str(self._dir),
                hint="set cache_dir to a folder that this process's user may write to",
            ) from e


def _hex(blob: Blob) -> str:
    return blob.digest.removeprefix("sha256:")


def _needed(segment: Segment, tensors: Sequence[WeightTensor]) -> int:
    return disk_bytes(tensors) + segment.graph.size + _SLACK_BYTES


def _is_intact(path: Path, blob: Blob) -> bool:
    try:
        return digest_of(path.read_bytes()) == blob.digest
    except FileNotFoundError:
        return False
