"""A blob store of each kind, each over a real server or an emulator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from isthmus.registry import BlobStore, FolderStore, RemoteStore, RetryPolicy
from isthmus.registry.addresses import Address
from isthmus.registry.cloud import CloudStore, azure_store, gcs_store
from isthmus.registry.hdfs import HdfsStore
from support import gcs_server
from support.azurite_server import ACCOUNT, CONTAINER, KEY
from support.s3_server import PATIENCE, store_at, unique_prefix

STORES = ["folder", "s3", "gs", "az", "hdfs"]
COMPARING = ["folder", "moto_s3", "gs", "az", "hdfs"]
"""Stores that enforce conditional writes."""


def make_store(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    """An empty store; skips where its server is not installed."""
    if kind == "folder":
        (tmp_path / "registry").mkdir(exist_ok=True)
        return FolderStore(tmp_path / "registry")
    return make_remote(kind, request)


def make_remote(kind: str, request: pytest.FixtureRequest) -> RemoteStore:
    """An empty store on a server; skips where the server is not installed."""
    server: Any
    match kind:
        case "s3":
            return store_at(request.getfixturevalue("s3_server").endpoint, unique_prefix())
        case "moto_s3":
            return store_at(request.getfixturevalue("moto_s3").endpoint, unique_prefix())
        case "gs":
            server = request.getfixturevalue("gcs_server")
            request.getfixturevalue("monkeypatch").setenv("GOOGLE_BEARER_TOKEN", gcs_server.TOKEN)
            return gcs_at(server.endpoint)
        case "az":
            return azure_at(request.getfixturevalue("azurite").endpoint)
    server = request.getfixturevalue("hdfs_server")
    store = HdfsStore(server.authority, unique_prefix(), PATIENCE)
    store.put("folder", b"")  # as of the other kinds, the registry is there, and empty
    store.delete("folder")
    return store


def gcs_at(endpoint: str, bucket: str = gcs_server.BUCKET, retry_policy: RetryPolicy = PATIENCE) -> CloudStore:
    place = Address(scheme="gs", bucket=bucket, prefix=unique_prefix())
    return gcs_store(place, endpoint=endpoint, key_file="", retry_policy=retry_policy)


def azure_at(
    endpoint: str, container: str = CONTAINER, *, key: str = KEY, retry_policy: RetryPolicy = PATIENCE
) -> CloudStore:
    place = Address(scheme="az", bucket=container, prefix=unique_prefix())
    return azure_store(place, account=ACCOUNT, endpoint=endpoint, key=key, sas="", retry_policy=retry_policy)
