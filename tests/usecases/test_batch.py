"""Photos to a file of JSON lines: each once, also after a run that was killed, and an error in its photo's place."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import stamina

from isthmus.client import Client
from isthmus.errors import HopUnavailable, Overloaded, RequestMalformed, RequestTooLarge
from isthmus_tools.usecases import batch
from isthmus_tools.usecases.batch import BatchRequest, BatchResult, classify_photos, remote_predictor
from support.bundles import Published, photo, router_settings
from support.bundles import photos as photos
from support.cli import isthmus
from support.routers import expected_classes, served_router


class Recorder:
    """Predicts the photo's bytes, and holds the requests."""

    def __init__(self, version: str = "1") -> None:
        self.version = version
        self.requests: list[list[bytes]] = []

    def __call__(self, data: Sequence[bytes]) -> list[dict[str, Any]]:
        self.requests.append(list(data))
        return [{"model_name": "m", "model_version": self.version, "classes": [d.decode()]} for d in data]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "photos"
    path.mkdir()
    for i in range(20):
        (path / f"{i:02}.jpg").write_bytes(str(i).encode())
    (path / ".hidden").write_bytes(b"hidden")
    return path


def run(folder: Path, predict: batch.Predict, *more: Path) -> BatchResult:
    return classify_photos(BatchRequest(photos=[folder, *more], output=folder.parent / "out.jsonl", predict=predict))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder.parent / "out.jsonl").read_text().splitlines()]


def test_each_photo_gets_a_line_in_requests_of_a_bounded_number(folder: Path) -> None:
    recorder = Recorder()
    assert run(folder, recorder) == BatchResult(20, 0, 0)
    assert [(line["photo"], line["classes"]) for line in lines(folder)] == [
        (str(folder / f"{i:02}.jpg"), [str(i)]) for i in range(20)
    ]
    assert [len(request) for request in recorder.requests] == [8, 8, 4]


def test_a_request_has_a_bounded_number_of_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "MAX_BYTES", 5)
    recorder = Recorder()
    run(folder, recorder)
    assert max(sum(map(len, request)) for request in recorder.requests) <= 5
    assert [data for request in recorder.requests for data in request] == [str(i).encode() for i in range(20)]


def test_a_run_continues_where_one_was_killed(folder: Path) -> None:
    run(folder, Recorder())
    whole = (folder.parent / "out.jsonl").read_bytes()
    # A kill may end the file at any byte.
    for size in (0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 1, len(whole)):
        (folder.parent / "out.jsonl").write_bytes(whole[:size])
        recorder = Recorder()
        result = run(folder, recorder)
        assert (folder.parent / "out.jsonl").read_bytes() == whole
        assert result.skipped == whole[:size].count(b"\n")
        assert sum(map(len, recorder.requests)) == 20 - result.skipped


def test_what_was_written_before_an_error_stays(folder: Path) -> None:
    recorder = Recorder()

    def fails(data: Sequence[bytes]) -> list[dict[str, Any]]:
        if recorder.requests:
            raise HopUnavailable("gone", hop="")
        return recorder(data)

    with pytest.raises(HopUnavailable):
        run(folder, fails)
    assert len(lines(folder)) == 8
    assert run(folder, Recorder()) == BatchResult(12, 0, 8)


def test_a_photo_too_large_for_a_request_fails_alone(folder: Path) -> None:
    recorder = Recorder()

    def bounded(data: Sequence[bytes]) -> list[dict[str, Any]]:
        if b"3" in data:
            raise RequestTooLarge("too large", limit=0)
        return recorder(data)

    assert run(folder, bounded) == BatchResult(19, 1, 0, {"RequestTooLarge": 1})
    assert [line["photo"] for line in lines(folder) if "error" in line] == [str(folder / "03.jpg")]
    assert run(folder, recorder) == BatchResult(0, 0, 20, {"RequestTooLarge": 1})


def test_a_file_that_cannot_be_read_has_its_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path) -> bytes:
        if path.name == "03.jpg":
            raise RequestMalformed("03.jpg cannot be read: Permission denied")
        return path.read_bytes()

    monkeypatch.setattr(batch, "read_photo", read)
    assert run(folder, Recorder(), folder / "04.jpg") == BatchResult(19, 1, 0, {"RequestMalformed": 1})
    assert [line["error"] for line in lines(folder) if "error" in line] == ["03.jpg cannot be read: Permission denied"]
    with pytest.raises(RequestMalformed, match="no such file"):
        run(folder / "none.jpg", Recorder())


def test_results_of_two_versions_do_not_mix(folder: Path) -> None:
    run(folder, Recorder())
    (folder / "new.jpg").write_bytes(b"new")
    with pytest.raises(RequestMalformed, match="results of m:1 and m:2"):
        run(folder, Recorder("2"))
    assert len(lines(folder)) == 20


def test_a_file_name_of_any_bytes_has_a_line_that_later_runs_know(folder: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xe9.jpg"))
    odd.write_bytes(b"odd")
    assert run(folder, Recorder()) == BatchResult(21, 0, 0)
    assert run(folder, Recorder()) == BatchResult(0, 0, 21)
    assert lines(folder)[-1]["photo"] == str(odd)


def test_a_line_without_a_version_is_of_another_model(folder: Path) -> None:
    (folder.parent / "out.jsonl").write_text('{"photo": "x", "model_name": "m"}\n')
    with pytest.raises(RequestMalformed, match="results of m:1 and m:None"):
        run(folder, Recorder())


def test_another_file_is_never_overwritten(folder: Path) -> None:
    output = folder.parent / "out.jsonl"
    output.write_text("my notes\n")
    with pytest.raises(RequestMalformed, match="line 1 is no result"):
        run(folder, Recorder())
    assert output.read_text() == "my notes\n"


def test_two_runs_do_not_write_to_one_file(folder: Path) -> None:
    with (folder.parent / "out.jsonl").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(RequestMalformed, match="another run writes"):
            run(folder, Recorder())


def test_a_busy_router_is_asked_again_and_a_missing_one_is_not() -> None:
    answers: list[Any] = [Overloaded("busy"), [{"classes": []}], HopUnavailable("gone", hop=""), [{"classes": []}]]

    class Caller(Client):
        def photos(self, *args: Any, **options: Any) -> list[dict[str, Any]]:
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer  # type: ignore[no-any-return]

    predict = remote_predictor(Caller("http://127.0.0.1:9"), "", 3)
    with stamina.set_testing(True, attempts=3):  # without waits
        assert predict([b""]) == predict([b""]) == [{"classes": []}]
    answers.append(HopUnavailable("never there", hop=""))
    with pytest.raises(HopUnavailable):
        remote_predictor(Caller("http://127.0.0.1:9"), "", 3)([b""])


@pytest.mark.parametrize("local", [True, False])
def test_the_command_writes_a_line_a_photo_and_skips_it_later(local: bool, photos: Published, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(3):
        (folder / f"{seed}.png").write_bytes(photo(seed=seed))
    (folder / "notes.txt").write_text("no photo")
    output = tmp_path / "results.jsonl"
    with served_router(router_settings(photos, tmp_path / "cache", ("local",))) as url:
        where = ("--local", "--model", "photos", "--registry", photos.folder) if local else ("--url", url)
        command = ("infer", folder, "--output", output, "--top-k", "2", *where)
        result = isthmus(*command)
        assert result.exit_code == 1
        assert "3 classified, 1 with an error, 0 there already" in result.stdout
        assert result.stderr.splitlines()[-1] == "error: 1 of 4 photos failed: 1 MediaUnsupported"
        again = isthmus(*command, "--json")
        (folder / "notes.txt").unlink()
        assert isthmus(*command).exit_code == 0
    assert again.exit_code == 1
    assert json.loads(again.stdout) == {
        "classified": 0,
        "failed": 0,
        "skipped": 4,
        "errors": {"MediaUnsupported": 1},
        "file": str(output),
    }
    assert json.loads(again.stderr.splitlines()[-1])["facts"]["failed"] == 1
    found = {Path(line["photo"]).name: line for line in map(json.loads, output.read_text().splitlines())}
    assert found["notes.txt"]["type"] == "MediaUnsupported"
    for seed in range(3):
        (first, *_) = found[f"{seed}.png"]["classes"]
        assert first["label"] == expected_classes(photos, photo(seed=seed))[0]["label"]


def test_the_file_of_a_batch_ends_in_jsonl(photos: Published, tmp_path: Path) -> None:
    result = isthmus("infer", tmp_path, "--output", tmp_path / "out.npz", "--local", "--registry", photos.folder)
    assert result.exit_code == 1
    assert ".jsonl" in result.stderr
