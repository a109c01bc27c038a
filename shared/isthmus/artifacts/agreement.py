"""The rule by which two predictions agree, as fidelity documents state it; pipeline.agreement applies it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from isthmus.artifacts.bundle import Bundle

TOLERANCE = 0.05
TOP1, CLOSE = "top1", "close"


@dataclass(frozen=True)
class Measure:
    """What makes two answers the same.

    `top1`: the likeliest class of `output` is the same, in every row. `close`: the error of every output is at most
    `tolerance`. An output's error is the root mean square of the differences over that of the output, or over its
    scale in `scales` where that is larger: the root mean square over the inputs that codecs were calibrated with.
    """

    kind: str
    output: str = ""
    tolerance: float = TOLERANCE
    scales: Mapping[str, float] = field(default_factory=dict)


def measure_for(bundle: Bundle, output: str = "", tolerance: float = TOLERANCE) -> Measure:
    """The measure of a model: its classes where it has some (or in `output`), else how close its outputs are."""
    after: Mapping[str, Any] = bundle.postprocess or {}
    named = output or (after.get("output", "") if after.get("kind") == "classify" else "")
    return Measure(TOP1, str(named)) if named else Measure(CLOSE, tolerance=tolerance)
