"""Codec ids, and the choice of a codec and quality in the text form of settings and documents."""

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

# All codec ids; frames with any other id are refused.
CODEC_IDS: tuple[str, ...] = (
    RAW_ID,
    "half/1",
    "bfloat16/1",
    LOSSLESS_ID,
    "int8/1",
    "int4/1",
    "int8-token/1",
    SPARSE_ID,
    TRANSFORM_ID,
    PHOTO_ID,
)
# Ids of earlier versions whose tables and sizes hold for a current codec. Payloads of the earlier ids are refused.
_SUCCESSORS: Mapping[str, str] = {"transform/3": TRANSFORM_ID}
# Codecs of model inputs, not of boundary tensors: `photo/1` carries the encoded photo.
INPUT_CODECS = frozenset({PHOTO_ID})


# Codecs under which a token decodes to the same values in a step of its own and beside other tokens. A language model
# takes these alone: its tokens must not depend on chunks of a prompt, speculation or replay.
TOKEN_CODECS = (RAW_ID, "half/1", "bfloat16/1", LOSSLESS_ID, "int8-token/1", TRANSFORM_ID)

BoundaryCodecId = Annotated[str, one_of(*(codec for codec in CODEC_IDS if codec not in INPUT_CODECS), *_SUCCESSORS)]
# A codec id in a document; an earlier id means its successor.
CodecId = Annotated[str, one_of(*CODEC_IDS, *_SUCCESSORS)]


def successor(codec: str) -> str:
    """The current id of a codec named in a setting, plan or fidelity document; `codec` itself if current."""
    return _SUCCESSORS.get(codec, codec)


# Codecs with a quality.
GRADED = frozenset({SPARSE_ID, TRANSFORM_ID})

# In nats. At this margin the odds of the two likeliest classes are e^1000 : 1, beyond the range of a float.
MAX_MARGIN = 1000.0


Margin = Annotated[float, Meta(gt=0, le=MAX_MARGIN)]

# Closer looks per choice; each costs a call.
MAX_LOOKS = 4


class Look(Struct, frozen=True, forbid_unknown_fields=True):
    """A closer look (confidence-gated second transmission): below `margin` (nats) the tensors are sent again at
    `quality`.
    """

    quality: Share
    margin: Margin


@dataclass(frozen=True)
class Choice:
    """The codec of the tensors at a cut: `int8/1`, or `transform/4@0.9` with a quality of 0 to 1.

    `transform/4@0.2+0.4:1.5+0.6:0.7` transmits at quality 0.2; at 0.4 if the margin of the prediction is below 1.5; and
    at 0.6 if the margin of the second prediction is below 0.7. Margins are those of `margin_of`.
    """

    codec: str
    quality: float = 1.0
    looks: tuple[Look, ...] = ()

    def __str__(self) -> str:
        text = f"{self.codec}@{self.quality:g}" if self.codec in GRADED else self.codec
        return "".join([text, *(f"+{look.quality:g}:{look.margin:g}" for look in self.looks)])

    @property
    def once(self) -> Choice:
        """This choice without closer looks."""
        return replace(self, looks=()) if self.looks else self

    @property
    def last(self) -> Choice:
        """The choice of the last closer look, for every input."""
        return Choice(self.codec, self.looks[-1].quality) if self.looks else self

    def is_valid(self) -> bool:
        """Whether the codec admits closer looks, with rising qualities and margins above 0."""
        qualities = [self.quality, *(look.quality for look in self.looks)]
        return not self.looks or (
            self.codec in GRADED
            and len(self.looks) <= MAX_LOOKS
            and all(a < b <= 1 for a, b in itertools.pairwise(qualities))
            and all(0 < look.margin <= MAX_MARGIN for look in self.looks)
        )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse the text form; the default quality is 1. Numbers are rounded to six digits, as in `str`.

        Raises:
            ValueError: unknown codec, quality out of range, or invalid closer looks.
        """
        first, *looks = text.strip().split("+")
        name, at, quality = first.partition("@")
        codec = successor(name)
        if codec not in CODEC_IDS or codec in INPUT_CODECS:
            accepted = ", ".join(k for k in CODEC_IDS if k not in INPUT_CODECS)
            raise ValueError(f"{codec!r} is no codec of tensors; known are {accepted}")
        # Without a quality every codec is valid; a quality is refused below for codecs that ignore quality.
        if not at and not looks:
            return cls(codec)
        value = _number(quality) if at else 1.0
        if codec not in GRADED or not 0 <= value <= 1:
            raise ValueError(f"{text!r}: only {', '.join(sorted(GRADED))} has a quality, from 0 to 1")
        # Validated by the same rule as documents.
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
    """A finite number rounded to the six digits of `str`; -1 for any other text, so that range checks refuse it."""
    try:
        number = float(f"{float(text):g}")
    except ValueError:
        return -1.0
    return number if math.isfinite(number) else -1.0
