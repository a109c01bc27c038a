"""Opens the store at an address with the settings' servers and the secrets' credentials; no request is sent.

obstore and hdfs-native are optional packages, and imported where an address asks for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from isthmus.errors import SettingsError
from isthmus.registry.addresses import (
    STORE_SECRETS,
    Address,
    check_account,
    check_endpoint,
    check_region,
    parse_address,
)
from isthmus.registry.blobs import RemoteStore
from isthmus.registry.folder import FolderStore
from isthmus.registry.registry import Registry
from isthmus.registry.retry_policy import RetryPolicy
from isthmus.registry.s3 import S3Store
from isthmus.security.recipients import read_recipient_key
from isthmus.settings import RegistrySettings, read_secret

if TYPE_CHECKING:  # cryptography takes 15 MB
    from isthmus.security.trust import Trust

TRUSTED_KEYS = "trusted-keys"
"""The secret that holds a function's keyring."""
NO_KEYRING = "none"
"""The value of the setting trusted_keys that demands no signatures, whatever secrets are there."""


def open_registry(settings: RegistrySettings) -> Registry:
    """Build the registry at the setting `registry`; no request is sent yet.

    Raises:
        SettingsError: no address, a malformed endpoint, region or account, a secret without usable form, only one of
            the two S3 secrets, the secret recipient-key is no private key, the keyring cannot be used, or a store's
            package is not installed.
    """
    store, recipient_key = open_blob_store(settings.registry, settings), read_recipient_key(settings.secrets_dir)
    return Registry(store, _policy(settings), recipient_key, demanded_trust(settings))


def demanded_trust(settings: RegistrySettings) -> Trust | None:
    """The trust that the setting or the secret demands; None where neither names a keyring.

    Raises:
        SettingsError: the keyring cannot be read or is none, or the cache folder, which remembers aliases, is not
            writable.
    """
    if (keyring := keyring_file(settings)) is None:
        return None
    from isthmus.security.trust import open_trust

    return open_trust(keyring, Path(settings.cache_dir))


def keyring_file(settings: RegistrySettings) -> Path | None:
    """The file of the keyring whose signatures are demanded: the setting's, else the secret; None for neither."""
    if settings.trusted_keys == NO_KEYRING:
        return None
    if settings.trusted_keys:
        return Path(settings.trusted_keys)
    secret = Path(settings.secrets_dir, TRUSTED_KEYS)
    return secret if secret.exists() else None


def open_blob_store(address: str, settings: RegistrySettings, *, any_key: bool = False) -> FolderStore | RemoteStore:
    """The store at `address`, with the settings and retry policy of the registry; no request is sent yet.

    `any_key`: keys of objects in S3 may be any that S3 takes, for objects that are read and are no registry's.

    Raises:
        SettingsError: as `open_registry`.
    """
    place = parse_address(address)
    match place.scheme:
        case "":
            return FolderStore(place.folder, _policy(settings))
        case "s3":
            return _s3(place, settings, any_key)
        case "gs":
            return _gcs(place, settings)
        case "az":
            return _azure(place, settings)
    with _package("hdfs"):
        from isthmus.registry.hdfs import HdfsStore

        return HdfsStore(place.bucket, place.prefix, _policy(settings))


def _s3(place: Address, settings: RegistrySettings, any_key: bool) -> RemoteStore:
    check_endpoint(settings.s3_endpoint)
    check_region(settings.s3_region)
    key_id, secret = (read_secret(settings.secrets_dir, name) for name in STORE_SECRETS["s3"])
    # Half a key pair is a deployment mistake; report the mistake before the first request is denied.
    if bool(key_id) != bool(secret):
        raise SettingsError(
            f"the setting secrets_dir ({settings.secrets_dir}) holds only one of s3-access-key-id and"
            " s3-secret-access-key",
            variable="secrets_dir",
            value=settings.secrets_dir,
        )
    return S3Store(
        place.bucket,
        place.prefix,
        endpoint=settings.s3_endpoint,
        region=settings.s3_region,
        key_id=key_id,
        secret=secret,
        retry_policy=_policy(settings),
        any_key=any_key,
    )


def _gcs(place: Address, settings: RegistrySettings) -> RemoteStore:
    check_endpoint(settings.gcs_endpoint, "gcs_endpoint")
    key_file = Path(settings.secrets_dir) / "gcs-service-account"
    with _package("gcs"):
        from isthmus.registry.cloud import gcs_store

        return gcs_store(
            place,
            endpoint=settings.gcs_endpoint,
            # obstore reads the file: the document has more lines than `read_secret` allows.
            key_file=str(key_file) if key_file.is_file() else "",
            retry_policy=_policy(settings),
        )


def _azure(place: Address, settings: RegistrySettings) -> RemoteStore:
    check_account(settings.azure_account)
    check_endpoint(settings.azure_endpoint, "azure_endpoint")
    with _package("azure"):
        from isthmus.registry.cloud import azure_store

        return azure_store(
            place,
            account=settings.azure_account,
            endpoint=settings.azure_endpoint,
            key=read_secret(settings.secrets_dir, "azure-account-key"),
            sas=read_secret(settings.secrets_dir, "azure-sas-token"),
            retry_policy=_policy(settings),
        )


def _policy(settings: RegistrySettings) -> RetryPolicy:
    return RetryPolicy(settings.registry_attempts, settings.registry_timeout_s)


@contextmanager
def _package(extra: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as e:
        raise SettingsError(
            f"the package {e.name} is not installed, which a registry of this kind needs",
            variable="registry",
            package=e.name,
            hint=f'pip install "isthmus[{extra}]"; a function needs the package in its requirements.txt',
        ) from e
