"""A codec and its quality, as settings and documents write them, and what that means for the tensors of one hop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Self

from isthmus.bundle import TensorSpec
from isthmus.codecs import KNOWN, Packing, find

_EXACT = frozenset({"raw", "lossless/1", "photo/1"})
GRADED = frozenset({"sparse/1", "transform/1"})
"""Codecs that a quality means something to."""
SIDE = "lossless/1"
"""How tensors travel that are no activations: ids, masks, states of a counter."""

WIDEST_MARGIN = 1000.0
"""In nats; an answer that is clearer than this is sure whatever was sent."""
_ACTIVATIONS = frozenset({"float16", "bfloat16", "float32"})


@dataclass(frozen=True)
class Again:
    """A second look: where the answer's margin is below `margin` (nats), the tensors are sent again at `quality`."""

    quality: float
    margin: float

    def can_follow(self, codec: str, quality: float) -> bool:
        """Whether it is finer than that, of a codec with qualities, and has a margin above 0."""
        return codec in GRADED and quality < self.quality <= 1 and 0 < self.margin <= WIDEST_MARGIN


@dataclass(frozen=True)
class Choice:
    """How the tensors that cross one cut are packed: `int8/1`, or `transform/1@0.9` with a quality of 0 to 1.

    `transform/1@0.4+0.8:0.2` sends at 0.4, and at 0.8 where the margin of the answer is below 0.2; see `margin_of`.
    """

    codec: str
    quality: float = 1.0
    again: Again | None = None

    def __str__(self) -> str:
        text = f"{self.codec}@{self.quality:g}" if self.codec in GRADED else self.codec
        return text if self.again is None else f"{text}+{self.again.quality:g}:{self.again.margin:g}"

    @property
    def once(self) -> Choice:
        """The same without a second look."""
        return self if self.again is None else replace(self, again=None)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `str` writes; without a quality it is 1.

        Raises:
            ValueError: no codec of that name, or no such quality or second look.
        """
        first, plus, again = text.strip().partition("+")
        codec, at, quality = first.partition("@")
        if codec not in KNOWN or codec == "photo/1":
            raise ValueError(
                f"{codec!r} is no codec of tensors; known are {', '.join(k for k in KNOWN if k != 'photo/1')}"
            )
        if not at and not plus:
            return cls(codec)
        value = _number(quality) if at else 1.0
        if codec not in GRADED or not 0 <= value <= 1:
            raise ValueError(f"{text!r}: only {', '.join(sorted(GRADED))} has a quality, from 0 to 1")
        return cls(codec, value, _again(text, again, codec, value) if plus else None)


RAW = Choice("raw")


def _again(text: str, again: str, codec: str, quality: float) -> Again:
    finer, _, margin = again.partition(":")
    made = Again(_number(finer), _number(margin))
    if not made.can_follow(codec, quality):
        raise ValueError(
            f"{text!r}: a second look is a higher quality and a margin in nats, above 0 and at most {WIDEST_MARGIN:g},"
            " as in transform/1@0.4+0.8:0.2"
        )
    return made


def _number(text: str) -> float:
    """A finite number; -1 for anything else."""
    try:
        found = float(text)
    except ValueError:
        return -1.0
    return found if math.isfinite(found) else -1.0


def is_exact(packing: Choice | Packing) -> bool:
    """Whether it gives back the very bits, so that no answer can differ."""
    return packing.codec in _EXACT or (packing.codec == "sparse/1" and packing.quality >= 1)


def packings(
    specs: Iterable[TensorSpec], choice: Choice, table: Callable[[str], object] | None = None
) -> dict[str, Packing]:
    """How each tensor of one hop is packed: activations as `choice` says, everything else without a change.

    `table` gives a tensor's table by its name; it is asked for calibrated codecs only, and what it has none for is no
    activation: an attention mask, say, which calibration found to hold two values.
    """
    if choice.codec == "raw":
        return {}
    calibrated = find(choice.codec).calibrated
    made = {}
    for spec in specs:
        found = table(spec.name) if calibrated and table is not None and is_activation(spec) else None
        exact = not is_activation(spec) or (calibrated and found is None)
        made[spec.name] = Packing(SIDE) if exact else Packing(choice.codec, choice.quality, found)
    return made


def is_activation(spec: TensorSpec) -> bool:
    """Whether a codec that changes values may have this tensor: floats of at most 32 bits."""
    return spec.dtype in _ACTIVATIONS
