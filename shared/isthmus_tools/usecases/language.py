"""Facts of a published language model that matter for a cut; read without onnx, since `isthmus models` lists them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from isthmus.artifacts.bundle import Bundle, Segment
from isthmus.artifacts.segment_id import WHOLE
from isthmus.artifacts.tensors import TensorSpec
from isthmus.units import format_size


@dataclass(frozen=True)
class LanguageSegment:
    """A segment of a language model's default partition. Units: `kv_bytes` per token of a session."""

    id: str
    layers: int
    weights: str
    weights_bytes: int
    kv_bytes: int


@dataclass(frozen=True)
class LanguageFacts:
    """What a cut of a language model costs.

    Units: `context` in tokens; `kv_bytes` per token over all layers; `token_bytes` per token over a cut, unencoded.
    """

    layers: int
    context: int
    vocabulary: int
    kv_bytes: int
    token_bytes: int
    chat: bool
    segments: tuple[LanguageSegment, ...]

    def document(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def sentences(self) -> list[str]:
        """The facts for people, a line for the model and one for each segment."""
        chat = "a chat template" if self.chat else "no chat template"
        lines = [
            f"{self.layers} layers, {self.context:,} tokens of context, {self.vocabulary:,} in the vocabulary, {chat};"
            f" {format_size(self.kv_bytes)} of keys and values per token"
            f" and {self.token_bytes:,} bytes over a cut per token"
        ]
        lines += [
            f"{s.id}: {s.layers} layer{'s' * (s.layers != 1)}, {s.weights}, {format_size(s.weights_bytes)} of weights,"
            f" {format_size(s.kv_bytes)} of keys and values per token"
            for s in self.segments
        ]
        return lines


def language_facts(bundle: Bundle) -> LanguageFacts | None:
    """The facts of a language model's bundle; None for another model."""
    if bundle.state is None or bundle.text is None:
        return None
    # The uncut segment has the state of every layer, and each bundle has it.
    whole = bundle.segment(WHOLE)
    crossing = next((cut.tensors[0] for cut in bundle.cut_list), None)
    logits = next(spec for spec in bundle.outputs if spec.name == bundle.text.logits)
    return LanguageFacts(
        len(bundle.state.pairs) // 2,
        bundle.state.context,
        _size(logits.shape[-1]),
        _state_bytes(bundle, whole.inputs),
        0 if crossing is None else _row_bytes(crossing),
        bool(bundle.text.chat_template),
        tuple(_segment(bundle, segment) for segment in bundle.partition()),
    )


def _segment(bundle: Bundle, segment: Segment) -> LanguageSegment:
    # Keys and values are a pair each, in the order of layers.
    inputs = {spec.name for spec in segment.inputs}
    layers = [i for i, past in enumerate(_pasts(bundle)[::2]) if past in inputs]
    precisions = [name for name, count in bundle.source.get("precisions", ()) for _ in range(count)]
    weights = "/".join(dict.fromkeys(precisions[layer] for layer in layers if layer < len(precisions)))
    size = sum(tensor.length for tensor in bundle.weight_ranges(segment))
    return LanguageSegment(segment.id, len(layers), weights, size, _state_bytes(bundle, segment.inputs))


def _state_bytes(bundle: Bundle, specs: Iterable[TensorSpec]) -> int:
    pasts = frozenset(_pasts(bundle))
    return sum(_row_bytes(spec) for spec in specs if spec.name in pasts)


def _pasts(bundle: Bundle) -> list[str]:
    return [pair.past for pair in bundle.state.pairs] if bundle.state is not None else []


def _row_bytes(spec: TensorSpec) -> int:
    """Bytes of a tensor for one row and one token: free sizes count as 1."""
    # The names of dtypes end with their bits, but for bool; numpy, which knows too, takes 40 ms to load.
    bits = int("".join(filter(str.isdigit, spec.dtype)) or 8)
    return math.prod(map(_size, spec.shape)) * bits // 8


def _size(dim: int | str) -> int:
    return dim if isinstance(dim, int) else 1
