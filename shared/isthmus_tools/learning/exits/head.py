"""The fit of a cut's exit: a ridge head for each kind of target, the better head's temperature and confidence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np

from isthmus.arrays import Array
from isthmus_tools.graph.exit_branch import BranchWeights
from isthmus_tools.learning.exits.confidence import MARGIN, choose_rule, share_at, temperature
from isthmus_tools.learning.exits.ridge import RidgeSolver

RiskKind: TypeAlias = Literal["accuracy", "disagreement"]
ACCURACY: Final = "accuracy"
DISAGREEMENT: Final = "disagreement"


@dataclass(frozen=True)
class ExitRisk:
    """The events that count against a gate, and the share of all requests that these may have.

    `kind` `disagreement`: the exit's class is another than the model's. `accuracy`: the exit is wrong, and the model
    is right.
    """

    kind: RiskKind = DISAGREEMENT
    limit: float = 0.01
    confidence: float = 0.95

    def failures(self, exit_classes: Array, model_classes: Array, labels: Array | None) -> Array:
        """Marks inputs that would fail if these exited. Shapes: (inputs,) all."""
        if self.kind == ACCURACY and labels is not None:
            wrong: Array = (exit_classes != labels) & (model_classes == labels)
            return wrong
        differs: Array = exit_classes != model_classes
        return differs


@dataclass(frozen=True, eq=False)
class FittedHead:
    """A branch's numbers, and estimates from the fitting inputs, each scored by a head without this input.

    `target` is `model` or `labels`, `agreement` the share of classes that are the model's, `share` that of inputs
    to exit at the limit.
    """

    branch: BranchWeights
    target: str
    penalty: float
    agreement: float
    share: float
    is_learned: bool


def fit_head(features: Array, logits: Array, labels: Array | None, risk: ExitRisk) -> FittedHead:
    """Fit a cut's head and confidence. Shapes: features (inputs, width), logits (inputs, classes), labels (inputs,)."""
    solver = RidgeSolver(features)
    model_classes = logits.argmax(axis=1)
    # Rows differ by a constant that no softmax sees, and the regression would spend weights on.
    targets = {"model": logits - logits.mean(axis=1, keepdims=True)}
    if labels is not None:
        targets["labels"] = np.eye(logits.shape[1], dtype=np.float32)[labels]
    best: FittedHead | None = None
    for name, target in targets.items():
        fit = solver.fit(target)
        # Predictions become probabilities of the classes that the risk compares with.
        factor = temperature(fit.left_out, labels if risk.kind == ACCURACY and labels is not None else model_classes)
        scores = fit.left_out * np.float32(factor)
        agrees = ~risk.failures(scores.argmax(axis=1), model_classes, labels)
        share = share_at(MARGIN(scores), agrees, risk.limit)
        if best is not None and share <= best.share:
            continue
        rule = choose_rule(scores, agrees, risk.limit)
        branch = BranchWeights(
            fit.head.mean,
            fit.head.scale,
            fit.head.weights * factor,
            fit.head.bias * factor,
            rule.weights,
            rule.bias,
        )
        agreement = float((scores.argmax(axis=1) == model_classes).mean())
        best = FittedHead(branch, name, fit.penalty, agreement, share, rule.is_learned)
    if best is None:
        raise AssertionError("there is always the model as a target")
    return best
