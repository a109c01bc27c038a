"""Cleaning and splitting: what is dropped, what stays together, and where statistics come from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest

from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import LearningError
from isthmus_tools.calibration.inputs import ArraySource
from isthmus_tools.learning.training.cleaning import prepare
from isthmus_tools.learning.training.config import CleanTable, SplitTable, TrainConfig, parse_config
from isthmus_tools.learning.training.samples import PARTS, PreparedData, RawSample, read_prepared

SERIES = 'name = "m"\n[data]\nkind = "series"\n[[data.sources]]\nkind = "files"\npath = "x"\n'


def config(kind: str = "series", clean: CleanTable | None = None, **data: object) -> TrainConfig:
    whole = parse_config(SERIES.replace("series", kind), {})
    table = msgspec.structs.replace(whole.data, **data)
    return msgspec.structs.replace(whole, data=table, clean=clean or CleanTable())


def series(count: int = 40, length: int = 20, channels: int = 2, seed: int = 0) -> list[RawSample]:
    rng = np.random.default_rng(seed)
    return [
        RawSample(rng.normal(size=(channels, length)).astype(np.float32), "ab"[i % 2], f"g{i}", f"file {i}")
        for i in range(count)
    ]


def changed(samples: Sequence[RawSample], index: int, **fields: object) -> list[RawSample]:
    copy = list(samples)
    copy[index] = RawSample(**{**vars(copy[index]), **fields})  # type: ignore[arg-type]
    return copy


def reasons(data: PreparedData) -> dict[str, int]:
    return {reason: entry["samples"] for reason, entry in data.report["changes"].items()}


def part_of(data: PreparedData) -> dict[str, set[str]]:
    parts: dict[str, set[str]] = {}
    for name in PARTS:
        for group in data.parts[name].groups:
            parts.setdefault(group, set()).add(name)
    return parts


@pytest.mark.parametrize("seed", range(5))
def test_windows_of_one_recording_are_never_in_two_parts(seed: int) -> None:
    recordings = series(30, length=100)
    settings = msgspec.structs.replace(config(length=20, hop=5), seed=seed)
    data = prepare(settings, recordings)
    assert len(data.train) > 200
    assert all(len(parts) == 1 for parts in part_of(data).values())
    assert {len(set(data.parts[name].groups)) for name in ("validation", "test")} == {4, 6}


def test_statistics_come_from_the_training_part_alone() -> None:
    samples = series()
    data = prepare(config(), samples)
    held_out = part_of(data)
    moved = [
        s if held_out[s.group] == {"train"} else RawSample(s.values * 7 + 3, s.label, s.group, s.origin)
        for s in samples
    ]
    other = prepare(config(), moved)
    np.testing.assert_array_equal(other.statistics.mean, data.statistics.mean)
    np.testing.assert_array_equal(other.statistics.scale, data.statistics.scale)
    normalised = (data.train.inputs - data.statistics.mean[:, None]) * data.statistics.scale[:, None]
    np.testing.assert_allclose(normalised.mean((0, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(normalised.std((0, 2)), 1, atol=1e-4)


def test_a_group_keeps_the_part_of_an_earlier_run_when_data_grows() -> None:
    first = part_of(prepare(config(), series(40)))
    earlier = {group: next(iter(parts)) for group, parts in first.items()}
    grown = part_of(
        prepare(
            config(),
            series(40) + [RawSample(s.values, s.label, f"new-{s.group}", s.origin) for s in series(40, seed=1)],
            earlier,
        )
    )
    assert {group: grown[group] for group in first} == first
    assert sum(parts == {"test"} for parts in grown.values()) == 16


def test_missing_values_are_interpolated_or_their_sample_is_dropped() -> None:
    values = np.stack([np.arange(20, dtype=np.float32), np.ones(20, np.float32)])
    values[0, 5:8] = np.nan
    values[0, 19] = np.inf
    samples = changed(series(), 0, values=values, part="train")
    filled = prepare(config(clean=CleanTable(outliers="keep")), samples)
    assert reasons(filled) == {"filled: interpolated": 1}
    expected = np.arange(20, dtype=np.float32)
    expected[19] = 18
    np.testing.assert_array_equal(filled.train.inputs[filled.train.groups.index("g0")][0], expected)
    dropped = prepare(config(clean=CleanTable(missing="drop", outliers="keep")), samples)
    assert reasons(dropped) == {"dropped: missing values": 1}
    mostly = np.full((2, 20), np.nan, np.float32)
    assert reasons(prepare(config(), changed(series(), 0, values=mostly))) == {"dropped: missing values": 1}


def test_an_outlier_is_dropped_from_training_and_stays_in_the_test() -> None:
    spike = np.array(series()[0].values)
    spike[0, 3] = 1e6
    for part, left in (("train", False), ("validation", False), ("test", True)):
        samples = changed(series(), 0, values=spike)
        for i in range(8):
            samples = changed(samples, i, part=part)
        data = prepare(config(), samples)
        assert ("g0" in data.parts[part].groups) is left, part


def test_equal_samples_count_once_and_contradicting_ones_never() -> None:
    samples = series()
    samples += [samples[0], RawSample(samples[1].values, "a", "other", "file x")]
    assert samples[1].label == "b"
    assert reasons(prepare(config(), samples)) == {
        "dropped: duplicate": 1,
        "dropped: equal samples of several classes": 2,
    }


def test_series_get_one_length() -> None:
    samples = series(30)
    lengths = {0: 12, 1: 5, 2: 45}
    for index, length in lengths.items():
        samples = changed(samples, index, values=np.resize(samples[index].values, (2, length)).copy(), part="train")
    data = prepare(config(), samples)
    assert data.input_shape == (2, 20)
    assert reasons(data) == {
        "filled: the last value, up to the length": 1,
        "dropped: shorter than half of the length": 1,
        "cut into windows": 1,
    }
    assert data.train.groups.count("g2") == 2
    padded = data.train.inputs[data.train.groups.index("g0")]
    np.testing.assert_array_equal(padded[:, 12:], np.repeat(padded[:, 11:12], 8, axis=1))


def test_a_constant_channel_has_no_weight_and_a_dead_sensor_no_sample() -> None:
    constant = np.full(20, 7, np.float32)
    samples = [RawSample(np.vstack([s.values, constant]), s.label, s.group, s.origin) for s in series()]
    dead = changed(samples, 0, values=np.zeros((3, 20), np.float32))
    data = prepare(config(), dead)
    assert data.statistics.scale[2] == 0
    assert (data.statistics.scale[:2] > 0).all()
    assert reasons(data) == {
        "dropped: constant in every channel": 1,
        "ignored: a channel that is constant in training": 1,
    }


def test_missing_values_of_a_table_become_the_median_of_training() -> None:
    rng = np.random.default_rng(0)
    rows = [RawSample(rng.normal(size=4).astype(np.float32), "ab"[i % 2], f"g{i}", f"row {i}") for i in range(40)]
    values = np.array(rows[0].values)
    values[1] = np.nan
    data = prepare(config("table", clean=CleanTable(max_missing=0.5)), changed(rows, 0, values=values))
    assert data.statistics.fill is not None
    present = data.train.inputs[:, 1][np.isfinite(data.train.inputs[:, 1])]
    assert data.statistics.fill[1] == pytest.approx(np.median(present), abs=1e-6)
    assert np.isfinite(data.statistics.mean).all()


@pytest.mark.parametrize(
    ("samples", "settings", "message"),
    [
        ([s for s in series() if s.label == "a"], config(), "all 20 samples are of one class, 'a'"),
        (changed(series(), 3, label=""), config(), "1 samples have no label; the first is file 3"),
        (series(), config(classes=("a", "c")), "the data has the labels b, and data.classes names a, c"),
        (series(), config(classes=("a", "b", "c")), "no sample is of the class c"),
        (series(), config(max_bytes=500), "more than data.max_bytes"),
        (
            [RawSample(s.values, s.label, "g", s.origin, ("train", "test")[i % 2]) for i, s in enumerate(series())],
            config(),
            "the group g is in the parts test and train",
        ),
        (changed(changed(series(3), 0, part="test"), 2, label="b"), config(), "the part train has no sample of a"),
    ],
    ids=["one class", "unlabelled", "unknown label", "absent class", "too much", "leak", "too few groups"],
)  # fmt: skip
def test_data_that_nothing_can_be_learned_from_is_refused(
    samples: Sequence[RawSample], settings: TrainConfig, message: str
) -> None:
    with pytest.raises(LearningError, match=message):
        prepare(settings, samples)


def test_a_rare_class_is_warned_of() -> None:
    samples = [RawSample(s.values, "ab"[i % 20 == 0], s.group, s.origin) for i, s in enumerate(series(200))]
    warning = prepare(config(), samples).imbalance()
    assert warning.startswith("a has ")
    assert "macro F1" in warning
    assert prepare(config(), series()).imbalance() == ""


def test_prepared_data_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    data = prepare(msgspec.structs.replace(config(), split=SplitTable(validation=0.0)), series())
    assert len(data.validation) == 0
    data.write(folder)
    again = read_prepared(folder)
    assert again.digest() == data.digest()
    # Calibration reads them too, and takes the labels for no input.
    spec = TensorSpec("readings", "float32", ("batch", 2, 20))
    source = ArraySource((spec,), "data", [folder / "train.npz"])
    first = next(iter(source.examples(source.files, 3)))
    np.testing.assert_array_equal(first.arrays["readings"], data.train.inputs[:1])
    assert set(first.arrays) == {"readings"}
    assert (again.classes, again.report, again.input_name) == (data.classes, data.report, "readings")
    (folder / "train.npz").write_bytes(b"x")
    with pytest.raises(LearningError, match="holds no prepared data"):
        read_prepared(folder)
