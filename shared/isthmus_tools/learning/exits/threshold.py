"""The threshold of a gate: the lowest confidence that keeps the joint risk under its limit, with high probability.

Thresholds are tested from the strictest on, and the first that fails ends the sequence (fixed-sequence testing), so
that every test has the full level. The joint risk P(exits and fails) falls with the threshold; so the sequence may
run over the held-out confidences themselves.

Source: Angelopoulos et al., "Learn then Test" (arXiv 2110.01052); Bates et al., "Distribution-free, risk-controlling
prediction sets" (J. ACM 68, 2021) for the monotone risk; Clopper, Pearson, Biometrika 26 (1934).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import betaincinv  # type: ignore[import-untyped]

from isthmus.arrays import Array


@dataclass(frozen=True)
class ChosenThreshold:
    """A threshold on held-out inputs: `exiting` exit, `failing` of these count as risk.

    `bound` is the upper bound of the joint risk.
    """

    threshold: float
    exiting: int
    failing: int
    bound: float


def upper_bound(failing: int, inputs: int, confidence: float) -> float:
    """The one-sided upper bound of Clopper and Pearson on the rate behind `failing` of `inputs`."""
    if failing >= inputs:
        return 1.0
    return float(betaincinv(failing + 1, inputs - failing, confidence))


def inputs_needed(limit: float, confidence: float) -> int:
    """The fewest held-out inputs that can bound the risk by `limit`, without a single failure."""
    count = math.ceil(math.log(1 - confidence) / math.log1p(-limit))
    # The logarithms round: the bound itself decides.
    return count if upper_bound(0, count, confidence) <= limit else count + 1


def choose_threshold(confidences: Array, fails: Array, limit: float, confidence: float) -> ChosenThreshold | None:
    """The lowest of the held-out `confidences` with a bound of the joint risk of at most `limit`.

    `fails` marks inputs that would count as risk if these exited. None where even the surest exits exceed the limit.
    Shapes: (inputs,) both.
    """
    count = len(confidences)
    # NaN is no confidence: an input without never exits.
    values = np.where(np.isnan(confidences), -np.inf, confidences)
    order = np.argsort(-values, kind="stable")
    lowest, failing = None, 0
    for position, index in enumerate(order):
        if values[index] == -np.inf:
            break
        failing += bool(fails[index])
        # Inputs of equal confidence exit together, so that the test waits for the last.
        if position + 1 < count and values[order[position + 1]] == values[index]:
            continue
        bound = upper_bound(failing, count, confidence)
        if bound > limit:
            break
        lowest = ChosenThreshold(float(values[index]), position + 1, failing, bound)
    return lowest
