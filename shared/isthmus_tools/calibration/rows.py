"""Learning a table of `transform/4` for rows: classes, a rotation or none, and how many classes pay."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from isthmus.arrays import Array
from isthmus.codecs.classes import Classes
from isthmus.codecs.row_layout import RowLayout
from isthmus.codecs.rows import RowTable
from isthmus.codecs.steps import size_of
from isthmus.codecs.table import OCTAVE, ZERO_DEVIATION
from isthmus.errors import CalibrationError
from isthmus_tools.calibration.harm import equal_harm, harm_of
from isthmus_tools.calibration.layout import row_layout_of
from isthmus_tools.calibration.models import learn_models
from isthmus_tools.calibration.samples import laid_out, unit_of
from isthmus_tools.calibration.sensitivity import Sensitivity

_KEPT_VALUES = 2**23
_MODELLED_VALUES = 400_000
_ROUNDS = 8
_STEP = -8
"""At which classes are learned: half a unit."""
_LEANING = 8.0
"""Rows of average deviation added to each class."""
_LEANING_HARM = 2.0
"""Rows of average sensitivity added to each."""
_MAX_WEIGHT = 16
_ANY = 0
"""The class of rows unlike those of every other: of the mean and the variance of all."""


@dataclass(frozen=True)
class Form:
    """What is chosen by trying: the number of classes; and the rotation, or none.

    `leaning` is how much of the covariance's diagonal is added to it.
    """

    classes: int
    rotated: bool
    leaning: float = 0.0


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of channels from samples, and the number of the sample that each is from."""

    layout: RowLayout
    values: Array
    sample: Array

    @property
    def count(self) -> int:
        """Of samples."""
        return int(self.sample[-1]) + 1

    def first(self, count: int) -> Rows:
        """The rows of the first samples."""
        stop = int(np.searchsorted(self.sample, count))
        return Rows(self.layout, self.values[:stop], self.sample[:stop])

    @classmethod
    def of(cls, samples: Iterable[Array], layout: RowLayout | None = None) -> Rows:
        """All rows, or as many of each sample as memory allows.

        Raises:
            CalibrationError: there are none; or the samples' channels differ, or are not finite floats.
        """
        found: list[Array] = []
        rng = np.random.default_rng(0)
        kept = 0
        for array in samples:
            layout = layout or row_layout_of(array)
            rows = laid_out(array, layout)[0]
            found.append(rows)
            kept += rows.size
            if kept > _KEPT_VALUES:
                found = [r[np.sort(rng.permutation(len(r))[: math.ceil(len(r) / 2)])] for r in found]
                kept = sum(r.size for r in found)
        if layout is None:
            raise CalibrationError("there are no samples to learn from")
        numbers = np.repeat(np.arange(len(found)), [len(r) for r in found])
        return cls(layout, np.concatenate(found).astype(np.float64), numbers)


def learn_rows(rows: Rows, form: Form, sensitivity: Sensitivity | None, steps: tuple[int, int]) -> RowTable:
    """The table of rows in that form."""
    values, channels = rows.values, rows.layout.channels
    centre = values.mean(axis=0) if form.rotated else np.median(values, axis=0)
    centred = values - centre
    energy = float(np.mean(np.square(centred)))
    unit = unit_of(energy)
    harm = harm_of(sensitivity, channels)
    # Rotated to tell classes apart, and again for what is left when they are told.
    synthesis = _synthesis(centred, harm, form, energy)
    classes = _told_apart(centred @ np.linalg.inv(synthesis).T / unit, form.classes)
    if form.rotated and form.classes > 1:
        means = _means(centred, classes, form.classes)
        synthesis = _synthesis(centred - means[classes], harm, form, energy)
        classes = _told_apart(centred @ np.linalg.inv(synthesis).T / unit, form.classes)
    means = _means(centred, classes, form.classes) if form.rotated else _medians(centred, classes, form.classes)
    means[_ANY] = 0
    stored = synthesis.astype(np.float16)
    weights = _weights(rows, classes, form.classes, sensitivity)
    analysis = np.linalg.inv(stored.astype(np.float64)).T / unit
    factors = np.exp2(weights / OCTAVE)
    turned = centred @ analysis
    components = (turned - (means @ analysis)[classes]) * factors[classes, None]
    variance = _variances(components, classes, form.classes)
    variance[_ANY] = np.square(turned * factors[_ANY]).mean(axis=0)
    deviations = np.round(OCTAVE * np.log2(np.sqrt(np.maximum(variance, 1e-9)))) + ZERO_DEVIATION
    deviations = np.clip(deviations, 0, 255).astype(np.uint8)
    at = np.random.default_rng(0).permutation(len(values))[: max(1, _MODELLED_VALUES // channels)]
    models = learn_models(
        components[at].reshape(-1),
        deviations[classes[at]].reshape(-1).astype(np.int64),
        np.repeat(rows.sample[at], channels),
        steps,
    )
    return RowTable(
        layout=rows.layout,
        means=(means + centre).astype(np.float32),
        weights=weights.astype(np.int8),
        scale=unit,
        synthesis=stored if form.rotated else np.ascontiguousarray(np.diag(stored)),
        deviations=deviations,
        steps=steps,
        models=models,
    )


def _synthesis(centred: Array, harm: Array, form: Form, energy: float) -> Array:
    channels = len(harm)
    if not form.rotated:
        return np.diag(1 / np.sqrt(np.diag(harm)))
    covariance = centred.T @ centred / len(centred)
    covariance += form.leaning * np.diag(np.diag(covariance)) + 1e-6 * energy * np.eye(channels)
    return equal_harm(covariance, harm)


def _told_apart(components: Array, count: int) -> Array:
    """The class of each row: by the bits that it takes, from starts that lie far from one another."""
    components = components.astype(np.float32)
    if count == 1:
        return np.zeros(len(components), np.uint16)
    centres = components[_starts(components, count - 1)]
    variance = components.var(axis=0)
    spread = np.broadcast_to(variance, centres.shape)
    for _ in range(_ROUNDS):
        classes = Classes.of(centres, spread).likeliest(components)
        centres = _means(components, classes, count - 1)
        spread = _variances(components - centres[classes], classes, count - 1)
    # Only now, for rows that it takes would never become a class of their own.
    centres, spread = (
        np.insert(a, _ANY, b, axis=0) for a, b in ((centres, components.mean(axis=0)), (spread, variance))
    )
    return Classes.of(centres, spread).likeliest(components)


def _starts(components: Array, count: int) -> list[int]:
    """Rows that lie far from one another: each drawn by its distance from those before it.

    Source: Arthur and Vassilvitskii, "k-means++: The Advantages of Careful Seeding", 2007.
    """
    rng = np.random.default_rng(0)
    # Far in deviations: one channel that stands out would else be all that counts.
    relative = components / (components.std(axis=0) + np.float32(size_of(_STEP)))
    squares = np.square(relative).sum(axis=1)

    def distance_from(row: int) -> Array:
        return np.asarray(np.maximum(squares + squares[row] - 2 * (relative @ relative[row]), 0))

    found = [int(rng.integers(len(components)))]
    distance = distance_from(found[0])
    while len(found) < count:
        shares = distance.astype(np.float64)
        total = float(shares.sum())
        found.append(int(rng.choice(len(shares), p=shares / total)) if total > 0 else 0)
        distance = np.minimum(distance, distance_from(found[-1]))
    return found


def _weights(rows: Rows, classes: Array, count: int, sensitivity: Sensitivity | None) -> Array:
    """How much finer each class's steps are, in eighths of an octave: noise in its rows then harms as in others."""
    harm = np.full(len(classes), np.nan)
    for number, places in enumerate(sensitivity.places if sensitivity else ()):
        of_sample = np.flatnonzero(rows.sample == number)
        if len(of_sample) == len(places):
            harm[of_sample] = places
    known = np.isfinite(harm)
    members, sums = _sums(harm[known][:, None], classes[known], count)
    mean = (sums[:, 0] + _LEANING_HARM) / (members + _LEANING_HARM)
    return np.asarray(np.clip(np.round(OCTAVE / 2 * np.log2(np.maximum(mean, 1e-3))), -_MAX_WEIGHT, _MAX_WEIGHT), int)


def _sums(values: Array, classes: Array, count: int) -> tuple[Array, Array]:
    """How many rows each class has, and their sums, (count, C)."""
    members = np.bincount(classes, minlength=count)
    found = np.zeros((count, values.shape[1]), values.dtype)
    if len(values):
        starts = np.concatenate([[0], np.cumsum(members)[:-1]])[members > 0]
        found[members > 0] = np.add.reduceat(values[classes.argsort(kind="stable")], starts, axis=0)
    return members, found


def _means(values: Array, classes: Array, count: int) -> Array:
    """Of each class, (count, C); an empty class has that of all."""
    members, sums = _sums(values, classes, count)
    counts = members[:, None].astype(values.dtype)
    return np.asarray(np.where(counts > 0, sums / np.maximum(counts, 1), values.mean(axis=0)))


def _medians(values: Array, classes: Array, count: int) -> Array:
    return np.stack([np.median(values[classes == k] if (classes == k).any() else values, axis=0) for k in range(count)])


def _variances(values: Array, classes: Array, count: int) -> Array:
    """About zero, of each class, (count, C); with few rows it leans on that of all."""
    squares = np.square(values)
    members, sums = _sums(squares, classes, count)
    counts = members[:, None].astype(values.dtype)
    return np.asarray((sums + _LEANING * squares.mean(axis=0)) / (counts + _LEANING))
