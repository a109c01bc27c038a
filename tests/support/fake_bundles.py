"""Bundles of random bytes: everything a registry looks at, and no model."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.synchronize import Event
from pathlib import Path

from msgspec import structs

from isthmus.artifacts.bundle import Blob, Bundle, Cut, Segment, Weights, WeightTensor, digest_of, to_json
from isthmus.artifacts.segment_id import SegmentId
from isthmus.artifacts.tensors import TensorSpec
from isthmus.registry import FolderStore, Registry, RetryPolicy, SegmentCache
from support.patience import LONG_S
from support.s3_server import store_at

SPEC = TensorSpec("x", "float32", (1, 4))


@dataclass(frozen=True)
class Fake:
    """A bundle, its digest, its content by digest, and its weights file's bytes."""

    bundle: Bundle
    files: dict[str, Path]
    weights: bytes

    @property
    def digest(self) -> str:
        return digest_of(to_json(self.bundle))


def make_bundle(
    folder: Path,
    *,
    name: str = "fake",
    lengths: Sequence[int] = (3000, 50, 0, 70_000, 9000),
    cut: int = 2,
    seed: int = 0,
) -> Fake:
    """A model of `len(lengths)` weights with a cut `1` before weight number `cut`; the tail reads the first too."""
    folder.mkdir(parents=True, exist_ok=True)
    random_bytes = random.Random(seed).randbytes
    content, tensors = bytearray(), []
    for i, length in enumerate(lengths):
        content.extend(b"\xee" * (-len(content) % 64))
        data = random_bytes(length)
        tensors.append(WeightTensor(f"w{i}", len(content), length, digest_of(data)))
        content.extend(data)
    files: dict[str, Path] = {}

    def keep(data: bytes) -> Blob:
        digest = digest_of(data)
        files[digest] = folder / digest[7:]
        files[digest].write_bytes(data)
        return Blob(digest, len(data))

    last = len(lengths)
    ranges = {"..": ((0, last),), "..1": ((0, cut),), "1..": ((0, min(1, cut)), (cut, last))}
    bundle = Bundle(
        name=name,
        inputs=(SPEC,),
        outputs=(SPEC,),
        weights=Weights(keep(bytes(content)), tuple(tensors)),
        segment_list=tuple(
            Segment(SegmentId.parse(id), keep(f"graph {id} {seed}".encode() * 50), (SPEC,), (SPEC,), weights)
            for id, weights in ranges.items()
        ),
        cut_list=(Cut("1", (SPEC,), 16, 0.5, 1),),
        default_cuts=("1",),
    )
    return Fake(bundle, files, bytes(content))


def variant(fake: Fake, note: str) -> Fake:
    """The same content under another manifest."""
    return replace(fake, bundle=structs.replace(fake.bundle, source={"note": note}))


def weights_here(fake: Fake, path: Path, segment_id: str) -> bool:
    """Whether the weights file beside `path` holds every tensor of the segment."""
    with (path.parent / "weights.bin").open("rb") as f:
        here = f.read()
    tensors = fake.bundle.weight_ranges(fake.bundle.segment(segment_id))
    return len(here) == len(fake.weights) and all(
        here[t.offset : t.offset + t.length] == fake.weights[t.offset : t.offset + t.length] for t in tensors
    )


def allocated(folder: Path) -> int:
    """Bytes that a folder's files take on disk."""
    return sum(p.lstat().st_blocks * 512 for p in folder.rglob("*") if p.is_file())


def fill(registry: str, cache_dir: str, limit: int, digest: str, segments: Sequence[str]) -> None:
    """What one process of several does: locate segments. `registry` is a folder, or an endpoint and a prefix."""
    endpoint, _, prefix = registry.partition("#")
    retry_policy = RetryPolicy(attempts=4, timeout_s=LONG_S)
    store = store_at(endpoint, prefix, retry_policy=retry_policy) if prefix else FolderStore(registry)
    cache = SegmentCache(Registry(store, retry_policy), cache_dir, limit)
    for segment in segments:
        cache.locate(digest, segment)


def hold(registry: str, cache_dir: str, digest: str, held: Event) -> None:
    """What a process that serves a segment does: it keeps it located until it ends."""
    located = SegmentCache(Registry(FolderStore(registry)), cache_dir, 2**40).locate(digest, "..")
    held.set()
    time.sleep(60)
    located.release()
