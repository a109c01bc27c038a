"""A weights file of which only some ranges are here: sparse on disk, with a ledger of what is present."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from isthmus.artifacts.bundle import WeightTensor

READ_BYTES = 8 * 2**20
"""Longest ranged read; a longer tensor is read in parts."""

_GAP_BYTES = 4096
_BLOCK_BYTES = 4096
_HASH_BYTES = 2**20


@dataclass(frozen=True)
class Batch:
    """Neighbouring tensors that one ranged read brings."""

    start: int
    stop: int
    tensors: tuple[WeightTensor, ...]


class WeightsFile:
    """`weights.bin` in `folder`, as long as the whole file, and `ledger.json`: the tensors known to have arrived.

    The ledger is written after the bytes it speaks of have reached the disk, and replaced as a whole, so a crash costs
    at most a refetch. It says what is worth hashing, not what may be run: see `intact`.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self._path, self._ledger, self._size = folder / "weights.bin", folder / "ledger.json", size

    def recorded(self) -> set[tuple[int, int]]:
        """Offset and length of each tensor in the ledger; empty when it cannot be read."""
        try:
            return {(int(offset), int(length)) for offset, length in json.loads(self._ledger.read_bytes())}
        except (FileNotFoundError, ValueError, TypeError, OverflowError, RecursionError):
            return set()

    def intact(self, tensor: WeightTensor) -> bool:
        """Whether the bytes on disk hash to the tensor's digest, read from where a runtime would map them."""
        try:
            descriptor = os.open(self._path, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            # A file cut short would end a process that maps it, whatever this tensor holds.
            if os.fstat(descriptor).st_size != self._size:
                return False
            digest = hashlib.sha256()
            at, stop = tensor.offset, tensor.offset + tensor.length
            while at < stop and (part := os.pread(descriptor, min(_HASH_BYTES, stop - at), at)):
                digest.update(part)
                at += len(part)
            return f"sha256:{digest.hexdigest()}" == tensor.digest
        finally:
            os.close(descriptor)

    def prepare(self) -> None:
        """Give the file its full length; no disk space is taken."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if os.fstat(descriptor).st_size != self._size:
                os.ftruncate(descriptor, self._size)
        finally:
            os.close(descriptor)

    def write(self, pieces: Iterable[tuple[int, bytes | memoryview]]) -> None:
        """Put bytes at their offsets; not present until `record`."""
        descriptor = os.open(self._path, os.O_WRONLY)
        try:
            for offset, data in pieces:
                view = memoryview(data)
                while view:
                    written = os.pwrite(descriptor, view, offset)
                    view, offset = view[written:], offset + written
        finally:
            os.close(descriptor)

    def record(self, tensors: Iterable[WeightTensor]) -> None:
        """Note that these tensors, verified, are present. One process at a time may do this."""
        descriptor = os.open(self._path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        present = self.recorded() | {(t.offset, t.length) for t in tensors}
        write_whole(self._ledger, json.dumps(sorted(present)).encode())


def batches(tensors: Sequence[WeightTensor]) -> list[Batch]:
    """Few ranged reads for many tensors: neighbours together, up to READ_BYTES; a longer tensor is a batch alone."""
    found: list[Batch] = []
    for t in sorted(tensors, key=lambda t: t.offset):
        last, stop = found[-1] if found else None, t.offset + t.length
        if last and t.offset - last.stop <= _GAP_BYTES and stop - last.start <= READ_BYTES:
            found[-1] = Batch(last.start, stop, (*last.tensors, t))
        else:
            found.append(Batch(t.offset, stop, (t,)))
    return found


def parts(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """`start` to `stop` in ranges of at most READ_BYTES."""
    for at in range(start, stop, READ_BYTES):
        yield at, min(at + READ_BYTES, stop)


def disk_bytes(tensors: Iterable[WeightTensor]) -> int:
    """Bytes that these tensors will take on disk, in whole blocks."""
    total = end = 0
    for t in sorted(tensors, key=lambda t: t.offset):
        start = max(end, t.offset // _BLOCK_BYTES * _BLOCK_BYTES)
        stop = -(-(t.offset + t.length) // _BLOCK_BYTES) * _BLOCK_BYTES
        if t.length and stop > start:
            total, end = total + stop - start, stop
    return total


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is either complete or not there."""
    descriptor, staged = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with open(descriptor, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(staged, path)
    finally:
        Path(staged).unlink(missing_ok=True)
