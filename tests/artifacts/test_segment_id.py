"""Segment ids: their ends, their one text form, and copies of them."""

from __future__ import annotations

import copy
import json

import pytest

from isthmus.artifacts.segment_id import WHOLE, SegmentId, partition_ids


@pytest.mark.parametrize(
    ("text", "start", "stop"), [("..", "", ""), ("..31", "", "31"), ("31..", "31", ""), ("20..a-b_2", "20", "a-b_2")]
)
def test_an_id_is_written_and_parsed_by_its_two_ends(text: str, start: str, stop: str) -> None:
    segment = SegmentId.parse(text)
    assert (segment.start, segment.stop) == (start, stop)
    assert segment == SegmentId(start, stop) == text
    assert json.loads(json.dumps({segment: segment})) == {text: text}


def test_a_variant_is_written_behind_its_segment() -> None:
    segment = SegmentId.parse("20..31~int8")
    assert (segment.start, segment.stop, segment.variant) == ("20", "31", "int8")
    assert segment == SegmentId("20", "31", "int8") == copy.copy(segment)
    assert segment.plain == SegmentId("20", "31") == segment.plain.plain
    assert SegmentId.parse("..~int8").plain == WHOLE


@pytest.mark.parametrize(
    "text",
    ["", "31", ".", "...", "a..b..c", "a/b..", "..-a", "..\ud800", f"..{'a' * 64}", "..a~", "a~b..", "..a~b~c", "~a"],
)
def test_text_that_is_no_id_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"segment id|cannot name a|names no variant") as e:
        SegmentId.parse(text)
    assert len(str(e.value)) < 200


def test_an_end_is_a_cut_and_never_an_id() -> None:
    with pytest.raises(ValueError, match="cannot name a cut"):
        SegmentId("..31")


def test_copies_have_the_same_ends() -> None:
    segment = SegmentId("20", "31")
    for duplicate in (copy.copy(segment), copy.deepcopy(segment)):
        assert (type(duplicate), duplicate.start, duplicate.stop) == (SegmentId, "20", "31")


def test_cuts_make_one_segment_more() -> None:
    assert partition_ids([]) == [WHOLE]
    assert partition_ids(["a", "b"]) == ["..a", "a..b", "b.."]
