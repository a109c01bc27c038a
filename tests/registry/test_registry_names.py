"""Names, versions, digests and segments as callers send them: whatever their length and characters, a 404 or a 400."""

from __future__ import annotations

import contextlib
from pathlib import Path
from urllib.parse import quote

import pytest
from flask.testing import FlaskClient
from hypothesis import example, given
from hypothesis import strategies as st

from isthmus.errors import Missing, RegistryError
from isthmus.registry import FolderStore, Registry
from isthmus.serving import create_router_app, create_segment_app
from isthmus.wire import frame as frames
from isthmus.wire.frame import MAX_TEXT_BYTES, Frame
from support.bundles import Published, photo, ready, router_settings, segment_settings
from support.bundles import photos as photos
from support.fake_bundles import make_bundle
from support.moto_server import Moto
from support.s3_server import PATIENCE, store_at, unique_prefix

ODD = [
    *("9" * 255, "9" * 256, "1" * 5000, "0", "00", "01", "-1", "+1", "1.0", "1e3", "\u0661", "\u00b2", "1\n", " 1"),
    *(
        "a" * 63,
        "a" * 64,
        "a" * 300,
        "a" * 5000,
        "a/b",
        "..",
        ".",
        "%",
        "%2e%2e",
        "a\0b",
        "A",
        "\u00e4",
        "\ud7ff",
        "a b",
    ),
]


@pytest.fixture(scope="module", params=["folder", "s3"])
def registry(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    folder = tmp_path_factory.mktemp("names")
    if request.param == "folder":
        store = FolderStore(folder / "registry", PATIENCE)
    else:
        server: Moto = request.getfixturevalue("moto_s3")
        store = store_at(server.endpoint, unique_prefix())  # type: ignore[assignment]
    fake = make_bundle(folder / "fake")
    registry = Registry(store, PATIENCE)
    registry.publish(fake.bundle, fake.files)
    return registry


@pytest.mark.parametrize("text", ODD, ids=lambda text: ascii(text)[:20])
def test_an_odd_version_or_name_is_missing_and_is_not_repeated_at_length(registry: Registry, text: str) -> None:
    for reference in (f"fake:{text}", text, f"{text}:1", f"{text}:{text}"):
        with pytest.raises(Missing) as caught:
            registry.resolve(reference)
        assert len(caught.value.message) < 400
        assert len(caught.value.facts["name"]) <= 81


@given(text=st.text(max_size=300))
@example(text="1" * 300)
def test_any_text_is_a_reference_that_is_found_or_missing(text: str, registry_here: Registry) -> None:
    for reference in (f"fake:{text}", text):
        with contextlib.suppress(Missing):
            registry_here.resolve(reference)
    for ask in (
        lambda: registry_here.move_alias("fake", text, "1"),
        lambda: registry_here.move_alias("fake", "other", text),
        lambda: registry_here.bundle(text),
        lambda: registry_here.aliases(text),
        lambda: registry_here.documents.profile("fake", text, text, text, max_bytes=9),
    ):
        with contextlib.suppress(RegistryError):
            ask()


@pytest.fixture(scope="module")
def registry_here(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    folder = tmp_path_factory.mktemp("any")
    fake = make_bundle(folder / "fake")
    registry = Registry(FolderStore(folder / "registry", PATIENCE), PATIENCE)
    registry.publish(fake.bundle, fake.files)
    return registry


@pytest.fixture(scope="module")
def router(photos: Published, tmp_path_factory: pytest.TempPathFactory) -> FlaskClient:
    settings = router_settings(photos, tmp_path_factory.mktemp("r"), ("local",))
    return ready(create_router_app(settings).test_client())


@pytest.mark.parametrize("text", ODD, ids=lambda text: ascii(text)[:20])
def test_the_router_answers_odd_names_with_404(router: FlaskClient, text: str) -> None:
    quoted = quote(text, safe="")
    for answer in (
        router.post(f"/?model=photos:{quoted}", data=photo()),
        router.post(f"/?model={quoted}", data=photo()),
        router.get(f"/v2/models/photos/versions/{quoted}"),
        router.post(f"/v2/models/photos/versions/{quoted}/infer", data=b"{}"),
        router.get(f"/v2/models/{quoted}/ready"),
    ):
        assert answer.status_code == 404, answer.json
        assert len(answer.data) < 2000


@pytest.mark.parametrize("text", ODD, ids=lambda text: ascii(text)[:20])
def test_a_segment_function_answers_odd_segments_and_bundles_with_404_or_400(
    text: str, photos: Published, tail: FlaskClient
) -> None:
    text = text[: MAX_TEXT_BYTES // 4]
    for bundle, segment, status in ((photos.digest, text, 404), (text, "..", 400), (f"sha256:{text}", "..", 400)):
        body = frames.encode(Frame(photos.inputs, bundle, segment))
        answer = tail.post("/", data=body)
        expected = {".." + photos.digest: 200, "..sha256:" + "a" * 64: 404}.get(segment + bundle, status)
        assert answer.status_code == expected, answer.json


@pytest.fixture(scope="module")
def tail(photos: Published, tmp_path_factory: pytest.TempPathFactory) -> FlaskClient:
    return ready(create_segment_app(segment_settings(photos, tmp_path_factory.mktemp("t"))).test_client())


def test_leading_zeros_make_no_second_name_of_a_version(registry_here: Registry) -> None:
    assert registry_here.resolve("fake:1").version == "1"
    with pytest.raises(Missing, match="no version '01'"):
        registry_here.resolve("fake:01")


def test_numbers_in_the_store_that_no_version_has_are_passed_over(tmp_path: Path) -> None:
    fake = make_bundle(tmp_path / "fake")
    registry = Registry(FolderStore(tmp_path / "r", PATIENCE), PATIENCE)
    registry.publish(fake.bundle, fake.files)
    versions = tmp_path / "r/models/fake/versions"
    for name in ("007", "9" * 200, "x"):
        (versions / name).write_text(fake.digest)
    assert [v.version for v in registry.versions("fake")] == ["1"]
