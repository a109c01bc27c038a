"""The confidence of an exit: a ranking of inputs by how likely the exit's prediction is to fail.

A calibrated probability need not rank failures well. So a logistic regression on three statistics of the scores
predicts agreement with the model, and replaces the plain margin only where its ranking is better beyond chance.

Source: "failure prediction" of early exits, arXiv 2508.21495.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from isthmus.arrays import Array

STATISTICS = ("margin", "top probability", "entropy")
_FOLDS, _RESAMPLES = 5, 200
# The share of resamples with the learned ranking in front.
_SURE = 0.95
# Of squared weights; the statistics are standardised, and a separable sample would have no finite optimum.
_PENALTY = 1.0
_STEPS = 50
_MAX_TEMPERATURE = 1e4


@dataclass(frozen=True)
class ConfidenceRule:
    """Weights of the standardised statistics of scores, in the log-odds of agreement. Shapes: (3,), ()."""

    weights: Array
    bias: float
    is_learned: bool = False

    def __call__(self, scores: Array) -> Array:
        """Confidences. Shapes: (rows, classes) to (rows,)."""
        values: Array = statistics_of(scores) @ self.weights + self.bias
        return values


MARGIN = ConfidenceRule(np.array([1.0, 0.0, 0.0]), 0.0)
"""The margin alone, in nats."""


def statistics_of(scores: Array) -> Array:
    """Margin, top probability and entropy of rows of logits. Shapes: (rows, classes) to (rows, 3)."""
    x = scores.astype(np.float64)
    # Exponents of at most 0 cannot overflow.
    x = x - x.max(axis=1, keepdims=True)
    exponents = np.exp(x)
    total = exponents.sum(axis=1)
    top = np.partition(x, -2, axis=1)[:, -2:]
    # -Σ p log p, where log p is x - log total.
    entropy = np.log(total) - (exponents * x).sum(axis=1) / total
    return np.stack([top[:, 1] - top[:, 0], 1 / total, entropy], axis=1)


def temperature(scores: Array, classes: Array) -> float:
    """The factor of `scores` that gives their softmax the highest likelihood of `classes`, by bisection.

    Shapes: (rows, classes), (rows,).
    """
    x = scores.astype(np.float64)
    x -= x[np.arange(len(x)), classes][:, None]
    spread = float(np.abs(x).max()) or 1.0
    # Of the derivative: the likelihood is concave in the factor.
    low, high = 0.0, _MAX_TEMPERATURE / spread
    for _ in range(_STEPS):
        factor = (low + high) / 2
        weights = np.exp(factor * x - (factor * x).max(axis=1, keepdims=True))
        slope = float(((weights * x).sum(axis=1) / weights.sum(axis=1)).mean())
        low, high = (factor, high) if slope < 0 else (low, factor)
    return (low + high) / 2


def fit_rule(scores: Array, agrees: Array) -> ConfidenceRule:
    """Logistic regression from the statistics of `scores` to agreement, by Newton's method. Shapes: (rows, …)."""
    statistics = statistics_of(scores)
    mean, deviation = statistics.mean(axis=0), np.maximum(statistics.std(axis=0), 1e-12)
    x = np.concatenate([(statistics - mean) / deviation, np.ones((len(scores), 1))], axis=1)
    # The intercept is free but for what keeps the matrix regular.
    penalty = np.diag([_PENALTY, _PENALTY, _PENALTY, 1e-6])
    solution = np.zeros(x.shape[1])
    for _ in range(_STEPS):
        chance = 1 / (1 + np.exp(-np.clip(x @ solution, -30, 30)))
        gradient = x.T @ (chance - agrees) + penalty @ solution
        curvature = (x * (chance * (1 - chance))[:, None]).T @ x + penalty
        step = np.linalg.solve(curvature, gradient)
        solution -= step
        # Newton's steps square their error, so that the next would be rounding.
        if float(np.abs(step).max()) < 1e-9:
            break
    weights = solution[:3] / deviation
    return ConfidenceRule(weights, float(solution[3] - weights @ mean), is_learned=True)


def choose_rule(scores: Array, agrees: Array, limit: float, seed: int = 0) -> ConfidenceRule:
    """The learned rule where more inputs exit at `limit` than by the margin, in 95 of 100 resamples; else the margin.

    Each input is ranked by a rule that was fitted without its fold. Shapes: (rows, classes), (rows,).
    """
    # Without failures, or with nothing else, there is no ranking to learn.
    if agrees.all() or not agrees.any():
        return MARGIN
    margin, learned = MARGIN(scores), np.empty(len(scores))
    rng = np.random.default_rng(seed)
    folds = rng.permutation(len(scores)) % _FOLDS
    for fold in range(_FOLDS):
        learned[folds == fold] = fit_rule(scores[folds != fold], agrees[folds != fold])(scores[folds == fold])
    wins = 0
    for _ in range(_RESAMPLES):
        # Both rankings on the same resample: their difference varies less than either.
        rows = rng.integers(0, len(scores), len(scores))
        wins += share_at(learned[rows], agrees[rows], limit) > share_at(margin[rows], agrees[rows], limit)
    return fit_rule(scores, agrees) if wins >= _SURE * _RESAMPLES else MARGIN


def share_at(confidences: Array, agrees: Array, limit: float) -> float:
    """The share of inputs that exit at the lowest threshold where at most `limit` of all exit and disagree."""
    order = np.argsort(-confidences, kind="stable")
    failing = np.cumsum(~agrees[order])
    return float(np.count_nonzero(failing <= limit * len(agrees)) / len(agrees))
