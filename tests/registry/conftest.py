"""What tests of the registry share: a bundle, and a registry over a folder and over S3."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.registry import BlobStore, FolderStore, Registry
from support.fake_bundles import Fake, make_bundle
from support.s3_server import PATIENCE, store_at, unique_prefix


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    if request.param == "folder":
        return FolderStore(tmp_path / "registry")
    return store_at(request.getfixturevalue("moto_s3").endpoint, unique_prefix())


@pytest.fixture
def registry(store: BlobStore) -> Registry:
    return Registry(store, PATIENCE)


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    return make_bundle(tmp_path / "fake")
