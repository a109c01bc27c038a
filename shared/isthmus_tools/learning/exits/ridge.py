"""Ridge regression in closed form, its penalty by leave-one-out from a single eigendecomposition.

With the eigenvalues s and vectors V of the standardised features' Gram matrix, every penalty λ costs a product: the
prediction of a row left out is (ŷ - h y) / (1 - h), where h is the row's leverage under λ.

Source: Golub, Heath, Wahba, Technometrics 21 (1979); Allen, Technometrics 16 (1974), the PRESS statistic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from isthmus.arrays import Array

# Of the number of rows, as a standardised feature's sum of squares is.
PENALTIES = tuple(10.0**exponent for exponent in np.arange(-6, 1.5, 0.5))
# Rows of a product: bounds the memory beside the Gram matrix.
_BATCH = 1024
# Variance below this part of the mean square is rounding: a constant feature, left out.
_MIN_VARIANCE = 1e-10


@dataclass(frozen=True)
class LinearHead:
    """The map ((x - mean) * scale) @ weights + bias. Shapes: (features,) twice, (features, classes), (classes,)."""

    mean: Array
    scale: Array
    weights: Array
    bias: Array

    def __call__(self, features: Array) -> Array:
        """Scores. Shapes: (rows, features) to (rows, classes)."""
        scores: Array = ((features - self.mean) * self.scale) @ self.weights + self.bias
        return scores


@dataclass(frozen=True)
class RidgeFit:
    """A head, its penalty (a part of the rows), and the scores of each row by the head fitted without that row.

    `error` is the mean squared error of these scores. Shapes: left_out (rows, classes) float32.
    """

    head: LinearHead
    penalty: float
    left_out: Array
    error: float


class RidgeSolver:
    """The decomposed Gram matrix of features, for any number of targets. Shapes: features (rows, features)."""

    def __init__(self, features: Array) -> None:
        self._features, self._count = features, len(features)
        total, products = _sums(features)  # (features,), (features, features)
        self._mean = total / self._count
        centred = products - self._count * np.outer(self._mean, self._mean)
        variance = np.maximum(np.diag(centred) / self._count, 0)
        is_constant = variance <= _MIN_VARIANCE * np.diag(products) / self._count
        self._scale = np.where(is_constant, 0, 1 / np.sqrt(np.where(is_constant, 1, variance)))
        values, self._vectors = np.linalg.eigh(centred * np.outer(self._scale, self._scale))
        # Rounding makes zeros slightly negative.
        self._values = np.maximum(values, 0)

    def fit(self, targets: Array, penalties: tuple[float, ...] = PENALTIES) -> RidgeFit:
        """The head of `targets`, with the penalty of the least leave-one-out error. Shapes: (rows, classes)."""
        middle = targets.mean(axis=0, dtype=np.float64)
        projected = np.zeros((len(self._values), targets.shape[1]))  # (eigenvectors, classes)
        for rows, z in self._projections():
            projected += z.T @ (targets[rows] - middle)
        damped = np.stack([self._damped(penalty) for penalty in penalties])  # (penalties, features)
        squares = np.zeros(len(penalties))
        for rows, z in self._projections():
            leverages = np.square(z) @ (1 / damped).T
            for index in range(len(penalties)):
                errors = targets[rows] - middle - z @ (projected / damped[index][:, None])
                squares[index] += np.square(errors / self._remainder(leverages[:, index])).sum()
        # The first of equal errors has the smaller penalty.
        best = int(squares.argmin())
        left_out = np.empty(targets.shape, np.float32)
        solved = projected / damped[best][:, None]
        for rows, z in self._projections():
            errors = targets[rows] - middle - z @ solved
            left_out[rows] = targets[rows] - errors / self._remainder(np.square(z) @ (1 / damped[best]))
        head = LinearHead(self._mean, self._scale, self._vectors @ solved, middle)
        return RidgeFit(head, penalties[best], left_out, float(squares[best] / targets.size))

    def _damped(self, penalty: float) -> Array:
        # Directions without variance get no weight rather than a division by zero.
        damped: Array = np.where(self._values > 0, self._values + penalty * self._count, np.inf)
        return damped

    def _remainder(self, leverage: Array) -> Array:
        """1 - leverage of rows, a column; the mean takes a share 1 / rows of every row too."""
        # A row alone in its direction has leverage 1: its score left out would be any number.
        remainder: Array = np.maximum(1 - leverage - 1 / self._count, 1e-9)[:, None]
        return remainder

    def _projections(self) -> Iterator[tuple[slice, Array]]:
        for rows in _batches(self._count):
            standard = (self._features[rows].astype(np.float64) - self._mean) * self._scale
            yield rows, standard @ self._vectors


def _sums(features: Array) -> tuple[Array, Array]:
    """The sum of rows and of their outer products, in float64."""
    width = features.shape[1]
    total, products = np.zeros(width), np.zeros((width, width))
    for rows in _batches(len(features)):
        # In float64: sums of thousands of products lose digits otherwise.
        x = features[rows].astype(np.float64)
        total += x.sum(axis=0)
        products += x.T @ x
    return total, products


def _batches(count: int) -> Iterator[slice]:
    return (slice(start, min(start + _BATCH, count)) for start in range(0, count, _BATCH))
