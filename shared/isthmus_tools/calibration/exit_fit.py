"""Fit of an exit branch: ridge regression from the residual stream at a cut to what the final norm gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isthmus.arrays import Array
from isthmus.errors import CalibrationError
from isthmus_tools.graph.decoder.exits import EPSILON

# In variances of a normalised channel; measured flat from 1 to 1,000 for SmolLM2.
_RIDGE = 30.0


@dataclass(frozen=True)
class LinearMap:
    """The map x W + b of normalised residual streams. Shapes: weights (width, width), bias (width,)."""

    weights: Array
    bias: Array

    def __call__(self, stream: Array) -> Array:
        """What the final norm would give. Shapes: (tokens, width) both."""
        return normalised(stream) @ self.weights + self.bias


def fit(stream: Array, final: Array) -> LinearMap:
    """The ridge regression's closed form. Shapes: (tokens, width) both.

    Raises:
        CalibrationError: fewer tokens than channels.
    """
    if len(stream) < stream.shape[1]:
        raise CalibrationError(
            f"{len(stream)} tokens to fit a map of {stream.shape[1]} channels; more text or more --tokens are needed"
        )
    x = np.concatenate([normalised(stream), np.ones((len(stream), 1))], axis=1)
    penalty = _RIDGE * np.eye(x.shape[1])
    # The bias is the mean, which no penalty should pull to zero.
    penalty[-1, -1] = 0.0
    # In float64: the sums of products of some 10,000 tokens lose digits otherwise.
    solved = np.linalg.solve(x.T @ x + penalty, x.T @ final.astype(np.float64))
    return LinearMap(solved[:-1], solved[-1])


def normalised(stream: Array) -> Array:
    """Rows of a root mean square of 1: the residual stream grows by orders of magnitude at single positions."""
    rows = stream.astype(np.float64)
    scaled: Array = rows / np.sqrt((rows**2).mean(axis=-1, keepdims=True) + EPSILON)
    return scaled


def offered_tokens(seen: Sequence[int], vocabulary: int, count: int) -> Array:
    """`count` ids that a branch chooses among: those seen, then the lowest.

    Byte-pair encodings number their tokens from frequent to rare.
    """
    ids = dict.fromkeys((*seen, *range(min(vocabulary, count))))
    return np.array(sorted(list(ids)[:count]), np.int64)
