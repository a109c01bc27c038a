"""How fast this machine packs, and how that compares with another."""

from __future__ import annotations

import pytest

from isthmus.artifacts.choice import CODEC_IDS, INPUT_CODECS
from isthmus.artifacts.profile import CodecSpeed
from isthmus.codecs import find_codec
from isthmus.runtime.codec_speed import compared, speeds


def test_every_codec_that_needs_no_calibration_is_timed() -> None:
    found = speeds(60.0)
    assert found.keys() == {c for c in CODEC_IDS if c not in INPUT_CODECS | {"raw"} and not find_codec(c).calibrated}


def test_what_no_time_is_left_for_is_not_there() -> None:
    assert speeds(-1.0) == {}


def test_a_codec_that_was_not_timed_is_as_much_slower_as_the_others_are() -> None:
    here = {"half/1": CodecSpeed(1.0, 1.0), "int8/1": CodecSpeed(1.0, 2.0), "lossless/3": CodecSpeed(1.0, 1.0)}
    there = {"half/1": CodecSpeed(2.0, 3.0), "int8/1": CodecSpeed(4.0, 4.0), "int4/1": CodecSpeed(9.0, 9.0)}
    slower = compared(there, here)
    assert slower["half/1"] == CodecSpeed(2.0, 3.0)
    assert slower["int8/1"] == CodecSpeed(4.0, 2.0)
    assert slower["transform/4"] == CodecSpeed(pytest.approx(3.0), pytest.approx(2.5))


def test_nothing_is_compared_with_a_profile_that_has_no_codecs() -> None:
    assert compared({}, {"half/1": CodecSpeed(1.0, 1.0)}) == {}
