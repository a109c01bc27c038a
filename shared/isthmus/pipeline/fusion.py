"""Fusion of members: a weighted sum of their scores for each class, in place of the scores of one of them.

Members disagree in scale: a ridge head gives small differences where a network is sure by orders of magnitude. Scores
are therefore taken as log-probabilities or probabilities, less their mean over the classes, which no prediction depends
on. Source: docs/how-to/fusion.md, "The sum".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from isthmus.arrays import Array
from isthmus.artifacts.fusion import Fusion, ScoreKind
from isthmus.artifacts.gate import EXIT_CONFIDENCE
from isthmus.pipeline.exits import ExitOutcome
from isthmus.processing.classify import softmax
from isthmus.runtime.early_exit import sure_rows

MIN_PROBABILITY = 1e-6
"""Smaller probabilities count as this one: the logarithm of a tree's zero would outweigh every other member."""


def centred_scores(scores: Array, kind: ScoreKind, *, probabilities: bool) -> Array:
    """A member's scores as a fusion sums them, in float64; `probabilities` says that they are such already.

    Shapes: (…, classes) both.
    """
    values = scores.astype(np.float64)
    if kind == "probabilities":
        values = values if probabilities else softmax(values)
    elif probabilities:
        values = np.log(np.maximum(values, MIN_PROBABILITY))
    centred: Array = values - values.mean(axis=-1, keepdims=True)
    return centred


def weighted_sum(members: Sequence[Array], weights: Sequence[Array]) -> Array:
    """The sum over members; each has one weight, or one for each class. Shapes: (…, classes), (1,) or (classes,)."""
    return np.asarray(sum(scores * weight for scores, weight in zip(members, weights, strict=True)))


def fused_outputs(
    fusion: Fusion | None, outcome: ExitOutcome | None, tensors: Mapping[str, Array], outputs: Mapping[str, Array]
) -> dict[str, Array] | None:
    """The model's outputs with fused scores; None where a request did not meet the fusion's exit, or took it.

    `tensors` have the exit's confidence in each row. In a batch, rows of which the exit was sure stay the model's own:
    the weights are of inputs that go on.
    """
    if fusion is None or outcome is None or outcome.is_taken or outcome.cut != fusion.cut:
        return None
    own = outputs.get(fusion.output)
    # A route that ends at a later cut has no scores of the model.
    if own is None or own.shape != outcome.scores.shape:
        return None
    sure = sure_rows(tensors[EXIT_CONFIDENCE], outcome.threshold).reshape(-1, *(1 for _ in own.shape[1:]))
    return {**outputs, fusion.output: np.where(sure, own, fused_output(fusion, outcome.scores, own))}


def fused_output(fusion: Fusion, exit_scores: Array, output: Array) -> Array:
    """The model's `output` with fused scores, of the same shape, dtype and meaning.

    Rows in which either member is not finite stay the model's own. Shapes: (batch, classes) both; axes of one value may
    follow.
    """
    rows = output.reshape(output.shape[:2])
    is_shares = fusion.output_kind == "probabilities"
    with np.errstate(invalid="ignore", over="ignore"):
        members = [
            centred_scores(scores.reshape(rows.shape), fusion.kind, probabilities=is_shares)
            for scores in (exit_scores, rows)
        ]
        total = fusion.scale * weighted_sum(members, [np.array(fusion.exit_weights), np.array(fusion.model_weights)])
        # In the output's dtype, which is narrower: a finite sum may be infinite there.
        fused = (softmax(total) if is_shares else total).astype(output.dtype)
    fused = np.where(np.isfinite(fused).all(axis=1, keepdims=True), fused, rows)
    return np.asarray(fused.reshape(output.shape))
