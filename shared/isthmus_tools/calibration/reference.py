"""What everyone sends today: the model's own input as a JPEG or WebP, measured like the codecs."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from isthmus.arrays import Array
from isthmus.artifacts.agreement import Measure
from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.fidelity import Reference
from isthmus.pipeline.agreement import agrees, output_error
from isthmus_tools.calibration.inputs import Example
from isthmus_tools.calibration.scoring import Tally

QUALITIES = (30, 50, 70, 85, 95)


class References:
    """Encodes the pixels that the model sees, decodes them, runs the whole model on them and keeps the tally."""

    def __init__(
        self,
        bundle: Bundle,
        whole: Callable[[Mapping[str, Array]], Mapping[str, Array]],
        measure: Measure,
        qualities: tuple[int, ...] = QUALITIES,
    ) -> None:
        spec = bundle.preprocess or {}
        steps = {step["op"]: step for step in spec["steps"]}
        normal = steps.get("normalize", {})
        self._input = spec["input"]
        self._last = steps.get("layout", {}).get("to", "NHWC") == "NHWC"
        self._mean, self._std = (np.asarray(normal.get(k, [v] * 3), np.float32) for k, v in (("mean", 0), ("std", 1)))
        self._whole, self._measure = whole, measure
        self.tallies = {(kind, q): Tally() for kind in ("jpeg", "webp") for q in qualities}

    def __call__(self, example: Example, expected: Mapping[str, Array]) -> None:
        """Note what each quality makes of one input."""
        array = example.arrays[self._input]
        pixels = array[0] if self._last else array[0].transpose(1, 2, 0)
        shown = np.clip(pixels.astype(np.float32) * self._std + self._mean, 0, 255).round().astype(np.uint8)
        for (kind, quality), tally in self.tallies.items():
            data = io.BytesIO()
            Image.fromarray(shown).save(data, kind.upper(), quality=quality)
            size = data.tell()
            came = (np.asarray(Image.open(data).convert("RGB"), np.float32) - self._mean) / self._std
            laid: np.ndarray[Any, Any] = came[None] if self._last else came.transpose(2, 0, 1)[None]
            got = self._whole({**example.arrays, self._input: np.ascontiguousarray(laid.astype(array.dtype))})
            tally.add(
                example.group, agrees(self._measure, expected, got), size, 0, output_error(self._measure, expected, got)
            )

    def entries(self) -> tuple[Reference, ...]:
        """The document's references."""
        found = []
        for (codec, quality), tally in self.tallies.items():
            low, high = tally.interval()
            found.append(
                Reference(
                    codec=codec,
                    quality=quality,
                    agreement=round(tally.agreement, 6),
                    low=round(low, 6),
                    high=round(high, 6),
                    error=float(f"{tally.mean_error():.6g}"),
                    bytes=round(statistics.median(tally.bytes)),
                    p95=tally.p95(),
                )
            )
        return tuple(found)
