"""The registry of published bundles: blob stores, versions and aliases, and the local segment cache."""

from __future__ import annotations

from isthmus.registry.addresses import Address, parse_address
from isthmus.registry.blobs import BlobStore, RemoteStore
from isthmus.registry.cache import SegmentCache
from isthmus.registry.folder import FolderStore
from isthmus.registry.lookups import Lookups
from isthmus.registry.opening import NO_KEYRING, demanded_trust, keyring_file, open_blob_store, open_registry
from isthmus.registry.registry import Registry, Resolved, Version
from isthmus.registry.retry_policy import RetryPolicy
from isthmus.registry.s3 import S3Store
from isthmus.registry.source import BakedSegment, Located, SegmentSource
from isthmus.settings import RegistrySettings, SegmentSettings

__all__ = [
    "NO_KEYRING",
    "Address",
    "BakedSegment",
    "BlobStore",
    "FolderStore",
    "Located",
    "Lookups",
    "Registry",
    "RemoteStore",
    "Resolved",
    "RetryPolicy",
    "S3Store",
    "SegmentCache",
    "SegmentSource",
    "Version",
    "demanded_trust",
    "keyring_file",
    "open_blob_store",
    "open_cache",
    "open_registry",
    "open_source",
    "parse_address",
]


def open_cache(settings: RegistrySettings, registry: Registry | None = None) -> SegmentCache:
    """The segment cache of `settings` in front of `registry`, by default the registry of the same settings."""
    return SegmentCache(registry or open_registry(settings), settings.cache_dir, settings.cache_bytes)


def open_source(settings: SegmentSettings, registry: Registry | None = None) -> SegmentSource:
    """The segment source of a function: the segment baked into its image if `segment_dir` is set, else the cache."""
    if settings.segment_dir:
        return BakedSegment(settings.segment_dir, demanded_trust(settings))
    return open_cache(settings, registry)
