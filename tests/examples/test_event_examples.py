"""The examples of events in and results out, with real brokers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support.example_scripts import output, started, without
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
