"""What encryption at rest costs: to encrypt a version, and to pull it, beside the same in plain; and the memory."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from harness import ROOT, Row, arguments, at_most, interleave

from isthmus.registry import FolderStore, Registry, SegmentCache
from isthmus.security.recipients import RecipientKey, new_pair, parse_recipient_key
from isthmus.settings import RegistrySettings
from isthmus_tools.usecases.encryption import EncryptRequest, encrypt
from support.fake_bundles import make_bundle

MB = 10**6
TENSOR_BYTES = 5 * MB
# A head of a tenth of the weights, and the tail.
HEAD_SHARE = 10
PULL_RATIO, ENCRYPT_RATIO, MEMORY_MB = 1.5, 6.0, 64.0


def main() -> None:
    report = arguments("encryption", __doc__, ["cryptography"])
    timed, streamed = (64, 256) if report.quick else (256, 2048)
    with tempfile.TemporaryDirectory(dir=ROOT / ".isthmus") as folder:
        report.say(f"encryption of {timed} MB")
        plain_registry, _ = published(Path(folder) / "plain", timed)
        registry, own = published(Path(folder) / "timed", timed)
        copied = copied_s(registry, Path(folder))
        began = time.perf_counter()
        encrypt(request(registry, own))
        encrypted_s = time.perf_counter() - began
        report.say(f"pulls of {timed} MB")
        key = parse_recipient_key(own[0], where="the key")
        pulls = interleave(
            {
                "plain": lambda: pull(plain_registry, None, Path(folder)),
                "sealed": lambda: pull(registry, key, Path(folder)),
                "head": lambda: pull(registry, key, Path(folder), "..1"),
            },
            turns=3 if report.quick else 7,
        )
        plain, sealed, head = (pulls[name].p50 for name in ("plain", "sealed", "head"))
        rows: list[Row] = [
            {"": "a copy, with SHA-256", "s": round(copied, 3), "MB/s": round(timed / copied, 1)},
            {"": "encrypt in place", "s": round(encrypted_s, 3), "MB/s": round(timed / encrypted_s, 1)},
            {"": "pull, plain", "s": round(plain, 3), "MB/s": round(timed / plain, 1)},
            {"": "pull, encrypted", "s": round(sealed, 3), "MB/s": round(timed / sealed, 1)},
            {"": "pull of the head, encrypted", "s": round(head, 3), "MB/s": round(timed / HEAD_SHARE / head, 1)},
        ]
        report.add(f"a version of {timed} MB in a folder", rows)
        report.goals.append(
            at_most("a pull, encrypted beside plain", pulls["sealed"].over(pulls["plain"]), PULL_RATIO, "times")
        )
        report.goals.append(at_most("encrypt beside a copy with SHA-256", encrypted_s / copied, ENCRYPT_RATIO, "times"))
        report.say(f"memory over {streamed} MB")
        registry, own = published(Path(folder) / "streamed", streamed)
        memory = {
            "encrypt": peak_mb(encrypt_again, registry, own, Path(folder)),
            "pull": peak_mb(pull_again, registry, own, Path(folder)),
        }
        report.add(
            f"memory added at most, for a version of {streamed} MB",
            [{"": name, "MB": round(value, 1)} for name, value in memory.items()],
        )
        for name, value in memory.items():
            report.goals.append(at_most(f"memory of {name}, {streamed} MB", value, MEMORY_MB, "MB"))
    report.emit()


def published(folder: Path, size_mb: int) -> tuple[Path, tuple[bytes, bytes]]:
    """A registry with one version of that size, and a recipient's key pair."""
    count = size_mb * MB // TENSOR_BYTES
    fake = make_bundle(folder / "files", lengths=[TENSOR_BYTES] * count, cut=max(1, count // HEAD_SHARE))
    Registry(FolderStore(folder / "registry")).publish(fake.bundle, fake.files)
    shutil.rmtree(folder / "files")
    return folder / "registry", new_pair()


def request(registry: Path, own: tuple[bytes, bytes]) -> EncryptRequest:
    public = registry.parent / "own.pem"
    public.write_bytes(own[1])
    return EncryptRequest(
        model="fake",
        recipients=[str(public)],
        registry=RegistrySettings(registry=str(registry), secrets_dir="/nowhere"),
    )


def pull(registry: Path, key: RecipientKey | None, folder: Path, segment: str = "..") -> None:
    """Pull a segment into an empty cache."""
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        reader = Registry(FolderStore(registry), recipient_key=key)
        SegmentCache(reader, cache, 2**34).locate(reader.resolve("fake").digest, segment).release()


def copied_s(registry: Path, folder: Path) -> float:
    """Seconds of a plain copy of the largest blob to the disk, and its SHA-256."""
    blob = max((registry / "blobs" / "sha256").iterdir(), key=lambda path: path.stat().st_size)
    began = time.perf_counter()
    with blob.open("rb") as source, (folder / "copy").open("wb") as target:
        shutil.copyfileobj(source, target, 2**20)
        target.flush()
        os.fsync(target.fileno())
    with (folder / "copy").open("rb") as f:
        hashlib.file_digest(f, "sha256")
    seconds = time.perf_counter() - began
    (folder / "copy").unlink()
    return seconds


def encrypt_again(registry: Path, own: tuple[bytes, bytes], folder: Path) -> None:
    encrypt(request(registry, own))


def pull_again(registry: Path, own: tuple[bytes, bytes], folder: Path) -> None:
    pull(registry, parse_recipient_key(own[0], where="the key"), folder)


Work = Callable[[Path, tuple[bytes, bytes], Path], None]


def peak_mb(work: Work, registry: Path, own: tuple[bytes, bytes], folder: Path) -> float:
    """Peak resident memory of the work in a process of its own, beyond that of its imports. Units: MB."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(added_mb, (work, registry, own, folder))


def added_mb(work: Work, registry: Path, own: tuple[bytes, bytes], folder: Path) -> float:
    # The peak of getrusage would be the parent's, which exec passes on; "5" sets the peak back to the present size.
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_bytes()
    work(registry, own, folder)
    return (peak_bytes() - before) / MB


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


if __name__ == "__main__":
    main()
