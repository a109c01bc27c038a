"""JPEG and WebP of the model's input as references: the alternative of sending the image itself."""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping

import numpy as np
from PIL import Image

from isthmus.arrays import Array
from isthmus.artifacts.fidelity import Measure, Reference
from isthmus.pipeline.agreement import agrees, output_error
from isthmus_tools.calibration.boundary import SegmentExecutor
from isthmus_tools.calibration.inputs import CalibrationInput
from isthmus_tools.calibration.scoring import Tally

QUALITIES = (30, 50, 70, 85, 95)


class References:
    """Encodes the model's input as an image, decodes the image, runs the uncut model; a tally for each quality."""

    def __init__(self, executor: SegmentExecutor, measure: Measure, qualities: tuple[int, ...] = QUALITIES) -> None:
        spec = executor.bundle.preprocess or {}
        steps = {step["op"]: step for step in spec["steps"]}
        normalize = steps.get("normalize", {})
        self._input = spec["input"]
        self._channels_last = steps.get("layout", {}).get("to", "NHWC") == "NHWC"
        self._mean = np.asarray(normalize.get("mean", [0] * 3), np.float32)
        self._std = np.asarray(normalize.get("std", [1] * 3), np.float32)
        self._executor, self._measure = executor, measure
        self.tallies = {(kind, q): Tally() for kind in ("jpeg", "webp") for q in qualities}

    def __call__(self, example: CalibrationInput, expected: Mapping[str, Array]) -> None:
        """Score every quality on an input; `expected` is the prediction for the input itself."""
        array = example.arrays[self._input]
        # Pixels after pre-processing, fewer than the photo's: in favour of the references.
        pixels = array[0] if self._channels_last else array[0].transpose(1, 2, 0)  # (height, width, channels)
        image = Image.fromarray(
            np.clip(pixels.astype(np.float32) * self._std + self._mean, 0, 255).round().astype(np.uint8)
        )
        for (kind, quality), tally in self.tallies.items():
            data = io.BytesIO()
            image.save(data, kind.upper(), quality=quality)
            size = data.tell()
            decoded = (np.asarray(Image.open(data).convert("RGB"), np.float32) - self._mean) / self._std
            batch: Array = (decoded if self._channels_last else decoded.transpose(2, 0, 1))[None]
            inputs = {**example.arrays, self._input: np.ascontiguousarray(batch.astype(array.dtype))}
            outputs = self._executor.predict(inputs)
            same, error = agrees(self._measure, expected, outputs), output_error(self._measure, expected, outputs)
            tally.add(example.group, same, size, error=error)

    def entries(self) -> tuple[Reference, ...]:
        """The references of the fidelity document."""
        return tuple(_reference(*key, tally) for key, tally in self.tallies.items())


def _reference(codec: str, quality: int, tally: Tally) -> Reference:
    low, high = tally.interval()
    return Reference(
        codec=codec,
        quality=quality,
        agreement=round(tally.agreement, 6),
        low=round(low, 6),
        high=round(high, 6),
        error=float(f"{tally.mean_error():.6g}"),
        bytes=round(statistics.median(tally.bytes)),
        p95=tally.p95(),
    )
