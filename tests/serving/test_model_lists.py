"""GET /v2/models, and the repository index as Triton's client asks for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from flask.testing import FlaskClient
from tritonclient.http import InferenceServerClient

from isthmus.serving import create_router_app
from support.bundles import Published, photos_model, publish, publish_photos, ready, router_settings, served
from support.bundles import photos as photos
from support.routers import local_router, oip_json

UNLOADED = {"state": "UNAVAILABLE", "reason": "the first request loads it"}


@pytest.fixture
def two_versions(tmp_path: Path) -> Published:
    publish_photos(tmp_path / "first")
    return publish_photos(tmp_path / "second", seed=1, registry=tmp_path / "first" / "registry")


def index(client: FlaskClient, **body: bool) -> list[dict[str, str]]:
    answer = client.post("/v2/repository/index", json=body)
    assert answer.status_code == 200
    found: list[dict[str, str]] = answer.json
    return found


def test_models_have_versions_aliases_and_the_routes_that_are_known(two_versions: Published, tmp_path: Path) -> None:
    client = local_router(two_versions, tmp_path)
    assert client.get("/v2/models").json == {
        "models": [
            {
                "name": "photos",
                "versions": ["1", "2"],
                "aliases": {"prod": "1"},
                "loaded": [{"version": "1", "segments": ["..6", "6.."]}],
                "default": True,
            }
        ]
    }


def test_a_version_is_ready_in_the_index_once_it_was_asked_for(two_versions: Published, tmp_path: Path) -> None:
    client = local_router(two_versions, tmp_path)
    first, second = ({"name": "photos", "version": version} for version in "12")
    assert index(client) == [first | {"state": "READY"}, second | UNLOADED]
    assert index(client, ready=True) == [first | {"state": "READY"}]
    client.post("/v2/models/photos/versions/2/infer", json=oip_json(two_versions))
    assert index(client, ready=True) == [first | {"state": "READY"}, second | {"state": "READY"}]


def test_tritons_client_reads_the_index(photos: Published, tmp_path: Path) -> None:
    app = create_router_app(router_settings(photos, tmp_path, ("local",)))
    ready(app.test_client())
    with served(app) as url:
        found = InferenceServerClient(url.removeprefix("http://")).get_model_repository_index()
    assert found == [{"name": "photos", "version": "1", "state": "READY"}]


def test_other_models_are_named_only_where_details_are_exposed(photos: Published, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    publish_photos(tmp_path / "own")
    registry = tmp_path / "own" / "registry"
    model = photos_model(tmp_path / "other" / "secret.onnx")
    publish(tmp_path / "other", model, photos.inputs, registry=registry)
    own = publish_photos(tmp_path / "own", registry=registry)
    shown, told = (
        local_router(own, tmp_path / str(exposed), expose_details=exposed).get("/v2/models").json["models"]
        for exposed in (True, False)
    )
    assert [m["name"] for m in shown] == ["photos", "secret"]
    assert [m["name"] for m in told] == ["photos"]


@pytest.mark.parametrize("body", [b"[]", b"{", b'{"ready": 1}', b"[" * 100_000])
def test_a_malformed_index_request_is_refused(photos: Published, tmp_path: Path, body: bytes) -> None:
    answer = local_router(photos, tmp_path).post("/v2/repository/index", data=body)
    assert (answer.status_code, answer.json["type"]) == (400, "RequestMalformed")
