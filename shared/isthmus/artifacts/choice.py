"""A codec and its quality, as settings and documents write them: the ids of the codecs, and the choice of one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Self

from msgspec import Meta, Struct

from isthmus.artifacts.constraints import Share, one_of

RAW_ID = "raw"
LOSSLESS_ID = "lossless/3"
SPARSE_ID = "sparse/2"
TRANSFORM_ID = "transform/4"
PHOTO_ID = "photo/1"

KNOWN: tuple[str, ...] = (
    RAW_ID,
    "half/1",
    "bfloat16/1",
    LOSSLESS_ID,
    "int8/1",
    "int4/1",
    SPARSE_ID,
    TRANSFORM_ID,
    PHOTO_ID,
)
"""Every codec's id; a frame that names another is refused."""
_SUCCESSORS: Mapping[str, str] = {"transform/3": TRANSFORM_ID}
"""Earlier ids whose tables and sizes hold for a codec of today. Their payloads are refused."""
NEVER_CHOSEN = frozenset({PHOTO_ID})
"""Codecs that nobody chooses for boundary tensors: `photo/1` carries the photo itself."""


BoundaryCodecId = Annotated[str, one_of(*(codec for codec in KNOWN if codec not in NEVER_CHOSEN), *_SUCCESSORS)]
CodecId = Annotated[str, one_of(*KNOWN, *_SUCCESSORS)]
"""A codec in a document; an earlier id stands for its successor."""


def successor(codec: str) -> str:
    """The id that a codec named in a setting, plan or fidelity document has today; itself if it has no successor."""
    return _SUCCESSORS.get(codec, codec)


GRADED = frozenset({SPARSE_ID, TRANSFORM_ID})
"""Codecs that a quality means something to."""

MAX_MARGIN = 1000.0
"""In nats; an answer that is clearer than this is sure whatever was sent."""


Margin = Annotated[float, Meta(gt=0, le=MAX_MARGIN)]

MAX_LOOKS = 4
"""Closer looks that a choice may have; each is one more call."""


class Look(Struct, frozen=True, forbid_unknown_fields=True):
    """A closer look: where the prediction's margin is below `margin` (nats), the tensors are sent at `quality`."""

    quality: Share
    margin: Margin


@dataclass(frozen=True)
class Choice:
    """How the tensors that cross one cut are packed: `int8/1`, or `transform/4@0.9` with a quality of 0 to 1.

    `transform/4@0.2+0.4:1.5+0.6:0.7` sends at 0.2, at 0.4 where the margin of the answer is below 1.5, and at 0.6 where
    that of the next answer is below 0.7; see `margin_of`.
    """

    codec: str
    quality: float = 1.0
    looks: tuple[Look, ...] = ()

    def __str__(self) -> str:
        text = f"{self.codec}@{self.quality:g}" if self.codec in GRADED else self.codec
        return "".join([text, *(f"+{look.quality:g}:{look.margin:g}" for look in self.looks)])

    @property
    def once(self) -> Choice:
        """The same without closer looks."""
        return replace(self, looks=()) if self.looks else self

    @property
    def last(self) -> Choice:
        """What the last look sends, for every answer."""
        return Choice(self.codec, self.looks[-1].quality) if self.looks else self

    def is_valid(self) -> bool:
        """Whether looks are of a codec with qualities, each finer than the one before, with a margin above 0."""
        qualities = [self.quality, *(look.quality for look in self.looks)]
        return not self.looks or (
            self.codec in GRADED
            and len(self.looks) <= MAX_LOOKS
            and all(a < b <= 1 for a, b in itertools.pairwise(qualities))
            and all(0 < look.margin <= MAX_MARGIN for look in self.looks)
        )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `str` writes; without a quality it is 1. Numbers are kept to six digits, as `str` writes them.

        Raises:
            ValueError: no codec of that name, or no such quality or looks.
        """
        first, *looks = text.strip().split("+")
        name, at, quality = first.partition("@")
        codec = successor(name)
        if codec not in KNOWN or codec in NEVER_CHOSEN:
            known = ", ".join(k for k in KNOWN if k not in NEVER_CHOSEN)
            raise ValueError(f"{codec!r} is no codec of tensors; known are {known}")
        if not at and not looks:
            return cls(codec)
        value = _number(quality) if at else 1.0
        if codec not in GRADED or not 0 <= value <= 1:
            raise ValueError(f"{text!r}: only {', '.join(sorted(GRADED))} has a quality, from 0 to 1")
        choice = cls(codec, value, tuple(_look(look) for look in looks))
        if not choice.is_valid():
            raise ValueError(
                f"{text!r}: a closer look is a higher quality and a margin in nats, above 0 and at most"
                f" {MAX_MARGIN:g}, as in transform/4@0.2+0.4:1.5; at most {MAX_LOOKS} follow one another"
            )
        return choice


RAW = Choice("raw")


def _look(text: str) -> Look:
    quality, _, margin = text.partition(":")
    return Look(_number(quality), _number(margin))


def _number(text: str) -> float:
    """A finite number, to the six digits that `str` writes; -1 for anything else."""
    try:
        number = float(f"{float(text):g}")
    except ValueError:
        return -1.0
    return number if math.isfinite(number) else -1.0
