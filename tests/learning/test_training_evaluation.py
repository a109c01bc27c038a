"""HeldOutScores against scikit-learn's metrics, its intervals, and the rule of promotion."""

from __future__ import annotations

import numpy as np
import pytest

from isthmus.arrays import Array
from isthmus_tools.learning.training.evaluation import PairedComparison, compare, evaluate


def predictions(seed: int, count: int = 300, classes: int = 4, right: float = 0.8) -> tuple[Array, Array, list[str]]:
    """Predictions, labels and groups of three; classes of very different frequency."""
    rng = np.random.default_rng(seed)
    shares = np.arange(1, classes + 1) ** 2
    labels = rng.choice(classes, count, p=shares / shares.sum())
    predicted = np.where(rng.random(count) < right, labels, rng.integers(0, classes, count))
    return predicted, labels, [f"g{i // 3}" for i in range(count)]


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_scikit_learn(seed: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    predicted, labels, groups = predictions(seed)
    # A class that is never predicted.
    predicted[predicted == 0] = 1
    result = evaluate(predicted, labels, groups, "abcd")
    precision, recall, f1, support = metrics.precision_recall_fscore_support(labels, predicted, zero_division=0)
    assert result.accuracy.value == metrics.accuracy_score(labels, predicted)
    assert result.macro_f1.value == pytest.approx(metrics.f1_score(labels, predicted, average="macro"))
    for k, each in enumerate(result.classes):
        assert (each.precision.value, each.recall.value) == pytest.approx((precision[k], recall[k]))
        assert each.f1.value == pytest.approx(f1[k])
        assert each.samples == support[k]
    np.testing.assert_array_equal(result.confusion, metrics.confusion_matrix(labels, predicted))
    assert result.majority == pytest.approx(np.bincount(labels).max() / len(labels))
    for estimate in (result.accuracy, result.macro_f1, *(each.recall for each in result.classes)):
        assert estimate.low <= estimate.value <= estimate.high


def test_intervals_hold_as_often_as_they_say() -> None:
    low = high = 0
    for seed in range(60):
        predicted, labels, groups = predictions(seed, count=150)
        estimate = evaluate(predicted, labels, groups, "abcd").macro_f1
        truth = TRUE_MACRO_F1
        low, high = low + (truth < estimate.low), high + (truth > estimate.high)
    assert low + high <= 8


TRUE_MACRO_F1 = evaluate(*predictions(999, count=60_000)[:2], ["x"] * 60_000, "abcd").macro_f1.value


def test_samples_of_one_group_count_less_than_independent_ones() -> None:
    labels = np.arange(200) % 2
    # Whole groups are wrong together.
    predicted = np.where(np.arange(200) // 20 % 2 == 0, labels, 1 - labels)
    grouped = evaluate(predicted, labels, [str(i // 20) for i in range(200)], "ab").accuracy
    independent = evaluate(predicted, labels, [str(i) for i in range(200)], "ab").accuracy
    assert grouped.high - grouped.low > 2 * (independent.high - independent.low)


def test_a_class_whose_samples_are_all_right_has_an_interval_nevertheless() -> None:
    labels = np.array([0, 1] * 5)
    result = evaluate(labels, labels, [str(i) for i in range(10)], "ab")
    assert result.classes[0].f1.low == pytest.approx(0.566, abs=0.01)
    assert result.macro_f1.low < 0.6


def pair(better: int, worse: int, count: int = 100, metric: str = "accuracy") -> PairedComparison:
    """A candidate that is right where the served one is wrong `better` times, and the other way `worse` times."""
    labels = np.zeros(count, np.int64)
    labels[::2] = 1
    candidate, served = labels.copy(), labels.copy()
    served[:better] ^= 1
    candidate[better : better + worse] ^= 1
    return compare(candidate, served, labels, [str(i) for i in range(count)], 2, metric, "3")


@pytest.mark.parametrize(
    ("better", "worse", "is_better", "reason"),
    [
        (20, 5, True, ""),
        (7, 0, True, ""),
        (0, 0, False, "not surely above"),
        (6, 5, False, "not surely above"),
        (5, 20, False, "not surely above"),
        # Five of five by chance: 6%.
        (5, 0, False, "may be chance"),
    ],
)
def test_a_version_is_better_only_beyond_chance(better: int, worse: int, is_better: bool, reason: str) -> None:
    comparison = pair(better, worse)
    assert comparison.is_better is is_better
    assert reason in comparison.reason
    assert comparison.difference.value == pytest.approx((better - worse) / 100)
    assert (comparison.better_groups, comparison.worse_groups) == (better, worse)


def test_a_few_samples_make_no_better_macro_f1() -> None:
    comparison = pair(5, 0, count=20, metric="macro_f1")
    assert comparison.difference.low > 0
    assert "differs from version 3 on 5 held-out groups, 5 of them for the better" in comparison.reason


def test_an_equal_version_is_better_by_chance_at_most_as_often_as_stated() -> None:
    promoted = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 2, 60)
        two = [np.where(rng.random(60) < 0.7, labels, 1 - labels) for _ in range(2)]
        promoted += compare(*two, labels, [str(i) for i in range(60)], 2, "accuracy", "1").is_better
    assert promoted <= 4


def test_macro_f1_counts_a_rare_class_as_much_as_a_frequent_one() -> None:
    labels = np.array([0] * 180 + [1] * 20)
    served = np.zeros(200, np.int64)
    candidate = np.where(np.arange(200) >= 180, 1, 0)
    candidate[:10] = 1
    groups = [str(i) for i in range(200)]
    by_f1 = compare(candidate, served, labels, groups, 2, "macro_f1", "1")
    assert by_f1.is_better
    assert by_f1.difference.value > 0.3
    assert not compare(candidate, served, labels, groups, 2, "accuracy", "1").is_better
