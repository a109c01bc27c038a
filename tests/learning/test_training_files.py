"""Files that training reads, their labels and groups, and configurations."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from isthmus.errors import LearningError
from isthmus.settings import RegistrySettings
from isthmus_tools.learning.training.config import FileSource, TrainConfig, parse_config, read_config
from isthmus_tools.learning.training.files import read_samples
from isthmus_tools.learning.training.samples import RawSample
from support.s3_server import S3Server, store_at, unique_prefix

SETTINGS = RegistrySettings()
MINIMAL = 'name = "m"\n[data]\nkind = "series"\n[[data.sources]]\nkind = "files"\npath = "x"\n'


def samples(folder: Path, kind: str = "series", path: str = "", **options: str) -> list[RawSample]:
    data = parse_config(MINIMAL.replace("series", kind), {}).data
    source = FileSource(path=path or str(folder), **options)
    return list(read_samples(source, data, folder / "copies", SETTINGS))


def test_folders_of_classes_hold_readings_arrays_and_photos(tmp_path: Path) -> None:
    for label in ("walk", "run"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "person-1.csv").write_text("x,y\n1,2\n3,\n5,6\n")
        np.save(tmp_path / label / "person-2.npy", np.ones((2, 4), np.float32))
        Image.new("RGB", (9, 7), "red").save(tmp_path / label / "a.png")
    read = samples(tmp_path, group=r"(person-\d)", part="train")
    assert [(s.label, s.group, s.values.shape, s.part) for s in read] == [
        ("run", "person-1", (2, 3), "train"),
        ("run", "person-2", (2, 4), "train"),
        ("walk", "person-1", (2, 3), "train"),
        ("walk", "person-2", (2, 4), "train"),
    ]
    np.testing.assert_array_equal(read[0].values, [[1, 3, 5], [2, np.nan, 6]])
    photos = samples(tmp_path, "image")
    assert [(s.label, s.group) for s in photos] == [("run", "run/a.png"), ("walk", "walk/a.png")]
    np.testing.assert_array_equal(photos[0].values[:, 0, 0], [255, 0, 0])


def test_arrays_have_labels_beside_them(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 3, 4)), labels=["b", "a"], groups=["p", "q"])
    np.savez(tmp_path / "b.npz", x=np.zeros((1, 3, 4)), labels=np.array([7]))
    read = [(s.label, s.group, s.values.shape) for s in samples(tmp_path)]
    assert read == [("b", "p", (3, 4)), ("a", "q", (3, 4)), ("7", "b.npz#0", (3, 4))]


def test_an_archive_of_series_and_a_table_name_their_labels(tmp_path: Path) -> None:
    (tmp_path / "a.ts").write_text("#n\n@timeStamps false\n@classLabel true A B\n@data\n1,2:3,?:A\n4,5:6,7:B\n")
    read = samples(tmp_path)
    assert [s.label for s in read] == ["A", "B"]
    np.testing.assert_array_equal(read[0].values, [[1, 2], [3, np.nan]])
    (tmp_path / "t.csv").write_text("kind,height,who,width\nx,1,ann,2\ny,3,bob,\n")
    rows = samples(tmp_path, "table", label="kind", group="who")
    assert [(s.label, s.group) for s in rows] == [("x", "ann"), ("y", "bob")]
    np.testing.assert_array_equal(rows[1].values, [3, np.nan])


@pytest.mark.parametrize(
    ("name", "content", "kind", "message"),
    [
        ("loose.csv", "1,2\n", "series", "loose.csv has no label: it lies in no folder of a class"),
        ("c/a.csv", "1,2\n3,x\n", "series", "c/a.csv, reading 2: 'x' is no number"),
        ("c/a.csv", "1,2\n3\n", "series", "lines of different length"),
        ("a.ts", "@classLabel false\n@data\n1,2\n", "series", "a.ts has no class labels"),
        ("a.ts", "@classLabel true A\n@data\n1,2:3:A\n", "series", "line 3 has channels of different length"),
        ("a.csv", "label,x\na,1,2\n", "table", "line 2 has 3 fields of 2"),
        ("a.csv", "x,y\n1,2\n", "table", "has no column label; it has x, y"),
        ("c/a.npy", "no array", "series", "another kind of file"),
        ("c/a.txt", "nothing", "series", "holds no samples of the kind series among 1 files"),
        ("c/a.png", "\x89PNG\r\n\x1a\nbroken", "image", "a.png cannot be used"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(name: str, content: str, kind: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(LearningError, match=re.escape(message)):
        samples(tmp_path, kind)


def test_arrays_without_labels_say_what_to_add(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 3)))
    with pytest.raises(LearningError, match=r"a\.npz has no labels") as refused:
        samples(tmp_path)
    assert "'labels'" in refused.value.hint
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 3)), labels=[1])
    with pytest.raises(LearningError, match="holds 2 inputs and 1 labels"):
        samples(tmp_path)


def test_objects_of_a_store_are_copied_once(
    tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = unique_prefix()
    store = store_at(s3_server.endpoint, prefix)
    for label in ("walk", "run"):
        store.put(f"{label}/1.csv", b"1,2\n3,4\n")
    address = f"s3://{store.url.removeprefix('s3://')}"
    monkeypatch.setattr("test_training_files.SETTINGS", s3_settings(tmp_path, s3_server))
    assert [s.label for s in samples(tmp_path, path=address)] == ["run", "walk"]
    copies = list((tmp_path / "copies").rglob("*.csv"))
    stamps = [path.stat().st_mtime_ns for path in copies]
    assert len(samples(tmp_path, path=address)) == 2
    assert [path.stat().st_mtime_ns for path in copies] == stamps


def s3_settings(folder: Path, server: S3Server) -> RegistrySettings:
    from support.s3_server import KEY_ID, SECRET

    secrets = folder / "secrets"
    secrets.mkdir()
    (secrets / "s3-access-key-id").write_text(KEY_ID)
    (secrets / "s3-secret-access-key").write_text(SECRET)
    return RegistrySettings(s3_endpoint=server.endpoint, secrets_dir=str(secrets))


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (MINIMAL + "[training]\nepoch = 3\n", "`epoch` - at `$.training`", "is it epochs?"),
        ("name = 'm'\n", "missing required field `data`", "add the key data"),
        (MINIMAL + "[training]\nrate = 'x'\n", "at `$.training.rate`", "training.md"),
        (MINIMAL + "[training]\nbatch = 0\n", "at `$.training.batch`", "training.md"),
        (MINIMAL + "[training]\nmirror = true\n", "training.mirror is for photos alone", "training.mirror"),
        (MINIMAL + "[network]\nname = 'dense'\n", "the ready network of series is convolutions", "network.name"),
        (MINIMAL + "[network]\nname = 'x'\n", "network.name is 'x'; it is convolutions, residual, dense", "network"),
        (MINIMAL + "[split]\nvalidation = 0.5\ntest = 0.5\n", "leaves less than a tenth", "split"),
        (MINIMAL.replace('"m"', '"M x"'), "name is 'M x'", "name"),
        (MINIMAL.replace('path = "x"', 'path = "${NO_SUCH}"'), "NO_SUCH", ""),
        (MINIMAL + "[[data.sources]]\nkind = 'mqtt'\ntopic = 'a/+'\n", "data.sources[1].topic has no {label}", "topic"),
        (MINIMAL + "[[data.sources]]\nkind = 'mqtt'\ntopic = '{label}/#'\n", "has #; use +", "topic"),
        (MINIMAL + "[data\n", "('data',) twice", "training.md"),
    ],
)
def test_a_configuration_that_is_wrong_names_its_key(text: str, message: str, hint: str) -> None:
    with pytest.raises(LearningError) as refused:
        parse_config(text, {})
    assert message in str(refused.value)
    assert hint in refused.value.hint


def test_paths_are_relative_to_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(MINIMAL + "[network]\nname = 'net.py:make'\n")
    config: TrainConfig = read_config(tmp_path / "c.toml", {})
    (source,) = config.data.sources
    assert isinstance(source, FileSource)
    assert source.path == str(tmp_path / "x")
    assert config.run_folder == Path(".isthmus/training/m")
    assert config.network.name == str(tmp_path / "net.py:make")
    with pytest.raises(LearningError, match="cannot be read"):
        read_config(tmp_path / "absent.toml", {})
