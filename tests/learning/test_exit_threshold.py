"""Thresholds of gates: the bound beside scipy's, what is never accepted, and coverage over resampled splits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from isthmus.artifacts.bounds import exceeds
from isthmus_tools.learning.exits.confidence import MARGIN, choose_rule, fit_rule, share_at, statistics_of, temperature
from isthmus_tools.learning.exits.head import ExitRisk, fit_head
from isthmus_tools.learning.exits.ridge import RidgeSolver
from isthmus_tools.learning.exits.threshold import choose_threshold, inputs_needed, upper_bound
from support.digits import digits

LIMIT, CONFIDENCE = 0.05, 0.95


@pytest.mark.parametrize(("failing", "inputs"), [(0, 1), (0, 300), (3, 400), (7, 7), (12, 2000)])
def test_the_bound_is_that_of_clopper_and_pearson(failing: int, inputs: int) -> None:
    exact = binomtest(failing, inputs, alternative="less").proportion_ci(CONFIDENCE, "exact").high
    assert upper_bound(failing, inputs, CONFIDENCE) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("limit", [0.001, 0.01, 0.03, 0.2])
def test_the_inputs_needed_are_the_fewest(limit: float) -> None:
    needed = inputs_needed(limit, CONFIDENCE)
    assert upper_bound(0, needed, CONFIDENCE) <= limit < upper_bound(0, needed - 1, CONFIDENCE)
    assert not exceeds(0, needed, limit, CONFIDENCE)


@pytest.mark.parametrize("seed", range(20))
def test_a_threshold_keeps_its_bound_and_the_next_lower_one_does_not(seed: int) -> None:
    rng = np.random.default_rng(seed)
    confidences = np.round(rng.random(400), 2)  # with ties
    fails = rng.random(400) < 0.3 * (1 - confidences)
    chosen = choose_threshold(confidences, fails, LIMIT, CONFIDENCE)
    assert chosen is not None
    exits = confidences >= chosen.threshold
    assert (chosen.exiting, chosen.failing) == (exits.sum(), (exits & fails).sum())
    assert chosen.bound == upper_bound(chosen.failing, 400, CONFIDENCE) <= LIMIT
    lower = confidences[~exits].max()
    assert upper_bound(int((fails & (confidences >= lower)).sum()), 400, CONFIDENCE) > LIMIT


def test_nothing_exits_where_the_surest_fail_or_inputs_are_too_few() -> None:
    surest = np.arange(200) >= 150
    assert choose_threshold(np.arange(200.0), surest, LIMIT, CONFIDENCE) is not None
    tied = choose_threshold(np.where(surest, 1.0, 0.0), surest, LIMIT, CONFIDENCE)
    assert tied is None
    assert choose_threshold(np.arange(58.0), np.zeros(58, bool), LIMIT, CONFIDENCE) is None


def test_an_input_without_a_confidence_never_exits() -> None:
    confidences = np.array([np.nan] * 10 + [1.0] * 90)
    chosen = choose_threshold(confidences, np.zeros(100, bool), LIMIT, CONFIDENCE)
    assert chosen is not None
    assert (chosen.threshold, chosen.exiting) == (1.0, 90)


def head_on_digits() -> tuple[Any, Any]:
    """Confidences of a ridge head on coarse pixels for digits that did not fit it, and where it is wrong."""
    pixels, classes = digits()
    features = pixels.reshape(len(pixels), 4, 2, 4, 2).mean(axis=(2, 4)).reshape(len(pixels), 16)
    scores = RidgeSolver(features[:500]).fit(np.eye(10)[classes[:500]]).head(features[500:])
    return MARGIN(scores), scores.argmax(1) != classes[500:]


def test_the_bound_holds_in_95_of_100_resampled_splits() -> None:
    confidences, fails = head_on_digits()
    assert fails.mean() > 2 * LIMIT, "an easy head would hold at any threshold"
    rng, broken, shares = np.random.default_rng(0), 0, []
    for _ in range(100):
        # All 1,297 digits are the population, so that the risk behind each sample is exact.
        rows = rng.integers(0, len(fails), 600)
        chosen = choose_threshold(confidences[rows], fails[rows], LIMIT, CONFIDENCE)
        exits = confidences >= chosen.threshold if chosen is not None else np.zeros(len(fails), bool)
        broken += (fails & exits).mean() > LIMIT
        shares.append(exits.mean())
    assert broken <= 5
    # A gate that never opens would hold too.
    assert np.mean(shares) > 0.5


def test_a_naive_threshold_breaks_the_limit_often() -> None:
    confidences, fails = head_on_digits()
    rng, broken = np.random.default_rng(0), 0
    for _ in range(100):
        rows = rng.integers(0, len(fails), 600)
        order = rows[np.argsort(-confidences[rows])]
        within = np.cumsum(fails[order]) <= LIMIT * len(rows)
        broken += (fails & (confidences >= confidences[order[within]][-1])).mean() > LIMIT
    assert broken > 20


def test_the_statistics_of_scores_are_those_of_their_softmax() -> None:
    scores = np.random.default_rng(0).normal(0, 3, (6, 4))
    shares = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    top = np.sort(scores, axis=1)
    expected = np.stack([top[:, -1] - top[:, -2], shares.max(1), -(shares * np.log(shares)).sum(1)], 1)
    np.testing.assert_allclose(statistics_of(scores), expected, rtol=1e-12)


def test_the_temperature_has_the_highest_likelihood() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 1, (2000, 5))
    odds = np.exp(4 * scores)
    classes = np.array([rng.choice(5, p=row / row.sum()) for row in odds])
    assert temperature(scores, classes) == pytest.approx(4, rel=0.1)
    # Separable scores have no finite one.
    assert np.isfinite(temperature(np.eye(5), np.arange(5)))


def test_a_learned_ranking_stays_only_where_it_is_better() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 1, (2000, 3))
    # Failures where two classes beside the first are both improbable: the margin does not see it.
    entropy = statistics_of(scores)[:, 2]
    agrees = rng.random(2000) > 0.5 * (entropy < np.quantile(entropy, 0.5))
    learned = choose_rule(scores, agrees, 0.05)
    assert learned.is_learned
    assert share_at(learned(scores), agrees, 0.05) > share_at(MARGIN(scores), agrees, 0.05)
    by_margin = rng.random(2000) < 1 / (1 + np.exp(-3 * MARGIN(scores)))
    assert choose_rule(scores, by_margin, 0.05) is MARGIN
    assert choose_rule(scores, np.ones(2000, bool), 0.05) is MARGIN
    assert np.isfinite(fit_rule(scores, MARGIN(scores) > 1).weights).all()


def test_heads_on_labels_win_where_the_model_is_poor() -> None:
    pixels, classes = digits()
    rows = pixels[:600].reshape(600, -1)
    noise = np.random.default_rng(0).normal(0, 1, (600, 10)).astype(np.float32)
    head = fit_head(rows, noise, classes[:600], ExitRisk("accuracy", 0.05))
    assert head.target == "labels"
    logits = 8 * np.eye(10, dtype=np.float32)[classes[:600]]
    assert fit_head(rows, logits, None, ExitRisk()).target == "model"
