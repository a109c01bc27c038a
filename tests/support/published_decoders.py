"""Tiny decoders in a registry, their hops, and routes along their segments."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

from isthmus.context import Context
from isthmus.errors import HopError
from isthmus.generation.policy import FixedRoute
from isthmus.pipeline import Hop, HttpHop, LocalHop, LoopbackHop, Route, plan_route
from isthmus.registry import Resolved, open_cache, open_registry
from isthmus.retries import RetryBudget
from isthmus.runtime.session_store import SessionStore, open_store
from isthmus.settings import SegmentSettings
from isthmus_tools.graph.decoder.bundler import build_decoder
from isthmus_tools.graph.decoder.transformers_folder import read_folder
from isthmus_tools.usecases.language_sources import language_model
from support.decoders import save_decoder, tiny_config


@dataclass
class PublishedDecoder:
    """A decoder's folder and registry, and its published version."""

    folder: Path
    registry: Path
    model: Resolved

    def settings(self, cache: Path, **changes: int | float | str) -> SegmentSettings:
        """Settings of a function that runs its segments."""
        return SegmentSettings(registry=str(self.registry), cache_dir=str(cache), threads=1, **changes)  # type: ignore[arg-type]

    def store(self, cache: Path, **changes: int | float | str) -> SessionStore:
        """A store of its segments."""
        settings = self.settings(cache, **changes)
        return open_store(open_cache(settings, open_registry(settings)), settings)

    def route(self, cuts: Sequence[str], *hops: Hop) -> Route:
        """The route along `cuts` on these hops."""
        return plan_route(self.model.digest, self.model.bundle, hops, cuts)


CHAT_TEMPLATE = "{% for m in messages %}<|end|>{{ m.role }}: {{ m.content }}{% endfor %}<|end|>assistant:"


@pytest.fixture(scope="session")
def tiny_decoder(tmp_path_factory: pytest.TempPathFactory) -> PublishedDecoder:
    root = tmp_path_factory.mktemp("decoder")
    folder = save_decoder(root / "llama", tiny_config("llama"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    bundle, files = build_decoder(read_folder(folder), "tiny", root / "bundle", cuts=["1", "1/2", "2"])
    (root / "registry").mkdir()
    registry = open_registry(SegmentSettings(registry=str(root / "registry")))
    registry.publish(bundle, files, alias="prod")
    return PublishedDecoder(folder, root / "registry", registry.resolve("tiny"))


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> PublishedDecoder:
    """SmolLM2-135M-Instruct, cut after 10 layers and after 10 and 20; ten seconds, once for all processes of tests."""
    decoder = language_model("llm:smollm2")
    assert decoder is not None
    # xdist gives each process a folder within the one of the run.
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smollm2"
    (root / "registry").mkdir(parents=True, exist_ok=True)
    registry = open_registry(SegmentSettings(registry=str(root / "registry")))
    with FileLock(root / "lock"):
        if "smollm2" not in registry.models():
            bundle, files = build_decoder(decoder, "smollm2", root / "bundle", cuts=["10", "10/20"])
            registry.publish(bundle, files, alias="prod")
            shutil.rmtree(root / "bundle")
    return PublishedDecoder(Path(decoder.source), root / "registry", registry.resolve("smollm2"))


@pytest.fixture
def store(tiny_decoder: PublishedDecoder, tmp_path: Path) -> Iterator[SessionStore]:
    made = tiny_decoder.store(tmp_path / "cache")
    yield made
    made.store.close()


def http_hop(url: str, attempts: int = 4) -> HttpHop:
    """A hop to a function."""
    return HttpHop(url, attempts=attempts, connect_timeout_s=2, max_reply_bytes=2**24)


AMPLE = RetryBudget(burst=1000, per_second=1.0, per_success=1.0)
"""For more recoveries than a router allows at a time."""


class Instead(FixedRoute):
    """Another route after each failure."""

    def __init__(self, *routes: Route) -> None:
        self._routes = iter(routes)

    def instead(self, error: HopError, context: Context) -> Route | None:
        return next(self._routes, None)


def chained(store: SessionStore) -> tuple[Hop, Hop]:
    """A head in this process, and a tail behind frames."""
    return LocalHop(store), LoopbackHop(LocalHop(store))
