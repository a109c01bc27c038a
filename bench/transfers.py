"""Versions of any size to transfer, a plain copy to compare with, and what a transfer takes and moves."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from isthmus.registry import FolderStore, Registry
from support.fake_bundles import Fake, make_bundle

MB = 10**6
TENSOR_BYTES = 5 * MB
# A head of a tenth of the weights, and the tail.
HEAD_SHARE = 10


def model_files(folder: Path, size_mb: int) -> Fake:
    """A bundle of that size, and its files in the folder."""
    count = size_mb * MB // TENSOR_BYTES
    return make_bundle(folder, lengths=[TENSOR_BYTES] * count, cut=max(1, count // HEAD_SHARE))


def published(folder: Path, size_mb: int) -> Path:
    """A registry with one version of that size."""
    fake = model_files(folder / "files", size_mb)
    Registry(FolderStore(folder / "registry")).publish(fake.bundle, fake.files)
    shutil.rmtree(folder / "files")
    return folder / "registry"


def largest(folder: Path) -> Path:
    """The largest file below a folder: the weights of its version."""
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def copied_s(file: Path, folder: Path) -> float:
    """Seconds of a plain copy of a file to the folder's disk, and of its SHA-256."""
    began = time.perf_counter()
    copy_and_hash(file, folder)
    return time.perf_counter() - began


def copy_and_hash(file: Path, folder: Path) -> None:
    """Copy a file to the folder's disk, durably, and hash the copy."""
    with tempfile.TemporaryDirectory(dir=folder) as there:
        copy = Path(there) / "copy"
        with file.open("rb") as source, copy.open("wb") as target:
            shutil.copyfileobj(source, target, 2**20)
            target.flush()
            os.fsync(target.fileno())
        with copy.open("rb") as f:
            hashlib.file_digest(f, "sha256")


def peak_mb(work: Callable[..., object], *arguments: object) -> float:
    """Peak of resident megabytes that `work(*arguments)` adds to its imports, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_added_mb, (work, arguments))


def _added_mb(work: Callable[..., object], arguments: tuple[object, ...]) -> float:
    # The peak of getrusage would be the parent's, which exec passes on; "5" sets the peak back to the present size.
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_bytes()
    work(*arguments)
    return (_peak_bytes() - before) / MB


def _peak_bytes() -> int:
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024


class CountingStore(FolderStore):
    """A folder that counts the bytes that it gives; thread-safe, as sums under the interpreter's lock."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.sizes: list[int] = []

    def get(self, key: str, *, max_bytes: int) -> bytes:
        """See `FolderStore.get`."""
        data = super().get(key, max_bytes=max_bytes)
        self.sizes.append(len(data))
        return data

    def read(self, key: str, start: int, stop: int) -> bytes:
        """See `FolderStore.read`."""
        data = super().read(key, start, stop)
        self.sizes.append(len(data))
        return data
