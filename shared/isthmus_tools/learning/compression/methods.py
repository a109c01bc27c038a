"""The methods of compression by name, each from a segment's graph to candidates for variants."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from isthmus.errors import ModelError
from isthmus_tools.graph.quantise import linear_in_blocks
from isthmus_tools.learning.compression.distillation import distil, training_part
from isthmus_tools.learning.compression.int8 import int8
from isthmus_tools.learning.compression.measurement import GraphCandidate
from isthmus_tools.learning.compression.pruning import ChannelPruner, PrunedHead
from isthmus_tools.learning.compression.subject import HeadSubject
from isthmus_tools.progress import Progress, silent

KEEP = (0.9, 0.75)
"""Shares of the head's MACs that pruning leaves by default."""
DEFAULTS = ("int8", "weights-int8", "weights-int4", "prune")
"""The methods that are tried where none is named: minutes in all, and nothing beyond numpy and onnxruntime."""


@dataclass(frozen=True)
class CompressionSpec:
    """What to make: `methods` of METHODS, DEFAULTS if none; the shares of MACs that pruning keeps; int8's limit.

    `limit` is the share of predictions below which int8 leaves layers in float; `reduce_range` as of `Quantiser`.
    """

    methods: Sequence[str] = ()
    keep: Sequence[float] = KEEP
    limit: float = 0.99
    reduce_range: bool | None = None


@dataclass
class Workshop:
    """What methods share: the subject, and what one of them made for another. Files go to folders of their own."""

    subject: HeadSubject
    spec: CompressionSpec
    folder: Path
    progress: Progress
    pruned: dict[float, PrunedHead] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    """Why a variant of a method that applies is no candidate, by the variant's name."""

    @cached_property
    def pruner(self) -> ChannelPruner:
        """The cost of channels is measured once for all shares and methods."""
        return ChannelPruner(self.subject, self.progress)

    def pruned_heads(self) -> Iterator[tuple[str, PrunedHead]]:
        """The head at each share of the work, and the name of that variant."""
        for share in self.spec.keep:
            name = f"prune-{share:.0%}".removesuffix("%")
            if share not in self.pruned:
                self.pruned[share] = self.pruner.prune(share, self.place(name) / "pruned.onnx")
            yield name, self.pruned[share]

    def place(self, name: str) -> Path:
        """An empty folder for the files of a variant."""
        path = self.folder / name
        path.mkdir()
        return path


def make_candidates(
    subject: HeadSubject, spec: CompressionSpec, folder: Path, progress: Progress = silent
) -> tuple[list[GraphCandidate], dict[str, str]]:
    """Candidates of every method, and the reason for each method, or variant of one, that does not apply.

    Raises:
        ModelError: a method that `spec` names does not apply, or none does.
    """
    workshop = Workshop(subject, spec, folder, progress)
    candidates, refused = list[GraphCandidate](), workshop.refused
    for method in dict.fromkeys(spec.methods or DEFAULTS):
        try:
            candidates += METHODS[method](workshop)
        except ModelError as e:
            # Whoever names a method wants to know; otherwise the others are of use without it.
            if spec.methods:
                raise
            refused[method] = e.message
    if not candidates:
        raise ModelError("; ".join(f"{method}: {reason}" for method, reason in refused.items()))
    return candidates, refused


def _int8(workshop: Workshop) -> list[GraphCandidate]:
    return [_quantised(workshop, "int8", workshop.subject.graph, workshop.subject.segment.macs)]


def _quantised(workshop: Workshop, name: str, graph: Path, macs: int, before: str = "") -> GraphCandidate:
    spec = workshop.spec
    path, method = int8(workshop.subject, graph, workshop.place(name), spec.limit, workshop.progress, spec.reduce_range)
    return GraphCandidate(name, before + method, path, macs)


def _weights(bits: int) -> Callable[[Workshop], list[GraphCandidate]]:
    def make(workshop: Workshop) -> list[GraphCandidate]:
        name, subject = f"weights-int{bits}", workshop.subject
        path, layers = linear_in_blocks(subject.graph, bits, workshop.place(name) / "weights.onnx")
        method = f"weights of {layers} linear layers in int{bits}, activations in float"
        return [GraphCandidate(name, method, path, subject.segment.macs)]

    return make


def _prune(workshop: Workshop) -> list[GraphCandidate]:
    return [GraphCandidate(name, _pruning(head), head.path, head.macs) for name, head in workshop.pruned_heads()]


def _prune_int8(workshop: Workshop) -> list[GraphCandidate]:
    return [
        _quantised(workshop, f"{name}-int8", head.path, head.macs, f"{_pruning(head)}; ")
        for name, head in workshop.pruned_heads()
    ]


def _distil(workshop: Workshop) -> list[GraphCandidate]:
    candidates, subject = list[GraphCandidate](), workshop.subject
    pruner = ChannelPruner(training_part(subject), workshop.progress)
    for share in workshop.spec.keep:
        name = f"prune-{share:.0%}-distilled".replace("%", "")
        place = workshop.place(name)
        head = pruner.prune(share, place / "pruned.onnx")
        result = distil(subject, head.path, place / "distilled.onnx", workshop.progress)
        if result.gains:
            method = f"{_pruning(head)}; {result.steps} steps of distillation"
            candidates.append(GraphCandidate(name, method, result.path, head.macs))
        else:
            workshop.refused[name] = f"distillation gained nothing: {result}"
    return candidates


def _pruning(head: PrunedHead) -> str:
    return f"{head.kept} of {head.channels} channels left, the layers behind refit"


METHODS: Mapping[str, Callable[[Workshop], list[GraphCandidate]]] = {
    "int8": _int8,
    "weights-int8": _weights(8),
    "weights-int4": _weights(4),
    "prune": _prune,
    "prune-int8": _prune_int8,
    "distil": _distil,
}
