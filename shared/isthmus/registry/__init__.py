"""The registry of published bundles: blob stores (folder, S3), versions and aliases, and the local segment cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from isthmus.errors import SettingsError
from isthmus.registry.blobs import Address, BlobStore, check_endpoint, check_region, parse_address
from isthmus.registry.cache import SegmentCache
from isthmus.registry.folder import FolderStore
from isthmus.registry.registry import Registry, Resolved, Version
from isthmus.registry.retry_policy import RetryPolicy
from isthmus.registry.s3 import S3Store
from isthmus.registry.source import BakedSegment, Located, SegmentSource
from isthmus.security.recipients import read_recipient_key
from isthmus.settings import RegistrySettings, SegmentSettings, read_secret

if TYPE_CHECKING:  # cryptography takes 15 MB
    from isthmus.security.trust import Trust

TRUSTED_KEYS = "trusted-keys"
"""The secret that holds a function's keyring."""
NO_KEYRING = "none"
"""The value of the setting trusted_keys that demands no signatures, whatever secrets are there."""

__all__ = [
    "Address",
    "BakedSegment",
    "BlobStore",
    "FolderStore",
    "Located",
    "Registry",
    "Resolved",
    "RetryPolicy",
    "S3Store",
    "SegmentCache",
    "SegmentSource",
    "Version",
    "demanded_trust",
    "open_blob_store",
    "open_cache",
    "open_registry",
    "open_source",
    "parse_address",
]


def open_registry(settings: RegistrySettings) -> Registry:
    """Build the registry at the setting `registry`; no request is sent yet.

    Raises:
        SettingsError: not a folder path or s3://BUCKET/PREFIX, a malformed endpoint or region, only one of the two
            S3 secrets is present, the secret recipient-key is no private key, or the
            keyring cannot be used.
    """
    retries = RetryPolicy(settings.registry_attempts, settings.registry_timeout_s)
    store, recipient_key = open_blob_store(settings.registry, settings), read_recipient_key(settings.secrets_dir)
    return Registry(store, retries, recipient_key, demanded_trust(settings))


def demanded_trust(settings: RegistrySettings) -> Trust | None:
    """The trust that the setting or the secret demands; None where neither names a keyring.

    Raises:
        SettingsError: the keyring cannot be read or is none, or the cache folder, which remembers aliases, is not
            writable.
    """
    if settings.trusted_keys == NO_KEYRING:
        return None
    secret = Path(settings.secrets_dir, TRUSTED_KEYS)
    if not settings.trusted_keys and not secret.exists():
        return None
    from isthmus.security.trust import open_trust

    return open_trust(Path(settings.trusted_keys) if settings.trusted_keys else secret, Path(settings.cache_dir))


def open_blob_store(address: str, settings: RegistrySettings, *, any_key: bool = False) -> FolderStore | S3Store:
    """The store at `address`, with the S3 settings and retry policy of the registry; no request is sent yet.

    `any_key`: keys of objects in S3 may be any that S3 takes, for objects that are read and are no registry's.

    Raises:
        SettingsError: as `open_registry`.
    """
    retries = RetryPolicy(settings.registry_attempts, settings.registry_timeout_s)
    place = parse_address(address)
    if place.folder:
        return FolderStore(place.folder, retries)
    check_endpoint(settings.s3_endpoint)
    check_region(settings.s3_region)
    key_id, secret = (read_secret(settings.secrets_dir, name) for name in ("s3-access-key-id", "s3-secret-access-key"))
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
        retry_policy=retries,
        any_key=any_key,
    )


def open_cache(settings: RegistrySettings, registry: Registry | None = None) -> SegmentCache:
    """The segment cache of `settings` in front of `registry`, by default the registry of the same settings."""
    return SegmentCache(registry or open_registry(settings), settings.cache_dir, settings.cache_bytes)


def open_source(settings: SegmentSettings, registry: Registry | None = None) -> SegmentSource:
    """The segment source of a function: the segment baked into its image if `segment_dir` is set, else the cache."""
    if settings.segment_dir:
        return BakedSegment(settings.segment_dir, demanded_trust(settings))
    return open_cache(settings, registry)
