"""Models of text: which source is a language model or a sentence encoder, and facts that matter for a cut."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from isthmus.arrays import DTYPES
from isthmus.artifacts.bundle import Bundle, Segment
from isthmus.artifacts.segment_id import WHOLE
from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import ModelError
from isthmus.units import format_size
from isthmus_tools.graph.decoder.config import DecoderConfig, DecoderSource
from isthmus_tools.graph.decoder.gguf_file import read_gguf
from isthmus_tools.graph.decoder.transformers_folder import holds_decoder, read_folder
from isthmus_tools.graph.encoder.folder import EncoderSource, read_encoder
from isthmus_tools.zoo.models import DECODERS, ENCODERS, ready_decoder

# As the plugins of the command `llm` are called; a colon is in no file that an import takes.
_READY = "llm:"


def language_model(model: str) -> DecoderSource | None:
    """The decoder that `model` names: `llm:NAME`, a .gguf file or a folder of transformers; None for other models.

    Raises:
        ModelError: the decoder cannot be read; its weights are read later.
    """
    if model.startswith(_READY):
        ready = ready_decoder(model.removeprefix(_READY))
        return replace(read_gguf(ready.path), origin=ready.source)
    if model.lower().endswith(".gguf"):
        return read_gguf(Path(model))
    path = Path(model)
    # The other ready models go by their bare names, and a published model has this one too.
    if model in DECODERS and not path.exists():
        hint = f"the ready language model is {_READY}{model}; isthmus show {model} has the cuts of a published one"
        raise ModelError(f"there is no file or folder {model}", model=model, hint=hint)
    # Folders of encoders and classifiers go to the export by transformers.
    return read_folder(path) if path.is_dir() and holds_decoder(path) else None


def sentence_encoder(model: str) -> EncoderSource | None:
    """The sentence encoder that `model` names: a ready one, or a folder of sentence-transformers; None for others.

    Raises:
        ModelError: the encoder cannot be read, or its package is not installed; its weights are read later.
    """
    if (ready := ENCODERS.get(model)) is None:
        return read_encoder(model)
    source = read_encoder(str(ready.path))
    return None if source is None else replace(source, origin=ready.source)


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
    return math.prod(map(_size, spec.shape)) * DTYPES[spec.dtype].itemsize


def _size(dim: int | str) -> int:
    return dim if isinstance(dim, int) else 1


@dataclass(frozen=True)
class DecoderCut:
    """A cut of a decoder that is not published. Units: bytes in float32, `kv_bytes` per token of a session."""

    layers: int
    work_before: float
    head_weights: int
    tail_weights: int
    head_kv_bytes: int
    tail_kv_bytes: int


@dataclass(frozen=True)
class DecoderCutList:
    """The cuts of a decoder, one behind each layer but the last; `token_bytes` of any crosses the link per token."""

    config: DecoderConfig
    token_bytes: int
    cuts: tuple[DecoderCut, ...]

    @property
    def default(self) -> int:
        """The layers before the cut that an import without cuts takes."""
        return max(1, self.config.layers // 2)


def list_layer_cuts(model: str) -> DecoderCutList | None:
    """The cuts of a language model's file or folder, from its dimensions alone; None for other models.

    Raises:
        ModelError: the model cannot be read.
    """
    if (decoder := language_model(model)) is None:
        return None
    c, size = decoder.config, DTYPES["float32"].itemsize
    layer, table = c.layer_parameters, c.vocabulary * c.width
    # A product with each parameter of a layer and of the output matrix; rows of the embedding are read, not multiplied.
    work = c.layers * layer + table
    kv = 2 * c.kv_heads * c.head_size * size
    cuts = tuple(
        DecoderCut(
            layers=before,
            work_before=before * layer / work,
            head_weights=(table + before * layer) * size,
            tail_weights=(table + (c.layers - before) * layer) * size,
            head_kv_bytes=before * kv,
            tail_kv_bytes=(c.layers - before) * kv,
        )
        for before in range(1, c.layers)
    )
    return DecoderCutList(c, c.width * size, cuts)
