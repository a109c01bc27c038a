"""Sources of models of text: which one is a language model or a sentence encoder, and where a decoder can be cut."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from isthmus.arrays import DTYPES
from isthmus.errors import ModelError
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
