"""From import to service: each command says what serves now and what comes next; infer and up say what they serve."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from isthmus_tools.cli.progress_line import time_left
from isthmus_tools.cli.up import Greeting
from isthmus_tools.engine.telemetry import Event
from isthmus_tools.planner.publishing import publish_plan
from isthmus_tools.usecases.versions import next_command
from support.bundles import Published, photo, photos_model, publish_photos
from support.cli import document, isthmus
from support.plans import candidate, plan_for


@pytest.fixture
def photos(tmp_path: Path) -> Published:
    return publish_photos(tmp_path)


@pytest.fixture
def album(tmp_path: Path) -> Path:
    folder = tmp_path / "album"
    folder.mkdir()
    for seed in range(3):
        (folder / f"{seed}.png").write_bytes(photo((12, 10), seed))
    return folder


def test_import_says_what_serves_and_what_comes_next(tmp_path: Path) -> None:
    model = photos_model(tmp_path / "photos.onnx")
    made = document(isthmus("import", model, "--registry", tmp_path / "registry", "--json"))
    assert (made["serving"], made["next"]) == (
        "1",
        f"isthmus calibrate photos --data FOLDER --registry {tmp_path / 'registry'}",
    )
    assert "cut at 2, the narrowest" in isthmus("import", model, "--registry", tmp_path / "other").stdout
    again = isthmus("import", model, "--if-absent", "--registry", tmp_path / "registry")
    assert "requests for photos reach version 1" in again.stdout
    assert "next: isthmus calibrate photos --data FOLDER" in again.stdout


def test_a_cut_that_does_not_serve_names_its_version_in_the_next_command(photos: Published) -> None:
    made = document(isthmus("cut", "photos", "--cut", "2", "--alias", "canary", "--registry", photos.folder, "--json"))
    assert (made["version"], made["serving"]) == ("2", "1")
    assert made["next"] == f"isthmus calibrate photos:2 --data FOLDER --registry {photos.folder}"


def test_a_planned_version_that_does_not_serve_is_followed_by_the_alias(photos: Published) -> None:
    publish_plan(photos.registry, photos.bundle, {}, plan_for(photos.bundle, candidate()))
    assert document(isthmus("show", "photos:2", "--registry", photos.folder, "--json"))["next"] == (
        f"isthmus promote photos:2 --as prod --registry {photos.folder}"
    )


def test_the_next_command_names_a_registry_only_where_a_default_would_miss_it(
    photos: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISTHMUS_REGISTRY", str(photos.folder))
    assert document(isthmus("show", "photos", "--json"))["next"] == "isthmus calibrate photos --data FOLDER"
    monkeypatch.delenv("ISTHMUS_REGISTRY")
    monkeypatch.chdir(photos.folder.parent)
    (photos.folder.parent / ".isthmus").mkdir()
    photos.folder.rename(photos.folder.parent / ".isthmus" / "registry")
    assert document(isthmus("show", "photos", "--json"))["next"] == "isthmus calibrate photos --data FOLDER"


def test_up_fails_at_once_where_the_model_is_not_there(photos: Published) -> None:
    result = isthmus("up", "--model", "cat", "--registry", photos.folder)
    assert result.exit_code == 1
    assert "there is no model 'cat'" in result.stderr
    assert "there is: photos" in result.stderr
    assert "isthmus import MODEL.onnx --name NAME" in result.stderr


def test_infer_takes_folders_and_says_plan_and_bytes(photos: Published, album: Path) -> None:
    common = ["infer", album, "--local", "--model", "photos", "--registry", photos.folder]
    answers = document(isthmus(*common, "--json"))
    assert [Path(a["photo"]).name for a in answers] == ["0.png", "1.png", "2.png"]
    assert {(a["plan"], a["link_bytes"]) for a in answers} == {("", 0)}
    text = isthmus(*common).stdout
    assert "no plan; nothing sent over the link" in text
    assert "3 of 3 photos classified" in text


def test_infer_tells_an_error_per_file_and_classifies_the_others(photos: Published, album: Path) -> None:
    (album / "1.png").write_bytes(b"no image")
    common = ["infer", album, album / "none.png", "--local", "--model", "photos", "--registry", photos.folder]
    result = isthmus(*common, "--json")
    assert result.exit_code == 1
    answers = json.loads(result.stdout)
    assert ["error" in a for a in answers] == [False, True, False, True]
    assert answers[1]["type"] == "MediaUnsupported"
    text = isthmus(*common)
    assert text.exit_code == 1
    assert "2 of 4 photos classified" in text.stdout
    assert "1.png: " in text.stderr
    assert text.stderr.splitlines()[-1] == "error: 2 of 4 photos failed: 1 MediaUnsupported, 1 RequestMalformed"


def test_an_error_that_every_photo_meets_is_told_once(photos: Published, album: Path) -> None:
    bare = replace(photos.bundle, name="bare", postprocess=None)
    photos.registry.publish(bare, {})
    result = isthmus("infer", album, "--local", "--model", "bare", "--registry", photos.folder)
    assert result.exit_code == 1
    assert result.stderr.count("declares no pre- and post-processing") == 1


@pytest.mark.parametrize(
    ("done", "total", "elapsed_s", "text"),
    [
        (0, 0, 50, ""),
        (1, 1000, 50, ""),
        (500, 1000, 1, ""),
        (500, 1000, 240, "about 4 min left"),
        (900, 1000, 90, "about 10 s left"),
        (1000, 1000, 90, "about 1 s left"),
    ],
)
def test_the_time_left_is_told_once_it_can_be_estimated(done: int, total: int, elapsed_s: float, text: str) -> None:
    assert time_left(done, total, elapsed_s) == text


def test_up_says_how_to_send_a_request_once_all_replicas_are_ready(capsys: pytest.CaptureFixture[str]) -> None:
    greeting = Greeting("digits")
    events = [Event("listening", "http://127.0.0.1:8094"), Event("starting", "", "router", "router-1")]
    events += [Event("starting", "", "cloud-tail", "cloud-tail-1"), Event("ready", "", "router", "router-1")]
    for event in events:
        greeting.after(event)
    assert capsys.readouterr().err == ""
    greeting.after(Event("ready", "", "cloud-tail", "cloud-tail-1"))
    said = " ".join(capsys.readouterr().err.split())
    assert "isthmus infer PHOTO --model digits --url http://127.0.0.1:8094/function/router" in said
    # A replica that starts later is no news.
    greeting.after(Event("starting", "", "router", "router-2"))
    greeting.after(Event("ready", "", "router", "router-2"))
    assert capsys.readouterr().err == ""


def test_up_says_how_to_ask_a_language_model(capsys: pytest.CaptureFixture[str]) -> None:
    greeting = Greeting("smollm2", "http://127.0.0.1:8094", {"router-1"}, generates=True)
    greeting.after(Event("ready", "", "router", "router-1"))
    said = " ".join(capsys.readouterr().err.split())
    assert "base_url=http://127.0.0.1:8094/function/router/v1" in said
    assert "PHOTO" not in said


def test_a_model_from_a_package_is_calibrated_with_photos_of_packages(photos: Published) -> None:
    ready = replace(photos.bundle, source=photos.bundle.source | {"packages": ["some"]})
    version = photos.registry.publish(ready, {})
    assert next_command(photos.registry, f"photos:{version.version}").endswith("--data photos")


def test_infer_shows_as_many_classes_as_the_model_says_unless_asked_for_others(photos: Published, album: Path) -> None:
    common = ["infer", album / "0.png", "--local", "--registry", photos.folder, "--json"]
    assert photos.bundle.postprocess is not None
    own, asked = document(isthmus(*common))[0], document(isthmus(*common, "--top-k", 1))[0]
    assert len(own["classes"]) == photos.bundle.postprocess["top_k"]
    assert len(asked["classes"]) == 1
