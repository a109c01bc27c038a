"""Protected hops: functions with the secret `hop-keys` run nothing for a stranger, and answer the router as before."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path

import pytest
from flask import Flask
from flask.testing import FlaskClient

from isthmus.context import Deadline
from isthmus.errors import HopRejected, SettingsError
from isthmus.pipeline import HttpHop
from isthmus.security.protected_call import SEALED_TYPE, open_protection
from isthmus.serving import create_router_app, create_segment_app
from isthmus.settings import SegmentSettings
from isthmus.wire import frame as frames
from isthmus.wire.frame import Frame
from support.bundles import Published, framed, metrics, photo, ready, router_settings, segment_settings, served
from support.bundles import photos as photos
from support.hop_servers import context
from support.patience import LONG_S
from support.routers import before, expected_classes


def new_key(name: str) -> str:
    return f"{name}:{base64.b64encode(os.urandom(32)).decode()}"


def secrets_in(folder: Path, keys: str) -> dict[str, str]:
    """Settings of a function whose secret is `keys`."""
    folder.mkdir(exist_ok=True)
    (folder / "hop-keys").write_text(keys)
    return {"secrets_dir": str(folder)}


def hop_to(url: str, settings: SegmentSettings | None) -> HttpHop:
    """A hop as of a router with these settings; without any it protects nothing."""
    protection = open_protection(settings) if settings is not None else None
    return HttpHop(url, attempts=1, connect_timeout_s=LONG_S, max_reply_bytes=2**20, protection=protection)


class Protected:
    """A router before a head and a tail that share a key; bodies as they came over the sockets."""

    def __init__(self, photos: Published, folder: Path, stack: ExitStack, **changes: str) -> None:
        self.keys = secrets_in(folder / "secrets", new_key("k1")) | changes
        self.bodies: list[bytes] = []
        apps = [create_segment_app(segment_settings(photos, folder / name, **self.keys)) for name in ("head", "tail")]
        for app in apps:
            before(app, self._note)
            stack.callback(app.extensions["isthmus"].close)
        self.head, self.tail = (stack.enter_context(served(app)) for app in apps)
        ready(apps[1].test_client())
        self.router: Flask = create_router_app(
            router_settings(photos, folder / "router", (self.head, self.tail), **self.keys)
        )
        stack.callback(self.router.extensions["isthmus"].close)
        self.client: FlaskClient = ready(self.router.test_client())
        self.settings = segment_settings(photos, folder / "unused", **self.keys)

    def _note(self, environ: dict[str, object]) -> None:
        stream = environ["wsgi.input"]
        body = stream.read(int(str(environ.get("CONTENT_LENGTH") or 0)))  # type: ignore[attr-defined]
        self.bodies.append(body)
        environ["wsgi.input"] = BytesIO(body)


@pytest.fixture(params=["sealed", "signed"])
def protected(request: pytest.FixtureRequest, photos: Published, tmp_path: Path) -> Iterator[Protected]:
    with ExitStack() as stack:
        yield Protected(photos, tmp_path, stack, hop_security=request.param)


def test_a_photo_is_classified_over_protected_hops(protected: Protected, photos: Published) -> None:
    data = photo()
    answer = protected.client.post("/", data=data, content_type="image/png")
    assert answer.status_code == 200
    assert [c["index"] for c in answer.json["classes"]] == [c["index"] for c in expected_classes(photos, data)]
    calls = [body for body in protected.bodies if body]
    readable = [body.startswith(frames.MAGIC) for body in calls if len(body) > 300]
    assert readable
    assert all(each == (protected.keys["hop_security"] == "signed") for each in readable)


@pytest.fixture(scope="module", params=["sealed", "signed"])
def tail(
    request: pytest.FixtureRequest, photos: Published, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FlaskClient]:
    """A function with a key that no router calls."""
    folder = tmp_path_factory.mktemp("tail")
    keys = secrets_in(folder / "secrets", new_key("k1"))
    app = create_segment_app(segment_settings(photos, folder / "cache", **keys, hop_security=request.param))
    yield ready(app.test_client())
    app.extensions["isthmus"].close()


@pytest.mark.parametrize("content_type", [frames.CONTENT_TYPE, SEALED_TYPE, ""])
@pytest.mark.parametrize("path", ["/", "/load", "/sessions/end"])
def test_a_stranger_is_refused_and_nothing_runs(
    tail: FlaskClient, photos: Published, content_type: str, path: str
) -> None:
    answer = tail.post(path, data=framed(photos), content_type=content_type)
    assert (answer.status_code, answer.json["type"]) == (401, "CallerUnknown")
    loaded = {value for (name, _), value in metrics(tail).items() if name == "isthmus_loaded_segments"}
    assert loaded == {0}


def test_segments_are_loaded_ahead_over_protected_hops(protected: Protected, photos: Published) -> None:
    hop = hop_to(protected.tail, protected.settings)
    while not hop.load(photos.digest, str(photos.bundle.segment_list[0].id), Deadline.after(LONG_S)):
        pass
    hop.close()


def test_a_router_without_keys_is_told_what_to_do(protected: Protected, photos: Published) -> None:
    hop = hop_to(protected.tail, None)
    with pytest.raises(HopRejected) as caught:
        hop.call(Frame(photos.inputs, photos.digest, "..", "r"), context())
    assert caught.value.facts["status"] == 401
    assert "hop-keys" in caught.value.hint
    assert "hop-keys" in str(caught.value.facts["error"])
    hop.close()


def test_a_function_without_keys_tells_a_router_that_seals(photos: Published, tmp_path: Path) -> None:
    app = create_segment_app(segment_settings(photos, tmp_path / "cache"))
    settings = segment_settings(photos, tmp_path, **secrets_in(tmp_path / "secrets", new_key("k1")))
    with served(app) as url:
        ready(app.test_client())
        hop = hop_to(url, settings)
        with pytest.raises(HopRejected) as caught:
            hop.call(Frame(photos.inputs, photos.digest, "..", "r"), context())
        hop.close()
    app.extensions["isthmus"].close()
    assert "this function has no keys" in caught.value.message


def test_an_answer_of_someone_without_the_key_is_no_answer(protected: Protected, photos: Published) -> None:
    """A function in the place of the tail, which runs anything and seals nothing."""
    stranger = Flask("stranger")
    reply = frames.encode(Frame(photos.inputs, photos.digest, "..", "r"))
    stranger.add_url_rule("/", view_func=lambda: (reply, 200), methods=["POST"])
    with served(stranger) as url:
        hop = hop_to(url, protected.settings)
        with pytest.raises(HopRejected, match=r"is not (sealed|signed)"):
            hop.call(Frame(photos.inputs, photos.digest, "..", "r"), context())
        hop.close()


def test_a_secret_that_is_no_key_stops_the_start(photos: Published, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="hop-keys"):
        create_segment_app(segment_settings(photos, tmp_path, **secrets_in(tmp_path / "secrets", "no key")))
