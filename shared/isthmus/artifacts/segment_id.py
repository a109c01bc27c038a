"""Segment ids: the cuts at the two ends of a segment. The only module that formats and parses `FROM..TO`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Self

from isthmus.artifacts.cuts import is_cut_name

_DOTS = ".."


# A subclass of str: usable as is in frames, documents, metric labels and dictionary keys.
class SegmentId(str):
    """The segment between the cuts `start` and `stop`; an empty name is an end of the model.

    `..31` is a head, `31..` a tail, `20..31` a middle and `..` the whole model.

    Raises:
        ValueError: an end is neither empty nor a valid cut name.
    """

    __slots__ = ()

    def __new__(cls, start: str = "", stop: str = "") -> Self:
        for end in (start, stop):
            if end and not is_cut_name(end):
                raise ValueError(f"{end[:80]!r} cannot name a cut")
        return super().__new__(cls, f"{start}{_DOTS}{stop}")

    # pickle and copy rebuild from the two ends; the default of `str` would pass the whole text as `start`.
    def __reduce__(self) -> tuple[type[Self], tuple[str, str]]:
        return type(self), (self.start, self.stop)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse `FROM..TO`.

        Raises:
            ValueError: no `..` in `text`, or an invalid cut name beside the dots.
        """
        start, dots, stop = text.partition(_DOTS)
        if not dots:
            raise ValueError(f"{text[:80]!r} is no segment id; an id is FROM..TO, each a cut's name or nothing")
        return cls(start, stop)

    @property
    def start(self) -> str:
        """The cut before the segment; empty at the model's inputs."""
        return self.partition(_DOTS)[0]

    @property
    def stop(self) -> str:
        """The cut after the segment; empty at the model's outputs."""
        return self.partition(_DOTS)[2]


# The uncut model.
WHOLE = SegmentId()


def partition_ids(cuts: Iterable[str]) -> list[SegmentId]:
    """The segment ids of the partition at `cuts`, in order: n cuts make n + 1 segments."""
    return [SegmentId(start, stop) for start, stop in itertools.pairwise(("", *cuts, ""))]
