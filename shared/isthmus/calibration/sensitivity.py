"""How much an error in a crossing tensor moves the model's output: finite differences through the tail."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np

from isthmus.calibration.layout import layout_of
from isthmus.codecs.planes import Layout, plane_transform
from isthmus.errors import CalibrationError

Array = np.ndarray[Any, np.dtype[Any]]
Tail: TypeAlias = Callable[[Mapping[str, Array]], Mapping[str, Array]]
"""Outputs by name from all the tensors that cross, such as `Runner.run`."""

Loss: TypeAlias = Literal["classes", "probabilities", "values"]
Progress: TypeAlias = Callable[[int, int], None]

RING_EDGES = (0.0, 0.1, 0.18, 0.3, 0.45, 0.65)
"""Relative radial frequencies that part the rings whose sensitivity is measured; the first is the mean alone."""

_REACH = 0.3
"""The probe's size, in standard deviations of a channel: about the noise that coarse steps make."""

_MAX_RUNS, _MAX_SECONDS = 12_000, 120.0
_RING_DRAWS = 4


def _silent(done: int, most: int) -> None:
    """Report no progress."""


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """What one unit of noise does at the output.

    `channels` (C, C): the mean of J^T F J over the plane, so that noise of covariance S does damage trace(S channels) /
    2. `rings` (len(RING_EDGES) + 1,): the same for noise of those frequencies alone, relative to all; 0 where the plane
    has none. `inputs` and `runs` were spent on it.
    """

    layout: Layout
    channels: Array
    rings: Array
    inputs: int
    runs: int


def measure(
    tail: Tail,
    inputs: Iterable[Mapping[str, Array]],
    tensor: str,
    *,
    output: str | None = None,
    loss: Loss = "classes",
    layout: Layout | None = None,
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
    or `values`, relative to their mean square.

    Source: docs/codecs.md, "Sensitivity".

    Raises:
        CalibrationError: there is no input, the tensor holds no floats, or an answer is not finite.
    """
    rng = np.random.default_rng(seed)
    channels: Array | None = None
    rings = np.zeros(len(RING_EDGES) + 1)
    seen, counted, runs = 0, np.zeros_like(rings), 0
    sums, values = np.zeros((2, 1)), 0
    started = time.monotonic()
    for crossing in inputs:
        clean = crossing[tensor]
        if clean.dtype.kind in "iub" or clean.size == 0:
            raise CalibrationError(f"{tensor} holds no numbers that errors could move", tensor=tensor)
        layout = layout or layout_of(clean)
        n, c, h, w = layout.sizes(clean.shape)
        planes = layout.forward(clean).astype(np.float64)
        # A vector's channels have no spread in one input; their variance over the inputs so far is as good.
        sums = sums + np.stack([planes.sum(axis=(0, 1)), np.square(planes).sum(axis=(0, 1))])
        values += n * h * w
        spread = np.sqrt(np.maximum(sums[1] / values - np.square(sums[0] / values), 0))
        reach = _REACH * np.maximum(spread, 0.1 * float(planes.std()) + 1e-12)
        answer = _Answer(tail(crossing), output, loss)

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
    return Sensitivity(layout, channels / seen, rings / total if total else np.ones_like(rings), seen, runs)


def _moved(
    tail: Tail, crossing: Mapping[str, Array], tensor: str, layout: Layout, answer: _Answer, planes: Array
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


class _Answer:
    """A clean answer, and how far another is from it in the metric of the loss, as a vector."""

    def __init__(self, outputs: Mapping[str, Array], output: str | None, loss: Loss) -> None:
        names = list(outputs) if output is None else [output]
        self._clean = {name: _scores(outputs[name], loss) for name in names}
        self._loss = loss

    def moved(self, outputs: Mapping[str, Array]) -> Array:
        """A vector whose square is the damage."""
        parts = []
        for name, clean in self._clean.items():
            change = _scores(outputs[name], self._loss) - clean
            if self._loss == "values":
                parts.append(change.reshape(-1) / np.sqrt(max(float(np.mean(clean**2)), 1e-12) * clean.size))
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
