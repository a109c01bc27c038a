"""What encryption at rest costs: to encrypt a version, and to pull it, beside the same in plain; and the memory."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from harness import ROOT, Row, arguments, at_most, interleave
from transfers import HEAD_SHARE, copied_s, largest, peak_mb, published

from isthmus.registry import FolderStore, Registry, SegmentCache
from isthmus.security.recipients import RecipientKey, new_pair, parse_recipient_key
from isthmus.settings import RegistrySettings
from isthmus_tools.usecases.encryption import EncryptRequest, encrypt

PULL_RATIO, ENCRYPT_RATIO, MEMORY_MB = 1.5, 6.0, 64.0


def main() -> None:
    report = arguments("encryption", __doc__, ["cryptography"])
    timed, streamed = (64, 256) if report.quick else (256, 2048)
    with tempfile.TemporaryDirectory(dir=ROOT / ".isthmus") as folder:
        report.say(f"encryption of {timed} MB")
        plain_registry = published(Path(folder) / "plain", timed)
        registry, own = encryptable(Path(folder) / "timed", timed)
        copied = copied_s(largest(registry), Path(folder))
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
        registry, own = encryptable(Path(folder) / "streamed", streamed)
        memory = {
            "encrypt": peak_mb(encrypt_again, registry, own),
            "pull": peak_mb(pull_again, registry, own, Path(folder)),
        }
        report.add(
            f"memory added at most, for a version of {streamed} MB",
            [{"": name, "MB": round(value, 1)} for name, value in memory.items()],
        )
        for name, value in memory.items():
            report.goals.append(at_most(f"memory of {name}, {streamed} MB", value, MEMORY_MB, "MB"))
    report.emit()


def encryptable(folder: Path, size_mb: int) -> tuple[Path, tuple[bytes, bytes]]:
    """A registry with one version of that size, and a recipient's key pair."""
    return published(folder, size_mb), new_pair()


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


def encrypt_again(registry: Path, own: tuple[bytes, bytes]) -> None:
    encrypt(request(registry, own))


def pull_again(registry: Path, own: tuple[bytes, bytes], folder: Path) -> None:
    pull(registry, parse_recipient_key(own[0], where="the key"), folder)


if __name__ == "__main__":
    main()
