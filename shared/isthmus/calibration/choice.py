"""A codec and its quality, as settings and documents write them, and what that means for the tensors of one hop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Self

from isthmus.bundle import TensorSpec
from isthmus.codecs import KNOWN, Packing, find

_EXACT = frozenset({"raw", "lossless/1", "photo/1"})
GRADED = frozenset({"sparse/1", "transform/1"})
"""Codecs that a quality means something to."""
SIDE = "lossless/1"
"""How tensors travel that are no activations: ids, masks, states of a counter."""

_ACTIVATIONS = frozenset({"float16", "bfloat16", "float32"})


@dataclass(frozen=True)
class Choice:
    """How the tensors that cross one cut are packed: `int8/1`, or `transform/1@0.9` with a quality of 0 to 1."""

    codec: str
    quality: float = 1.0

    def __str__(self) -> str:
        return f"{self.codec}@{self.quality:g}" if self.codec in GRADED else self.codec

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `str` writes; without a quality it is 1.

        Raises:
            ValueError: no codec of that name, or no such quality.
        """
        codec, at, quality = text.strip().partition("@")
        if codec not in KNOWN or codec == "photo/1":
            raise ValueError(
                f"{codec!r} is no codec of tensors; known are {', '.join(k for k in KNOWN if k != 'photo/1')}"
            )
        if not at:
            return cls(codec)
        try:
            value = float(quality)
        except ValueError:
            value = -1.0
        if codec not in GRADED or not 0 <= value <= 1:
            raise ValueError(f"{text!r}: only {', '.join(sorted(GRADED))} has a quality, from 0 to 1")
        return cls(codec, value)


RAW = Choice("raw")


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
