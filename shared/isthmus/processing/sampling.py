"""Sampling of tokens from scores, repeatable on any replica: a random number depends on seed and position alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from isthmus.arrays import Array
from isthmus.artifacts.sampling import ALTERNATIVE_LOGPROBS, ALTERNATIVES, LOGPROBS, TOKENS, Sampling
from isthmus.errors import RunFailed

# How many of the likeliest tokens are put in order, before all are.
_FIRST_COUNTS = (64, 1024)
# Sums of the same numbers in another order differ by less.
_ROUNDING = 1e-9


class SampledToken(NamedTuple):
    """A token, the natural logarithm of its probability, and the likeliest alternatives with theirs."""

    token: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


def sample(scores: Array, sampling: Sampling, position: int, history: Sequence[int] = ()) -> SampledToken:
    """The token at `position` of a sequence; equal arguments give equal tokens.

    Shapes: scores (vocabulary,), float. `history` are the tokens before, for the penalties. Log-probabilities are the
    model's own, before temperature and filters.

    Raises:
        RunFailed: a score is NaN, or the highest is infinite.
    """
    scores = np.asarray(scores, np.float64)
    if not np.isfinite(top := scores.max()):
        raise RunFailed("the model's scores are no numbers, so no token can be sampled")
    total = float(top + np.log(np.exp(scores - top).sum()))
    own = _penalised(scores, sampling, history) if sampling.has_penalty and len(history) else scores
    token = int(own.argmax()) if sampling.temperature == 0 else _drawn(own, sampling, position)
    best = _best(scores, sampling.logprobs) if sampling.logprobs else ()
    alternatives = tuple((int(i), float(scores[i] - total)) for i in best)
    return SampledToken(token, float(scores[token] - total), alternatives)


def sampled_tensors(
    scores: Array,
    sampling: Sampling,
    position: int,
    history: Sequence[int],
    before_each: Callable[[], None] = lambda: None,
) -> dict[str, Array]:
    """The outputs of a step that samples, as `artifacts.sampling.sampled_outputs` declares them.

    Shapes: scores (positions, vocabulary); the first row gives the token at `position`. `before_each` may end the work
    by an exception: a token of a large vocabulary takes up to 10 ms.

    Raises:
        RunFailed: as `sample`.
    """
    drawn: list[SampledToken] = []
    for i, row in enumerate(scores, position):
        before_each()
        drawn.append(sample(row, sampling, i, history[:i]))
    outputs: dict[str, Array] = {
        TOKENS: np.array([[d.token for d in drawn]], np.int64),
        LOGPROBS: np.array([[d.logprob for d in drawn]], np.float32),
    }
    if sampling.logprobs:
        shape = (1, len(drawn), sampling.logprobs)
        pairs = [pair for d in drawn for pair in d.alternatives]
        outputs[ALTERNATIVES] = np.array([token for token, _ in pairs], np.int64).reshape(shape)
        outputs[ALTERNATIVE_LOGPROBS] = np.array([logprob for _, logprob in pairs], np.float32).reshape(shape)
    return outputs


def _penalised(scores: Array, sampling: Sampling, history: Sequence[int]) -> Array:
    tokens, counts = np.unique(np.asarray(history, np.int64), return_counts=True)
    inside = tokens < len(scores)
    tokens, counts = tokens[inside], counts[inside]
    scores = scores.copy()
    seen, penalty = scores[tokens], sampling.repetition_penalty
    seen = np.where(seen > 0, seen / penalty, seen * penalty)
    scores[tokens] = seen - sampling.presence_penalty - sampling.frequency_penalty * counts
    return scores


def _drawn(scores: Array, sampling: Sampling, position: int) -> int:
    """A token by inversion of the distribution, likeliest first.

    Few tokens hold most of the probability, so only the likeliest are put in order: a growing number of them, until
    these hold what is asked for.
    """
    draw = np.random.Generator(np.random.Philox(key=sampling.seed, counter=position)).random()
    if 0 < sampling.top_k < len(scores):
        kept = _best(scores, sampling.top_k)
        return int(kept[_inverted(_weights(scores[kept], sampling), sampling, draw)])
    weights = _weights(scores, sampling)
    # Of what is wanted of all probability, and so of the order.
    total = float(weights.sum())
    wanted = (draw if sampling.top_p == 1 else sampling.top_p) * total
    for count in (count for count in _FIRST_COUNTS if count < len(scores)):
        kept = _best(scores, count)
        if weights[kept].sum() > wanted * (1 + _ROUNDING):
            return int(kept[_inverted(weights[kept], sampling, draw, total)])
    order = _best(scores, len(scores))
    return int(order[_inverted(weights[order], sampling, draw)])


def _weights(scores: Array, sampling: Sampling) -> Array:
    """Probabilities relative to that of the likeliest token; 0 below `min_p`."""
    weights: Array = np.exp((scores - scores.max()) / sampling.temperature)
    if sampling.min_p > 0:
        weights[weights < sampling.min_p] = 0
    return weights


def _inverted(weights: Array, sampling: Sampling, draw: float, total: float = 0.0) -> int:
    """The place of the drawn token. Shapes: weights in falling order; `total` is of all tokens where there are more."""
    cumulated = np.cumsum(weights)
    total = total or float(cumulated[-1])
    if sampling.top_p < 1:
        cumulated = cumulated[: int(np.searchsorted(cumulated, sampling.top_p * total)) + 1]
        total = float(cumulated[-1])
    return min(int(np.searchsorted(cumulated, draw * total, side="right")), len(cumulated) - 1)


def _best(scores: Array, count: int) -> Array:
    """The ids of the highest scores in falling order; equal scores in the order of ids, so that replicas agree."""
    ids = np.arange(len(scores))
    if count < len(scores):
        ids = np.flatnonzero(scores >= np.partition(scores, len(scores) - count)[len(scores) - count])
    order = np.argsort(-scores[ids], kind="stable")[:count]
    return np.asarray(ids[order])
