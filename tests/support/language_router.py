"""Routers that run a whole tiny decoder, and OpenAI's client of one behind the template's own server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
from flask.testing import FlaskClient

from isthmus.serving import create_router_app
from isthmus.settings import RouterSettings
from support.bundles import ready
from support.local_stack import http
from support.paths import ROOT
from support.patience import LONG_S, eventually
from support.published_decoders import PublishedDecoder
from support.template_process import served

HANDLER = (ROOT / "functions" / "router" / "handler.py").read_text()


def decoder_router(decoder: PublishedDecoder, cache: Path, **given: Any) -> FlaskClient:
    """A client of a router in this process."""
    settings = {
        "registry": str(decoder.registry),
        "cache_dir": str(cache),
        "model": "tiny",
        "hops": ("local",),
        "threads": 1,
        "log_level": "error",
        "deadline_s": LONG_S,
        "exec_timeout": 0.0,
    }
    return ready(create_router_app(RouterSettings(**settings | given)).test_client())


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
