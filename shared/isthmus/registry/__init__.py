"""Bundles and their content: a folder or S3, and the cache of segments in front of it."""

from __future__ import annotations

from pathlib import Path

from isthmus.errors import RegistryError, SettingsError
from isthmus.registry.baked import BakedSegment
from isthmus.registry.blobs import BlobStore
from isthmus.registry.cache import SegmentCache
from isthmus.registry.folder import FolderStore
from isthmus.registry.patience import Patience
from isthmus.registry.registry import Registry, Resolved, Version
from isthmus.registry.s3 import S3Store
from isthmus.registry.source import Located, SegmentSource
from isthmus.settings import RegistrySettings, SegmentSettings

__all__ = [
    "BakedSegment",
    "BlobStore",
    "FolderStore",
    "Located",
    "Patience",
    "Registry",
    "Resolved",
    "S3Store",
    "SegmentCache",
    "SegmentSource",
    "Version",
    "open_cache",
    "open_registry",
    "open_source",
]


def open_registry(settings: RegistrySettings) -> Registry:
    """The registry that `settings.registry` names; nothing is asked of it yet.

    Raises:
        SettingsError: neither a folder's path nor s3://BUCKET/PREFIX, or one of two S3 secrets is not there.
    """
    patience = Patience(settings.registry_attempts, settings.registry_timeout_s)
    scheme, separator, rest = settings.registry.partition("://")
    if not separator:
        return Registry(FolderStore(settings.registry), patience)
    bucket, _, prefix = rest.partition("/")
    if scheme != "s3" or not bucket:
        raise SettingsError(
            f"the setting registry is {settings.registry!r}; it must be a folder's path or s3://BUCKET/PREFIX",
            variable="registry",
            value=settings.registry,
        )
    key_id, secret = (_secret(settings.secrets_dir, name) for name in ("s3-access-key-id", "s3-secret-access-key"))
    if bool(key_id) != bool(secret):
        raise SettingsError(
            f"the setting secrets_dir ({settings.secrets_dir}) holds only one of s3-access-key-id and"
            " s3-secret-access-key",
            variable="secrets_dir",
            value=settings.secrets_dir,
        )
    try:
        store = S3Store(
            bucket,
            prefix,
            endpoint=settings.s3_endpoint,
            region=settings.s3_region,
            key_id=key_id,
            secret=secret,
            patience=patience,
        )
    except RegistryError as e:
        raise SettingsError(
            f"the setting registry is {settings.registry!r}: {e}", variable="registry", value=settings.registry
        ) from e
    return Registry(store, patience)


def open_cache(settings: RegistrySettings, registry: Registry | None = None) -> SegmentCache:
    """The cache that `settings` describe, before their registry, or before `registry` where it is open already."""
    return SegmentCache(registry or open_registry(settings), settings.cache_dir, settings.cache_bytes)


def open_source(settings: SegmentSettings, registry: Registry | None = None) -> SegmentSource:
    """Where a function's segments come from: the one baked into its image if there is one, else the cache."""
    return BakedSegment(settings.segment_dir) if settings.segment_dir else open_cache(settings, registry)


def _secret(folder: str, name: str) -> str:
    try:
        return (Path(folder) / name).read_text().strip()
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as e:
        raise SettingsError(
            f"the secret {name} in the setting secrets_dir ({folder}) cannot be read: {e.strerror}",
            variable="secrets_dir",
            value=folder,
        ) from e
