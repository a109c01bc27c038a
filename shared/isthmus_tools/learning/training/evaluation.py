"""HeldOutScores of a classifier on held-out data, with intervals, and the paired comparison of two.

Shares have Wilson intervals over groups of samples; F1 and differences have intervals by a bootstrap that draws whole
groups. Both are of 95%.

Source: Wilson, J. Am. Stat. Assoc. 22 (1927); Davison and Hinkley, "Bootstrap Methods and their Application" (1997),
3.8 and 5.3; McNemar, Psychometrika 12 (1947).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from isthmus.arrays import Array
from isthmus.artifacts.bounds import CONFIDENCE, interval

RESAMPLES = 2000
# Resamples of a single product of matrices: bounds the memory at many groups.
_CHUNK = 200
_SEED = 0
# Two-sided, five differences of equal sign have a probability of 6% by chance.
_MIN_DIFFERENCES = 6


@dataclass(frozen=True)
class Estimate:
    """A value and its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ClassScore:
    """A class: its samples, its predictions, precision, recall and F1."""

    label: str
    samples: int
    predicted: int
    precision: Estimate
    recall: Estimate
    f1: Estimate


@dataclass(frozen=True)
class HeldOutScores:
    """Scores on held-out samples. `confusion` has a row for each true class and a column for each predicted class.

    `majority` is the accuracy of always predicting the most frequent class.
    """

    samples: int
    groups: int
    accuracy: Estimate
    macro_f1: Estimate
    majority: float
    classes: tuple[ClassScore, ...]
    confusion: tuple[tuple[int, ...], ...]

    def document(self) -> dict[str, Any]:
        """All scores, JSON-ready, and the methods of the intervals."""
        return asdict(self) | {
            "confidence": CONFIDENCE,
            "intervals": {
                "accuracy, precision, recall": "Wilson, over groups",
                "f1, macro_f1": f"bootstrap over groups, {RESAMPLES} resamples; without spread, from the lower ends of"
                " precision and recall",
            },
        }

    def summary(self) -> dict[str, Any]:
        """The figures for a bundle's source: small, and without the labels, since the bundle has these."""
        return {
            "samples": self.samples,
            "groups": self.groups,
            "accuracy": rounded(self.accuracy),
            "macro_f1": rounded(self.macro_f1),
            "majority": round(self.majority, 4),
            "f1": [round(each.f1.value, 4) for each in self.classes],
        }


@dataclass(frozen=True)
class PairedComparison:
    """Two classifiers on the same held-out samples: `metric` of the candidate and of the version in service.

    `better_groups` and `worse_groups` count groups with more, or fewer, samples right by the candidate.
    """

    metric: str
    served: str
    candidate: float
    in_service: float
    difference: Estimate
    better_groups: int
    worse_groups: int
    sign_test: float

    @property
    def is_better(self) -> bool:
        return not self.reason

    @property
    def reason(self) -> str:
        """Why the candidate does not count as better; empty for a better candidate."""
        name, differ = self.metric.replace("_", " "), self.better_groups + self.worse_groups
        if self.difference.low <= 0:
            return (
                f"its {name} of {self.candidate:.1%} is not surely above the {self.in_service:.1%} of version"
                f" {self.served}: the difference is {100 * self.difference.low:+.1f} to"
                f" {100 * self.difference.high:+.1f} points"
            )
        if differ < _MIN_DIFFERENCES or (self.metric == "accuracy" and self.sign_test > 1 - CONFIDENCE):
            return (
                f"it differs from version {self.served} on {differ} held-out groups, {self.better_groups} of them for"
                f" the better, which may be chance (probability {self.sign_test:.0%})"
            )
        return ""

    def document(self) -> dict[str, Any]:
        """The comparison, JSON-ready."""
        return asdict(self) | {"is_better": self.is_better, "reason": self.reason, "confidence": CONFIDENCE}


def rounded(estimate: Estimate) -> list[float]:
    """Value, low and high to four digits."""
    return [round(each, 4) for each in (estimate.value, estimate.low, estimate.high)]


def evaluate(predicted: Array, labels: Array, groups: Sequence[str], classes: Sequence[str]) -> HeldOutScores:
    """Score predictions (count,) against labels (count,), both indices of classes."""
    by_group = _confusions(predicted, labels, groups, len(classes))
    confusion = by_group.sum(0)
    support, chosen = confusion.sum(1), confusion.sum(0)
    f1_draws = np.concatenate([_f1(draw) for draw in _resampled(by_group)])
    f1, per_group = _f1(confusion[np.newaxis])[0], by_group.sum((1, 2))
    diagonals = np.einsum("gkk->gk", by_group)
    scores = []
    for k, label in enumerate(classes):
        precision = _share(diagonals[:, k], by_group[:, :, k].sum(1))
        recall = _share(diagonals[:, k], by_group[:, k, :].sum(1))
        estimate = _widened(_percentiles(_zero(f1[k]), f1_draws[:, k]), precision, recall)
        scores.append(ClassScore(label, int(support[k]), int(chosen[k]), precision, recall, estimate))
    # The mean over classes, frequent or rare.
    macro = _percentiles(_macro(f1[np.newaxis])[0], _macro(f1_draws))
    if macro.low == macro.high:
        macro = Estimate(macro.value, float(np.mean([each.f1.low for each in scores])), macro.high)
    return HeldOutScores(
        samples=len(labels),
        groups=len(by_group),
        accuracy=_share(diagonals.sum(1), per_group),
        macro_f1=macro,
        majority=float(support.max() / max(1, support.sum())),
        classes=tuple(scores),
        confusion=tuple(tuple(int(n) for n in row) for row in confusion),
    )


def compare(
    candidate: Array, in_service: Array, labels: Array, groups: Sequence[str], classes: int, metric: str, served: str
) -> PairedComparison:
    """Compare the predictions of two classifiers on the same samples; the bootstrap draws the same groups for both."""
    # Imported late: scipy.stats takes half a second.
    from scipy.stats import binomtest  # type: ignore[import-untyped]

    pair = [_confusions(predicted, labels, groups, classes) for predicted in (candidate, in_service)]
    measure = _METRICS[metric]
    values = [float(measure(each.sum(0)[np.newaxis])[0]) for each in pair]
    draws = [np.concatenate([measure(draw) for draw in _resampled(each)]) for each in pair]
    right = [np.einsum("gkk->g", each) for each in pair]
    better, worse = int((right[0] > right[1]).sum()), int((right[0] < right[1]).sum())
    # Of groups that differ, half would be for the better by chance.
    chance = float(binomtest(better, better + worse).pvalue) if better + worse else 1.0
    difference = _percentiles(values[0] - values[1], draws[0] - draws[1])
    return PairedComparison(metric, served, values[0], values[1], difference, better, worse, chance)


def _confusions(predicted: Array, labels: Array, groups: Sequence[str], classes: int) -> Array:
    """A confusion matrix for each group: (groups, true, predicted)."""
    # Groups as numbers, in the order of their names.
    _, group = np.unique(np.asarray(groups, str), return_inverse=True)
    matrices = np.zeros((int(group.max(initial=-1)) + 1, classes, classes), np.int64)
    np.add.at(matrices, (group, labels, predicted), 1)
    return matrices


def _resampled(by_group: Array) -> list[Array]:
    """Confusion matrices of resamples of groups; the same groups for any matrices over the same groups."""
    count = len(by_group)
    # A fixed seed: equal data gives equal intervals.
    rng = np.random.default_rng(_SEED)
    flat = by_group.reshape(count, -1).astype(np.float64)
    draws = []
    for _ in range(0, RESAMPLES, _CHUNK):
        weights = rng.multinomial(count, np.full(count, 1 / max(1, count)), size=_CHUNK) if count else np.zeros((1, 0))
        draws.append((weights @ flat).reshape(-1, *by_group.shape[1:]))
    return draws


def _accuracy(confusions: Array) -> Array:
    total = np.maximum(confusions.sum((1, 2)), 1)
    share: Array = np.einsum("nkk->n", confusions) / total
    return share


def _f1(confusions: Array) -> Array:
    """F1 of each class, (count, classes); NaN where a class is neither there nor predicted."""
    right = np.einsum("nkk->nk", confusions).astype(np.float64)
    both = confusions.sum(1) + confusions.sum(2)
    f1: Array = np.divide(2 * right, both, out=np.full_like(right, np.nan), where=both > 0)
    return f1


def _macro(f1: Array) -> Array:
    """The mean over the classes that are there or predicted."""
    present = np.isfinite(f1)
    mean: Array = np.where(present, f1, 0).sum(1) / np.maximum(present.sum(1), 1)
    return mean


_METRICS: dict[str, Callable[[Array], Array]] = {"accuracy": _accuracy, "macro_f1": lambda c: _macro(_f1(c))}


def _share(hits: Array, counts: Array) -> Estimate:
    total = int(counts.sum())
    low, high = interval(zip(hits.tolist(), counts.tolist(), strict=True))
    return Estimate(float(hits.sum() / total) if total else 0.0, low, high)


def _percentiles(value: float, draws: Array) -> Estimate:
    usable = draws[np.isfinite(draws)]
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(usable, [tail, 100 - tail]) if len(usable) else (0.0, 1.0)
    return Estimate(float(value), float(low), float(high))


def _widened(f1: Estimate, precision: Estimate, recall: Estimate) -> Estimate:
    """The interval of F1; where no resample differs, down to the F1 of the lower ends of precision and recall."""
    if f1.low < f1.high or not precision.low + recall.low:
        return f1
    # A bootstrap of samples that are all right cannot draw an error.
    return Estimate(f1.value, 2 * precision.low * recall.low / (precision.low + recall.low), f1.high)


def _zero(value: float) -> float:
    # As scikit-learn reports a class without samples and predictions.
    return float(value) if np.isfinite(value) else 0.0
