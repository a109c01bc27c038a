"""Functions over a registry of an encrypted model: each runs what its recipient key reads, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from flask import Flask

from isthmus.errors import SettingsError
from isthmus.security.recipients import new_pair
from isthmus.serving import create_router_app, create_segment_app
from isthmus.settings import RegistrySettings
from isthmus_tools.usecases.encryption import EncryptRequest, encrypt
from support.bundles import (
    Published,
    photo,
    publish_photos,
    ready,
    router_settings,
    segment_settings,
    served,
)
from support.patience import until
from support.routers import assert_classes, expected_classes

NAMES = ("edge", "cloud", "stranger")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """The model for photos, its head for the edge and all of it for the cloud; secrets beside the registry."""
    folder = tmp_path_factory.mktemp("encrypted")
    published = publish_photos(folder)
    for name in NAMES:
        private, public = new_pair()
        (folder / name).mkdir()
        (folder / name / "recipient-key").write_bytes(private)
        (folder / f"{name}.pem").write_bytes(public)
    recipients = [f"{folder}/edge.pem@head", f"{folder}/cloud.pem"]
    encrypt(EncryptRequest(model="photos", recipients=recipients, registry=settings_of(published)))
    return published


def settings_of(model: Published) -> RegistrySettings:
    return RegistrySettings(registry=str(model.folder))


def function(model: Published, secrets: str, cache: Path, stack: ExitStack) -> Flask:
    app = create_segment_app(
        segment_settings(model, cache, secrets_dir=str(model.folder.parent / secrets), expose_details=False)
    )
    stack.callback(app.extensions["isthmus"].close)
    return app


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def test_a_photo_is_classified_by_functions_that_hold_their_keys(
    model: Published, tmp_path: Path, stack: ExitStack
) -> None:
    apps = [function(model, name, tmp_path / name, stack) for name in ("edge", "cloud")]
    urls = [stack.enter_context(served(app)) for app in apps]
    secrets = {"secrets_dir": str(model.folder.parent / "edge")}
    router = create_router_app(router_settings(model, tmp_path / "router", urls, **secrets))
    stack.callback(router.extensions["isthmus"].close)
    answer = ready(router.test_client()).post("/", data=photo(), content_type="image/png")
    assert answer.status_code == 200, answer.json
    assert_classes(answer.json["classes"], expected_classes(model, photo()))
    # A tail with the edge's key: nothing runs, and the response says why.
    tail = stack.enter_context(served(function(model, "edge", tmp_path / "wrong", stack)))
    wrong = create_router_app(router_settings(model, tmp_path / "router", (urls[0], tail), **secrets))
    stack.callback(wrong.extensions["isthmus"].close)
    answer = ready(wrong.test_client()).post("/", data=photo(), content_type="image/png")
    assert (answer.status_code, answer.json["type"]) == (502, "HopRejected")
    assert "encrypted" in str(answer.json)


@pytest.mark.parametrize(
    ("secrets", "segment"), [("edge", "6.."), ("edge", ".."), ("stranger", "..6"), ("none", "..6")]
)
def test_a_function_without_a_grant_answers_403_and_names_segment_and_recipient(
    model: Published, tmp_path: Path, stack: ExitStack, secrets: str, segment: str
) -> None:
    client = ready(function(model, secrets, tmp_path / "cache", stack).test_client())
    asked = {"bundle": model.digest, "segment": segment}
    # 202 while the function looks.
    assert until(lambda: client.post("/load", json=asked).status_code != 202)
    answer = client.post("/load", json=asked)
    assert (answer.status_code, answer.json["type"]) == (403, "NotGranted")
    assert answer.json["facts"]["segment"] == segment
    assert len(answer.json["facts"]["recipient"]) == (0 if secrets == "none" else 32)
    assert "isthmus grant" in answer.json["hint"]
    # On its disk lies the manifest alone: no graph and no weights.
    held = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.parent.name != "locks"]
    assert [path.suffix for path in held if path.stat().st_blocks] == [".json"]


def test_a_recipient_key_that_is_none_stops_the_start(model: Published, tmp_path: Path) -> None:
    (tmp_path / "recipient-key").write_text("no key\nat all\n")
    with pytest.raises(SettingsError, match="no private key") as caught:
        create_segment_app(segment_settings(model, tmp_path / "cache", secrets_dir=str(tmp_path)))
    assert "at all" not in str(caught.value)
