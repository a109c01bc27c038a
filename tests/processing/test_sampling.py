"""Sampling: the distribution of the parameters, and the same token for the same seed and position."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from isthmus.artifacts.sampling import Sampling
from isthmus.errors import RunFailed
from isthmus.processing.sampling import sample, sampled_tensors

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


def in_full_order(scores: Any, sampling: Sampling, position: int) -> int:
    """The token by its definition: all tokens in order, filters, inversion."""
    scores = scores.astype(np.float64)
    order = np.argsort(-scores, kind="stable")[: sampling.top_k or len(scores)]
    weights = np.exp((scores[order] - scores[order[0]]) / sampling.temperature)
    weights = weights[weights >= sampling.min_p]
    cumulated = np.cumsum(weights)
    if sampling.top_p < 1:
        cumulated = cumulated[: int(np.searchsorted(cumulated, sampling.top_p * cumulated[-1])) + 1]
    draw = np.random.Generator(np.random.Philox(key=sampling.seed, counter=position)).random()
    place = int(np.searchsorted(cumulated, draw * cumulated[-1], side="right"))
    return int(order[min(place, len(cumulated) - 1)])


@pytest.mark.parametrize("temperature", [0.3, 1.0, 8.0])
@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"top_k": 40},
        {"top_k": 3000},
        {"top_p": 0.95},
        {"min_p": 0.02},
        {"top_k": 2000, "top_p": 0.8, "min_p": 0.01},
    ],
    ids=str,
)
def test_tokens_are_those_of_the_whole_order(temperature: float, filters: Any) -> None:
    rng = np.random.default_rng(0)
    for scores in (rng.standard_normal(5000) * 3, np.round(rng.standard_normal(5000) * 2), np.zeros(5000)):
        sampling = Sampling(temperature=temperature, seed=7, **filters)
        scores = scores.astype(np.float32)
        found = [sample(scores, sampling, position).token for position in range(25)]
        assert found == [in_full_order(scores, sampling, position) for position in range(25)]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1, min_p=0.1), Sampling(temperature=1, top_k=2)])
def test_scores_that_are_no_numbers_give_no_token(bad: float, sampling: Sampling) -> None:
    with pytest.raises(RunFailed, match="no numbers"):
        sample(np.array([1.0, bad, 2.0], np.float32), sampling, 0)


def test_a_token_of_no_probability_is_never_drawn() -> None:
    scores = np.array([0.0, -np.inf, 0.0], np.float32)
    drawn = {sample(scores, Sampling(temperature=1), position).token for position in range(100)}
    assert drawn == {0, 2}


def test_sampling_ends_between_two_tokens_where_its_caller_says_so() -> None:
    left = iter([None])
    with pytest.raises(StopIteration):
        sampled_tensors(np.zeros((2, 4)), Sampling(last=2), 0, (), lambda: next(left))
