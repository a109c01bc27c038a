"""Runs of the uncut model that show the boundary tensors of all candidate cuts beside the prediction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.segment_id import WHOLE
from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import LearningError
from isthmus.pipeline.agreement import are_probabilities
from isthmus.runtime.ort_runner import UnpublishedRunner
from isthmus_tools.graph.cuts import AnyCut
from isthmus_tools.graph.exit_branch import TensorPool
from isthmus_tools.graph.observing import observing
from isthmus_tools.learning.classes import ModelClasses
from isthmus_tools.learning.exits.features import features_of, pools_for
from isthmus_tools.learning.exits.padding import token_masks
from isthmus_tools.learning.labelled import LabelledData
from isthmus_tools.progress import Progress

# Inputs of a run, where the model takes any number: early activations have megabytes each.
_BATCH = 16
# Inputs, drawn at random, that show which boundary tensors are masks.
_SAMPLE = 64
# A mean beyond is no activation's: biases of masks are sums of such numbers, and would hide all else.
_MAX_FEATURE = 1e8
# Softmax underflows to 0, and no regression has infinite targets.
_MIN_PROBABILITY = 1e-7


class ActivationObserver:
    """The uncut graph with boundary tensors as outputs, in a session of its own."""

    def __init__(
        self, whole: Path, bundle: Bundle, cuts: Sequence[AnyCut], classes: ModelClasses, threads: int = 0
    ) -> None:
        specs = list({spec.name: spec for cut in cuts for spec in cut.tensors}.values())
        graph, segment = observing(whole, bundle.segment(WHOLE), specs)
        self._runner = UnpublishedRunner(graph, segment, whole.parent, threads=threads, repack=True)
        self._classes = classes
        self._is_free = all(_has_free_batch(spec) for spec in (*bundle.inputs, *specs, classes.output))

    def batches(
        self, data: LabelledData, progress: Progress, stage: str
    ) -> Iterator[tuple[slice, dict[str, Array], Array]]:
        """The rows of a batch, all tensors of its run, and the model's scores. Shapes: scores (batch, classes).

        Raises:
            LearningError: an input cannot be used, or gives scores that are not finite.
        """
        done = 0
        for inputs in _stacked(data.inputs(), _BATCH if self._is_free else 1):
            progress(stage, done, len(data))
            tensors = inputs | self._runner.run(inputs)
            scores = tensors[self._classes.output.name]
            rows = slice(done, done + len(scores))
            scores = scores.reshape(len(scores), self._classes.count).astype(np.float32)
            if not np.isfinite(scores).all():
                first = done + int(np.flatnonzero(~np.isfinite(scores).all(axis=1))[0])
                path, row = data.places[first]
                raise LearningError(f"the model gives NaN or infinity for {path}, input {row}", file=str(path), row=row)
            yield rows, tensors, scores
            # Counted here: batches vary with the shapes of inputs.
            done = rows.stop


@dataclass(frozen=True, eq=False)
class ObservedInputs:
    """The data of a fit: features of each cut that can be pooled, and the model's logits.

    `refused` says of other cuts why not, and `left_out` of boundary tensors by cut. Shapes: features (inputs, width)
    and logits (inputs, classes), both float32 in files that memory maps.
    """

    pools: Mapping[str, Sequence[TensorPool]]
    features: Mapping[str, Array]
    logits: Array
    are_probabilities: bool
    refused: Mapping[str, str]
    left_out: Mapping[str, Mapping[str, str]]


def observe(
    observer: ActivationObserver, cuts: Sequence[AnyCut], data: LabelledData, folder: Path, progress: Progress
) -> ObservedInputs:
    """Run the model on all inputs, and keep pooled features alone: activations have a hundred times their size.

    Raises:
        LearningError: as `ActivationObserver.batches`.
    """
    sample = (tensors for _, tensors, _ in observer.batches(data.sample(_SAMPLE), progress, "looking for masks"))
    masks = token_masks(list({spec.name: spec for cut in cuts for spec in cut.tensors}.values()), sample)
    batches = observer.batches(data, progress, "running the model on inputs to fit")
    first = next(batches)
    _, tensors, scores = first
    pools: dict[str, list[TensorPool]] = {}
    refused: dict[str, str] = {}
    for cut in cuts:
        try:
            example = {spec.name: tensors[spec.name][:1] for spec in cut.tensors}
            pools[cut.name] = pools_for(cut.tensors, example, [mask for mask in masks if mask.tensor in example])
        except LearningError as e:
            refused[cut.name] = e.message
    widths = {name: sum(pool.width for pool in each) for name, each in pools.items()}
    # Files in place of memory: 20,000 inputs of ten cuts take 800 MB.
    features = {name: _mapped(folder / f"{name}.features", len(data), width) for name, width in widths.items()}
    logits = _mapped(folder / "logits", len(data), scores.shape[1])
    for rows, activations, batch in chain([first], batches):
        # The activations themselves go with this batch.
        for name, each in pools.items():
            features[name][rows] = features_of(each, activations)
        logits[rows] = batch
    probabilities = are_probabilities(logits)
    if probabilities:
        logits[:] = np.log(np.maximum(logits, _MIN_PROBABILITY))
    left_out = {name: _useless(each, features[name]) for name, each in pools.items()}
    for name in [name for name, reasons in left_out.items() if reasons]:
        kept = [pool for pool in pools[name] if pool.tensor not in left_out[name]]
        if kept:
            features[name] = _columns(pools[name], features[name], kept, folder / f"{name}.kept")
            pools[name] = kept
        else:
            refused[name] = "no feature: " + "; ".join(f"{tensor} {why}" for tensor, why in left_out[name].items())
            del pools[name], features[name]
    return ObservedInputs(pools, features, logits, probabilities, refused, left_out)


def _useless(pools: Sequence[TensorPool], features: Array) -> dict[str, str]:
    """Tensors whose features tell nothing, and why. A head without such a tensor is smaller, and finite."""
    reasons: dict[str, str] = {}
    for pool, columns in _ranges(pools):
        least, most = features[:, columns].min(axis=0), features[:, columns].max(axis=0)
        if not (np.isfinite(least).all() and np.isfinite(most).all()):
            reasons[pool.tensor] = "has features that are not finite"
        elif max(np.abs(least).max(), np.abs(most).max()) > _MAX_FEATURE:
            reasons[pool.tensor] = f"has features beyond {_MAX_FEATURE:.0e}"
        elif (least == most).all():
            reasons[pool.tensor] = "is the same for all inputs"
    return reasons


def _ranges(pools: Sequence[TensorPool]) -> Iterator[tuple[TensorPool, slice]]:
    start = 0
    for pool in pools:
        yield pool, slice(start, start + pool.width)
        start += pool.width


def _columns(pools: Sequence[TensorPool], features: Array, kept: Sequence[TensorPool], path: Path) -> Array:
    """The features of some of `pools`, in a file of their own."""
    own = _mapped(path, len(features), sum(pool.width for pool in kept))
    parts = [columns for pool, columns in _ranges(pools) if pool in kept]
    for (_, into), columns in zip(_ranges(kept), parts, strict=True):
        own[:, into] = features[:, columns]
    return own


def _mapped(path: Path, rows: int, columns: int) -> Array:
    return np.memmap(path, np.float32, "w+", shape=(rows, columns))


def _has_free_batch(spec: TensorSpec) -> bool:
    return bool(spec.shape) and isinstance(spec.shape[0], str)


def _stacked(inputs: Iterator[dict[str, Array]], size: int) -> Iterator[dict[str, Array]]:
    """Inputs in batches of at most `size`, each of inputs of equal shapes."""
    batch: list[dict[str, Array]] = []
    for arrays in inputs:
        if batch and (len(batch) == size or any(batch[0][name].shape != a.shape for name, a in arrays.items())):
            yield _joined(batch)
            batch = []
        batch.append(arrays)
    if batch:
        yield _joined(batch)


def _joined(batch: list[dict[str, Array]]) -> dict[str, Array]:
    if len(batch) == 1:
        return dict(batch[0])
    return {name: np.concatenate([arrays[name] for arrays in batch]) for name in batch[0]}
