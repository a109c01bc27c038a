"""Segment ids: the cuts at the two ends of a segment, and its variant. The only module that formats and parses
`FROM..TO` and `FROM..TO~VARIANT`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Self

from isthmus.artifacts.cuts import is_cut_name

_DOTS = ".."
# In no cut's name.
_TILDE = "~"


# A subclass of str: usable as is in frames, documents, metric labels and dictionary keys.
class SegmentId(str):
    """The segment between the cuts `start` and `stop`; an empty name is an end of the model.

    `..31` is a head, `31..` a tail, `20..31` a middle and `..` the whole model. `variant` names another graph of the
    same segment: `..31~int8` is a compressed head.

    Raises:
        ValueError: an end is neither empty nor a valid cut name, or the variant is no such name.
    """

    __slots__ = ()

    def __new__(cls, start: str = "", stop: str = "", variant: str = "") -> Self:
        for end in (start, stop):
            if end and not is_cut_name(end):
                raise ValueError(f"{end[:80]!r} cannot name a cut")
        if variant and not is_cut_name(variant):
            raise ValueError(f"{variant[:80]!r} cannot name a variant")
        return super().__new__(cls, f"{start}{_DOTS}{stop}{_TILDE * bool(variant)}{variant}")

    # pickle and copy rebuild from the parts; the default of `str` would pass the whole text as `start`.
    def __reduce__(self) -> tuple[type[Self], tuple[str, str, str]]:
        return type(self), (self.start, self.stop, self.variant)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse `FROM..TO`, or `FROM..TO~VARIANT`.

        Raises:
            ValueError: no `..` in `text`, an invalid cut name beside the dots, or an invalid variant.
        """
        start, dots, rest = text.partition(_DOTS)
        if not dots:
            raise ValueError(f"{text[:80]!r} is no segment id; an id is FROM..TO, each a cut's name or nothing")
        stop, tilde, variant = rest.partition(_TILDE)
        if tilde and not variant:
            raise ValueError(f"{text[:80]!r} names no variant behind the {_TILDE}")
        return cls(start, stop, variant)

    @property
    def start(self) -> str:
        """The cut before the segment; empty at the model's inputs."""
        return self.partition(_DOTS)[0]

    @property
    def stop(self) -> str:
        """The cut after the segment; empty at the model's outputs."""
        return self.partition(_DOTS)[2].partition(_TILDE)[0]

    @property
    def variant(self) -> str:
        """The name of the variant; empty for the segment as it was extracted."""
        return self.partition(_TILDE)[2]

    @property
    def plain(self) -> SegmentId:
        """The segment that a variant stands for."""
        return SegmentId(self.start, self.stop)


# The uncut model.
WHOLE = SegmentId()


def partition_ids(cuts: Iterable[str]) -> list[SegmentId]:
    """The segment ids of the partition at `cuts`, in order: n cuts make n + 1 segments."""
    return [SegmentId(start, stop) for start, stop in itertools.pairwise(("", *cuts, ""))]
