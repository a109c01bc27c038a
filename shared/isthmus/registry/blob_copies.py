"""Copies of blobs to local files: by ranges in parallel, verified, and resumed after an interruption."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from isthmus.artifacts.bundle import Blob
from isthmus.artifacts.plan import read_plan
from isthmus.errors import Corrupt, PlanMalformed, PlanMismatch, RegistryUnavailable
from isthmus.registry.content import blob_key, corrupt
from isthmus.registry.folder import FolderStore
from isthmus.registry.registry import Registry
from isthmus.registry.retry_policy import MAX_PARALLEL_REQUESTS
from isthmus.registry.source import Progress
from isthmus.retries import RetryBudget

RANGE_BYTES = 4 * 2**20
"""The memory of a copy is this times MAX_PARALLEL_REQUESTS, of a blob of any size."""


def version_content(registry: Registry, digest: str) -> dict[str, Blob]:
    """All content of a version by digest: its blobs, its manifest, and those of variants that its plan serves.

    Raises:
        RegistryError: a manifest or the plan cannot be read.
    """
    bundle, content = registry.bundle(digest), dict[str, Blob]()
    try:
        plan = read_plan(bundle, registry.blob)
    except (PlanMalformed, PlanMismatch):  # no router serves by it
        plan = None
    variants = {each.variant for each in plan.candidates if each.variant} if plan is not None else set()
    for manifest in (*sorted(variants - {digest}), digest):
        content |= {each: Blob(each, size) for each, size in registry.bundle(manifest).content.items()}
        content[manifest] = Blob(manifest, len(registry.manifest(manifest)))
    return content


def local_blob(registry: Registry, blob: Blob) -> Path | None:
    """The file of a blob in a registry that is a folder on this machine; None for other stores."""
    if not isinstance(registry.store, FolderStore):
        return None
    path = Path(registry.store.url) / blob_key(blob.digest)
    return path if path.is_file() else None


def fetch_blob(registry: Registry, blob: Blob, path: Path, progress: Progress | None = None) -> None:
    """Fetch a blob to `path`, from where an interrupted fetch ended; `progress` is called with bytes of this blob.

    Raises:
        Corrupt: the whole does not hash to the digest, fetched twice; the file is removed.
        RegistryUnavailable: another process fetches to the same file.
        OSError: the disk; the caller knows what the file is for.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as f:
        try:
            # Released with the process: an interrupted fetch never blocks the next one.
            fcntl.flock(f.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise RegistryUnavailable(
                f"another process fetches {blob.digest} to {path}", registry=registry.url, blob=blob.digest
            ) from e
        resumed = path.stat().st_size > 0
        if _filled(registry, blob, f, progress) or (resumed and _filled_anew(registry, blob, f, progress)):
            f.flush()
            os.fsync(f.fileno())
            return
        path.unlink()
    raise corrupt(registry.url, blob.digest)


def verify_blob(registry: Registry, blob: Blob, progress: Progress | None = None) -> None:
    """Read a whole blob and compare its digest.

    Raises:
        Corrupt: the bytes do not hash to the digest, or end early.
        RegistryError: the registry cannot be read.
    """
    sha, done = hashlib.sha256(), 0
    for part in _ranges(registry, blob, 0):
        sha.update(part)
        done += len(part)
        if progress is not None:
            progress(done, blob.size)
    if f"sha256:{sha.hexdigest()}" != blob.digest:
        raise corrupt(registry.url, blob.digest)


def _filled_anew(registry: Registry, blob: Blob, f: BinaryIO, progress: Progress | None) -> bool:
    # The part of the interrupted fetch may be what is wrong: a power failure loses bytes behind a right length.
    f.truncate(0)
    return _filled(registry, blob, f, progress)


def _filled(registry: Registry, blob: Blob, f: BinaryIO, progress: Progress | None) -> bool:
    """Append what the file lacks of the blob; whether the whole hashes to the digest."""
    f.truncate(min(os.fstat(f.fileno()).st_size, blob.size))
    f.seek(0)
    sha = hashlib.sha256()
    while prefix := f.read(RANGE_BYTES):
        sha.update(prefix)
    done = f.tell()
    try:
        for part in _ranges(registry, blob, done):
            f.write(part)
            sha.update(part)
            done += len(part)
            if progress is not None:
                progress(done, blob.size)
    except Corrupt:
        return False
    return f"sha256:{sha.hexdigest()}" == blob.digest


def _ranges(registry: Registry, blob: Blob, start: int) -> Iterator[bytes | bytearray]:
    """The bytes of a blob from `start`, in order; MAX_PARALLEL_REQUESTS ranges are under way at a time."""
    budget, pending = registry.retry_policy.budget(), deque[Future[bytes | bytearray]]()
    starts = iter(range(start, blob.size, RANGE_BYTES))
    pool = ThreadPoolExecutor(MAX_PARALLEL_REQUESTS, thread_name_prefix="copy")

    def submit() -> None:
        if (at := next(starts, None)) is not None:
            pending.append(pool.submit(_read, registry, blob, at, budget))

    try:
        for _ in range(MAX_PARALLEL_REQUESTS):
            submit()
        while pending:
            part = pending.popleft().result()
            submit()
            yield part
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _read(registry: Registry, blob: Blob, start: int, budget: RetryBudget) -> bytes | bytearray:
    return registry.read(blob.digest, start, min(blob.size, start + RANGE_BYTES), budget=budget)
