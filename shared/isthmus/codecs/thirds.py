"""What is left to say of whole numbers when steps become a third: of each n, whether it is 3 n - 1, 3 n or 3 n + 1.

How likely these are follows from the models that the finer numbers have, so that numbers sent coarsely and then refined
take as many bits as the finer ones would have taken at once. docs/codecs.md, "Refining".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from isthmus.codecs.ans import Codebook, Decoder, Encoder
from isthmus.codecs.bytewise import Run
from isthmus.codecs.levels import Models

Array = np.ndarray[Any, np.dtype[Any]]

_MAGNITUDES = 3
"""That have models of their own: 0, 1, and 2 with all above it."""
_TOGETHER = 4
_PLACES = 3 ** np.arange(_TOGETHER)[::-1]
_PLACES_AT_WORK = _PLACES.astype(np.float32)  # numpy multiplies no integers fast
_FOURS = np.ascontiguousarray(np.arange(3**_TOGETHER)[:, None] // _PLACES % 3, np.int8).view(np.uint32).reshape(-1)
"""The digits that a symbol stands for, in the order of `itertools.product`, seen as one integer."""


def encode(thirds: Array, coarse: Array, runs: Sequence[Run], models: Models) -> bytes:
    """The bytes of what makes whole numbers (n,) three times finer: -1, 0 or 1 for each, int8 (n,).

    `runs` are the finer numbers' levels.
    """
    order, zeros, bounds, codebook = _alike(coarse, runs, models)
    sorted_thirds = (thirds * _away(coarse)).take(order)
    digits = np.zeros(bounds[-1] * _TOGETHER, np.int8)
    digits[:zeros] = sorted_thirds[:zeros] != 0
    digits[zeros : order.size] = sorted_thirds[zeros:] + 1
    symbols = (digits.astype(np.float32).reshape(-1, _TOGETHER) @ _PLACES_AT_WORK).astype(np.uint8)
    coder = Encoder()
    coder.add(symbols, bounds, codebook)
    return coder.finish((sorted_thirds[:zeros][digits[:zeros] != 0] < 0).view(np.uint8))


def decode(data: memoryview, coarse: Array, runs: Sequence[Run], models: Models) -> Array:
    """The thirds that `encode` took; allocates no more than they ask for.

    Raises:
        ValueError: the data are not such numbers' bytes.
    """
    order, zeros, bounds, codebook = _alike(coarse, runs, models)
    coder = Decoder(data)
    digits = _FOURS.take(coder.take(bounds, codebook)).view(np.int8)
    if digits[order.size :].any():
        raise ValueError("the padding of a refinement is not zero")
    digits = digits[: order.size]
    digits[zeros:] -= 1
    ones = digits[:zeros].nonzero()[0]
    digits[ones[coder.finish(ones.size).take(ones.size).view(np.bool_)]] = -1
    found = np.empty(order.size, np.int8)
    found[order] = digits
    found *= _away(coarse)
    return found


def _away(coarse: Array) -> Array:
    """What turns a third's direction to away from zero, and back: -1 or 1, int8 (n,)."""
    signs = (coarse < 0).view(np.int8)
    signs *= -2
    signs += 1
    return signs


def _alike(coarse: Array, runs: Sequence[Run], models: Models) -> tuple[Array, int, list[int], Codebook]:
    """The numbers' order by magnitude, then level; how many are 0; and the bounds of fours that have one model.

    A four of two models has the later one's.
    """
    magnitudes = np.minimum(np.abs(coarse), _MAGNITUDES - 1).astype(np.int8, copy=False)
    order = magnitudes.argsort(kind="stable")
    counts = np.bincount(magnitudes, minlength=_MAGNITUDES).tolist()
    stops = [stop for _, _, stop in runs]
    bounds, found, first = [0], [], 0
    for magnitude, count in enumerate(counts):
        for (level, _, _), bound in zip(runs, order[first : first + count].searchsorted(stops).tolist(), strict=True):
            stop = first + bound
            fours = stop // _TOGETHER if stop < order.size else -(-stop // _TOGETHER)
            if bounds[-1] < fours:
                bounds.append(fours)
                found.append(models.thirds(level, magnitude, _TOGETHER))
        first += count
    return order, counts[0], bounds, Codebook(found)
