"""Weights of a fusion: ridge regression over the members' scores, chosen and judged by nested cross-validation.

min_w Σ‖Σ_i w_i g_i(x) − y‖² + λ‖w‖², where g_i are the centred scores of member i and y is 1 for the true class, less
its mean. Kind of scores, form of weights and λ are chosen on the folds that train; the left-out fold judges the choice
without a part in the choice.

Source: Breiman, Stacked regressions, Machine Learning 24 (1996); Varma and Simon, BMC Bioinformatics 7:91 (2006), for
the nesting; McNemar, Psychometrika 12 (1947).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest  # type: ignore[import-untyped]

from isthmus.arrays import Array
from isthmus.artifacts.bounds import CONFIDENCE, wilson
from isthmus.artifacts.fusion import FusionGain, ScoreKind
from isthmus.errors import LearningError
from isthmus.pipeline.fusion import centred_scores, weighted_sum
from isthmus_tools.learning.exits.confidence import temperature

FOLDS = 5
MIN_INPUTS = 50
"""Below, a fold has fewer than ten inputs to judge by; McNemar's test needs six turned predictions at the least."""
# Relative to the mean square of a member's scores, times the inputs.
PENALTIES = (1e-6, 1e-4, 1e-2, 0.1, 1.0, 10.0)
_KINDS: tuple[ScoreKind, ...] = ("log_odds", "probabilities")
# Of the scale: predictions do not depend on it, and beyond these bounds probabilities are 0 and 1.
_SCALES = (1e-3, 1e4)


class FusionRecipe(NamedTuple):
    """How weights are fitted: from scores of a kind, per class or for all classes, with a relative penalty."""

    kind: ScoreKind
    per_class: bool
    penalty: float


@dataclass(frozen=True)
class MemberScores:
    """Scores of every member for the same inputs, and the class that is right.

    Shapes: scores (inputs, classes) of each member, truth (inputs,). `probabilities` marks the members that give
    probabilities; `names` are for messages.
    """

    names: tuple[str, ...]
    scores: tuple[Array, ...]
    probabilities: tuple[bool, ...]
    truth: Array

    @property
    def classes(self) -> int:
        """The number of classes of every member."""
        return int(self.scores[0].shape[1])

    @cached_property
    def target(self) -> Array:
        """1 for the right class, less its mean. Shapes: (inputs, classes)."""
        # Centred as the scores are, so that no intercept is needed.
        return np.asarray(np.eye(self.classes)[self.truth] - 1 / self.classes)

    def centred(self, kind: ScoreKind) -> Array:
        """Shapes: (inputs, members, classes)."""
        pairs = zip(self.scores, self.probabilities, strict=True)
        return np.stack([centred_scores(each, kind, probabilities=shares) for each, shares in pairs], axis=1)

    def hits(self) -> Array:
        """Right predictions of each member. Shapes: (members, inputs)."""
        return np.stack([each.argmax(axis=1) == self.truth for each in self.scores])

    def check(self) -> None:
        """Refuse scores that no weights can be fitted to.

        Raises:
            LearningError: too few inputs, a single class, or scores that are not finite.
        """
        count, present = len(self.truth), np.unique(self.truth)
        if count < MIN_INPUTS:
            raise LearningError(
                f"{count} inputs to learn the weights of a fusion from; {MIN_INPUTS} are the least",
                inputs=count,
                needed=MIN_INPUTS,
                missing=MIN_INPUTS - count,
                hint="add inputs; behind an exit those alone count that do not exit",
            )
        if len(present) < 2:
            raise LearningError(
                f"all {count} inputs are of the class {int(present[0])}; a fusion is learned from two classes or more",
                inputs=count,
                classes=[int(present[0])],
            )
        for name, scores in zip(self.names, self.scores, strict=True):
            if (broken := ~np.isfinite(scores).all(axis=1)).any():
                raise LearningError(
                    f"{name} gives scores that are not finite for {int(broken.sum())} of {count} inputs",
                    member=name,
                    first=int(broken.argmax()),
                )


class FoldFit(NamedTuple):
    """The choice of one set of training folds: the recipe and the fitted weights."""

    recipe: FusionRecipe
    weights: Array


@dataclass(frozen=True)
class FittedFusion:
    """Weights fitted on all inputs, and the gain of the whole procedure on folds that had no part in it.

    Shapes: weights (members, 1) or (members, classes). `scale` makes the sum log-odds. `alone` is the member that the
    gain is over. `outer` has the choice of each fold's training inputs.
    """

    recipe: FusionRecipe
    weights: Array
    scale: float
    alone: int
    gain: FusionGain
    outer: tuple[FoldFit, ...]

    def fused(self, data: MemberScores, rows: slice = slice(None)) -> Array:
        """The sum for some inputs, in log-odds. Shapes: (rows, classes)."""
        scores = data.centred(self.recipe.kind)[rows]
        return self.scale * weighted_sum([scores[:, i] for i in range(scores.shape[1])], list(self.weights))


def require_gain(fitted: FittedFusion, data: MemberScores, hint: str = "") -> None:
    """Refuse a fusion that predicts no better than its better member, beyond chance.

    Raises:
        LearningError: the interval of the gain reaches zero; facts have the interval and the shares.
    """
    gain = fitted.gain
    if gain.is_beyond_chance:
        return
    alone = data.names[fitted.alone]
    raise LearningError(
        f"the fusion gains nothing beyond chance over {alone} alone: {gain.gain:+.2%}, between {gain.low:+.2%} and"
        f" {gain.high:+.2%} at {CONFIDENCE:.0%}, of {gain.inputs} inputs",
        member=alone,
        inputs=gain.inputs,
        alone=round(gain.alone, 6),
        fused=round(gain.fused, 6),
        gain=round(gain.gain, 6),
        low=round(gain.low, 6),
        high=round(gain.high, 6),
        better=gain.better,
        worse=gain.worse,
        hint=hint
        or "members that err on the same inputs gain nothing from each other; more inputs narrow the interval",
    )


def fit_fusion(data: MemberScores, reference: int | None = None, seed: int = 0) -> FittedFusion:
    """Weights of all members, and their gain over the member `reference`.

    Without `reference` over the member that is best on all inputs: a choice in that member's favour.

    Raises:
        LearningError: scores that no weights can be fitted to, as `MemberScores.check`.
    """
    data.check()
    search = _Search(data, seed)
    fused, outer = np.zeros(len(data.truth), bool), []
    hits = data.hits()
    better = int(hits.sum(axis=1).argmax()) if reference is None else reference
    for fold in range(FOLDS):
        training = [each for each in range(FOLDS) if each != fold]
        is_outer = search.folds == fold
        recipe = search.choose(training)
        weights = search.weights(recipe, training)
        fused[is_outer] = search.predictions(recipe, weights, is_outer) == data.truth[is_outer]
        outer.append(FoldFit(recipe, weights))
    # More inputs than any fold had: the published weights are no worse than those that were judged.
    everything = range(FOLDS)
    recipe = search.choose(everything)
    return FittedFusion(
        recipe,
        search.weights(recipe, everything),
        # By weights fitted without the input: sums of the fit's own inputs would be too sure.
        float(np.clip(temperature(search.held_out(recipe, everything), data.truth), *_SCALES)),
        better,
        paired_gain(hits[better], fused),
        tuple(outer),
    )


def paired_gain(alone: Array, fused: Array) -> FusionGain:
    """The gain of `fused` over `alone`, right predictions of the same inputs, with its interval."""
    better, worse = int((fused & ~alone).sum()), int((alone & ~fused).sum())
    count, turned = len(alone), better + worse
    if not turned:
        return FusionGain(count, float(alone.mean()), float(fused.mean()), 0, 0, 0.0, 0.0)
    # Conditional on the turned predictions: a share of one half among them is no gain.
    exact = [(2 * float(end) - 1) * turned / count for end in binomtest(better, turned).proportion_ci(CONFIDENCE)]
    low, high = _newcombe(alone, fused)
    return FusionGain(
        count, float(alone.mean()), float(fused.mean()), better, worse, min(low, exact[0]), max(high, exact[1])
    )


def _newcombe(alone: Array, fused: Array) -> tuple[float, float]:
    """The hybrid score interval of a difference of paired shares, from Wilson's for each.

    Source: Newcombe, Statistics in Medicine 17 (1998), method 10 without its correction for continuity.
    """
    count, shares = len(alone), [float(fused.mean()), float(alone.mean())]
    (low, high), (low_alone, high_alone) = (wilson(share, count) for share in shares)
    spread = math.sqrt(math.prod(share * (1 - share) for share in shares))
    correlation = (float((fused & alone).mean()) - math.prod(shares)) / spread if spread else 0.0

    def half(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b))

    gain = shares[0] - shares[1]
    return gain - half(shares[0] - low, high_alone - shares[1]), gain + half(high - shares[0], shares[1] - low_alone)


@dataclass(frozen=True)
class NormalEquations:
    """Sums over inputs; those of several folds add up. Shapes: (classes, members, members | none)."""

    products: Array
    targets: Array

    @classmethod
    def of(cls, scores: Array, target: Array) -> NormalEquations:
        """The sums of some inputs. Shapes: scores (inputs, members, classes), target (inputs, classes)."""
        return cls(
            np.einsum("nic,njc->cij", scores, scores, optimize=True),
            np.einsum("nic,nc->ci", scores, target, optimize=True),
        )

    @classmethod
    def total(cls, parts: Iterable[NormalEquations]) -> NormalEquations:
        """The sums of several folds."""
        each = list(parts)
        return cls(np.sum([p.products for p in each], axis=0), np.sum([p.targets for p in each], axis=0))

    @property
    def mean_square(self) -> float:
        """Of a member's scores, summed over classes and inputs."""
        products = self.products.sum(axis=0)
        return float(np.trace(products) / len(products))


def ridge_weights(sums: NormalEquations, penalty: float, *, per_class: bool) -> Array:
    """The closed form of the ridge regression, without an intercept. Shapes: (members, classes) or (members, 1)."""
    products, targets = sums.products, sums.targets
    if not per_class:
        products, targets = products.sum(axis=0, keepdims=True), targets.sum(axis=0, keepdims=True)
    # A positive penalty also makes members that repeat each other solvable.
    ridge = penalty * np.eye(products.shape[-1])
    return np.asarray(np.linalg.solve(products + ridge, targets[..., None])[..., 0].T)


class _Search:
    """Choice of a recipe by cross-validation among some of the folds; only these folds are read."""

    def __init__(self, data: MemberScores, seed: int) -> None:
        self._data = data
        # Without regard to classes: a fold must not depend on the labels of another.
        self.folds = np.random.default_rng(seed).permutation(len(data.truth)) % FOLDS
        self._scores: Mapping[ScoreKind, Array] = {kind: data.centred(kind) for kind in _KINDS}
        # Sums of each fold once: any set of training folds is a sum of these.
        self._sums = {
            (kind, fold): NormalEquations.of(scores[self.folds == fold], data.target[self.folds == fold])
            for kind, scores in self._scores.items()
            for fold in range(FOLDS)
        }

    def weights(self, recipe: FusionRecipe, folds: Iterable[int]) -> Array:
        """The weights that `folds` give."""
        sums = NormalEquations.total(self._sums[recipe.kind, fold] for fold in folds)
        # A class has a part of the sum alone.
        share = 1 / self._data.classes if recipe.per_class else 1.0
        # Constant scores have no square to relate to.
        penalty = recipe.penalty * sums.mean_square * share or recipe.penalty
        return ridge_weights(sums, penalty, per_class=recipe.per_class)

    def predictions(self, recipe: FusionRecipe, weights: Array, rows: Array) -> Array:
        """The classes that the sum predicts for some inputs."""
        return np.asarray(self._sum(recipe, weights, rows).argmax(axis=1))

    def held_out(self, recipe: FusionRecipe, folds: Collection[int]) -> Array:
        """The sum for each input of `folds`, by weights of the other folds among them; zeros for further inputs."""
        sums = np.zeros((len(self.folds), self._data.classes))
        for fold in folds:
            weights = self.weights(recipe, [each for each in folds if each != fold])
            sums[self.folds == fold] = self._sum(recipe, weights, self.folds == fold)
        return sums

    def choose(self, folds: Collection[int]) -> FusionRecipe:
        """The recipe with the fewest errors; of equals, with the least squared error.

        Weights for each class have to be better by a standard error, since more weights overfit more.
        """
        rows = np.isin(self.folds, list(folds))
        truth, target = self._data.truth[rows], self._data.target[rows]

        def judged(recipe: FusionRecipe) -> tuple[FusionRecipe, Array, float]:
            # Sums of thousands of classes are large: those of a recipe at a time.
            sums = self.held_out(recipe, folds)[rows]
            return recipe, sums.argmax(axis=1) != truth, float(((sums - target) ** 2).sum())

        def best(per_class: bool) -> tuple[FusionRecipe, Array]:
            recipes = (FusionRecipe(kind, per_class, p) for kind, p in itertools.product(_KINDS, PENALTIES))
            recipe, errors, _ = min(map(judged, recipes), key=lambda each: (int(each[1].sum()), each[2]))
            return recipe, errors

        (single, single_errors), (many, many_errors) = best(False), best(True)
        saved = single_errors.astype(np.float64) - many_errors
        return many if saved.mean() > saved.std() / np.sqrt(len(saved)) else single

    def _sum(self, recipe: FusionRecipe, weights: Array, rows: Array) -> Array:
        scores = self._scores[recipe.kind][rows]
        return weighted_sum([scores[:, i] for i in range(scores.shape[1])], list(weights))
