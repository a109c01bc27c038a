"""What a variant costs and keeps: size, seconds, memory, agreement of predictions, error at the cut."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from isthmus.artifacts.bounds import interval
from isthmus.artifacts.bundle import Segment, SegmentVariant
from isthmus.pipeline.agreement import agrees
from isthmus.runtime.kernel_profile import OrtObserver
from isthmus.runtime.ort_runner import OrtRunner
from isthmus_tools.calibration.inputs import CalibrationInput
from isthmus_tools.graph.variant_graphs import variant_segment
from isthmus_tools.learning.compression.subject import Arrays, HeadSubject, check_finite
from isthmus_tools.progress import Progress, silent

# Seconds of interleaved runs; the median of a hundred turns moves by under 2% between two measurements.
_TIMING_S = 4.0
_MIN_TURNS, _MAX_TURNS = 15, 100
# The first allocates the arena, the second shows its steady size.
_MEMORY_RUNS = 3


@dataclass(frozen=True)
class GraphCandidate:
    """A graph that may stand for a segment: the name of the variant, how it was made, its file and its MACs."""

    name: str
    method: str
    path: Path
    macs: int


@dataclass(frozen=True)
class PlainFigures:
    """The segment itself: bytes of weights and graph, seconds of a run, bytes of its session."""

    size: int
    seconds: float
    memory_bytes: int


class Outcomes:
    """Predictions and boundary tensors of one variant beside the segment's, summed over inputs."""

    def __init__(self) -> None:
        self.same: dict[str, list[bool]] = {}
        self._difference: dict[str, float] = {}
        self._size: dict[str, float] = {}

    def add(self, group: str, same: bool, reference: Arrays, other: Arrays) -> None:
        self.same.setdefault(group, []).append(same)
        for name, array in reference.items():
            if array.dtype.kind == "f":
                change = np.square(array.astype(np.float64) - other[name])
                self._difference[name] = self._difference.get(name, 0.0) + float(change.sum())
                self._size[name] = self._size.get(name, 0.0) + float(np.square(array, dtype=np.float64).sum())

    @property
    def error(self) -> float:
        """The relative RMS error of the worst tensor."""
        shares = [self._difference[name] / (size or 1.0) for name, size in self._size.items()]
        return float(np.sqrt(max(shares, default=0.0)))


def measure_variants(
    subject: HeadSubject,
    candidates: Sequence[GraphCandidate],
    held_out: Iterable[CalibrationInput],
    progress: Progress = silent,
) -> tuple[PlainFigures, list[SegmentVariant]]:
    """The segment's own figures, and each candidate as a variant with its figures.

    Raises:
        ModelError: a candidate takes or gives other tensors than the segment.
        RunFailed: a graph does not run.
    """
    segments = [variant_segment(subject.segment, c.name, c.path.read_bytes(), c.macs) for c in candidates]
    plain = subject.runner(subject.graph)
    runners = [subject.runner(c.path, segment) for c, segment in zip(candidates, segments, strict=True)]
    outcomes = [Outcomes() for _ in candidates]
    last: Arrays = {}
    for count, example in enumerate(held_out):
        progress("measuring agreement", count)
        check_finite(example)
        expected, last = subject.executor.predict(example.arrays), subject.head_inputs(example.arrays)
        reference = plain.run(last)
        for runner, outcome in zip(runners, outcomes, strict=True):
            boundary = runner.run(last)
            prediction = subject.predict(example.arrays, boundary)
            outcome.add(example.group, agrees(subject.measure, expected, prediction), reference, boundary)
    progress("measuring times")
    seconds = interleaved_seconds([plain, *runners], last)
    figures = PlainFigures(
        subject.graph.stat().st_size, statistics.median(seconds[0]), session_bytes(subject.graph, subject.segment, last)
    )
    return figures, [
        _variant(c, segment, outcome, times, seconds[0], session_bytes(c.path, segment, last))
        for c, segment, outcome, times in zip(candidates, segments, outcomes, seconds[1:], strict=True)
    ]


def _variant(
    candidate: GraphCandidate,
    segment: Segment,
    outcome: Outcomes,
    seconds: Sequence[float],
    plain_s: Sequence[float],
    memory: int,
) -> SegmentVariant:
    counts = [(sum(same), len(same)) for same in outcome.same.values()]
    low, high = interval(counts)
    inputs = sum(count for _, count in counts)
    return SegmentVariant(
        segment=segment,
        method=candidate.method,
        agreement=round(sum(hits for hits, _ in counts) / max(1, inputs), 6),
        low=round(low, 6),
        high=round(high, 6),
        inputs=inputs,
        error=float(f"{outcome.error:.4g}"),
        seconds=float(f"{statistics.median(seconds):.4g}"),
        # Turn by turn: a slower moment of the machine slows both.
        seconds_ratio=float(f"{statistics.median(a / b for a, b in zip(seconds, plain_s, strict=True)):.4g}"),
        memory_bytes=memory,
    )


def interleaved_seconds(runners: Sequence[OrtRunner], arrays: Arrays) -> list[list[float]]:
    """Seconds of runs of each, in turns. Units: CPU time of this thread, free of other processes' load.

    Sessions of one thread compute in the caller's.
    """
    for runner in runners:
        runner.run(arrays)
    start = time.perf_counter()
    for runner in runners:
        runner.run(arrays)
    turns = min(_MAX_TURNS, max(_MIN_TURNS, int(_TIMING_S / max(1e-6, time.perf_counter() - start))))
    seconds: list[list[float]] = [[] for _ in runners]
    for turn in range(turns):
        for offset in range(len(runners)):
            index = (turn + offset) % len(runners)
            begin = time.thread_time()
            runners[index].run(arrays)
            seconds[index].append(time.thread_time() - begin)
    return seconds


def session_bytes(path: Path, segment: Segment, arrays: Arrays) -> int:
    """Bytes of a graph's weights and of the runtime's arena in a run on these arrays."""
    with tempfile.TemporaryDirectory(prefix="isthmus-") as folder:
        observer = OrtObserver(path, segment, providers=("CPUExecutionProvider",), threads=1, folder=Path(folder))
        for _ in range(_MEMORY_RUNS):
            observer.run(arrays)
        # In-graph weights are no part of the arena.
        return path.stat().st_size + observer.finish(_MEMORY_RUNS, 0).memory.arena_bytes
