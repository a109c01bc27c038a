"""Labelled data from photos and arrays: three ways to label, and data that is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.errors import LearningError
from isthmus_tools.learning.classes import ModelClasses, classes_of
from isthmus_tools.learning.labelled import LabelledData, open_labelled
from support.bundles import LABELS, Published, bfloat16_model, pair_model, photo, photo_array, publish
from support.bundles import photos as photos


@pytest.fixture(scope="module")
def classes(photos: Published) -> ModelClasses:
    return classes_of(photos.bundle, photos.registry.blob)


def rows(count: int, **changes: Any) -> dict[str, Any]:
    x = np.random.default_rng(0).standard_normal((count, 3, 8, 8)).astype(np.float32)
    return {"x": x, "labels": np.arange(count) % 5} | changes


def npz(folder: Path, name: str = "data.npz", **arrays: Any) -> Path:
    np.savez(folder / name, **arrays)
    return folder


def opened(photos: Published, folder: Path, classes: ModelClasses | None, **options: Any) -> LabelledData:
    return open_labelled(photos.bundle, folder, classes, **options)


def test_folders_of_photos_are_classes_by_name_and_by_index(
    photos: Published, classes: ModelClasses, tmp_path: Path
) -> None:
    for name, seed in (("Cat", 1), ("0", 2), ("elk", 3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(photo(seed=seed))
    data = opened(photos, tmp_path, classes, required=True)
    assert [path.parent.name for path, _ in data.places] == ["0", "Cat", "elk"]
    assert data.labels is not None
    assert data.labels.tolist() == [0, 2, 4]
    (first, *_) = data.inputs([1])
    np.testing.assert_array_equal(first["x"], photo_array(photo(seed=1)))


@pytest.mark.parametrize("shape", [(6, 3, 8, 8), (6, 1, 3, 8, 8)])
def test_rows_of_arrays_are_inputs_in_batches_of_one(
    shape: tuple[int, ...], photos: Published, classes: ModelClasses, tmp_path: Path
) -> None:
    content = rows(6)
    npz(tmp_path, x=content["x"].reshape(shape), labels=content["labels"])
    data = opened(photos, tmp_path, classes)
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1, 2, 3, 4, 0]
    np.testing.assert_array_equal(np.concatenate([a["x"] for a in data.inputs()]), content["x"])


def test_a_file_alone_is_data_and_labels_come_from_a_list(
    photos: Published, classes: ModelClasses, tmp_path: Path
) -> None:
    npz(tmp_path, x=rows(3)["x"])
    (tmp_path / "labels.json").write_text(json.dumps(["ape", 1, "dog"]))
    data = opened(photos, tmp_path / "data.npz", classes, labels=tmp_path / "labels.json")
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1, 3]


def test_a_table_labels_files_by_path_or_name(photos: Published, classes: ModelClasses, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    for name in ("x/a.png", "b.png"):
        (tmp_path / name).write_bytes(photo())
    table = tmp_path / "labels.csv"
    table.write_text("file,label\nx/a.png,bee\nb.png,cat\n")
    data = opened(photos, tmp_path, classes, labels=table)
    assert data.labels is not None
    assert {p.name: label for (p, _), label in zip(data.places, data.labels.tolist(), strict=True)} == {
        "a.png": 1,
        "b.png": 2,
    }


def test_a_number_is_an_index_and_a_text_of_digits_a_name_first(photos: Published) -> None:
    named = ModelClasses(photos.bundle.outputs[0], 3, ("1", "2", "tabby, tabby cat"))
    assert [named.index(label) for label in (1, "1", "0", "Tabby cat", 3, "ox")] == [1, 0, 0, 2, None, None]


def test_parts_are_disjoint_random_and_repeatable(photos: Published, classes: ModelClasses, tmp_path: Path) -> None:
    data = opened(photos, npz(tmp_path, **rows(40)), classes)
    first, second = data.parts([0.25, 0.75], seed=3)
    assert (len(first), len(second)) == (10, 30)
    assert sorted([*first.places, *second.places]) == list(data.places)
    assert first.places == data.parts([0.25, 0.75], seed=3)[0].places != list(data.places[:10])
    assert first.labels is not None
    assert first.labels.tolist() == [row % 5 for _, row in first.places]
    assert len(data.sample(7)) == 7


def test_folders_of_another_order_are_no_labels_unless_they_are_needed(
    photos: Published, classes: ModelClasses, tmp_path: Path
) -> None:
    for name in ("monday", "tuesday"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(photo())
    assert opened(photos, tmp_path, classes).labels is None
    with pytest.raises(LearningError, match=r"no class of the model: 'monday', 'tuesday'"):
        opened(photos, tmp_path, classes, required=True)


def test_values_that_are_not_finite_name_the_file_and_the_row(
    photos: Published, classes: ModelClasses, tmp_path: Path
) -> None:
    content = rows(4)
    content["x"][2, 0, 0, 0] = np.nan
    data = opened(photos, npz(tmp_path, **content), classes)
    with pytest.raises(LearningError, match=r"data\.npz holds NaN or infinity in x, input 2"):
        list(data.inputs())


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (rows(4, labels=np.zeros(4, np.int64)), "one class only"),
        (rows(4, labels=np.arange(3)), r"holds 4 inputs, and 'labels' is int64 \[3\]"),
        (rows(4, labels=np.array([0, 1, 2, 5])), "no class of the model: '5'"),
        ({"x": rows(4)["x"]}, "has no labels"),
        ({"y": rows(4)["x"]}, "does not fit the model"),
        (rows(4, x=rows(4)["x"][:, :2]), "does not fit the model"),
    ],
    ids=["one-class", "number", "range", "absent", "name", "shape"],
)
def test_arrays_that_cannot_teach_are_refused(
    arrays: dict[str, Any], message: str, photos: Published, classes: ModelClasses, tmp_path: Path
) -> None:
    with pytest.raises(LearningError, match=message):
        opened(photos, npz(tmp_path, **arrays), classes, required=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("labels.csv", "a.png,ape\n", r"no label of b\.png"),
        ("labels.csv", "a.png,ape\nb.png,bee\nc.png,bee\n", r"label of c\.png, which is no input"),
        ("labels.csv", "a.png,ape\na.png,bee\n", r"two labels of a\.png"),
        ("labels.csv", "a.png\n", "line 1 has 1 cells"),
        ("labels.csv", "", "it is empty"),
        ("labels.csv", "a.png,ape\nb.png,APE\n", "one class only, ape"),
        ("labels.json", "[0]", "has 1 labels, and .* has 2 inputs"),
        ("labels.json", "{}", "no list of class names"),
        ("labels.npy", "x", r"cannot be read as a \.npy"),
        ("absent.csv", None, "cannot be read as labels: No such file"),
    ],
    ids=["missing", "unknown", "twice", "cells", "empty", "one-class", "count", "object", "kind", "absent"],
)
def test_label_files_that_do_not_match_are_refused(
    name: str, content: str | None, message: str, photos: Published, classes: ModelClasses, tmp_path: Path
) -> None:
    for file in ("a.png", "b.png"):
        (tmp_path / file).write_bytes(photo())
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(LearningError, match=message):
        opened(photos, tmp_path, classes, labels=tmp_path / name)


def test_a_folder_of_both_kinds_or_none_is_refused(photos: Published, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(LearningError, match="neither photos nor arrays"):
        opened(photos, tmp_path, None)
    (tmp_path / "a.png").write_bytes(photo())
    npz(tmp_path, **rows(2))
    with pytest.raises(LearningError, match="both photos and arrays"):
        opened(photos, tmp_path, None)


def test_models_without_one_output_of_classes_are_refused(photos: Published, tmp_path: Path) -> None:
    assert classes_of(photos.bundle, photos.registry.blob).names == tuple(LABELS)
    pair = publish(tmp_path / "pair", pair_model(tmp_path / "pair.onnx"), {})
    with pytest.raises(LearningError, match="does not say which output holds classes"):
        classes_of(pair.bundle, pair.registry.blob)
    with pytest.raises(LearningError, match="2 outputs"):
        classes_of(pair.bundle, pair.registry.blob, "late")
    with pytest.raises(LearningError, match="no output 'lat'"):
        classes_of(pair.bundle, pair.registry.blob, "lat")
    scalar = publish(tmp_path / "scalar", bfloat16_model(tmp_path / "scalar.onnx"), {})
    with pytest.raises(LearningError, match="no table of scores"):
        classes_of(scalar.bundle, scalar.registry.blob, "y")
