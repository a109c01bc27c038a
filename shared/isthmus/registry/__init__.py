"""Bundles and their content: a folder or S3, and the cache of segments in front of it."""

from __future__ import annotations

from isthmus.errors import SettingsError
from isthmus.registry.blobs import Address, BlobStore, check_endpoint, check_region, parse_address
from isthmus.registry.cache import SegmentCache
from isthmus.registry.folder import FolderStore
from isthmus.registry.registry import Registry, Resolved, Version
from isthmus.registry.retry_policy import RetryPolicy
from isthmus.registry.s3 import S3Store
from isthmus.registry.source import BakedSegment, Located, SegmentSource
from isthmus.settings import RegistrySettings, SegmentSettings, read_secret

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
    "open_cache",
    "open_registry",
    "open_source",
    "parse_address",
]


def open_registry(settings: RegistrySettings) -> Registry:
    """The registry that `settings.registry` names; nothing is asked of it yet.

    Raises:
        SettingsError: neither a folder's path nor s3://BUCKET/PREFIX, an endpoint or region that cannot be one, or only
            one of the two S3 secrets is there.
    """
    patience = RetryPolicy(settings.registry_attempts, settings.registry_timeout_s)
    address = parse_address(settings.registry)
    if address.folder:
        return Registry(FolderStore(address.folder, patience), patience)
    check_endpoint(settings.s3_endpoint)
    check_region(settings.s3_region)
    key_id, secret = (read_secret(settings.secrets_dir, name) for name in ("s3-access-key-id", "s3-secret-access-key"))
    if bool(key_id) != bool(secret):
        raise SettingsError(
            f"the setting secrets_dir ({settings.secrets_dir}) holds only one of s3-access-key-id and"
            " s3-secret-access-key",
            variable="secrets_dir",
            value=settings.secrets_dir,
        )
    store = S3Store(
        address.bucket,
        address.prefix,
        endpoint=settings.s3_endpoint,
        region=settings.s3_region,
        key_id=key_id,
        secret=secret,
        patience=patience,
    )
    return Registry(store, patience)


def open_cache(settings: RegistrySettings, registry: Registry | None = None) -> SegmentCache:
    """The cache that `settings` describe, before their registry, or before `registry` where it is open already."""
    return SegmentCache(registry or open_registry(settings), settings.cache_dir, settings.cache_bytes)


def open_source(settings: SegmentSettings, registry: Registry | None = None) -> SegmentSource:
    """Where a function's segments come from: the one baked into its image if there is one, else the cache."""
    return BakedSegment(settings.segment_dir) if settings.segment_dir else open_cache(settings, registry)
