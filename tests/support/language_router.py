"""A router of a tiny decoder behind the template's own server, and OpenAI's client of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai

from support.local_stack import http
from support.paths import ROOT
from support.patience import LONG_S, eventually
from support.published_decoders import PublishedDecoder
from support.template_process import served

HANDLER = (ROOT / "functions" / "router" / "handler.py").read_text()


@contextmanager
def language_router(decoder: PublishedDecoder, home: Path, *, handler: str = HANDLER, **settings: str) -> Iterator[str]:
    """The URL of a router that runs the whole decoder in its own process."""
    environment = {
        "registry": str(decoder.registry),
        "cache_dir": str(home / "cache"),
        "model": "tiny",
        "hops": "local",
        "threads": "1",
        "log_level": "error",
        "deadline_s": str(LONG_S),
        "exec_timeout": "0",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    with served(handler, home / "app", **environment | settings) as port:
        url = f"http://127.0.0.1:{port}"
        eventually(lambda: http("GET", f"{url}/ready").status == 200)
        yield url


@contextmanager
def openai_client(url: str) -> Iterator[openai.OpenAI]:
    """A client that tries once."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=LONG_S) as client:
        yield client
