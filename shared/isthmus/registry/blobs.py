"""Where bytes live: keys, and the one Protocol that a folder and S3 both fulfil.

A store makes one try; where a method takes several steps, it tries each of them again. It raises our errors, never its
library's: `Missing`, `Denied`, `Corrupt` for content shorter than asked for, and `RegistryUnavailable` for what another
try may mend. isthmus.registry.retry_policy tries again.
"""

from __future__ import annotations

import builtins
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from isthmus.errors import Corrupt, Missing, RegistryError, RegistryMissing, SettingsError
from isthmus.retries import RetryBudget

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")
"""What file systems take for a name; S3 takes more."""
_MAX_KEY = 900
"""Of S3's 1,024 bytes, with room for a registry's prefix."""


class BlobStore(Protocol):
    """Bytes under keys such as `blobs/sha256/<hex>`; safe to use from several threads and processes."""

    @property
    def url(self) -> str:
        """What to call this store in messages: a folder's path, or s3://BUCKET/PREFIX."""
        ...

    def get(self, key: str, *, max_bytes: int) -> bytes:
        """All bytes of `key`.

        Raises:
            Missing: no such key, or no such registry.
            RegistryError: longer than `max_bytes`; the rest was not read.
        """
        ...

    def read(self, key: str, start: int, stop: int) -> bytes:
        """Exactly the bytes `start` to `stop` (half open) of `key`.

        Raises:
            Missing: no such key.
            Corrupt: `key` ends before `stop`.
        """
        ...

    def size(self, key: str) -> int | None:
        """Length in bytes, or None if there is no such key."""
        ...

    def exists(self, key: str) -> bool:
        """Whether `key` is there."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Store `data`; a reader sees what was there before, or all of it."""
        ...

    def put_file(self, key: str, path: Path, budget: RetryBudget | None = None) -> None:
        """Store a file's bytes as `put` does, streamed; each step is tried again by itself."""
        ...

    def put_if_absent(self, key: str, data: bytes, budget: RetryBudget | None = None) -> bool:
        """Store `data` unless `key` is there; whether it was stored. Each step is tried again by itself."""
        ...

    def delete(self, key: str) -> None:
        """Remove `key`; nothing happens if it is not there."""
        ...

    def list(self, prefix: str) -> builtins.list[str]:
        """All keys under `prefix`, which is empty or ends with '/', sorted. Each step is tried again by itself.

        Raises:
            Missing: no such registry.
        """
        ...


def check_key(key: str) -> str:
    """`key` itself, once it cannot leave the store: parts of letters, digits, '.', '_', '-', none starting with a dot.

    A part has at most 255 characters.

    Raises:
        RegistryError: any other key.
    """
    if len(key) <= _MAX_KEY and all(_PART.fullmatch(part) for part in key.split("/")):
        return key
    raise RegistryError(f"{key[:100]!r} is not a key of a registry", blob=key[:100])


def check_range(start: int, stop: int) -> None:
    """Refuse a range that runs backwards.

    Raises:
        RegistryError: start is negative or after stop.
    """
    if not 0 <= start <= stop:
        raise RegistryError(f"{start}..{stop} is not a range of bytes")


def missing_blob(registry: str, key: str) -> Missing:
    """The error for a key that is not there."""
    return Missing(f"{registry} has no {key}", kind="blob", name=key, exists=[], registry=registry, blob=key)


def missing_registry(registry: str) -> RegistryMissing:
    """The error for a folder or bucket that is not there."""
    return RegistryMissing(
        f"there is no registry at {registry}",
        kind="registry",
        name=registry,
        exists=[],
        registry=registry,
        hint="check the setting registry; a folder is made by the first publish, a bucket must be there",
    )


def too_long(registry: str, key: str, max_bytes: int) -> RegistryError:
    """The error for content longer than its reader bears."""
    return RegistryError(f"{key} in {registry} exceeds {max_bytes} bytes", registry=registry, blob=key, limit=max_bytes)


def ended_early(registry: str, key: str, got: int, wanted: int) -> Corrupt:
    """The error for content that ends before the bytes asked for."""
    return Corrupt(
        f"{registry} gave {got} of {wanted} bytes of {key}", registry=registry, blob=key, got=got, wanted=wanted
    )


_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_NEARLY_S3 = re.compile(r"s3(//|\\)", re.IGNORECASE)
# What boto3 takes for a bucket's name, access points' ARNs and `..` aside; other servers allow more than AWS.
_BUCKET = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")
# A host label: the region becomes part of AWS's host name, and of each signature.
_REGION = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")


@dataclass(frozen=True)
class Address:
    """A folder's path, or a bucket and the prefix of all keys in it, without slashes at its ends."""

    folder: str = ""
    bucket: str = ""
    prefix: str = ""


def parse_address(text: str) -> Address:
    """The address that the setting `registry` holds.

    `~` is the user's home, which a shell leaves to us in `--registry=~/models`. A folder whose name starts with `~`, or
    contains a colon before its first slash, is written with `./`.

    Raises:
        SettingsError: neither a folder's path nor s3://BUCKET/PREFIX. A user or password in it is not repeated.
    """
    if not text.strip():
        raise SettingsError(
            "the setting registry is empty; it must be a folder's path or s3://BUCKET/PREFIX", variable="registry"
        )
    if not text.isprintable():
        raise _refused(text, "it holds a control character")
    scheme = _SCHEME.match(text)
    if scheme is None:
        if _NEARLY_S3.match(text):
            raise _refused(text, "an address in S3 starts with s3://")
        try:
            return Address(folder=str(Path(text).expanduser()) if text.startswith("~") else text)
        except RuntimeError as e:
            raise _refused(text, "there is no user of that name; ./~… is a folder here") from e
    if scheme[1].lower() != "s3":
        raise _refused(text, "a server other than AWS is named by the setting s3_endpoint")
    rest = text[scheme.end() :]
    bucket, _, prefix = rest.removeprefix("//").partition("/")
    if not rest.startswith("//") or not _BUCKET.fullmatch(bucket):
        raise _refused(text, "s3:// is followed by a bucket's name")
    prefix = prefix.strip("/")
    try:
        return Address(bucket=bucket, prefix=prefix and check_key(prefix))
    except RegistryError as e:
        raise _refused(text, str(e)) from e


def check_endpoint(text: str) -> None:
    """Refuse what cannot be an S3 server's URL; none is AWS, or what boto3's own configuration names.

    Raises:
        SettingsError: no http:// or https:// URL, or one with a user, password or query, which is not repeated.
    """
    if not text:
        return
    try:
        url = urlsplit(text)
        good = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        good = False
    if "@" in text or "?" in text or "#" in text:
        raise SettingsError(
            "the setting s3_endpoint holds a user, a password or a query; it is a server's URL such as"
            " http://minio:9000, and the keys are secrets",
            variable="s3_endpoint",
            hint="put s3-access-key-id and s3-secret-access-key in the setting secrets_dir",
        )
    if not good or not text.isprintable() or " " in text:
        raise SettingsError(
            f"the setting s3_endpoint is {text!r}; it must be a URL such as http://minio:9000",
            variable="s3_endpoint",
            value=text,
        )


def check_region(text: str) -> None:
    """Refuse what cannot be a region's name; none is boto3's own, else us-east-1.

    Raises:
        SettingsError: not letters, digits and '-'.
    """
    if text and not _REGION.fullmatch(text):
        raise SettingsError(
            f"the setting s3_region is {text!r}; it must be a region such as eu-central-1",
            variable="s3_region",
            value=text,
        )


def _refused(text: str, why: str) -> SettingsError:
    must = "it must be a folder's path or s3://BUCKET/PREFIX"
    if "@" in text:
        # A password would be in every log that holds this message.
        return SettingsError(f"the setting registry holds an '@'; {must}", variable="registry")
    return SettingsError(f"the setting registry is {text!r}; {must}: {why}", variable="registry", value=text)
