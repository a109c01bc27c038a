"""What crosses each cut for each calibrating input, in files: read one at a time, as often as learning asks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from isthmus.arrays import Array
from isthmus.pipeline.agreement import root_mean_square
from isthmus.wire import frame as frames
from isthmus_tools.calibration.crossing import Crossing, Run

MAX_FRAME = 2**31


class Spool:
    """Runs inputs up to every cut and keeps what crosses as frames in `folder`; the last answer is at hand."""

    def __init__(self, crossings: Sequence[Crossing], run: Run, folder: Path) -> None:
        self._crossings, self._run, self._folder = crossings, run, folder
        self._squares: dict[str, list[float]] = {}
        self.count = 0
        self.answer: Mapping[str, Array] = {}

    def add(self, inputs: Mapping[str, Array]) -> None:
        """Run one input up to every cut, and from the first one on to the end."""
        for i, each in enumerate(self._crossings):
            crossed, early = each.before(self._run, inputs)
            if not i:
                self.answer = each.after(self._run, crossed, early)
            self._path(each.cut, self.count).write_bytes(frames.encode(frames.Frame(crossed)))
        for name, array in self.answer.items():
            if array.dtype.kind in "fV":
                self._squares.setdefault(name, []).append(root_mean_square(array) ** 2)
        self.count += 1

    def crossed(self, cut: str) -> Crossed:
        """What crossed `cut`, each input's tensors by name."""
        return Crossed([self._path(cut, i) for i in range(self.count)])

    def scales(self) -> dict[str, float]:
        """The root mean square of each float output over all inputs."""
        return {name: float(np.sqrt(np.mean(squares))) for name, squares in self._squares.items()}

    def _path(self, cut: str, index: int) -> Path:
        return self._folder / f"{cut}-{index}.frame"


@dataclass(frozen=True)
class Crossed:
    """Frames in files, decoded one at a time, any number of times over; of one tensor, or of all."""

    paths: Sequence[Path]

    def __iter__(self) -> Iterator[dict[str, Array]]:
        for path in self.paths:
            yield dict(frames.decode(path.read_bytes(), max_bytes=MAX_FRAME).tensors)

    def scattered(self) -> tuple[Crossed, list[int]]:
        """The same in a random order, always the same one, and the place of each: neighbours may be alike."""
        order = np.random.default_rng(0).permutation(len(self.paths)).tolist()
        return Crossed([self.paths[i] for i in order]), order

    def tensor(self, name: str) -> Samples:
        """Only that tensor of each."""
        return Samples(self, name)


@dataclass(frozen=True)
class Samples:
    """One tensor as it crossed, input by input."""

    crossed: Crossed
    name: str

    def __iter__(self) -> Iterator[Array]:
        return (tensors[self.name] for tensors in self.crossed)
