"""The average of the nodes' changes of the weights, by their numbers of examples, and the server's momentum.

Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017; the
momentum: Hsu et al., "Measuring the Effects of Non-Identical Data Distribution", arXiv 1909.06335.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from isthmus.arrays import Array
from isthmus.errors import LearningError, ShapeMismatch

Weights = Mapping[str, Array]
# Sums of that many nodes' numbers stay within the whole numbers of a float64.
MAX_EXAMPLES = 10**9
# Between the largest weight and the end of its dtype's range.
_HEADROOM = 1024
STATISTICS = "input:"
"""Before the names of the inputs' statistics among the weights; no name of a weight has a colon."""


@dataclass(frozen=True)
class NodeUpdate:
    """The change of the weights by a node's training in a round, and the number of examples behind it."""

    node: str
    examples: int
    change: Weights


def check_update(update: NodeUpdate, weights: Weights) -> None:
    """Refuse a change that would spoil the average.

    Raises:
        ShapeMismatch: other names, dtypes or shapes than the weights'.
        LearningError: NaN or infinity, weights near the end of their dtype's range, or a number of examples out of
            range.
    """
    if not weights:
        raise ShapeMismatch("there are no weights to average")
    if missing := sorted(set(weights) ^ set(update.change)):
        raise ShapeMismatch(f"the update lacks or adds {missing[0]!r}", tensor=missing[0])
    for name, array in update.change.items():
        if (array.dtype, array.shape) != (weights[name].dtype, weights[name].shape):
            raise ShapeMismatch(
                f"{name} is {array.dtype} {list(array.shape)}",
                tensor=name,
                expected=f"{weights[name].dtype} {list(weights[name].shape)}",
                got=f"{array.dtype} {list(array.shape)}",
            )
        # A single NaN would spread to all weights, and to every node with the next round.
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise LearningError(
                f"{name} of the node {update.node} holds NaN or infinity",
                hint="its training diverged: a lower learning rate",
            )
        # Finite changes of a few rounds, with the server's momentum, may add up to infinity.
        if array.dtype.kind == "f" and array.size:
            largest = float(np.max(np.abs(np.asarray(weights[name], np.float64) + array)))
            if largest > float(np.finfo(array.dtype).max) / _HEADROOM:
                raise LearningError(
                    f"{name} of the node {update.node} would become {largest:.3g}",
                    hint="its training diverged: a lower learning rate",
                )
    if not 1 <= update.examples <= MAX_EXAMPLES:
        raise LearningError(f"the node {update.node} has {update.examples} examples; 1 to {MAX_EXAMPLES} count")


def average(updates: Sequence[NodeUpdate]) -> dict[str, Array]:
    """The mean change, each node's weighted by its examples; of integers, counters mostly, the largest."""
    # In the order of names: the order of arrival must not show in the weights.
    updates = sorted(updates, key=lambda update: update.node)
    total = sum(update.examples for update in updates)
    mean: dict[str, Array] = {}
    for name, first in updates[0].change.items():
        if first.dtype.kind != "f":
            mean[name] = np.asarray(np.max([update.change[name] for update in updates], axis=0), first.dtype)
            continue
        parts = [np.float64(update.examples / total) * update.change[name] for update in updates]
        mean[name] = np.asarray(np.sum(parts, axis=0, dtype=np.float64), first.dtype)
    return mean


def moved(
    weights: Weights, change: Weights, velocity: Weights, momentum: float
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The weights after a round, and the velocity: change + momentum × velocity before."""
    new: dict[str, Array] = {}
    speed: dict[str, Array] = {}
    for name, array in weights.items():
        # Statistics are set once, and do not move on.
        is_float = array.dtype.kind == "f" and not name.startswith(STATISTICS)
        total = change[name] + momentum * velocity[name] if is_float and name in velocity else change[name]
        # Arithmetic on arrays without axes gives numpy's scalars.
        speed[name] = np.asarray(total, array.dtype)
        new[name] = np.asarray(array + speed[name], array.dtype)
    return new, speed
