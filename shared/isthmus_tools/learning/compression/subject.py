"""The segment to compress: its graph with its weights, the segments behind it, and inputs that calibrate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Bundle, Segment
from isthmus.artifacts.fidelity import CLOSE, TOP1, Measure
from isthmus.artifacts.segment_id import WHOLE, SegmentId
from isthmus.errors import CalibrationError, ModelError
from isthmus.pipeline.agreement import agrees, root_mean_square
from isthmus.runtime.ort_runner import OrtRunner
from isthmus.wire import frame as frames
from isthmus_tools.calibration.boundary import BoundarySamples, CutBoundary, SegmentExecutor
from isthmus_tools.calibration.inputs import CalibrationInput
from isthmus_tools.progress import Progress, silent

Arrays = Mapping[str, Array]
# Layers are tried in float one after the other, each on so many inputs.
_MAX_TRIALS = 64


@dataclass(frozen=True)
class HeadSubject:
    """A segment that begins at the model's inputs, and what compression needs beside it.

    `graph` is its file with the weights inside, `tail` the segments behind it, empty for the whole model. `samples` are
    inputs of the model that calibrate; `measure` says when two predictions are the same. Runs take `threads`.
    """

    executor: SegmentExecutor
    segment: Segment
    tail: tuple[Segment, ...]
    graph: Path
    samples: BoundarySamples
    measure: Measure
    threads: int = 1

    @property
    def bundle(self) -> Bundle:
        return self.executor.bundle

    def head_inputs(self, arrays: Arrays) -> dict[str, Array]:
        """The segment's inputs among the model's."""
        return {spec.name: arrays[spec.name] for spec in self.segment.inputs}

    def head_samples(self) -> Iterator[dict[str, Array]]:
        """The segment's inputs of each sample, read from files."""
        return (self.head_inputs(arrays) for arrays in self.samples)

    def runner(self, graph: Path | bytes, segment: Segment | None = None) -> OrtRunner:
        """A session of a graph that stands for the segment, on the provider that every machine has."""
        return OrtRunner(graph, segment or self.segment, providers=("CPUExecutionProvider",), threads=self.threads)

    def predict(self, arrays: Arrays, boundary: Arrays) -> dict[str, Array]:
        """The model's outputs from a head's, by the unchanged tail."""
        if not self.tail:
            return dict(boundary)
        return self.executor.execute(self.tail, {**arrays, **boundary}).outputs

    def agreement(self, graph: Path) -> float:
        """The share of the first samples whose prediction a graph keeps."""
        head, same, count = self.runner(graph), 0, 0
        for arrays in _first(self.samples, _MAX_TRIALS):
            expected = self.executor.predict(arrays)
            same += agrees(self.measure, expected, self.predict(arrays, head.run(self.head_inputs(arrays))))
            count += 1
        return same / max(1, count)


def _first(samples: BoundarySamples, count: int) -> BoundarySamples:
    return BoundarySamples(samples.paths[:count])


def head_boundary(bundle: Bundle, cut: str) -> tuple[Segment, tuple[Segment, ...]]:
    """The head of a bundle at `cut` and the segments behind it; the whole model where the cut is empty.

    Raises:
        ModelError: a model whose segments keep state.
        Missing: no such head in the bundle.
        CalibrationError: no segments from the cut on.
    """
    # A session's cache of keys and values is of one graph, and a fallback to the plain head would continue another's.
    if bundle.state is not None:
        raise ModelError(
            f"{bundle.name} keeps state between requests: variants of its segments could not take over from each other",
            hint=f"choose its weights at import: isthmus import … --weights int8 --name {bundle.name}",
        )
    # An edge without a link runs all of the model, so that nothing lies behind.
    if not cut:
        return bundle.segment(WHOLE), ()
    return bundle.segment(SegmentId(stop=cut)), CutBoundary.at(bundle, cut).tail


def store_samples(examples: Iterable[CalibrationInput], folder: Path, progress: Progress = silent) -> BoundarySamples:
    """Write inputs to `folder`, a file each, so that memory holds a single one.

    Raises:
        CalibrationError: an input holds NaN or infinities.
    """
    paths = list[Path]()
    for index, example in enumerate(examples):
        progress("reading inputs", index)
        check_finite(example)
        path = folder / f"input-{index}.frame"
        # As frames: .npy files lose the name of bfloat16.
        path.write_bytes(frames.encode(frames.Frame(example.arrays)))
        paths.append(path)
    return BoundarySamples(paths)


def check_finite(example: CalibrationInput) -> None:
    """Refuse an input with NaN or infinities.

    Raises:
        CalibrationError: names the file and the input.
    """
    for name, array in example.arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise CalibrationError(
                f"{example.group} holds NaN or infinite values in {name}", file=example.group, tensor=name
            )


def with_scales(measure: Measure, executor: SegmentExecutor, samples: BoundarySamples) -> Measure:
    """The measure with the size of each output over the samples, where closeness is measured.

    Raises:
        CalibrationError: a prediction is not finite, or the measured output is not there.
    """
    # One prediction shows whether the classes are there; sizes are those of many.
    squares: dict[str, list[float]] = {}
    for arrays in _first(samples, _MAX_TRIALS) if measure.kind == CLOSE else _first(samples, 1):
        outputs = executor.predict(arrays)
        if measure.kind == TOP1 and measure.output not in outputs:
            raise CalibrationError(
                f"{executor.bundle.name} has no output {measure.output!r}",
                output=measure.output,
                exists=sorted(outputs),
            )
        for name, array in outputs.items():
            if array.dtype.kind == "f":
                if not np.isfinite(array).all():
                    raise CalibrationError(f"the model's output {name} is not finite for these inputs", output=name)
                squares.setdefault(name, []).append(root_mean_square(array) ** 2)
    if measure.kind == TOP1:
        return measure
    return replace(measure, scales={name: float(np.sqrt(np.mean(each))) for name, each in squares.items()})
