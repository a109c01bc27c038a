"""Weights of a fusion: the closed form, the choice by nested validation, and the gain beyond chance or its absence."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.linear_model import Ridge

from isthmus.arrays import Array
from isthmus.errors import LearningError
from isthmus.pipeline.fusion import MIN_PROBABILITY, centred_scores
from isthmus.processing.classify import softmax
from isthmus_tools.learning.fusion import FOLDS, MemberScores, NormalEquations, fit_fusion, paired_gain, ridge_weights

CLASSES = 4


def members(count: int = 600, noise: tuple[float, ...] = (1.5, 1.5), seed: int = 0) -> MemberScores:
    """Members that see the truth through independent noise of their own: each knows what the other misses."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, CLASSES, count)
    logits = [2 * np.eye(CLASSES)[truth] + each * rng.standard_normal((count, CLASSES)) for each in noise]
    names = tuple("abcdef"[: len(noise)])
    return MemberScores(names, tuple(logits), (False,) * len(noise), truth)


@pytest.mark.parametrize("penalty", [0.0, 3.0, 500.0])
def test_weights_of_members_are_the_closed_form_of_scikit_learn(penalty: float) -> None:
    data = members(noise=(1.5, 0.7, 3.0))
    scores = data.centred("log_odds")
    # Each class of each input is a row of the regression, each member a column.
    rows = scores.transpose(0, 2, 1).reshape(-1, 3)
    oracle = Ridge(alpha=penalty, fit_intercept=False).fit(rows, data.target.ravel())
    weights = ridge_weights(NormalEquations.of(scores, data.target), penalty, per_class=False)
    np.testing.assert_allclose(weights, oracle.coef_[:, None], rtol=1e-9)


@pytest.mark.parametrize("penalty", [0.0, 3.0, 500.0])
def test_weights_of_members_and_classes_are_the_closed_form_of_scikit_learn(penalty: float) -> None:
    data = members(noise=(1.5, 0.7, 3.0))
    scores = data.centred("probabilities")
    weights = ridge_weights(NormalEquations.of(scores, data.target), penalty, per_class=True)
    for c in range(CLASSES):
        oracle = Ridge(alpha=penalty, fit_intercept=False).fit(scores[:, :, c], data.target[:, c])
        np.testing.assert_allclose(weights[:, c], oracle.coef_, rtol=1e-9)


def test_two_members_that_complete_each_other_gain_beyond_chance_on_inputs_that_chose_nothing() -> None:
    data = members()
    fitted = fit_fusion(data)
    assert fitted.gain.is_beyond_chance
    assert fitted.gain.fused == pytest.approx(fitted.gain.alone + fitted.gain.gain)
    # What was measured by folds holds on further inputs of the same kind.
    fresh = members(4000, seed=1)
    total = np.einsum("nic,ic->nc", fresh.centred(fitted.recipe.kind), np.broadcast_to(fitted.weights, (2, CLASSES)))
    gain = (total.argmax(axis=1) == fresh.truth).mean() - max(fresh.hits().mean(axis=1))
    assert 0 < fitted.gain.low < gain


def test_the_better_member_gets_more_weight_and_equal_ones_equal_weight() -> None:
    better = fit_fusion(members(2000, noise=(0.8, 2.5)))
    assert better.weights[0, 0] > 2 * better.weights[1, 0] > 0
    equal = fit_fusion(members(4000))
    assert equal.weights[0, 0] == pytest.approx(equal.weights[1, 0], rel=0.15)


def test_a_member_of_noise_gives_no_gain() -> None:
    data = members(1000, noise=(0.7, 0.7))
    rng = np.random.default_rng(5)
    noise = rng.dirichlet(np.ones(CLASSES), 1000)
    fitted = fit_fusion(replace(data, scores=(data.scores[0], noise), probabilities=(False, True)))
    assert not fitted.gain.is_beyond_chance


def test_gains_by_chance_are_refused_in_nineteen_of_twenty_draws() -> None:
    # The second member repeats the first up to noise that knows nothing: whatever turns, turns by chance.
    beyond = 0
    for seed in range(12):
        data = members(200, noise=(1.5,), seed=seed)
        shaken = data.scores[0] + 0.4 * np.random.default_rng([seed, 1]).standard_normal((200, CLASSES))
        both = replace(data, names=("a", "b"), scores=(data.scores[0], shaken), probabilities=(False, False))
        beyond += fit_fusion(both, reference=0).gain.is_beyond_chance
    assert beyond <= 1


def test_what_a_fold_chose_does_not_depend_on_the_inputs_that_judge_it() -> None:
    data = members(400)
    before = fit_fusion(data, seed=3)
    folds = np.random.default_rng(3).permutation(400) % FOLDS
    for fold in range(FOLDS):
        rng = np.random.default_rng(fold)
        spoiled = tuple(np.where((folds == fold)[:, None], 9 * rng.standard_normal(s.shape), s) for s in data.scores)
        truth = np.where(folds == fold, rng.integers(0, CLASSES, 400), data.truth)
        after = fit_fusion(replace(data, scores=spoiled, truth=truth), seed=3)
        assert after.outer[fold].recipe == before.outer[fold].recipe
        np.testing.assert_allclose(after.outer[fold].weights, before.outer[fold].weights, rtol=1e-6)


def test_a_gain_is_beyond_chance_where_mcnemars_exact_test_says_so() -> None:
    rng = np.random.default_rng(0)
    for share in (0.3, 0.5, 0.7):
        turned = rng.random(300) < 0.1
        alone = rng.random(300) < 0.8
        fused = np.where(turned, rng.random(300) < share, alone)
        gain = paired_gain(alone, fused)
        p = binomtest(gain.better, gain.better + gain.worse, 0.5, alternative="greater").pvalue
        assert gain.is_beyond_chance == (p < 0.025)
        assert gain.low <= gain.gain <= gain.high
    same = paired_gain(alone, alone)
    assert (same.gain, same.low, same.high, same.is_beyond_chance) == (0, 0, 0, False)


def test_the_interval_covers_what_a_bootstrap_of_the_differences_covers() -> None:
    rng = np.random.default_rng(2)
    alone = rng.random(2000) < 0.8
    fused = np.where(rng.random(2000) < 0.08, ~alone, alone)
    gain = paired_gain(alone, fused)
    difference = fused.astype(float) - alone
    means = [difference[rng.integers(0, 2000, 2000)].mean() for _ in range(2000)]
    low, high = np.quantile(means, [0.025, 0.975])
    assert gain.low == pytest.approx(low, abs=0.004)
    assert gain.high == pytest.approx(high, abs=0.004)


def test_the_scale_makes_probabilities_that_come_true() -> None:
    data = members(4000)
    fitted = fit_fusion(data)
    scores = np.einsum("nic,ic->nc", data.centred(fitted.recipe.kind), np.broadcast_to(fitted.weights, (2, CLASSES)))
    shares = softmax(fitted.scale * scores)
    assert shares.max(axis=1).mean() == pytest.approx(fitted.gain.fused, abs=0.02)


def test_log_odds_of_logits_and_of_their_probabilities_are_the_same() -> None:
    logits: Array = np.array([[1.0, -2.0, 0.5], [3.0, 3.0, -1.0]])
    shares = softmax(logits)
    np.testing.assert_allclose(
        centred_scores(shares, "log_odds", probabilities=True), centred_scores(logits, "log_odds", probabilities=False)
    )
    np.testing.assert_allclose(
        centred_scores(shares, "probabilities", probabilities=True),
        centred_scores(logits, "probabilities", probabilities=False),
    )
    never: Array = np.array([[1.0, 0.0]])
    largest = centred_scores(never, "log_odds", probabilities=True).max()
    assert largest == pytest.approx(-np.log(MIN_PROBABILITY) / 2)


def test_scores_that_no_weights_can_be_learned_from_are_refused_with_their_facts() -> None:
    data = members(100)
    with pytest.raises(LearningError, match="30 inputs to learn") as few:
        fit_fusion(members(30))
    assert few.value.facts["missing"] == 20
    with pytest.raises(LearningError, match="all 100 inputs are of the class 2"):
        fit_fusion(replace(data, truth=np.full(100, 2)))
    broken = data.scores[1].copy()
    broken[7, 1] = np.nan
    with pytest.raises(LearningError, match="b gives scores that are not finite for 1 of 100") as nan:
        fit_fusion(replace(data, scores=(data.scores[0], broken)))
    assert (nan.value.facts["member"], nan.value.facts["first"]) == ("b", 7)
