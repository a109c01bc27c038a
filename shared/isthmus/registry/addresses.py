"""The address of a registry: a folder, or a scheme with a bucket, container or server and a prefix of keys."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from isthmus.errors import RegistryError, SettingsError
from isthmus.registry.blobs import check_key

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
# A mistyped address must not become a folder of that name.
_NEARLY_SCHEME = re.compile(r"(s3|gs|az|hdfs)(//|\\)", re.IGNORECASE)
_FORMS: Final = {
    "s3": "s3://BUCKET/PREFIX",
    "gs": "gs://BUCKET/PREFIX",
    "az": "az://CONTAINER/PREFIX",
    "hdfs": "hdfs://HOST:PORT/PATH",
}
ADDRESS_FORMS: Final = f"a folder's path, {', '.join([*_FORMS.values()][:-1])} or {_FORMS['hdfs']}"
_PLACES: Final = {
    # boto3 allows exactly this, apart from access point ARNs and `..`; servers other than AWS allow longer names.
    "s3": ("a bucket's name", re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")),
    # Source: cloud.google.com/storage/docs/buckets, "Bucket names"; 222 with dots.
    "gs": ("a bucket's name", re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")),
    # Source: "Naming and referencing containers, blobs, and metadata" of Azure Storage.
    "az": ("a container's name", re.compile(r"(?!.*--)[a-z0-9][a-z0-9-]{1,61}[a-z0-9]")),
    "hdfs": (
        "a server, or the name service of HADOOP_CONF_DIR",
        re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,252}(:\d{1,5})?"),
    ),
}
# The region becomes a label of the AWS host name and a part of each signature.
_REGION = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")
_ACCOUNT = re.compile(r"[a-z0-9]{3,24}")


@dataclass(frozen=True)
class Address:
    """A folder path; or a scheme, its bucket (a container, or HOST:PORT of HDFS) and the prefix of keys, without
    slashes at either end.
    """

    folder: str = ""
    scheme: str = ""
    bucket: str = ""
    prefix: str = ""


def parse_address(text: str) -> Address:
    """Parse the setting `registry`.

    A leading `~` is the home directory, since a shell does not expand `--registry=~/models`. A folder name with a
    leading `~`, or with a colon before the first slash, needs a leading `./`.

    Raises:
        SettingsError: none of ADDRESS_FORMS; the message never repeats a user or password.
    """
    if not text.strip():
        raise SettingsError(f"the setting registry is empty; it must be {ADDRESS_FORMS}", variable="registry")
    if not text.isprintable():
        raise _refused(text, "it holds a control character")
    scheme = _SCHEME.match(text)
    if scheme is None:
        if nearly := _NEARLY_SCHEME.match(text):
            raise _refused(text, f"such an address starts with {nearly[1].lower()}://")
        try:
            return Address(folder=str(Path(text).expanduser()) if text.startswith("~") else text)
        except RuntimeError as e:
            raise _refused(text, "there is no user of that name; ./~… is a folder here") from e
    return _remote(text, scheme[1].lower(), text[scheme.end() :])


def _remote(text: str, scheme: str, rest: str) -> Address:
    if scheme not in _PLACES:
        raise _refused(text, "an S3 server other than AWS is named by the setting s3_endpoint")
    kind, form = _PLACES[scheme]
    bucket, _, prefix = rest.removeprefix("//").partition("/")
    if not rest.startswith("//") or not form.fullmatch(bucket):
        raise _refused(text, f"{scheme}:// is followed by {kind}")
    prefix = prefix.strip("/")
    try:
        return Address(scheme=scheme, bucket=bucket, prefix=prefix and check_key(prefix))
    except RegistryError as e:
        raise _refused(text, str(e)) from e


def check_endpoint(text: str, setting: str = "s3_endpoint") -> None:
    """Refuse a malformed URL of a store's server; an empty text is the provider's own.

    Raises:
        SettingsError: no http:// or https:// URL, or a URL with a user, password or query (never repeated).
    """
    if not text:
        return
    try:
        url = urlsplit(text)
        good = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        good = False
    # Checked before the URL's form: the message for a malformed URL repeats the text, credentials included.
    if "@" in text or "?" in text or "#" in text:
        raise SettingsError(
            f"the setting {setting} holds a user, a password or a query; it is a server's URL such as"
            " http://minio:9000, and the keys are secrets",
            variable=setting,
            hint=f"put {', '.join(STORE_SECRETS[_SCHEME_OF[setting]])} in the setting secrets_dir",
        )
    if not good or not text.isprintable() or " " in text:
        raise SettingsError(
            f"the setting {setting} is {text!r}; it must be a URL such as http://minio:9000",
            variable=setting,
            value=text,
        )


_SCHEME_OF: Final = {"s3_endpoint": "s3", "gcs_endpoint": "gs", "azure_endpoint": "az"}
STORE_SECRETS: Final = {
    "s3": ("s3-access-key-id", "s3-secret-access-key"),
    "gs": ("gcs-service-account",),
    "az": ("azure-account-key", "azure-sas-token"),
    "hdfs": (),
}
"""The secrets with the credentials of each kind of store; HDFS has a user name or a Kerberos ticket."""


def check_region(text: str) -> None:
    """Refuse a malformed region; an empty text is boto3's own region, else us-east-1.

    Raises:
        SettingsError: not letters, digits and '-'.
    """
    if text and not _REGION.fullmatch(text):
        raise SettingsError(
            f"the setting s3_region is {text!r}; it must be a region such as eu-central-1",
            variable="s3_region",
            value=text,
        )


def check_account(text: str) -> None:
    """Refuse a malformed name of a storage account, since the name becomes a label of the server's host name.

    Raises:
        SettingsError: absent, or not 3 to 24 small letters and digits.
    """
    if not _ACCOUNT.fullmatch(text):
        raise SettingsError(
            f"the setting azure_account is {text!r}; az://CONTAINER needs the name of a storage account: 3 to 24 small"
            " letters and digits",
            variable="azure_account",
            value=text,
            hint="set azure_account (AZURE_ACCOUNT for commands and stack.yml)",
        )


def _refused(text: str, why: str) -> SettingsError:
    must = f"it must be {ADDRESS_FORMS}"
    if "@" in text:
        # The message goes to logs, and the part before '@' may be a password.
        return SettingsError(f"the setting registry holds an '@'; {must}", variable="registry")
    return SettingsError(f"the setting registry is {text!r}; {must}: {why}", variable="registry", value=text)
