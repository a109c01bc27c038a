"""The quantiser steps of `transform/4`: whole numbers, of which thirteen are a factor of three.

Source: docs/codecs.md, "transform/4".
"""

from __future__ import annotations

import math
from functools import lru_cache

THIRD = 13
"""How much lower the number of a third of a step is."""
FACTOR = 3


def size_of(step: int) -> float:
    """A step in units."""
    return float(FACTOR ** (step / THIRD))


def in_eighths(step: int) -> int:
    """A step's size in eighths of an octave above one unit, rounded: 3^(1/13) is 2^(0.975/8)."""
    return (39 * step + 20) // 40


@lru_cache(maxsize=1024)
def step_of(quality: float, steps: tuple[int, int]) -> int:
    """The step of a quality from 0 (the coarsest of `steps`) to 1 (the finest).

    Raises:
        ValueError: the quality is not in that range.
    """
    if not 0 <= quality <= 1:
        raise ValueError(f"a quality is a number from 0 to 1, not {quality}")
    coarsest, finest = steps
    # Halves all go one way, so that qualities a factor of three apart are always whole steps apart.
    return math.floor(round(coarsest + (finest - coarsest) * quality, 6) + 0.5)
