"""How much an error in a crossing tensor moves the model's output: finite differences through the tail."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeAlias

import numpy as np

from isthmus.arrays import Array
from isthmus.codecs.planes import Layout, plane_transform
from isthmus.codecs.row_layout import RowLayout
from isthmus.errors import CalibrationError
from isthmus_tools.calibration.layout import layout_of, state_layout_of

Tail: TypeAlias = Callable[[Mapping[str, Array]], Mapping[str, Array]]
"""Outputs by name from all the tensors that cross, such as `Runner.run`."""

Loss: TypeAlias = Literal["classes", "probabilities", "values"]
Progress: TypeAlias = Callable[[int, int], None]

RING_EDGES = (0.0, 0.1, 0.18, 0.3, 0.45, 0.65)
"""Relative radial frequencies that part the rings whose sensitivity is measured; the first is the mean alone."""

_REACH = 0.3
"""The probe's size, in standard deviations of a channel: about the noise that coarse steps make."""

_MAX_RUNS, _MAX_SECONDS = 24_000, 120.0
_RING_DRAWS = 4
_PLACES = 32
"""Of a sequence, as many are moved by themselves."""


def _silent(done: int, most: int) -> None:
    """Report no progress."""


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """What one unit of noise does at the output.

    `channels` (C, C): the mean of J^T F J over the plane, so that noise of covariance S does damage trace(S channels) /
    2. `rings` (len(RING_EDGES) + 1,): the same for noise of those frequencies alone, relative to all; 0 where the plane
    has none. `places`: for each input, the same for noise at one place of the plane alone, relative to all, float64
    (height * width,); NaN where it was not measured, empty for maps. `inputs` and `runs` were spent on it.
    """

    layout: Layout | RowLayout
    channels: Array
    rings: Array
    inputs: int
    runs: int
    places: tuple[Array, ...] = ()

    def in_order(self, order: Sequence[int]) -> Sensitivity:
        """The same for inputs as they lie, if it was measured on them in `order`."""
        known = dict(zip(order, self.places, strict=False))
        return replace(self, places=tuple(known.get(i, np.zeros(0)) for i in range(len(order))))


def measure(
    tail: Tail,
    inputs: Iterable[Mapping[str, Array]],
    tensor: str,
    *,
    output: str | None = None,
    loss: Loss = "classes",
    layout: Layout | RowLayout | None = None,
    scales: Mapping[str, float] | None = None,
    max_runs: int = _MAX_RUNS,
    max_s: float = _MAX_SECONDS,
    seed: int = 0,
    progress: Progress = _silent,
) -> Sensitivity:
    """Measure it on the first of `inputs`: as many as `max_runs` runs of the tail and `max_s` seconds allow.

    Each input is every tensor that crosses. `layout` is found from the first one if None. All channels of `tensor` are
    moved one by one, each by the same random pattern of signs over the plane, so the answers' products sum to J^T F J
    over the plane on average. `loss` says what `output` (all outputs if None) holds: scores of `classes` or
    `probabilities`, weighted by the Fisher metric at the clean answer, so that damage is the divergence of the answers;
    or `values`, relative to their mean square, or to the square of the output's scale in `scales` where that is larger.

    Source: docs/codecs.md, "Sensitivity".

    Raises:
        CalibrationError: there is no input, the tensor holds no floats, or an answer is not finite.
    """
    rng = np.random.default_rng(seed)
    channels: Array | None = None
    rings = np.zeros(len(RING_EDGES) + 1)
    seen, counted, runs = 0, np.zeros_like(rings), 0
    sums, values = np.zeros((2, 1)), 0
    places: list[Array] = []
    started = time.monotonic()
    for crossing in inputs:
        clean = crossing[tensor]
        if clean.dtype.kind in "iub" or clean.size == 0:
            raise CalibrationError(f"{tensor} holds no numbers that errors could move", tensor=tensor)
        layout = layout or state_layout_of(clean) or layout_of(clean)
        n, c, h, w = layout.sizes(clean.shape)
        planes = layout.forward(clean).astype(np.float64)
        # A vector's channels have no spread in one input; their variance over the inputs so far is as good.
        sums = sums + np.stack([planes.sum(axis=(0, 1)), np.square(planes).sum(axis=(0, 1))])
        values += n * h * w
        spread = np.sqrt(np.maximum(sums[1] / values - np.square(sums[0] / values), 0))
        reach = _REACH * np.maximum(spread, 0.1 * float(planes.std()) + 1e-12)
        answer = _Answer(tail(crossing), output, loss, scales or {})

        moved = partial(_moved, tail, crossing, tensor, layout, answer)

        signs = rng.choice([-1.0, 1.0], (n, h * w))
        rows = []
        for k in range(c):
            by = np.zeros_like(planes)
            by[:, :, k] = reach[k] * signs
            rows.append(moved(planes + by) / reach[k])
        stacked = np.stack(rows)
        gram = stacked @ stacked.T / (n * h * w)
        channels = gram if channels is None else channels + gram
        runs += c + 1
        if h * w > 1:
            rings, counted, spent = _add_rings(rings, counted, moved, rng, planes, reach, (h, w))
            runs += spent
        if w == 1 and h > 1 and crossing[tensor].ndim < 4:
            places.append(_of_places(moved, rng, planes, reach))
            runs += min(h, _PLACES)
        seen += 1
        progress(runs, max_runs)
        if runs + runs // seen > max_runs or time.monotonic() - started > max_s:
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
    return Sensitivity(layout, channels / seen, rings, seen, runs, tuple(places))


def _moved(
    tail: Tail, crossing: Mapping[str, Array], tensor: str, layout: Layout | RowLayout, answer: _Answer, planes: Array
) -> Array:
    """How the answer changes if `planes` cross in place of the tensor's own."""
    clean = crossing[tensor]
    array = np.ascontiguousarray(layout.backward(planes, clean.shape).astype(clean.dtype))
    return answer.moved(tail({**crossing, tensor: array}))


def _add_rings(
    rings: Array,
    counted: Array,
    moved: Callable[[Array], Array],
    rng: np.random.Generator,
    planes: Array,
    reach: Array,
    size: tuple[int, int],
) -> tuple[Array, Array, int]:
    """Each ring's damage by unit noise added to `rings`, the number of its coefficients to `counted`; and the runs."""
    n, hw, c = planes.shape
    transform = plane_transform(*size, RING_EDGES)
    rings, counted, spent = rings.copy(), counted.copy(), 0
    level = float(np.sqrt(np.mean(reach**2)))
    for ring, (start, stop) in enumerate(itertools.pairwise(transform.starts)):
        if start == stop:
            continue
        # As much energy in every ring as one channel's probe has, so that none is moved past what noise would do.
        amplitude = level * np.sqrt(hw / (stop - start) / c)
        for _ in range(_RING_DRAWS):
            coefficients = np.zeros((n, hw, c), np.float32)
            coefficients[:, start:stop] = rng.choice([-amplitude, amplitude], (n, stop - start, c))
            answer = moved(planes + transform.backward(coefficients))
            rings[ring] += float(answer @ answer) / amplitude**2
            spent += 1
        counted[ring] += _RING_DRAWS * (stop - start)
    return rings, counted, spent


def _of_places(moved: Callable[[Array], Array], rng: np.random.Generator, planes: Array, reach: Array) -> Array:
    """The damage by noise at each place of a sequence, or at some of them."""
    n, hw, c = planes.shape
    found = np.full(hw, np.nan)
    for at in rng.permutation(hw)[:_PLACES]:
        by = np.zeros_like(planes)
        by[:, at] = reach * rng.choice([-1.0, 1.0], (n, c))
        answer = moved(planes + by)
        found[at] = float(answer @ answer)
    return found


class _Answer:
    """A clean answer, and how far another is from it in the metric of the loss, as a vector."""

    def __init__(
        self, outputs: Mapping[str, Array], output: str | None, loss: Loss, scales: Mapping[str, float]
    ) -> None:
        names = list(outputs) if output is None else [output]
        self._clean = {name: _scores(outputs[name], loss) for name in names}
        self._loss = loss
        self._squares = {
            name: max(float(np.mean(clean**2)), scales.get(name, 0.0) ** 2, 1e-12)
            for name, clean in self._clean.items()
        }

    def moved(self, outputs: Mapping[str, Array]) -> Array:
        """A vector whose square is the damage."""
        parts = []
        for name, clean in self._clean.items():
            change = _scores(outputs[name], self._loss) - clean
            if self._loss == "values":
                parts.append(change.reshape(-1) / np.sqrt(self._squares[name] * clean.size))
                continue
            p = np.exp(clean - clean.max(axis=-1, keepdims=True))
            p /= p.sum(axis=-1, keepdims=True)
            # p (x - p.x)^2 summed over the classes is x^T (diag(p) - p p^T) x.
            centred = change - (p * change).sum(axis=-1, keepdims=True)
            parts.append((np.sqrt(p) * centred).reshape(-1) / np.sqrt(p.size / p.shape[-1]))
        return np.concatenate(parts)


def _scores(array: Array, loss: Loss) -> Array:
    scores = array.astype(np.float64)
    return np.log(np.maximum(scores, 1e-9)) if loss == "probabilities" else scores
