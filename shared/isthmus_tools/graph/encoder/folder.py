"""Sentence encoders in sentence-transformers' folder layout; nothing in it is executed.

`modules.json` lists the steps: a transformer, pooling, and a normalisation. Sources: sbert.net, "Creating Custom
Models"; transformers' modeling_bert.py and modeling_roberta.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import msgspec
import numpy as np
from msgspec import Meta, Struct

from isthmus.arrays import Array
from isthmus.errors import ModelError
from isthmus_tools.graph.exporting import missing_package, read_bounded

Pooling: TypeAlias = Literal["cls", "max", "mean"]
MODULES = "modules.json"
# Configurations are some kB; a tokenizer.json has up to some 30 MB.
_MAX_JSON_BYTES, _MAX_TOKENIZER_BYTES = 2**20, 2**27
# Prefixes of tensors: a folder may hold the encoder alone, or as part of a model with a head.
_PREFIXES = {"BertModel": ("", "bert."), "RobertaModel": ("", "roberta."), "XLMRobertaModel": ("", "roberta.")}
_Size = Annotated[int, Meta(ge=1, le=2**20)]
Document = TypeVar("Document")


class EncoderConfig(Struct, frozen=True):
    """What config.json says of an encoder. Units: `max_position_embeddings` in tokens."""

    hidden_size: _Size
    num_hidden_layers: _Size
    num_attention_heads: _Size
    max_position_embeddings: _Size
    layer_norm_eps: Annotated[float, Meta(gt=0, lt=1)] = 1e-12
    hidden_act: str = "gelu"
    position_embedding_type: str = "absolute"
    pad_token_id: Annotated[int, Meta(ge=0)] = 0
    architectures: tuple[str, ...] = ()

    @property
    def first_position(self) -> int:
        """The position of the first token: RoBERTa's positions begin behind that of padding."""
        return 0 if self.architectures[0] == "BertModel" else self.pad_token_id + 1


class _Module(Struct, frozen=True):
    path: str
    type: str


class _PoolingConfig(Struct, frozen=True):
    pooling_mode_cls_token: bool = False
    pooling_mode_mean_tokens: bool = False
    pooling_mode_max_tokens: bool = False
    pooling_mode_mean_sqrt_len_tokens: bool = False
    pooling_mode_weightedmean_tokens: bool = False
    pooling_mode_lasttoken: bool = False


class _LengthConfig(Struct, frozen=True):
    max_seq_length: _Size | None = None


@dataclass(frozen=True)
class EncoderSource:
    """A sentence encoder's folder: dimensions, the steps behind its layers, and its tokenizer (tokenizers' JSON).

    `origin` says where a ready model comes from.
    """

    folder: Path
    config: EncoderConfig
    pooling: Pooling
    normalized: bool
    max_tokens: int
    tokenizer: bytes
    origin: Mapping[str, Any] = field(default_factory=dict)

    @contextmanager
    def weights(self) -> Iterator[EncoderWeights]:
        """The tensors, for the block.

        Raises:
            ModelError: the package safetensors is missing, or the file cannot be read.
        """
        try:
            import safetensors
        except ImportError as e:
            raise missing_package(str(self.folder), "safetensors", "llm") from e
        path = self.folder / "model.safetensors"
        try:
            reader = safetensors.safe_open(path, framework="numpy")
        except Exception as e:  # safetensors' own error is no subclass of any other
            raise ModelError(f"{path} cannot be read: {e}", spec=str(self.folder)) from e
        with reader as tensors:
            yield EncoderWeights(tensors, _PREFIXES[self.config.architectures[0]], path)


class EncoderWeights:
    """Tensors by transformers' names, as float32 and in the layout of torch's Linear: (out, in)."""

    def __init__(self, tensors: Any, prefixes: tuple[str, ...], path: Path) -> None:
        self._tensors, self._path, self._names = tensors, path, set(tensors.keys())
        self._prefix = next((p for p in prefixes if f"{p}embeddings.word_embeddings.weight" in self._names), "")

    def get(self, name: str) -> Array:
        """The tensor.

        Raises:
            ModelError: the file lacks the tensor.
        """
        if (own := self._prefix + name) not in self._names:
            raise ModelError(f"{self._path} lacks the tensor {own}", spec=str(self._path), tensor=own)
        return np.asarray(self._tensors.get_tensor(own)).astype(np.float32)


def read_encoder(model: str) -> EncoderSource | None:
    """The sentence encoder of a folder; None for any other model.

    Raises:
        ModelError: a file is missing or malformed, or the encoder takes steps that are not known here.
    """
    folder = Path(model)
    if not (folder / MODULES).is_file():
        return None
    modules = _read(folder / MODULES, tuple[_Module, ...])
    kinds = [module.type.rpartition(".")[2] for module in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise ModelError(
            f"{folder} makes its vectors by {', '.join(kinds)[:200]}; taken are Transformer, Pooling and Normalize",
            spec=model,
        )
    root = folder / Path(modules[0].path).name
    config = _read(root / "config.json", EncoderConfig)
    _check(model, config)
    # Paths come from the folder: none may lead out of it.
    pooling = _read(folder / Path(modules[1].path).name / "config.json", _PoolingConfig)
    lengths = root / "sentence_bert_config.json"
    length = (_read(lengths, _LengthConfig) if lengths.is_file() else _LengthConfig()).max_seq_length
    positions = config.max_position_embeddings - config.first_position
    return EncoderSource(
        root,
        config,
        _pooling(model, pooling),
        normalized=len(kinds) == 3,
        max_tokens=min(positions, length or positions),
        tokenizer=read_bounded(root / "tokenizer.json", _MAX_TOKENIZER_BYTES),
    )


def _check(model: str, config: EncoderConfig) -> None:
    architecture = config.architectures[0] if config.architectures else "none"
    if architecture not in _PREFIXES:
        raise ModelError(
            f"{model} holds a {architecture[:80]}; sentence encoders taken are {', '.join(_PREFIXES)}",
            spec=model,
            architecture=architecture[:80],
            hint=f"without {MODULES} the folder is imported as an encoder whose outputs are a vector for each token",
        )
    if config.hidden_act not in ("gelu", "gelu_new", "relu") or config.position_embedding_type != "absolute":
        kind = f"{config.hidden_act[:40]} and {config.position_embedding_type[:40]} positions"
        raise ModelError(f"{model} has {kind}; known are gelu, gelu_new, relu and absolute", spec=model)
    if config.hidden_size % config.num_attention_heads or config.max_position_embeddings <= config.first_position:
        raise ModelError(f"{model}/config.json states dimensions that no encoder has", spec=model)


def _pooling(model: str, config: _PoolingConfig) -> Pooling:
    modes = [name for name, value in msgspec.structs.asdict(config).items() if value]
    taken: dict[str, Pooling] = {
        "pooling_mode_cls_token": "cls",
        "pooling_mode_max_tokens": "max",
        "pooling_mode_mean_tokens": "mean",
    }
    if len(modes) != 1 or modes[0] not in taken:
        raise ModelError(
            f"{model} pools tokens by {', '.join(modes) or 'no mode'}; one of {', '.join(taken)} is taken", spec=model
        )
    return taken[modes[0]]


def _read(path: Path, kind: type[Document]) -> Document:
    try:
        return msgspec.json.decode(read_bounded(path, _MAX_JSON_BYTES), type=kind)
    except (msgspec.DecodeError, RecursionError) as e:
        raise ModelError(f"{path} cannot be read: {e}", file=str(path)) from e
