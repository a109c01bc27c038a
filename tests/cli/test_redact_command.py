"""`isthmus redact`: the version that it publishes, what it keeps of the version before, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from isthmus.artifacts.plan import Coding
from isthmus_tools.cli import app
from isthmus_tools.planner.publishing import publish_plan
from support.bundles import POSTPROCESS, PREPROCESS, Published, photos_model, publish_photos
from support.face_detectors import fixed_detector
from support.plans import candidate, plan_for


@pytest.fixture
def photos(tmp_path: Path) -> Published:
    published = publish_photos(tmp_path)
    published.registry.move_alias("photos", "prod", "1")
    return published


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """A model of which every new version is refused."""
    return publish_photos(tmp_path_factory.mktemp("untouched"))


def redact(published: Published, *arguments: str) -> Any:
    command = ["redact", "photos", *arguments, "--registry", str(published.folder), "--json"]
    return CliRunner().invoke(app, command)


def refused(published: Published, *arguments: str) -> Any:
    result = redact(published, *arguments)
    assert result.exit_code == 1, result.stdout
    return json.loads(result.stderr)


def test_faces_and_regions_are_a_version_with_the_detector_among_its_blobs(photos: Published) -> None:
    result = redact(photos, "--faces", "--side", "320", "--region", "0,0.9,1,0.1")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert (document["version"], document["alias_moved"]) == ("2", True)
    assert document["redaction"] == "blurs faces (score 0.3 and more) and fills 0,0.9,1,0.1 of photos"
    bundle = photos.registry.resolve("photos:prod").bundle
    assert bundle.redaction is not None
    assert bundle.redaction.faces is not None
    assert bundle.redaction.faces.detector.digest in bundle.blobs()
    assert len(photos.registry.blob(bundle.redaction.faces.detector)) == bundle.redaction.faces.detector.size
    shown = CliRunner().invoke(app, ["show", "photos", "--registry", str(photos.folder)])
    assert document["redaction"] in shown.stdout
    again = redact(photos, "--remove")
    assert json.loads(again.stdout)["redaction"] == "redacts nothing"
    # Content decides the number: without redaction it is the first version again.
    assert json.loads(again.stdout)["version"] == "1"


def test_a_plan_stays_in_force(photos: Published) -> None:
    chosen = candidate("cloud-photo", "cloud", input="photo", codecs={"x": Coding("photo/1")})
    publish_plan(photos.registry, photos.bundle, {}, plan_for(photos.bundle, chosen), alias="prod")
    document = json.loads(redact(photos, "--region", "0,0,0.5,0.5").stdout)
    assert (document["plan"], document["plan_dropped"]) == ("cloud-photo", False)


def test_a_new_import_of_the_model_keeps_the_redaction(photos: Published, tmp_path: Path) -> None:
    assert redact(photos, "--region", "0,0,0.5,0.5").exit_code == 0
    for name, spec in (("preprocess", PREPROCESS), ("postprocess", POSTPROCESS | {"labels": None})):
        (tmp_path / f"{name}.json").write_text(json.dumps(spec))
    model = photos_model(tmp_path / "again.onnx", seed=1)
    command = ["import", str(model), "--name", "photos", "--registry", str(photos.folder)]
    processing = [f"--{name}={tmp_path / name}.json" for name in ("preprocess", "postprocess")]
    result = CliRunner().invoke(app, [*command, *processing])
    assert result.exit_code == 0, result.stderr
    assert "redacts as the version before: fills 0,0,0.5,0.5 of photos" in " ".join(result.stdout.split())
    served = photos.registry.resolve("photos:prod")
    assert served.version == "3"
    assert served.bundle.redaction == photos.registry.resolve("photos:2").bundle.redaction
    assert json.loads(redact(photos, "--remove").stdout)["redaction"] == "redacts nothing"
    assert photos.registry.resolve("photos:prod").bundle.redaction is None
    # A model of tensors has nothing that a region could be filled in.
    assert redact(photos, "--region", "0,0,0.5,0.5").exit_code == 0
    assert CliRunner().invoke(app, command).exit_code == 0
    assert photos.registry.resolve("photos:prod").bundle.redaction is None


def test_a_detector_of_ones_own_is_taken(photos: Published, tmp_path: Path) -> None:
    path = tmp_path / "mine.onnx"
    path.write_bytes(fixed_detector([[0, 0, 9, 9]], [1.0]))
    assert redact(photos, "--detector", str(path), "--threshold", "1").exit_code == 0
    path.write_bytes(b"no graph")
    assert "cannot be loaded" in refused(photos, "--detector", str(path))["error"]


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ([], "RequestMalformed", "name what to redact"),
        (["--remove", "--faces"], "RequestMalformed", "--remove alone"),
        (["--patterns", "email"], "RequestMalformed", "takes no texts"),
        (["--patterns", "names"], "RequestMalformed", "no pattern 'names'"),
        (["--pattern", "own=(?=a)"], "ModelError", "pattern own cannot be used"),
        (["--pattern", "=a"], "RequestMalformed", "NAME=EXPRESSION"),
        (["--pattern", "email=a"], "RequestMalformed", "built-in"),
        (["--region", "10,10,20,20"], "RequestMalformed", "shares of the photo"),
        (["--region", "0.6,0,0.6,1"], "RequestMalformed", "not within the photo"),
        (["--region", "0,0,0,1"], "RequestMalformed", "not within the photo"),
        (["--faces", "--side", "100"], "ModelError", "multiple of 32"),
    ],
)
def test_what_cannot_be_redacted_is_refused(arguments: list[str], kind: str, words: str, untouched: Published) -> None:
    error = refused(untouched, *arguments)
    assert error["type"] == kind
    assert words in error["error"]
    assert len(untouched.registry.versions("photos")) == 1
