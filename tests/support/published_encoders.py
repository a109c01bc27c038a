"""A tiny sentence encoder in a registry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from isthmus.artifacts.bundle import Bundle
from isthmus.registry import open_registry
from isthmus.settings import RegistrySettings
from isthmus_tools.graph.encoder.bundler import build_encoder
from isthmus_tools.graph.encoder.folder import read_encoder
from support.encoders import save_encoder


@dataclass
class PublishedEncoder:
    """An encoder's folder, registry and published bundle, cut after one of three layers."""

    folder: Path
    registry: Path
    bundle: Bundle


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> PublishedEncoder:
    root = tmp_path_factory.mktemp("encoder")
    source = read_encoder(str(save_encoder(root / "bert")))
    assert source is not None
    bundle, files = build_encoder(source, "sentences", root / "bundle", cuts=["1"])
    (root / "registry").mkdir()
    registry = open_registry(RegistrySettings(registry=str(root / "registry")))
    registry.publish(bundle, files, alias="prod")
    return PublishedEncoder(root / "bert", root / "registry", bundle)
