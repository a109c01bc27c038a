"""Training data of attackers: a model's inputs as compared arrays, and boundary tensors as a cloud receives them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from isthmus.arrays import Array
from isthmus.errors import LearningError
from isthmus_tools.learning.leak.targets import IMAGE, SERIES, TargetLayout

# For a cut and codec, on disk; attackers read batches.
_MAX_FILE_BYTES = 4 * 2**30
# Values of a tensor without places; longer ones are averaged down.
_MAX_FLAT = 2**16
# Variances below this share of the mean square mean a constant.
_MIN_VARIANCE = 1e-8


@dataclass
class Features:
    """A boundary tensor of each input, in a file: maps (channels, height, width), or values (values, 1, 1).

    `mean` and `deviation` are over the training inputs, by channel of maps and by value otherwise.
    """

    values: Array
    mean: Array
    deviation: Array

    @property
    def is_map(self) -> bool:
        """Whether its values have places."""
        return bool(self.values.shape[2] * self.values.shape[3] > 1)

    def batch(self, indices: Sequence[int] | Array) -> torch.Tensor:
        """Standardised features of some inputs."""
        rows = (np.asarray(self.values[np.asarray(indices)]) - self.mean) / self.deviation
        return torch.from_numpy(rows.astype(np.float32))


@dataclass(frozen=True)
class Crossings:
    """The tensors that cross a cut under a codec, of all inputs, and the compared arrays, in units.

    The first `trained` inputs train attackers, the rest measure.
    """

    features: Sequence[Features]
    targets: Array
    trained: int

    @property
    def held_out(self) -> Array:
        """The indices of inputs that measure."""
        return np.arange(self.trained, len(self.targets))

    def batch(self, indices: Sequence[int] | Array) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Standardised features and compared arrays of some inputs."""
        return [f.batch(indices) for f in self.features], torch.from_numpy(self.targets[np.asarray(indices)])

    def batches(self, indices: Array, size: int = 32) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
        """All of some inputs, in batches."""
        for start in range(0, len(indices), size):
            yield self.batch(indices[start : start + size])


@dataclass
class FeatureFiles:
    """Writes the boundary tensors of inputs to files in `folder`, input by input."""

    folder: Path
    into: TargetLayout
    count: int
    trained: int
    _files: list[Array] = field(default_factory=list)
    _sums: list[tuple[Array, Array]] = field(default_factory=list)
    written: int = 0

    def add(self, tensors: Mapping[str, Array]) -> None:
        """Write the boundary tensors of the next input.

        Raises:
            LearningError: values that are not finite, more bytes than the bound, or shapes that vary with the input.
        """
        rows = [part for name in sorted(tensors) for part in parts(tensors[name], self.into)]
        if not self._files:
            self._open(rows)
        if [row.shape for row in rows] != [file.shape[1:] for file in self._files]:
            raise LearningError("the boundary tensors' shapes vary with the input; leak takes inputs of one shape")
        for index, row in enumerate(rows):
            if not np.isfinite(row).all():
                raise LearningError(
                    f"boundary tensors of input {self.written} are not finite",
                    input=self.written,
                    hint="are the inputs in the range that the model was trained on?",
                )
            self._files[index][self.written] = row
            if self.written < self.trained:
                total, squares = self._sums[index]
                total += row
                squares += row.astype(np.float64) ** 2
        self.written += 1

    def _open(self, rows: Sequence[Array]) -> None:
        size = 4 * self.count * sum(row.size for row in rows)
        if size > _MAX_FILE_BYTES:
            raise LearningError(
                f"the boundary tensors of {self.count} inputs take {size} bytes of disk; at most {_MAX_FILE_BYTES}",
                limit=_MAX_FILE_BYTES,
                hint="fewer --inputs, or a smaller --side for photos",
            )
        for index, row in enumerate(rows):
            # Mapped files: the tensors of all inputs may not fit in memory.
            path = self.folder / f"features-{index}.npy"
            shape = (self.count, *row.shape)
            self._files.append(np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape))
            self._sums.append((np.zeros(row.shape), np.zeros(row.shape)))

    def crossings(self, targets: Array) -> Crossings:
        """The written tensors, standardised by the training inputs."""
        return Crossings(
            [_standardised(f, *sums, self.trained) for f, sums in zip(self._files, self._sums, strict=True)],
            targets,
            self.trained,
        )


def _standardised(values: Array, total: Array, squares: Array, count: int) -> Features:
    mean, square = total / count, squares / count
    if values.shape[2] * values.shape[3] > 1:
        mean, square = mean.mean(axis=(1, 2), keepdims=True), square.mean(axis=(1, 2), keepdims=True)
    variance = square - mean**2
    # Constants become zeros, and not noise of the size of rounding errors.
    deviation = np.where(variance > _MIN_VARIANCE * square, np.sqrt(np.maximum(variance, 0)), np.inf)
    return Features(values, mean.astype(np.float32), deviation.astype(np.float32))


def parts(tensor: Array, into: TargetLayout) -> list[Array]:
    """A boundary tensor as maps or values, by the kind of the reconstructed input.

    Images: (1, channels, height, width) as maps; tokens (1, tokens, width) as maps where the tokens are a square, a
    class token beside. Series: (1, channels, length) or (1, length, channels) as maps of height 1. All else as values.
    Maps are averaged down to the compared size.
    """
    array = np.asarray(tensor, np.float32)
    if array.ndim and array.shape[0] == 1:
        array = array[0]
    if into.kind == IMAGE and array.ndim == 3:
        return [_pooled(array, into)]
    if into.kind == IMAGE and array.ndim == 2 and (side := math.isqrt(array.shape[0])) > 1:
        extra = array.shape[0] - side * side
        if extra in (0, 1):
            maps = array[extra:].T.reshape(-1, side, side)
            return [_pooled(maps, into), *([array[0].reshape(-1, 1, 1)] if extra else [])]
    if into.kind == SERIES and array.ndim == 2:
        length = max(into.full)
        maps = array.T if array.shape[0] == length != array.shape[1] else array
        return [_pooled(maps[:, None, :], into)]
    flat = torch.from_numpy(np.ascontiguousarray(array.reshape(1, 1, -1)))
    # Averages lose something: the leak of such tensors is understated rather than unmeasured.
    if flat.shape[2] > _MAX_FLAT:
        flat = functional.adaptive_avg_pool1d(flat, _MAX_FLAT)
    return [np.asarray(flat.numpy().reshape(-1, 1, 1))]


def _pooled(maps: Array, into: TargetLayout) -> Array:
    """Maps averaged down to at most the compared size. Shapes: (channels, height, width)."""
    size = tuple(min(a, b) for a, b in zip(maps.shape[1:], into.shape[1:], strict=True))
    tensor = torch.from_numpy(np.ascontiguousarray(maps))
    return np.asarray(functional.adaptive_avg_pool2d(tensor[None], size)[0].numpy())
