"""The address of a registry: a folder's path or s3://BUCKET/PREFIX, checked before anything is opened or signed.

A text that only resembles an S3 address (`s3:/bucket`, `s3//bucket`) is refused, never taken for a folder. An endpoint
that cannot be meant is refused too: a client that fell back to AWS would sign with keys of another server.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from isthmus.errors import RegistryError, SettingsError
from isthmus.registry.blobs import check_key

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
