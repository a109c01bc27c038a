"""The methods of compression by name, each from a segment's graph to candidates for variants."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from isthmus.errors import ModelError
from isthmus_tools.graph.quantise import linear_in_blocks
from isthmus_tools.learning.compression.int8 import int8
from isthmus_tools.learning.compression.measurement import GraphCandidate
from isthmus_tools.learning.compression.subject import HeadSubject
from isthmus_tools.progress import Progress, silent


@dataclass(frozen=True)
class CompressionSpec:
    """What to make: `methods` of METHODS, all if none; the shares of MACs that pruning keeps; int8's limit.

    `limit` is the share of predictions below which int8 leaves layers in float; `reduce_range` as of `Quantiser`.
    """

    methods: Sequence[str] = ()
    keep: Sequence[float] = (0.8, 0.6)
    limit: float = 0.99
    reduce_range: bool | None = None


Maker: TypeAlias = Callable[[HeadSubject, CompressionSpec, Path, Progress], list[GraphCandidate]]


def make_candidates(
    subject: HeadSubject, spec: CompressionSpec, folder: Path, progress: Progress = silent
) -> tuple[list[GraphCandidate], dict[str, str]]:
    """Candidates of every method, and the reason for each method that does not apply.

    Raises:
        ModelError: a method that `spec` names does not apply, or none does.
    """
    candidates, refused = list[GraphCandidate](), dict[str, str]()
    for method in spec.methods or METHODS:
        place = folder / method
        place.mkdir(exist_ok=True)
        try:
            candidates += METHODS[method](subject, spec, place, progress)
        except ModelError as e:
            # Whoever names a method wants to know; otherwise the others are of use without it.
            if spec.methods:
                raise
            refused[method] = e.message
    if not candidates:
        raise ModelError("; ".join(f"{method}: {reason}" for method, reason in refused.items()))
    return candidates, refused


def _int8(subject: HeadSubject, spec: CompressionSpec, folder: Path, progress: Progress) -> list[GraphCandidate]:
    path, method = int8(subject, subject.graph, folder, spec.limit, progress, spec.reduce_range)
    return [GraphCandidate("int8", method, path, subject.segment.macs)]


def _weights(bits: int) -> Maker:
    def make(subject: HeadSubject, spec: CompressionSpec, folder: Path, progress: Progress) -> list[GraphCandidate]:
        path, layers = linear_in_blocks(subject.graph, bits, folder / "weights.onnx")
        method = f"weights of {layers} linear layers in int{bits}, activations in float"
        return [GraphCandidate(f"weights-int{bits}", method, path, subject.segment.macs)]

    return make


METHODS: Mapping[str, Maker] = {
    "int8": _int8,
    "weights-int8": _weights(8),
    "weights-int4": _weights(4),
}
