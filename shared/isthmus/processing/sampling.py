"""Sampling of tokens from scores, repeatable on any replica: a random number depends on seed and position alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from isthmus.arrays import Array
from isthmus.artifacts.sampling import Sampling


class SampledToken(NamedTuple):
    """A token, the natural logarithm of its probability, and the likeliest alternatives with theirs."""

    token: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


def sample(scores: Array, sampling: Sampling, position: int, history: Sequence[int] = ()) -> SampledToken:
    """The token at `position` of a sequence; equal arguments give equal tokens.

    Shapes: scores (vocabulary,), float. `history` are the tokens before, for the penalties. Log-probabilities are the
    model's own, before temperature and filters.
    """
    scores = np.asarray(scores, np.float64)
    shifted = scores - scores.max()
    logprobs = shifted - np.log(np.exp(shifted).sum())
    scores = _penalised(scores, sampling, history) if sampling.has_penalty and len(history) else scores
    token = int(scores.argmax()) if sampling.temperature == 0 else _drawn(scores, sampling, position)
    alternatives: tuple[tuple[int, float], ...] = ()
    if count := sampling.logprobs:
        # Equal scores in the order of ids, so that two replicas list them alike.
        best = np.argsort(-logprobs, kind="stable")[:count]
        alternatives = tuple((int(i), float(logprobs[i])) for i in best)
    return SampledToken(token, float(logprobs[token]), alternatives)


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
    """A token by inversion of the distribution, likeliest first."""
    # Stable, so that equal scores stay in the order of ids.
    order = np.argsort(-scores, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    scaled = (scores[order] - scores[order[0]]) / sampling.temperature
    weights = np.exp(scaled)
    if sampling.min_p > 0:
        weights = weights[weights >= sampling.min_p]  # sorted: a prefix
    cumulated = np.cumsum(weights)
    if sampling.top_p < 1:
        count = int(np.searchsorted(cumulated, sampling.top_p * cumulated[-1])) + 1
        cumulated = cumulated[:count]
    draw = np.random.Generator(np.random.Philox(key=sampling.seed, counter=position)).random()
    place = int(np.searchsorted(cumulated, draw * cumulated[-1], side="right"))
    return int(order[min(place, len(cumulated) - 1)])
