"""Data and configurations of a training that nobody would write on purpose: all are refused with their names."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from isthmus.errors import LearningError
from isthmus.settings import RegistrySettings
from isthmus_tools import array_files
from isthmus_tools.learning.classes import read_label_file
from isthmus_tools.learning.training.capture import Capture
from isthmus_tools.learning.training.cleaning import read_bounded
from isthmus_tools.learning.training.config import DataTable, FileSource, MqttSource, parse_config
from isthmus_tools.learning.training.files import read_samples
from isthmus_tools.learning.training.samples import RawSample
from isthmus_tools.usecases.train import TrainRequest, train

SETTINGS = RegistrySettings()


def samples(folder: Path, kind: str = "series", group: str = "") -> list[RawSample]:
    source = FileSource(path=str(folder), group=group)
    return list(read_samples(source, DataTable(kind=kind, sources=(source,)), folder / "copies", SETTINGS))


def request(shape: object, data: object) -> str:
    return json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": shape, "data": data}]})


@pytest.mark.parametrize(
    "payload",
    [f"[[{'9' * 400}]]", "5", request([], [1.0]), request([10**9, 0], []), "[]", "[" * 10**5],
    ids=["huge integer", "scalar", "no axis", "rows without values", "empty", "deep"],
)
def test_a_message_of_no_readings_is_named(payload: str, tmp_path: Path) -> None:
    capture = Capture(MqttSource(topic="a/{label}"), tmp_path, SETTINGS)
    capture.path.write_text(json.dumps({"id": "1", "topic": "a/walk", "payload": payload}) + "\n")
    with pytest.raises(LearningError, match="message 1 of a/walk holds no readings"):
        list(capture.samples())


@pytest.mark.parametrize("line", ["x", "[]", '{"id": "1"}', '{"id": "1", "topic": "a/b", "payload": 5}'])
def test_a_damaged_line_of_captured_messages_is_named(line: str, tmp_path: Path) -> None:
    source = MqttSource(topic="a/{label}")
    path = Capture(source, tmp_path, SETTINGS).path
    path.write_text(line + "\n")
    with pytest.raises(LearningError, match="line 1 is damaged"):
        Capture(source, tmp_path, SETTINGS)


@pytest.mark.parametrize(
    "arrays",
    [
        {"x": np.zeros((2, 4), "f4"), "labels": np.array(1)},
        {"x": np.zeros((2, 4), "f4"), "labels": np.zeros((2, 2), int)},
        {"x": np.zeros((2, 4), "f4"), "labels": np.arange(2), "groups": np.array(1)},
        {"x": np.array(1.0), "labels": np.arange(2)},
        {"x": np.array(["a", "b"]), "labels": np.array(["a", "b"])},
        {"x": np.zeros((2, 4), complex), "labels": np.array(["a", "b"])},
        {"x": np.zeros((2, 4), "M8[s]"), "labels": np.array(["a", "b"])},
        {"x": np.zeros(2, [("a", "f4")]), "labels": np.array(["a", "b"])},
    ],
    ids=["a label", "tables of labels", "a group", "scalar", "texts", "complex", "times", "records"],
)
def test_arrays_of_no_rows_of_numbers_are_refused(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(LearningError, match=r"a\.npz holds"):
        samples(tmp_path)


def test_values_beyond_float32_are_missing_ones(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.full((1, 2), 1e300), labels=np.array([1]))
    assert np.isinf(samples(tmp_path)[0].values).all()


@pytest.mark.parametrize("kind", ["table", "series"])
def test_a_field_without_an_end_names_the_file(kind: str, tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "t.csv").write_text('label,a\nx,"' + "1" * 200_000)
    with pytest.raises(LearningError, match=r"t\.csv cannot be read as CSV"):
        samples(tmp_path, kind)


def test_a_group_that_is_not_in_the_path_is_no_group(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    np.save(tmp_path / "c" / "a.npy", np.zeros((2, 4), "f4"))
    with pytest.raises(LearningError, match="is not in the path"):
        samples(tmp_path, group="(zz)?")


def test_a_small_archive_that_would_fill_the_memory_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w") as file:
        np.lib.format.write_array(file, np.zeros(2**20, "u1"))
    assert path.stat().st_size < 2**12
    assert array_files.read(path)
    monkeypatch.setattr(array_files, "memory", lambda: 2**20)
    with pytest.raises(ValueError, match="more than this machine's memory"):
        array_files.read(path)


@pytest.mark.parametrize(
    ("name", "content"), [("a.json", "[" * 10**5), ("a.json", "[1.5]"), ("a.csv", 'a,"' + "x" * 200_000)]
)
def test_labels_of_no_format_are_refused(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(LearningError, match="cannot be read as labels"):
        read_label_file(tmp_path / name)


def endless() -> Iterator[RawSample]:
    while True:
        yield RawSample(np.zeros((1, 2**16), np.float32), "a", "g", "o")


TEXT = 'name = "m"\n[data]\nkind = "series"\nmax_bytes = "1MiB"\n[[data.sources]]\nkind = "files"\npath = "data"\n'


def test_samples_are_counted_while_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config(TEXT, {})
    with pytest.raises(LearningError, match=r"more than data\.max_bytes"):
        read_bounded(endless(), config.data)
    # The command reads as this does: it has not all samples in memory before.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("isthmus_tools.usecases.train.read_samples", lambda *_: endless())
    settings = RegistrySettings(registry=str(tmp_path / "registry"))
    with pytest.raises(LearningError, match=r"more than data\.max_bytes"):
        train(TrainRequest(config=config, registry=settings, stage="clean"))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (lambda: "a = " + "[" * 10**5, "nests more deeply"),
        (lambda: TEXT + '[publish]\nalias = "../../x"\n', r"publish\.alias is '\.\./\.\./x'"),
        (lambda: TEXT + '[publish]\nalias = "12"\n', r"publish\.alias is '12'"),
    ],
    ids=["deep", "path", "number"],
)
def test_a_configuration_that_could_only_fail_later_is_refused(text: Callable[[], str], fault: str) -> None:
    with pytest.raises(LearningError, match=fault):
        parse_config(text(), {})
