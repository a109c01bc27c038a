"""What trust costs: calls between functions sealed and signed, and versions published and pulled, verified throughout.

A call is beside the call without protection, a transfer beside a plain copy with SHA-256. A publication's last step,
the run of each segment, takes what the model takes and is not in the times.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from harness import ROOT, Report, Row, arguments, at_most, interleave
from transfers import MB, CountingStore, copy_and_hash, largest, model_files, peak_mb, published

from isthmus.registry import FolderStore, Registry, SegmentCache
from isthmus.security import sealing
from isthmus.security.hop_protection import HopProtection
from isthmus.security.keys import HopKeys
from isthmus.security.protected_call import CallFacts
from isthmus.settings import RegistrySettings
from isthmus_tools.usecases.pull import PullRequest, pull
from support.fake_bundles import Fake

Result = TypeVar("Result")
# Of a frame: an int8 activation of a small cut, a photo's pixels as int8, a large float32 activation.
SIZES = {"4 kB": 4_000, "150 kB": 150_000, "1.2 MB": 1_200_000}
# A call and its reply of the same size, both ends together.
SEALED_MS = {"4 kB": 0.15, "1.2 MB": 1.0}
TRANSFER_RATIO, MEMORY_MB = 1.3, 64.0
# Padding between weights is read with these.
HEAD_RATIO = 1.01
FACTS = CallFacts("POST", "/", "application/vnd.isthmus.frame")


def main() -> None:
    report = arguments("trust", __doc__, ["cryptography", "http-message-signatures"])
    measure_calls(report)
    with tempfile.TemporaryDirectory(dir=ROOT / ".isthmus") as folder:
        measure_transfers(report, Path(folder))
    report.emit()


def measure_calls(report: Report) -> None:
    """Add the times of protected calls, by size."""
    keys = HopKeys({"k": os.urandom(32)})
    ways = {name: HopProtection(keys, seals=name == "sealed", skew_s=30) for name in ("sealed", "signed")}
    rows: list[Row] = []
    for size, count in SIZES.items():
        body = os.urandom(count)
        turns = 20 if report.quick else 200
        times = {name: statistics.median(exchange(way, body) for _ in range(turns)) for name, way in ways.items()}
        rows.append({"size": size, **{f"{name} ms": round(s * 1e3, 3) for name, s in times.items()}})
        if size in SEALED_MS:
            name = f"sealing a call and its reply of {size}"
            report.goals.append(at_most(name, times["sealed"] * 1e3, SEALED_MS[size], "ms"))
    cipher = {1: "AES-256-GCM", 2: "ChaCha20-Poly1305"}[sealing.fastest_cipher()]
    report.add(f"added to a call and its reply, both ends, replay check included ({cipher})", rows)


def measure_transfers(report: Report, folder: Path) -> None:
    """Add the times of a publication and of pulls, the memory of both, and what a head's pull reads."""
    timed, streamed = (64, 256) if report.quick else (256, 2048)
    report.say(f"transfers of {timed} MB")
    fake, registry = model_files(folder / "files", timed), published(folder / "timed", timed)
    weights = largest(registry)
    times = interleave(
        {
            "a copy, with SHA-256": lambda: copy_and_hash(weights, folder),
            "publish": lambda: publish_to_folder(fake, folder),
            "pull to a registry": lambda: pull_to_folder(registry, folder),
            "pull to a cache": lambda: pull_to_cache(registry, folder),
            "pull of the head to a cache": lambda: pull_to_cache(registry, folder, "..1"),
        },
        turns=3 if report.quick else 7,
    )
    copied = times["a copy, with SHA-256"]
    report.add(
        f"a version of {timed} MB in a folder",
        [
            {"": name, "s": round(each.p50, 3), "of the copy": round(each.over(copied), 2)}
            for name, each in times.items()
        ],
    )
    for name in ("publish", "pull to a registry", "pull to a cache"):
        report.goals.append(at_most(f"{name} beside a copy", times[name].over(copied), TRANSFER_RATIO, "times"))
    report.say(f"memory over {streamed} MB")
    fake, registry = model_files(folder / "files", streamed), published(folder / "streamed", streamed)
    fake = Fake(fake.bundle, fake.files, b"")
    memory = {
        "publish": peak_mb(publish_to_folder, fake, folder),
        "pull to a registry": peak_mb(pull_to_folder, registry, folder),
        "pull to a cache": peak_mb(pull_to_cache, registry, folder),
    }
    report.add(
        f"memory added at most, for a version of {streamed} MB",
        [{"": name, "MB": round(value, 1)} for name, value in memory.items()],
    )
    for name, value in memory.items():
        report.goals.append(at_most(f"memory of {name}, {streamed} MB", value, MEMORY_MB, "MB"))
    moved, own = head_bytes(registry, folder)
    report.add("a pull of the head", [{"its MB": round(own / MB, 2), "moved MB": round(moved / MB, 2)}])
    report.goals.append(at_most("bytes that a head's pull moves, beside its own", moved / own, HEAD_RATIO, "times"))


def head_bytes(registry: Path, folder: Path) -> tuple[int, int]:
    """Bytes that the registry gives for a head's pull, and bytes of the head: its weights, graph and manifest."""
    store = CountingStore(registry)
    reader = Registry(store)
    model = reader.resolve("fake")
    head = model.bundle.segment("..1")
    own = sum(t.length for t in model.bundle.weight_ranges(head)) + head.graph.size + len(reader.manifest(model.digest))
    store.sizes.clear()
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        SegmentCache(reader, cache, 2**40).locate(model.digest, "..1").release()
    return sum(store.sizes), own


def publish_to_folder(fake: Fake, folder: Path) -> None:
    """Publish to an empty registry."""
    with tempfile.TemporaryDirectory(dir=folder) as target:
        Registry(FolderStore(target)).publish(fake.bundle, fake.files)


def pull_to_folder(registry: Path, folder: Path) -> None:
    """Pull a version to an empty registry."""
    with tempfile.TemporaryDirectory(dir=folder) as target:
        pull(PullRequest(model="fake", registry=RegistrySettings(registry=str(registry)), folder=target))


def pull_to_cache(registry: Path, folder: Path, segment: str = "..") -> None:
    """Pull a segment to an empty cache."""
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        settings = RegistrySettings(registry=str(registry), cache_dir=cache, cache_bytes=2**40)
        pull(PullRequest(model="fake", registry=settings, segment=segment))


def exchange(way: HopProtection, body: bytes) -> float:
    """Seconds that the protection of a call and of a reply of the same size takes, at both ends."""
    watch = Stopwatch()
    sent = watch.timed(lambda: way.protect([body], FACTS))
    arrived, facts = b"".join(sent.body), CallFacts("POST", "/", sent.headers["Content-Type"])
    call = watch.timed(lambda: way.take(sent.headers, arrived, facts))
    parts, headers = watch.timed(lambda: call.protect_reply(200, body))
    returned = b"".join(parts)
    watch.timed(lambda: sent.open_reply(200, headers, returned))
    return watch.seconds


class Stopwatch:
    """The sum of the seconds of some calls; sockets, which every call has, lie between."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, call: Callable[[], Result]) -> Result:
        began = time.perf_counter()
        result = call()
        self.seconds += time.perf_counter() - began
        return result


if __name__ == "__main__":
    main()
