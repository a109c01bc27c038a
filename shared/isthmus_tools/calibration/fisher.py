"""Fisher-metric sensitivity of the prediction to a boundary tensor, and whitening under that metric.

To second order, noise of covariance S in a tensor costs the prediction a Kullback-Leibler divergence of
trace(S Jᵀ F J) / 2: J is the tail's Jacobian, F the Fisher information of the prediction. Finite differences through
the tail estimate Jᵀ F J.

Source: Kullback, "Information Theory and Statistics" (1959), 2.6; Martens, "New Insights and Perspectives on the
Natural Gradient Method", JMLR 21 (2020); docs/explanation/calibration.md, "Sensitivity".
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np

from isthmus.arrays import Array
from isthmus.codecs.transform.levels import STEP_FACTOR, STEPS_PER_FACTOR
from isthmus.codecs.transform.planes import Layout, plane_transform
from isthmus.codecs.transform.rows import RowLayout, RowTable
from isthmus.codecs.transform.table import PlaneTable
from isthmus.errors import CalibrationError
from isthmus_tools.calibration.layouts import plane_layout, state_layout
from isthmus_tools.progress import Progress, silent

Tail: TypeAlias = Callable[[Mapping[str, Array]], Mapping[str, Array]]
"""The segments behind a cut: outputs by name, from all boundary tensors by name."""
Loss: TypeAlias = Literal["classes", "probabilities", "values"]
TensorTables: TypeAlias = dict[str, PlaneTable | RowTable]

RING_EDGES = (0.0, 0.1, 0.18, 0.3, 0.45, 0.65)
"""Relative radial frequencies between the rings that are probed; the first ring is the plane's mean alone."""
MAX_SECONDS = 120.0
PROGRESS_UNITS = 1000
"""Units of progress per tensor."""
SHRINKAGE = 0.05
"""Share of the mean sensitivity added to every direction, so that none counts as harmless."""

# About the noise of coarse quantiser steps: smaller probes would measure the slope at the clean tensor only.
_PROBE_DEVIATIONS = 0.3
_MAX_RUNS = 24_000
# Random draws in a ring, averaged; every ring costs as many runs.
_RING_DRAWS = 4
# Of sequences with hundreds of places, and a run for each.
_MAX_PLACES = 32
# In thirteenths of a factor of three: farther, quantiser steps would leave the signed byte of their wire format.
_MAX_SHIFT = 40


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Divergence of the prediction per unit of noise energy in a boundary tensor.

    Shapes: `channels` (C, C) is Jᵀ F J averaged over the plane. `rings` (len(RING_EDGES) + 1,) is the sensitivity to
    noise of each frequency ring, relative to all; 0 for rings without coefficients. `places`, an array (height *
    width,) for each input, is the sensitivity at each place of a sequence, relative to all; NaN at unprobed places,
    empty for maps. `inputs` and `runs` count the estimate's samples and tail runs.
    """

    layout: Layout | RowLayout
    channels: Array
    rings: Array
    inputs: int
    runs: int
    places: tuple[Array, ...] = ()

    @property
    def mean(self) -> float:
        """Mean over the channels of their own sensitivities, the diagonal of `channels`."""
        return float(np.trace(self.channels)) / len(self.channels)

    def in_order(self, order: Sequence[int]) -> Sensitivity:
        """The same estimate with `places` by input index, for inputs that were probed in `order`."""
        by_input = dict(zip(order, self.places, strict=False))
        return replace(self, places=tuple(by_input.get(i, np.zeros(0)) for i in range(len(order))))


def measure_sensitivity(
    tail: Tail,
    inputs: Iterable[Mapping[str, Array]],
    tensor: str,
    *,
    output: str | None = None,
    loss: Loss = "classes",
    layout: Layout | RowLayout | None = None,
    scales: Mapping[str, float] | None = None,
    max_runs: int = _MAX_RUNS,
    max_s: float = MAX_SECONDS,
    seed: int = 0,
    progress: Progress = silent,
    stage: str = "measuring sensitivity",
) -> Sensitivity:
    """Probe `tensor` on the first of `inputs`, as many as `max_runs` tail runs and `max_s` seconds allow.

    Each input holds all boundary tensors. Every channel is moved alone, all by the same random signs over the
    plane: in expectation the products of the predictions' changes then sum to Jᵀ F J over the plane. `loss` is the kind
    of `output` (of all outputs if None): scores of `classes` or `probabilities`, compared by the Fisher metric
    diag(p) - p pᵀ at the clean prediction; `values` by squares relative to the output's mean square, or to the square
    of its scale in `scales` if larger. The layout is detected if None.

    Source: Hutchinson, "A Stochastic Estimator of the Trace of the Influence Matrix", Commun. Stat. 18 (1989).

    Raises:
        CalibrationError: there is no input, the tensor holds no floats, or a prediction is not finite.
    """
    rng = np.random.default_rng(seed)
    channels: Array | None = None
    rings = np.zeros(len(RING_EDGES) + 1)
    count, counted, runs = 0, np.zeros_like(rings), 0
    sums, values = np.zeros((2, 1)), 0
    places: list[Array] = []
    started, total = time.monotonic(), len(inputs) if isinstance(inputs, Sized) else math.inf
    for arrays in inputs:
        clean = arrays[tensor]
        if clean.dtype.kind in "iub" or clean.size == 0:
            raise CalibrationError(f"{tensor} holds no numbers that errors could move", tensor=tensor)
        layout = layout or state_layout(clean) or plane_layout(clean)
        n, c, h, w = layout.sizes(clean.shape)
        planes = layout.forward(clean).astype(np.float64)
        # A vector's channels have no spread within an input, so deviations are over all inputs so far.
        sums = sums + np.stack([planes.sum(axis=(0, 1)), np.square(planes).sum(axis=(0, 1))])
        values += n * h * w
        spread = np.sqrt(np.maximum(sums[1] / values - np.square(sums[0] / values), 0))
        # Channels that are constant so far get a small probe, too.
        amplitudes = _PROBE_DEVIATIONS * np.maximum(spread, 0.1 * float(planes.std()) + 1e-12)
        change = _Probe(tail, arrays, tensor, layout, loss, output, scales or {}).change

        signs = rng.choice([-1.0, 1.0], (n, h * w))
        changes = []
        for k in range(c):
            noise = np.zeros_like(planes)
            noise[:, :, k] = amplitudes[k] * signs
            changes.append(change(planes + noise) / amplitudes[k])
        stacked = np.stack(changes)  # (channels, values of the prediction)
        gram = stacked @ stacked.T / (n * h * w)
        channels = gram if channels is None else channels + gram
        runs += c + 1
        if h * w > 1:
            runs += _probe_rings(rings, counted, change, rng, planes, amplitudes, (h, w))
        if w == 1 and h > 1 and clean.ndim < 4:
            places.append(_probe_places(change, rng, planes, amplitudes))
            runs += min(h, _MAX_PLACES)
        count += 1
        elapsed = time.monotonic() - started
        # The bound that is nearest ends the probes.
        share = max(runs / max_runs, elapsed / max_s if max_s else 1.0, count / total)
        progress(stage, round(PROGRESS_UNITS * min(1.0, share)), PROGRESS_UNITS)
        if runs + runs // count > max_runs or elapsed > max_s:
            break
    if channels is None or layout is None:
        raise CalibrationError("there is no input to measure sensitivity on", tensor=tensor)
    if not np.isfinite(channels).all() or not np.isfinite(rings).all():
        raise CalibrationError("the tail's answers are not finite", tensor=tensor)
    rings = np.divide(rings, counted, out=np.zeros_like(rings), where=counted > 0)
    total = float(np.average(rings, weights=counted)) if counted.any() else 0.0
    if places and (mean := float(np.nanmean(np.concatenate(places)))) > 0:
        places = [each / mean for each in places]
    rings = rings / total if total else np.ones_like(rings)
    return Sensitivity(layout, channels / count, rings, count, runs, tuple(places))


def channel_metric(sensitivity: Sensitivity | None, channels: int) -> Array:
    """The sensitivity's matrix (C, C), scaled to a mean eigenvalue of 1 and shrunk towards the identity.

    Raises:
        CalibrationError: the sensitivity has another number of channels.
    """
    if sensitivity is None or not np.trace(sensitivity.channels) > 0:
        return np.eye(channels)
    if sensitivity.channels.shape != (channels, channels):
        raise CalibrationError(
            f"the sensitivity is of {len(sensitivity.channels)} channels, the samples have {channels}"
        )
    scaled = sensitivity.channels * (channels / np.trace(sensitivity.channels))
    return np.asarray((scaled + SHRINKAGE * np.eye(channels)) / (1 + SHRINKAGE))


def band_weights(sensitivity: Sensitivity | None, edges: tuple[float, ...], size: tuple[int, int]) -> Array:
    """Sensitivity to noise in each frequency band relative to all, (bands,), from the rings of its coefficients."""
    bands = len(edges) + 1
    if sensitivity is None or bands == 1:
        return np.ones(bands)
    height, width = size
    u, v = np.arange(height) / height, np.arange(width) / width
    radius = np.sqrt(u[:, None] ** 2 + v[None] ** 2).reshape(-1)
    by_coefficient = sensitivity.rings[np.searchsorted(np.asarray(RING_EDGES), radius, side="left")]
    band = np.searchsorted(np.asarray(edges), radius, side="left")
    counts = np.bincount(band, minlength=bands)
    weights = np.bincount(band, by_coefficient, bands) / np.maximum(counts, 1)
    return np.asarray(np.where(counts > 0, np.maximum(weights, SHRINKAGE), 1.0))


def whitened_basis(covariance: Array, metric: Array) -> Array:
    """Synthesis matrix (C, C) of the KLT weighted by `metric` M: uncorrelated components, noise of equal cost in each.

    With U the eigenvectors of M^½ S M^½, largest first, the matrix is M^-½ U and components are Uᵀ M^½ (x - mean). The
    KLT (principal component analysis) of the weighted tensor maximises the coding gain; equal quantiser steps are then
    optimal at high rates.

    Source: Goyal, "Theoretical Foundations of Transform Coding", IEEE Signal Process. Mag. 18 (2001).
    """
    values, vectors = np.linalg.eigh(metric)
    root = np.sqrt(np.maximum(values, 1e-9 * values[-1]))
    half, inverse = (vectors * root) @ vectors.T, (vectors / root) @ vectors.T
    _, rotation = np.linalg.eigh(half @ covariance @ half)
    return np.asarray(inverse @ rotation[:, ::-1])


def equalise_steps(tables: TensorTables, sensitivities: Mapping[str, Sensitivity]) -> None:
    """Shift the quantiser steps of several boundary tensors so that a quality costs the same divergence in each.

    Steps are in units of a tensor's own root mean square. The mean shift over all channels is zero. `tables` is changed
    in place, for tensors in `sensitivities`.
    """
    levels = {
        name: STEPS_PER_FACTOR * math.log(tables[name].scale * math.sqrt(sensitivity.mean), STEP_FACTOR)
        for name, sensitivity in sensitivities.items()
        if name in tables and sensitivity.mean > 0
    }
    if len(levels) < 2:
        return
    # Weighted by channels, so that the bytes at a quality stay about the same.
    mean = float(np.average(list(levels.values()), weights=[tables[name].channels for name in levels]))
    for name, level in levels.items():
        shift = round(min(max(mean - level, -_MAX_SHIFT), _MAX_SHIFT))
        coarsest, finest = tables[name].steps
        tables[name] = replace(tables[name], steps=(coarsest + shift, finest + shift))


def _probe_rings(
    rings: Array,
    counted: Array,
    change: Callable[[Array], Array],
    rng: np.random.Generator,
    planes: Array,
    amplitudes: Array,
    size: tuple[int, int],
) -> int:
    """Add each ring's cost of unit noise to `rings` and its coefficients to `counted`; returns the tail runs."""
    n, hw, c = planes.shape
    transform = plane_transform(*size, RING_EDGES)
    runs, level = 0, float(np.sqrt(np.mean(amplitudes**2)))
    for ring, (start, stop) in enumerate(itertools.pairwise(transform.starts)):
        if start == stop:
            continue
        # The energy of a channel's probe in every ring, so that no ring is moved past realistic noise.
        amplitude = level * np.sqrt(hw / (stop - start) / c)
        for _ in range(_RING_DRAWS):
            coefficients = np.zeros((n, hw, c), np.float32)
            coefficients[:, start:stop] = rng.choice([-amplitude, amplitude], (n, stop - start, c))
            moved = change(planes + transform.backward(coefficients))
            rings[ring] += float(moved @ moved) / amplitude**2
            runs += 1
        counted[ring] += _RING_DRAWS * (stop - start)
    return runs


def _probe_places(
    change: Callable[[Array], Array], rng: np.random.Generator, planes: Array, amplitudes: Array
) -> Array:
    """Cost of noise at each place of a sequence, (places,); NaN beyond `_MAX_PLACES` random ones."""
    n, hw, c = planes.shape
    costs = np.full(hw, np.nan)
    for at in rng.permutation(hw)[:_MAX_PLACES]:
        noise = np.zeros_like(planes)
        noise[:, at] = amplitudes * rng.choice([-1.0, 1.0], (n, c))
        moved = change(planes + noise)
        costs[at] = float(moved @ moved)
    return costs


class _Probe:
    """A tensor of one input and the clean prediction: changes of the prediction in the metric of the loss."""

    def __init__(
        self,
        tail: Tail,
        arrays: Mapping[str, Array],
        tensor: str,
        layout: Layout | RowLayout,
        loss: Loss,
        output: str | None,
        scales: Mapping[str, float],
    ) -> None:
        self._tail, self._arrays, self._tensor, self._layout, self._loss = tail, arrays, tensor, layout, loss
        outputs = tail(arrays)
        self._clean = {name: _scores(outputs[name], loss) for name in ([output] if output else outputs)}
        # The last bound is for outputs of zeros.
        self._squares = {
            name: max(float(np.mean(clean**2)), scales.get(name, 0.0) ** 2, 1e-12)
            for name, clean in self._clean.items()
        }

    def change(self, planes: Array) -> Array:
        """A vector with a squared norm of twice the divergence, or of the squared relative error, by `planes`."""
        own = self._arrays[self._tensor]
        array = np.ascontiguousarray(self._layout.backward(planes, own.shape).astype(own.dtype))
        outputs = self._tail({**self._arrays, self._tensor: array})
        parts = []
        for name, clean in self._clean.items():
            change = _scores(outputs[name], self._loss) - clean
            if self._loss == "values":
                parts.append(change.reshape(-1) / np.sqrt(self._squares[name] * clean.size))
                continue
            p = np.exp(clean - clean.max(axis=-1, keepdims=True))
            p /= p.sum(axis=-1, keepdims=True)
            # The sum of p (x - p.x)² over the classes is xᵀ (diag(p) - p pᵀ) x.
            centred = change - (p * change).sum(axis=-1, keepdims=True)
            parts.append((np.sqrt(p) * centred).reshape(-1) / np.sqrt(p.size / p.shape[-1]))
        return np.concatenate(parts)


def _scores(array: Array, loss: Loss) -> Array:
    scores = array.astype(np.float64)
    # A softmax underflows to 0, of infinite logarithm.
    return np.log(np.maximum(scores, 1e-9)) if loss == "probabilities" else scores
