"""What is left to say of whole numbers when steps become a third: of each n, whether it is 3 n - 1, 3 n or 3 n + 1.

How likely these are follows from the models that the finer numbers have, so that numbers sent coarsely and then refined
take as many bits as the finer ones would have taken at once. docs/codecs.md, "Refining".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from isthmus.codecs.bytewise import Run
from isthmus.codecs.entropy import close, opened, written
from isthmus.codecs.levels import Models

Array = np.ndarray[Any, np.dtype[Any]]

_MAGNITUDES = 3
"""That have models of their own: 0, 1, and 2 with all above it."""
_TOGETHER = 4
_PLACES = 3 ** np.arange(_TOGETHER)[::-1]
_PLACES_AT_WORK = _PLACES.astype(np.float32)  # numpy multiplies no integers fast
_FOURS = np.ascontiguousarray(np.arange(3**_TOGETHER)[:, None] // _PLACES % 3, np.int8).view(np.uint32).reshape(-1)
"""The thirds that a symbol stands for, in the order of `itertools.product`, seen as one integer."""
_MIDDLE = 1


def encode(thirds: Array, coarse: Array, runs: Sequence[Run], models: Models) -> bytes:
    """The bytes of what makes whole numbers (n,) three times finer: -1, 0 or 1 for each, int8 (n,).

    `runs` are the finer numbers' levels.
    """
    order, pieces = _alike(coarse, runs)
    fours = np.full(pieces[-1][3] * _TOGETHER, _MIDDLE, np.int8)
    fours[: order.size] += (thirds * _away(coarse)).take(order)
    symbols = (fours.astype(np.float32).reshape(-1, _TOGETHER) @ _PLACES_AT_WORK).astype(np.int32)
    return written([(symbols[a:b], models.thirds(level, size, _TOGETHER)) for level, size, a, b in pieces])


def decode(data: memoryview, coarse: Array, runs: Sequence[Run], models: Models) -> Array:
    """The thirds that `encode` took; allocates no more than they ask for.

    Raises:
        ValueError: the data are not such numbers' bytes.
    """
    order, pieces = _alike(coarse, runs)
    coder = opened(data)
    symbols = [coder.decode(models.thirds(level, size, _TOGETHER), b - a) for level, size, a, b in pieces]
    close(coder)
    fours = _FOURS.take(np.concatenate(symbols), mode="clip").view(np.int8)
    if (fours[order.size :] != _MIDDLE).any():
        raise ValueError("the padding of a refinement is not zero")
    found = np.empty(order.size, np.int8)
    found[order] = fours[: order.size]
    found -= _MIDDLE
    found *= _away(coarse)
    return found


def _away(coarse: Array) -> Array:
    """What turns a third's direction to away from zero, and back: -1 or 1, int8 (n,)."""
    signs = (coarse < 0).view(np.int8)
    signs *= -2
    signs += 1
    return signs


def _alike(coarse: Array, runs: Sequence[Run]) -> tuple[Array, list[tuple[int, int, int, int]]]:
    """The numbers' order by magnitude, then level; and which fours have one model: a level, a magnitude, start, stop.

    A four of two models has the later one's.
    """
    magnitudes = np.minimum(np.abs(coarse), _MAGNITUDES - 1).astype(np.int8, copy=False)
    order = magnitudes.argsort(kind="stable")
    stops = [stop for _, _, stop in runs]
    pieces: list[tuple[int, int, int, int]] = []
    first = at = 0
    for magnitude in range(_MAGNITUDES):
        after = first + int(np.count_nonzero(magnitudes == magnitude))
        for (level, _, _), bound in zip(runs, order[first:after].searchsorted(stops).tolist(), strict=True):
            stop = first + bound
            fours = stop // _TOGETHER if stop < order.size else -(-stop // _TOGETHER)
            if at < fours:
                pieces.append((level, magnitude, at, fours))
                at = fours
        first = after
    return order, pieces
