"""The space in which attackers reconstruct an input and reconstructions are compared: pixels, series or vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.leak import CORRELATION, SSIM
from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import LearningError

IMAGE, SERIES, VECTOR = "image", "series", "vector"
_KINDS = {4: IMAGE, 3: SERIES, 2: VECTOR}
# Longer series are averaged down to this length, as photos are to the side.
MAX_LENGTH = 512
# A linear layer of the network has an output for each value.
_MAX_VALUES = 2**16
# SSIM compares windows; smaller images have hardly any.
_MIN_SIDE = 4
_PIXELS = 255.0


@dataclass(frozen=True)
class TargetLayout:
    """An input of the model and the smaller array that stands for it.

    `full` is the input's shape without its batch; `shape` is (channels, height, width) of the compared array: of a
    series (channels, 1, length), of a vector (values, 1, 1). `swapped` says that channels come last in the input.
    """

    tensor: str
    kind: str
    full: tuple[int, ...]
    shape: tuple[int, int, int]
    swapped: bool

    @property
    def measure(self) -> str:
        """SSIM of images, the correlation of series and vectors."""
        return SSIM if self.kind == IMAGE else CORRELATION

    def small(self, row: Array) -> Array:
        """An input without batch as the compared array, in the input's units."""
        channels, height, width = self.shape
        array = np.asarray(row, np.float32)
        if self.swapped:
            array = np.moveaxis(array, -1, 0)
        tensor = torch.from_numpy(np.ascontiguousarray(array)).reshape(1, channels, -1, self._full_width)
        return np.asarray(functional.adaptive_avg_pool2d(tensor, (height, width))[0].numpy())

    def full_size(self, small: Array) -> Array:
        """A compared array as an input without batch, interpolated."""
        tensor = torch.from_numpy(np.ascontiguousarray(small, np.float32))[None]
        height = int(np.prod(self.full)) // self.shape[0] // self._full_width
        if (height, self._full_width) != self.shape[1:]:
            tensor = functional.interpolate(tensor, (height, self._full_width), mode="bilinear")
        array = tensor[0].numpy()
        if self.swapped:
            return np.moveaxis(array.reshape(self.shape[0], *self.full[:-1]), 0, -1)
        return np.asarray(array.reshape(self.full))

    @property
    def _full_width(self) -> int:
        if self.kind == VECTOR:
            return 1
        return self.full[-2] if self.swapped else self.full[-1]


def layout(bundle: Bundle, inputs: Mapping[str, Array], side: int) -> TargetLayout:
    """The input that attackers reconstruct: the largest of floats, or of pixels.

    Raises:
        LearningError: a model of whole numbers, or an input of a rank or size that nothing here suits.
    """
    specs = [s for s in bundle.inputs if s.dtype in ("float32", "float16", "float64", "bfloat16", "uint8")]
    if not specs:
        raise LearningError(f"{bundle.name} takes whole numbers alone; leak reconstructs floats and pixels")
    spec = max(specs, key=lambda s: inputs[s.name].size)
    full = tuple(inputs[spec.name].shape[1:])
    kind = _KINDS.get(len(full) + 1)
    if kind is None or not all(full):
        shape = "x".join(map(str, inputs[spec.name].shape))
        raise LearningError(
            f"the input {spec.name} has the shape {shape}; images have four axes, series three, vectors two",
            input=spec.name,
        )
    return _of_kind(spec, kind, full, side)


def _of_kind(spec: TensorSpec, kind: str, full: tuple[int, ...], side: int) -> TargetLayout:
    if kind == IMAGE:
        # Channels come last only where the last axis can hold nothing but colours.
        swapped = full[0] > 4 >= full[2]
        channels, height, width = (full[2], *full[:2]) if swapped else full
        scale = min(1.0, side / max(height, width))
        shape = (channels, max(1, round(height * scale)), max(1, round(width * scale)))
        if min(shape[1:]) < _MIN_SIDE:
            raise LearningError(f"the input {spec.name} has {height} x {width} pixels, too few to compare")
    elif kind == SERIES:
        # The longer axis is time.
        swapped = full[0] > full[1]
        channels, length = full[::-1] if swapped else full
        shape = (channels, 1, min(length, MAX_LENGTH))
    else:
        swapped, shape = False, (full[0], 1, 1)
    if int(np.prod(shape)) > _MAX_VALUES:
        raise LearningError(
            f"the input {spec.name} has {int(np.prod(shape))} values to reconstruct; at most {_MAX_VALUES}",
            input=spec.name,
            hint="a smaller --side compares photos at fewer pixels",
        )
    return TargetLayout(spec.name, kind, full, shape, swapped)


@dataclass(frozen=True)
class Units:
    """The affine map between the input's units and the compared ones, `unit = (x - offset) / scale`.

    Pixels become 0 to 1. Series and vectors become departures from the mean of the training inputs in standard
    deviations of their channel, so that the mean guess has no correlation.
    """

    offset: Array
    scale: Array
    low: float
    high: float

    @classmethod
    def of(cls, bundle: Bundle, into: TargetLayout, training: Array) -> Units:
        """The units of a model's input, by its pre-processing or else by the training inputs.

        Shapes: training (inputs, channels, height, width), in the input's units.
        """
        low, high = float(training.min()), float(training.max())
        if into.kind != IMAGE:
            deviation = training.std(axis=(0, 2, 3) if into.kind == SERIES else 0, keepdims=True)[0]
            return cls(training.mean(axis=0), np.where(deviation > 0, deviation, 1).astype(np.float32), low, high)
        if (mean_std := _normalisation(bundle, into)) is not None:
            mean, std = mean_std
            return cls(-mean / std, _PIXELS / std, low, high)
        shape = (1, 1, 1)
        return cls(np.full(shape, low, np.float32), np.full(shape, max(high - low, 1e-6), np.float32), low, high)

    def to_unit(self, arrays: Array) -> Array:
        """Compared arrays in units."""
        return np.asarray((arrays - self.offset) / self.scale, np.float32)

    def from_unit(self, arrays: Array) -> Array:
        """Compared arrays in the input's units, within the range of the training inputs."""
        return np.asarray(np.clip(arrays * self.scale + self.offset, self.low, self.high), np.float32)


def _normalisation(bundle: Bundle, into: TargetLayout) -> tuple[Array, Array] | None:
    """Mean and standard deviation that the pre-processing takes from pixels of 0 to 255. Shapes: (channels, 1, 1)."""
    doc: Mapping[str, Any] = bundle.preprocess or {}
    if doc.get("input") != into.tensor:
        return None
    step = next((s for s in doc.get("steps", ()) if s.get("op") == "normalize"), {"mean": [0.0], "std": [1.0]})
    mean, std = (np.asarray(step[key], np.float32).reshape(-1, 1, 1) for key in ("mean", "std"))
    return mean, std
