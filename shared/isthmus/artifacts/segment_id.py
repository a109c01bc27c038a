"""The id of a segment: the cuts at its two ends. The text form `FROM..TO` is written and parsed only in this module."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Self

from isthmus.artifacts.cuts import is_cut_name

_DOTS = ".."


# A str, so that frames, documents, labels and dictionaries carry an id as it is, and a lookup by text needs no parsing.
class SegmentId(str):
    """The segment between the cuts `start` and `stop`; an empty name is an end of the model.

    `..31` is a head, `31..` a tail, `20..31` a middle and `..` the whole model.

    Raises:
        ValueError: an end is neither empty nor the name of a cut.
    """

    __slots__ = ()

    def __new__(cls, start: str = "", stop: str = "") -> Self:
        for end in (start, stop):
            if end and not is_cut_name(end):
                raise ValueError(f"{end[:80]!r} cannot name a cut")
        return super().__new__(cls, f"{start}{_DOTS}{stop}")

    # Copies are made of the two ends: `str` would pass the whole text as the first.
    def __reduce__(self) -> tuple[type[Self], tuple[str, str]]:
        return type(self), (self.start, self.stop)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `FROM..TO`.

        Raises:
            ValueError: `text` has no `..`, or something that cannot name a cut beside it.
        """
        start, dots, stop = text.partition(_DOTS)
        if not dots:
            raise ValueError(f"{text[:80]!r} is no segment id; an id is FROM..TO, each a cut's name or nothing")
        return cls(start, stop)

    @property
    def start(self) -> str:
        """The cut that the segment follows; empty where it takes the model's inputs."""
        return self.partition(_DOTS)[0]

    @property
    def stop(self) -> str:
        """The cut that the segment ends at; empty where it gives the model's outputs."""
        return self.partition(_DOTS)[2]


WHOLE = SegmentId()
"""The uncut model: from its inputs to its outputs."""


def partition_ids(cuts: Iterable[str]) -> list[SegmentId]:
    """The ids of the partition at `cuts`, in order: n cuts make n + 1 segments."""
    return [SegmentId(start, stop) for start, stop in itertools.pairwise(("", *cuts, ""))]
