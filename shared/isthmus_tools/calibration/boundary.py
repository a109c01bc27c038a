"""Boundary tensors of a model's cuts: computed by its segments in this process, and kept as samples in files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Bundle, Segment
from isthmus.artifacts.segment_id import WHOLE
from isthmus.artifacts.tensors import TensorSpec
from isthmus.context import Context
from isthmus.errors import CalibrationError, Missing
from isthmus.pipeline import LocalHop, Result, Route, execute, local_route
from isthmus.pipeline.agreement import root_mean_square
from isthmus.registry import SegmentSource
from isthmus.runtime.store import SegmentStore
from isthmus.settings import SegmentSettings
from isthmus.wire import frame as frames

MAX_FRAME_BYTES = 2**31
# Long, since the first execution loads a segment and fetches its weights.
_MAX_EXECUTION_S = 600.0


class SegmentExecutor:
    """Executes segments of a bundle in this process; segments are loaded on first use."""

    def __init__(self, digest: str, bundle: Bundle, source: SegmentSource, settings: SegmentSettings) -> None:
        self.bundle = bundle
        self._digest, self._hop = digest, LocalHop(SegmentStore(source, settings))

    def execute(self, segments: Sequence[Segment], tensors: Mapping[str, Array]) -> Result:
        """Run consecutive segments on the model's inputs, or on all tensors at hand behind a cut."""
        route = local_route(self._digest, self.bundle, segments, self._hop)
        return execute(route, tensors, Context.from_headers({}, longest_s=_MAX_EXECUTION_S))

    def predict(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The uncut model's outputs."""
        return self.execute((self.bundle.segment(WHOLE),), inputs).outputs


@dataclass(frozen=True)
class CutBoundary:
    """A cut: the segments of its head and tail, and the tensors that the tail needs, inputs of the model included."""

    cut: str
    head: tuple[Segment, ...]
    tail: tuple[Segment, ...]
    tensors: tuple[TensorSpec, ...]

    @classmethod
    def at(cls, bundle: Bundle, cut: str) -> CutBoundary:
        """The boundary at `cut`, of as few segments as the bundle has for its sides.

        Raises:
            Missing: the bundle has no cut of that name.
            CalibrationError: the bundle has no segments to the cut, or none from there.
        """
        if cut not in bundle.cuts:
            raise Missing(
                f"bundle {bundle.name} has no cut {cut!r}",
                kind="cut",
                name=cut,
                exists=sorted(bundle.cuts),
                hint=f"publish it with: isthmus cut {bundle.name} --cut …",
            )
        head, tail = _fewest_segments(bundle, "", cut), _fewest_segments(bundle, cut, "")
        return cls(cut, head, tail, Route("", bundle, tail, ()).inputs)

    def select(self, tensors: Mapping[str, Array]) -> dict[str, Array]:
        """The boundary tensors among `tensors`."""
        return {s.name: tensors[s.name] for s in self.tensors}

    def tail_outputs(self, executor: SegmentExecutor, boundary: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs that the tail computes from boundary tensors alone; outputs of the head are left out."""
        computed = {s.name for segment in self.tail for s in segment.outputs}
        outputs = executor.execute(self.tail, boundary).outputs
        return {name: array for name, array in outputs.items() if name in computed}


def _fewest_segments(bundle: Bundle, start: str, stop: str) -> tuple[Segment, ...]:
    """Breadth-first search for segments between two cuts; an empty name is an end of the model."""
    queue: list[tuple[str, tuple[Segment, ...]]] = [(start, ())]
    visited = {start}
    for cut, path in queue:
        for segment in bundle.segments.values():
            end = segment.id.stop
            # The uncut model passes every cut by; only a tail may end at the model's outputs.
            if segment.id == WHOLE or segment.id.start != cut or (not end and stop):
                continue
            if end == stop:
                return (*path, segment)
            if end not in visited:
                visited.add(end)
                queue.append((end, (*path, segment)))
    raise CalibrationError(
        f"{bundle.name} has no segments from {start or 'its inputs'} to {stop or 'its outputs'}",
        cut=stop or start,
        exists=sorted(bundle.segments),
        hint=f"publish it with: isthmus cut {bundle.name} --cut {stop or start}",
    )


class Spool:
    """Boundary tensors of the calibrating inputs as frames in `folder`, so that memory holds a single input."""

    def __init__(self, boundaries: Sequence[CutBoundary], executor: SegmentExecutor, folder: Path) -> None:
        self._boundaries, self._executor, self._folder = boundaries, executor, folder
        self._squares: dict[str, list[float]] = {}
        self.count = 0
        self.prediction: Mapping[str, Array] = {}
        """The last input's."""

    def add(self, inputs: Mapping[str, Array]) -> None:
        """Execute the head of every boundary on an input, and the tail of the first boundary."""
        for index, boundary in enumerate(self._boundaries):
            tensors = self._executor.execute(boundary.head, inputs).tensors
            if not index:
                self.prediction = self._executor.execute(boundary.tail, tensors).outputs
            # As frames: .npy files lose the name of bfloat16.
            frame = frames.Frame(boundary.select(tensors))
            self._path(boundary.cut, self.count).write_bytes(frames.encode(frame))
        for name, array in self.prediction.items():
            if array.dtype.kind in "fV":
                self._squares.setdefault(name, []).append(root_mean_square(array) ** 2)
        self.count += 1

    def samples(self, cut: str) -> BoundarySamples:
        """The boundary tensors at `cut`, input by input."""
        return BoundarySamples([self._path(cut, i) for i in range(self.count)])

    def scales(self) -> dict[str, float]:
        """Root mean square of each float output over all inputs."""
        return {name: float(np.sqrt(np.mean(squares))) for name, squares in self._squares.items()}

    def _path(self, cut: str, index: int) -> Path:
        return self._folder / f"{cut}-{index}.frame"


@dataclass(frozen=True)
class BoundarySamples:
    """Boundary tensors in files, decoded on iteration, any number of times."""

    paths: Sequence[Path]

    def __iter__(self) -> Iterator[dict[str, Array]]:
        for path in self.paths:
            yield dict(frames.decode(path.read_bytes(), max_bytes=MAX_FRAME_BYTES).tensors)

    def __len__(self) -> int:
        return len(self.paths)

    def shuffled(self) -> tuple[BoundarySamples, list[int]]:
        """The samples in a fixed random order, and each one's index here: neighbours in a stream are alike."""
        order = np.random.default_rng(0).permutation(len(self.paths)).tolist()
        return BoundarySamples([self.paths[i] for i in order]), order

    def tensor(self, name: str) -> TensorSamples:
        """A single tensor of each input."""
        return TensorSamples(self, name)


@dataclass(frozen=True)
class TensorSamples:
    """A single boundary tensor of every input, decoded on iteration, any number of times."""

    samples: BoundarySamples
    name: str

    def __iter__(self) -> Iterator[Array]:
        return (tensors[self.name] for tensors in self.samples)
