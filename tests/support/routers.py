"""A router before a head and a tail, what it is sent, and what its answers should be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, Response
from flask.testing import FlaskClient
from werkzeug.datastructures import EnvironHeaders

from isthmus.processing.classify import classify
from isthmus.serving import create_router_app, create_segment_app
from isthmus.settings import RouterSettings, SegmentSettings
from support.bundles import LABELS, TOLERANCE, Published, photo_array, ready, router_settings, segment_settings, served
from support.ports import free_port
from support.segments import run_whole

INFER = "/v2/models/photos/infer"


def before(app: Flask, act: Callable[[dict[str, Any]], Response | None]) -> None:
    """Let `act` see each request first, but for probes and loads ahead; what it returns is the answer."""
    inner = app.wsgi_app

    def enter(environ: dict[str, Any], start_response: Any) -> Any:
        if environ["PATH_INFO"] in ("/load", "/ready"):
            return inner(environ, start_response)
        answer = act(environ)
        return inner(environ, start_response) if answer is None else answer(environ, start_response)

    app.wsgi_app = enter  # type: ignore[method-assign]


def photo_form(*photos: bytes) -> dict[str, Any]:
    """A form of photos as arguments of a test client's `post`.

    werkzeug's own boundaries have now and then more than the 70 characters of RFC 2046, and are refused.
    """
    name = b"image" if len(photos) == 1 else b"images"
    head = b'--page\r\nContent-Disposition: form-data; name="%s"; filename="photo.png"\r\n\r\n' % name
    body = b"".join(head + photo + b"\r\n" for photo in photos)
    return {"data": body + b"--page--\r\n", "content_type": "multipart/form-data; boundary=page"}


@dataclass
class Chain:
    """A router before a head and a tail, each on a socket of its own; what the two were sent."""

    router: Flask
    client: FlaskClient
    hops: tuple[str, str]
    seen: list[dict[str, str]]


@pytest.fixture(scope="module")
def chain(photos: Published, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    seen: list[dict[str, str]] = []
    apps = []
    for name in ("head", "tail"):
        app = create_segment_app(segment_settings(photos, tmp_path_factory.mktemp(name)))
        before(app, lambda environ: seen.append(dict(EnvironHeaders(environ))))
        apps.append(app)
    with served(apps[0]) as head, served(apps[1]) as tail:
        router = create_router_app(router_settings(photos, tmp_path_factory.mktemp("router"), (head, tail)))
        yield Chain(router, ready(router.test_client()), (head, tail), seen)


@pytest.fixture
def client(chain: Chain) -> FlaskClient:
    chain.seen.clear()
    return chain.client


@pytest.fixture(scope="module")
def cut_off(photos: Published, tmp_path_factory: pytest.TempPathFactory) -> FlaskClient:
    """A router with a head of its own, and a tail that nobody reaches."""
    hops = ("local", f"http://127.0.0.1:{free_port()}")
    settings = router_settings(photos, tmp_path_factory.mktemp("cut"), hops, codec="int8/1", hop_attempts=1)
    return ready(create_router_app(settings).test_client())


def local_router(published: Published, cache: Path, **given: Any) -> FlaskClient:
    return ready(create_router_app(router_settings(published, cache, ("local",), **given)).test_client())


@contextmanager
def served_functions(*settings: SegmentSettings) -> Iterator[list[str]]:
    """Segment functions on real sockets; their URLs."""
    with ExitStack() as stack:
        urls = []
        for each in settings:
            app = create_segment_app(each)
            stack.callback(app.extensions["isthmus"].close)
            urls.append(stack.enter_context(served(app)))
        yield urls


@contextmanager
def served_router(settings: RouterSettings) -> Iterator[str]:
    """A router on a real socket, once it is ready; its URL."""
    app = create_router_app(settings)
    ready(app.test_client())
    with served(app) as url:
        yield url


def expected_classes(published: Published, data: bytes, top_k: int = 3) -> Any:
    logits = run_whole(published.onnx, [{"x": photo_array(data)}])[0]["logits"]
    after: Any = published.bundle.postprocess
    return classify(logits, after, tuple(LABELS), top_k)[0]


def assert_classes(found: Any, expected: Any) -> None:
    assert [(c["label"], c["index"]) for c in found] == [(c["label"], c["index"]) for c in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["probability"] == pytest.approx(other["probability"], abs=TOLERANCE)


def oip_json(published: Published, **changes: Any) -> dict[str, Any]:
    x = published.inputs["x"]
    tensor = {"name": "x", "shape": list(x.shape), "datatype": "FP32", "data": x.ravel().tolist()} | changes
    return {"id": "me", "inputs": [tensor]}
