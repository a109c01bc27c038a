"""Least-squares repair: Gram matrices of a layer's inputs, what the removal of channels costs, and the refit weights.

A layer reads features x of fewer channels and is to give y, what it gave before: min_W Σ|xW - y|² + λ|W - W₀|² with W₀
its own weights for the channels that stay. The ridge pulls towards these, so that a direction that no input shows stays
as it was.

Sources: Hassibi and Stork, Optimal Brain Surgeon (1993): the cost of a removal with the best update of the rest; He et
al., arXiv 1707.06168, and Luo et al., ThiNet, arXiv 1707.06342: regression on what the unpruned network computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import linalg  # type: ignore[import-untyped]

from isthmus.arrays import Array

# Ridges tried, relative to the mean power of a feature.
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
# That of the choice of channels, which compares costs and fits nothing.
_CHOICE_RIDGE = 1e-4
# Channels go one at a time; of wider layers a few at a time.
_MAX_STEPS = 128


@dataclass
class GramSums:
    """Sums over samples, in float64. Shapes: features (F, F), cross (F, O), power and mean (O,) of the outputs."""

    features: Array
    cross: Array
    power: Array
    total: Array
    count: int = 0

    @classmethod
    def empty(cls, features: int, outputs: int) -> GramSums:
        """Sums of no samples."""
        zeros = np.zeros(outputs)
        return cls(np.zeros((features, features)), np.zeros((features, outputs)), zeros, zeros.copy())

    def add(self, x: Array, y: Array) -> None:
        """Add samples. Shapes: x (samples, F), y (samples, O)."""
        x, y = x.astype(np.float64), y.astype(np.float64)
        self.features += x.T @ x
        self.cross += x.T @ y
        self.power += np.square(y).sum(axis=0)
        self.total += y.sum(axis=0)
        self.count += len(x)

    def rows(self, kept: Array) -> GramSums:
        """The sums with these features alone."""
        return GramSums(self.features[np.ix_(kept, kept)], self.cross[kept], self.power, self.total, self.count)

    def loss(self, weights: Array) -> float:
        """Σ|xW - y|² of weights (F, O)."""
        quadratic = float(np.einsum("fo,fo->", weights, self.features @ weights))
        return float(self.power.sum()) - 2 * float(np.einsum("fo,fo->", weights, self.cross)) + quadratic

    @property
    def variance(self) -> float:
        """Σ|y - mean|², positive."""
        return max(float((self.power - np.square(self.total) / max(1, self.count)).sum()), 1e-12)


def merged(parts: Sequence[GramSums]) -> GramSums:
    """The sums over the samples of all parts."""
    return GramSums(
        np.sum([part.features for part in parts], axis=0),
        np.sum([part.cross for part in parts], axis=0),
        np.sum([part.power for part in parts], axis=0),
        np.sum([part.total for part in parts], axis=0),
        sum(part.count for part in parts),
    )


def refit(sums: GramSums, start: Array, ridge: float) -> Array:
    """The weights (F, O) that minimise Σ|xW - y|² + λ|W - start|²; `ridge` is λ over the features' mean power."""
    system = _with_ridge(sums.features, ridge)
    return np.asarray(start + linalg.solve(system, sums.cross - sums.features @ start, assume_a="pos"))


def repaired(folds: Sequence[GramSums], start: Array) -> Array:
    """The refit weights, by the ridge that fits the samples of the other fold best.

    The layer's own weights where no ridge fits those better than these do.
    """
    one, other = folds
    losses = {r: other.loss(refit(one, start, r)) + one.loss(refit(other, start, r)) for r in RIDGES}
    best = min(losses, key=losses.__getitem__)
    if losses[best] > one.loss(start) + other.loss(start):
        return start
    return refit(merged(folds), start, best)


def _with_ridge(features: Array, ridge: float) -> Array:
    # Features that are all zero have no power to relate to.
    power = float(np.trace(features)) / len(features) or 1.0
    return features + ridge * power * np.eye(len(features))


@dataclass(frozen=True)
class ReadingLayer:
    """A layer that reads the channels: its weights (C * block, O), and the sums of its features (C * block, + 1).

    The last feature is 1, for the bias, where the sums have one more than the weights.
    """

    weights: Array
    block: int
    sums: GramSums


@dataclass(frozen=True)
class Elimination:
    """The order in which channels go, the first one first, and the relative loss after each."""

    order: tuple[int, ...]
    losses: tuple[float, ...]


def eliminate(layers: Sequence[ReadingLayer], channels: int, least: int) -> Elimination:
    """Remove the channels one by one, the cheapest first, down to `least`.

    The cost of a removal is what the outputs of the layers that read the channels lose when all that stays is refit,
    relative to the outputs' variance, summed over the layers.
    """
    states = [_Remaining(layer) for layer in layers]
    left, order, losses, loss = np.arange(channels), list[int](), list[float](), 0.0
    step = max(1, channels // _MAX_STEPS)
    while len(left) > least:
        costs = np.sum([state.costs() for state in states], axis=0)
        cheapest = np.argsort(costs, kind="stable")[: min(step, len(left) - least)]
        loss += sum(state.remove(cheapest) for state in states)
        order += left[cheapest].tolist()
        losses += [loss] * len(cheapest)
        left = np.delete(left, cheapest)
    return Elimination(tuple(order), tuple(losses))


class _Remaining:
    """The inverse Gram matrix and the weights of what stays of a layer. Shapes: (F, F), (F, O)."""

    def __init__(self, layer: ReadingLayer) -> None:
        self._block, self._variance = layer.block, layer.sums.variance
        self._inverse = linalg.inv(_with_ridge(layer.sums.features, _CHOICE_RIDGE))
        # The bias's feature never goes; its weights only take up what others leave.
        self._weights = np.zeros((len(self._inverse), layer.weights.shape[1]))
        self._weights[: len(layer.weights)] = layer.weights
        self._channels = len(layer.weights) // layer.block

    def costs(self) -> Array:
        """The relative cost of each channel: wᵀ [(G⁻¹)ⱼⱼ]⁻¹ w of its block of features."""
        places = np.arange(self._channels * self._block).reshape(-1, self._block)
        blocks = self._inverse[places[:, :, None], places[:, None, :]]  # (channels, block, block)
        weights = self._weights[places]  # (channels, block, outputs)
        return np.asarray(np.einsum("cbo,cbo->c", weights, np.linalg.solve(blocks, weights)) / self._variance)

    def remove(self, channels: Array) -> float:
        """Remove channels, with the best update of the rest; returns the relative loss."""
        gone = (channels[:, None] * self._block + np.arange(self._block)).reshape(-1)
        weights = self._weights[gone]
        solved = np.linalg.solve(self._inverse[np.ix_(gone, gone)], np.hstack([weights, self._inverse[gone]]))
        outputs = weights.shape[1]
        loss = float(np.einsum("fo,fo->", weights, solved[:, :outputs])) / self._variance
        columns = self._inverse[:, gone]
        # Schur complement: what stays is the inverse of the remaining features' own matrix.
        self._weights = np.delete(self._weights - columns @ solved[:, :outputs], gone, axis=0)
        inverse = self._inverse - columns @ solved[:, outputs:]
        self._inverse = np.delete(np.delete(inverse, gone, axis=0), gone, axis=1)
        self._channels -= len(channels)
        return loss
