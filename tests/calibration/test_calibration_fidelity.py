"""The fidelity document, its bounds, targets, and what counts as the same answer."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from isthmus.artifacts.bounds import exceeds, interval, isotonic, wilson
from isthmus.artifacts.bundle import Blob, digest_of
from isthmus.artifacts.choice import Choice
from isthmus.artifacts.fidelity import (
    MAX_BYTES,
    Entry,
    Fidelity,
    Inputs,
    Measure,
    Reference,
    choose,
    from_json,
    offered,
    read_fidelity,
    to_json,
)
from isthmus.artifacts.tensors import TensorSpec
from isthmus.codecs import encodings, is_exact
from isthmus.errors import CalibrationError, ModelError
from isthmus.pipeline.agreement import agrees, classes, output_error
from isthmus_tools.calibration.scoring import monotone
from isthmus_tools.figures.fidelity import draw
from support.bundles import publish_photos


def entry(codec: str, size: int, agreement: float, ms: float = 1.0, cut: str = "6", quality: float = 1.0) -> Entry:
    low, high = wilson(agreement, 200)
    half, good = ms / 2, agreement >= 0.99
    return Entry(cut, codec, quality, agreement, low, high, 0.01, size, size, 2.0, half, half, 0.0, good, agreement)


FIDELITY = Fidelity(
    subject="sha256:" + "0" * 64,
    limit=0.99,
    measure=Measure("close", scales={"y": 0.5}),
    inputs=Inputs("photos", 16, 100, 200, "crops"),
    entries=(
        entry("raw", 1000, 1.0, 0.1),
        entry("half/1", 500, 1.0, 0.1),
        entry("int8/1", 250, 0.97, 0.2),
        entry("transform/4", 100, 0.995, 3.0, quality=0.8),
        entry("transform/4", 50, 0.9, 3.0, quality=0.4),
        entry("int8/1", 20, 1.0, cut="9"),
    ),
    references=(Reference("jpeg", 85, 0.8, 0.7, 0.9, 0.1, 9000, 12000),),
)


# The document


def test_a_document_comes_back_as_it_was() -> None:
    data = to_json(FIDELITY)
    assert from_json(data) == FIDELITY
    assert data == to_json(from_json(data))
    assert b" " not in data.replace(b"one of each file", b"")


def changed(**changes: Any) -> bytes:
    return json.dumps(json.loads(to_json(FIDELITY)) | changes).encode()


ENTRY = json.loads(to_json(FIDELITY))["entries"][0]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{",
        b"\xff",
        changed(format="isthmus.plan/2"),
        changed(limit=1.5),
        changed(limit="0.99"),
        changed(limit=True),
        changed(confidence=-1),
        changed(measure={"output": ""}),
        changed(measure={"kind": "nearly", "output": "", "tolerance": 1, "scales": {}}),
        changed(inputs={}),
        changed(entries=[{}]),
        changed(entries=[ENTRY | {"more": 1}]),
        changed(entries=[ENTRY | {"agreement": 1.01}]),
        changed(entries=[ENTRY | {"quality": 2}]),
        changed(entries=[ENTRY | {"bytes": -1}]),
        changed(entries=[ENTRY | {"bytes": 1.5}]),
        changed(entries=[ENTRY | {"offered": 1}]),
        changed(entries=[ENTRY | {"codec": "int9/1"}]),
        *(changed(entries=[ENTRY | {"codec": codec}]) for codec in ("photo/1", "layers/2", "jpeg", "webp", "")),
        changed(entries=[ENTRY | {"error": 10**400}]),
        changed(entries=[ENTRY | {"bytes": True}]),
        changed(entries=[[]]),
        changed(entries=None),
        changed(limit=10**400),
        changed(entries=[ENTRY | {"pack_ms": None}]),
        changed(entries=[ENTRY] * 20_001),
        b"[" * 100_000,
        to_json(FIDELITY).replace(b'"limit":0.99', b'"limit":NaN'),
    ],
)
def test_what_is_no_document_is_refused(data: bytes) -> None:
    with pytest.raises(CalibrationError):
        from_json(data)


def test_a_document_of_another_version_says_so_and_to_calibrate_again(tmp_path: Path) -> None:
    data = changed(format="isthmus.fidelity/1")
    with pytest.raises(CalibrationError, match="another version") as e:
        from_json(data)
    assert "isthmus calibrate" in e.value.hint
    bundle = replace(publish_photos(tmp_path).bundle, fidelity=Blob(digest_of(data), len(data)))
    with pytest.raises(CalibrationError, match=r"in photos: .*another version") as e:
        read_fidelity(bundle, lambda blob: data)
    assert "isthmus calibrate photos" in e.value.hint


def test_a_document_of_a_codec_that_is_no_more_says_to_calibrate_again() -> None:
    for more in ({}, {"again_quality": 0.0, "again_margin": 0.0, "asked_again": 0.0}):
        with pytest.raises(CalibrationError) as e:
            from_json(changed(entries=[ENTRY | {"codec": "transform/1"} | more]))
        assert "calibrate" in f"{e.value} {e.value.hint}"
        assert "isthmus calibrate" in e.value.hint
    with pytest.raises(CalibrationError, match=r'codec is "transform/1"; it is one of raw, .*transform/4'):
        from_json(changed(entries=[ENTRY | {"codec": "transform/1"}]))


def test_a_document_of_a_codec_with_a_successor_serves_the_successor() -> None:
    made = from_json(changed(entries=[ENTRY | {"codec": "transform/3", "quality": 0.5}]))
    assert [entry.choice for entry in made.entries] == [Choice("transform/4", 0.5)]
    assert Choice.parse("transform/3@0.4+0.6:0.2") == Choice.parse("transform/4@0.4+0.6:0.2")


def test_a_document_too_long_is_not_parsed() -> None:
    with pytest.raises(CalibrationError, match="at most"):
        from_json(b" " * (MAX_BYTES + 1))


# What a plan may use, and targets


def test_offered_are_those_that_meet_the_limit_fewest_bytes_first() -> None:
    assert [e.codec for e in offered(FIDELITY, "6")] == ["transform/4", "half/1", "raw"]
    assert offered(FIDELITY, "7") == []


@pytest.mark.parametrize(
    ("targets", "codec", "quality"),
    [
        ({"agreement": 0.99}, "transform/4", 0.8),
        ({"agreement": 0.85}, "transform/4", 0.4),
        ({"agreement": 0.999}, "half/1", 1.0),
        ({"agreement": 0.96, "pack_ms": 1.0}, "int8/1", 1.0),
        ({"bytes": 300}, "transform/4", 0.8),
        ({"bytes": 300, "pack_ms": 1.0}, "int8/1", 1.0),
        ({"pack_ms": 0.15}, "half/1", 1.0),
    ],
)
def test_a_target_finds_the_codec(targets: dict[str, Any], codec: str, quality: float) -> None:
    found = choose(FIDELITY, "6", **targets)
    assert (found.codec, found.quality) == (codec, quality)


def test_a_target_that_nothing_meets_names_what_comes_closest() -> None:
    with pytest.raises(CalibrationError) as e:
        choose(FIDELITY, "6", agreement=0.99, bytes=60)
    assert e.value.facts["closest"]["bytes"] == 50
    with pytest.raises(CalibrationError) as e:
        choose(FIDELITY, "7", agreement=0.99)
    assert e.value.facts["exists"] == ["6", "9"]


# Choices


@pytest.mark.parametrize("text", ["int8/1", "raw", "transform/4@0.9", "sparse/2@0.25", "lossless/3"])
def test_a_choice_reads_as_it_is_written(text: str) -> None:
    assert str(Choice.parse(text)) == text


NO_CHOICES = ("", "int8", "photo/1", "layers/2", "layers/2@0.5", "transform/1@0.5", "jpeg", "int8/1@0.5")
NO_QUALITIES = ("", "nan", "-1", "1.01", "inf", "1e400", "half", "0.5@0.5")


@pytest.mark.parametrize("text", [*NO_CHOICES, *(f"transform/4@{quality}" for quality in NO_QUALITIES)])
def test_what_is_no_choice_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"codec|quality"):
        Choice.parse(text)


def test_side_tensors_travel_exactly() -> None:
    specs = [TensorSpec("x", "float32", (1, 4)), TensorSpec("ids", "int64", (1,)), TensorSpec("mask", "bool", (1,))]
    made = encodings(specs, Choice("int8/1"))
    assert {name: p.codec for name, p in made.items()} == {"x": "int8/1", "ids": "lossless/3", "mask": "lossless/3"}
    assert encodings(specs, Choice("raw")) == {}
    assert [is_exact(p) for p in made.values()] == [False, True, True]


# Bounds


def test_wilsons_interval_is_the_published_one() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263, and 0 of 20.
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=12))
def test_an_interval_holds_its_share_and_lies_within_one(pairs: list[tuple[int, int]]) -> None:
    groups = [(min(a, b), max(a, b)) for a, b in pairs]
    low, high = interval(groups)
    assert 0 <= low <= high <= 1
    if total := sum(n for _, n in groups):
        assert low - 1e-12 <= sum(h for h, _ in groups) / total <= high + 1e-12


def test_inputs_of_one_photo_tell_less_than_as_many_photos() -> None:
    apart, alike = [(1, 1)] * 90 + [(0, 1)] * 10, [(10, 10)] * 9 + [(0, 10)]
    assert interval(alike)[0] < interval(apart)[0]
    assert interval([]) == (0.0, 1.0)


def test_agreement_rises_with_quality_and_luck_is_shared_out() -> None:
    assert isotonic([0.5, 0.9, 0.8, 1.0]) == pytest.approx([0.5, 0.85, 0.85, 1.0])
    assert isotonic([1.0, 0.9, 0.8]) == pytest.approx([0.9] * 3)
    assert isotonic([]) == []
    lucky = [entry("transform/4", 10 * i, a, quality=i / 10) for i, a in enumerate([0.8, 1.0, 0.9, 1.0])]
    made = monotone([*lucky, entry("int8/1", 30, 0.995)], 0.99)
    assert [(e.agreement, e.measured, e.offered) for e in made] == [
        (0.8, 0.8, False),
        (0.95, 1.0, False),
        (0.95, 0.9, False),
        (1.0, 1.0, True),
        (0.995, 0.995, True),
    ]


@given(st.lists(st.floats(0, 1), max_size=20))
def test_rising_shares_rise_and_keep_their_mean(shares: list[float]) -> None:
    found = isotonic(shares)
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(found))
    assert sum(found) == pytest.approx(sum(shares))


def test_the_guards_test_is_the_binomial_tail() -> None:
    assert exceeds(2, 5, 0.01, 0.999)
    assert not exceeds(2, 6, 0.01, 0.999)
    assert exceeds(3, 19, 0.01, 0.999)
    assert not exceeds(1, 1, 0.01, 0.999)
    assert not exceeds(0, 500, 0.01, 0.999)
    assert exceeds(1, 500, 0.0, 0.999)
    tail = sum(math.comb(30, k) * 0.1**k * 0.9 ** (30 - k) for k in range(8, 31))
    assert exceeds(8, 30, 0.1, 1 - tail * 1.01)
    assert not exceeds(8, 30, 0.1, 1 - tail * 0.99)


# What counts as the same answer


def test_top1_looks_at_every_row_and_past_trailing_ones() -> None:
    measure = Measure("top1", "y")
    scores = np.array([[1.0, 2.0], [4.0, 3.0]], np.float32)
    assert agrees(measure, {"y": scores}, {"y": scores + 9})
    assert not agrees(measure, {"y": scores}, {"y": scores[:, ::-1]})
    assert not agrees(measure, {"y": scores}, {"y": scores[:1]})
    assert classes(scores[:, :, None, None]).tolist() == [1, 0]


def test_closeness_is_relative_to_the_output_or_its_scale() -> None:
    one, other = {"y": np.full(4, 0.01, np.float32)}, {"y": np.full(4, 0.02, np.float32)}
    assert not agrees(Measure("close"), one, other)
    assert agrees(Measure("close", scales={"y": 1.0}), one, other)
    assert output_error(Measure("close"), one, one) == 0


def test_closeness_beside_zeros_alone_is_absolute() -> None:
    nothing, little = {"y": np.zeros(4, np.float32)}, {"y": np.full(4, 1e-3, np.float32)}
    assert output_error(Measure("close"), nothing, little) == pytest.approx(1e-3)
    assert output_error(Measure("close"), nothing, nothing) == 0


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (np.array([1, 2]), np.array([1, 2]), True),
        (np.array([1, 2]), np.array([1, 3]), False),
        (np.array([True]), np.array([False]), False),
        (np.array([np.nan, 1.0]), np.array([np.nan, 1.0]), True),
        (np.array([np.inf, 1.0]), np.array([np.inf, 1.0]), True),
        (np.array([1.0, 1.0]), np.array([np.nan, 1.0]), False),
        (np.array([np.inf, 1.0]), np.array([1.0, 1.0]), False),
        (np.array([np.inf, 1.0]), np.array([np.inf, 2.0]), False),
        (np.array([]), np.array([]), True),
        (np.zeros(3), np.zeros(3), True),
    ],
)
def test_whole_numbers_are_equal_or_not_and_nan_is_only_like_nan(one: Any, other: Any, same: bool) -> None:
    with np.errstate(invalid="raise", divide="raise"):
        assert agrees(Measure("close"), {"y": one}, {"y": other}) is same


# The picture


def test_the_picture_is_drawn_as_the_name_says(tmp_path: Path) -> None:
    draw(FIDELITY, dict.fromkeys(FIDELITY.cuts()), "small:1", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    text = draw(FIDELITY, {"6": None}, "small:1", tmp_path / "curves.svg").decode()
    assert "<svg" in text
    assert draw(replace(FIDELITY, references=()), {"6": FIDELITY.entries[0]}, "small:1").startswith(b"\x89PNG")
    with pytest.raises(ModelError, match="neither"):
        draw(FIDELITY, {"6": None}, "small:1", tmp_path / "curves.gif")
