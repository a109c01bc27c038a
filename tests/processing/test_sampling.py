"""Sampling: the distribution of the parameters, and the same token for the same seed and position."""

from __future__ import annotations

import numpy as np
import pytest

from isthmus.artifacts.sampling import Sampling
from isthmus.processing.sampling import sample

SCORES = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))


def shares(sampling: Sampling, count: int = 4000) -> list[float]:
    drawn = [sample(SCORES, sampling, position).token for position in range(count)]
    return (np.bincount(drawn, minlength=4) / count).tolist()


def test_the_highest_score_is_taken_without_temperature() -> None:
    assert [sample(SCORES, Sampling(seed=s), p).token for s in range(3) for p in range(3)] == [0] * 9


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1, seed=1), [0.5, 0.25, 0.15, 0.1]),
        (Sampling(temperature=0.5, seed=2), [0.725, 0.181, 0.065, 0.029]),
        (Sampling(temperature=1, top_k=2, seed=3), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(temperature=1, top_p=0.7, seed=4), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(temperature=1, min_p=0.25, seed=5), [0.5556, 0.2778, 0.1667, 0]),
    ],
)
def test_tokens_have_the_shares_of_their_probabilities(sampling: Sampling, expected: list[float]) -> None:
    np.testing.assert_allclose(shares(sampling), expected, atol=0.03)


def test_a_token_depends_on_seed_and_position_alone() -> None:
    sampling = Sampling(temperature=1, seed=9)
    forward = [sample(SCORES, sampling, p).token for p in range(50)]
    backward = [sample(SCORES, sampling, p).token for p in reversed(range(50))]
    assert forward == backward[::-1]
    assert forward != [sample(SCORES, Sampling(temperature=1, seed=10), p).token for p in range(50)]


def test_penalties_lower_the_scores_of_earlier_tokens() -> None:
    scores = np.array([2.0, 1.9, -1.0], np.float32)
    assert sample(scores, Sampling(repetition_penalty=1.1), 1, [0]).token == 1
    assert sample(scores, Sampling(presence_penalty=0.2), 1, [0]).token == 1
    assert sample(scores, Sampling(frequency_penalty=0.06), 1, [0]).token == 0
    assert sample(scores, Sampling(frequency_penalty=0.06), 1, [0, 0]).token == 1
    # Beyond the vocabulary, as a padded embedding may have it.
    assert sample(scores, Sampling(presence_penalty=1), 1, [7]).token == 0


def test_log_probabilities_are_the_models_own() -> None:
    drawn = sample(SCORES * 3, Sampling(temperature=2, top_k=1, logprobs=2), 0)
    expected = np.log(np.exp(SCORES * 3) / np.exp(SCORES * 3).sum())
    assert drawn.logprob == pytest.approx(expected[0], abs=1e-6)
    assert [t for t, _ in drawn.alternatives] == [0, 1]
    assert [p for _, p in drawn.alternatives] == pytest.approx(expected[:2].tolist(), abs=1e-6)


def test_equal_scores_are_taken_in_the_order_of_ids() -> None:
    drawn = sample(np.zeros(5, np.float32), Sampling(logprobs=3), 0)
    assert (drawn.token, [t for t, _ in drawn.alternatives]) == (0, [0, 1, 2])
