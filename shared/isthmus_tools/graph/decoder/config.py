"""A decoder's dimensions and weights, independent of the file that they came from."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast, get_args

import numpy as np

from isthmus.arrays import Array
from isthmus.errors import ModelError
from isthmus_tools.graph.quantise import BLOCK

Family = Literal["llama", "qwen2", "gpt2"]
Precision = Literal["float32", "float16", "int8", "int4"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
"""How the weights of a layer are stored; activations are float32 between layers."""
# Far above any published model: dimensions of a file are multiplied into sizes of memory.
_MAX_DIMENSION = 2**20


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Dimensions of a decoder. Units: `context` in tokens."""

    family: Family
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    vocabulary: int
    context: int
    epsilon: float
    rope_theta: float = 10_000.0
    rope_factors: tuple[float, ...] = ()
    """What each frequency of the rotary embedding is divided by, half a head of them; none leaves them as they are."""
    tied: bool = True
    """Whether the output matrix is the embedding."""
    qkv_bias: bool = False

    @property
    def layer_parameters(self) -> int:
        """Parameters of a layer's matrices; its norms and biases are few."""
        attention = self.width * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        return attention + (2 if self.family == "gpt2" else 3) * self.width * self.ffn

    def check(self, source: str) -> None:
        """Refuse dimensions that no decoder has.

        Raises:
            ModelError: a dimension is missing, negative, huge, or does not divide.
        """
        for name in ("layers", "width", "heads", "kv_heads", "head_size", "ffn", "vocabulary", "context"):
            if not 0 < (value := getattr(self, name)) <= _MAX_DIMENSION:
                raise ModelError(f"{source} states {name} as {value}; it is 1 to {_MAX_DIMENSION}", field=name)
        if self.heads % self.kv_heads:
            raise ModelError(f"{source} has {self.heads} heads for {self.kv_heads} of keys and values", field="heads")
        if self.head_size % 8:
            # onnxruntime's GroupQueryAttention takes no other size for rotary embeddings.
            raise ModelError(
                f"{source} has heads of size {self.head_size}; multiples of 8 are taken", field="head_size"
            )
        if self.rope_factors and len(self.rope_factors) != self.head_size // 2:
            raise ModelError(f"{source} has {len(self.rope_factors)} factors of frequencies", field="rope_factors")
        if not all(0 < factor < math.inf for factor in self.rope_factors):
            raise ModelError(f"{source} has factors of frequencies that are no positive numbers", field="rope_factors")
        if not 0 < self.epsilon < 1:
            raise ModelError(f"{source} states an epsilon of {self.epsilon}", field="epsilon")


def llama3_factors(theta: float, head_size: int, scaling: Mapping[str, Any]) -> tuple[float, ...]:
    """Factors of Llama 3.1's rotary embedding: long waves are stretched, short ones kept, those between in part.

    Raises:
        KeyError, TypeError, ValueError: `scaling` lacks a parameter, or has one that is no number.

    Source: transformers' modeling_rope_utils.py, `_compute_llama3_parameters`.
    """
    factor, low, high, context = (
        float(scaling[key])
        for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    if not (factor > 0 and high > low):
        raise ValueError("factors that do not grow")
    turns = context / (2 * math.pi * theta ** (np.arange(0, head_size, 2) / head_size))
    # 1 for waves that turn often within the original context, 0 for those that hardly do.
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return tuple((1 / ((1 - kept) / factor + kept)).tolist())


class DecoderWeights(Protocol):
    """Tensors of a decoder by their names in GGUF, as float32 and in the layout of torch's Linear: (out, in)."""

    def __contains__(self, name: str) -> bool:
        """Whether the file has the tensor."""
        ...

    def get(self, name: str) -> Array:
        """The tensor, read and dequantised now; rows of queries and keys in the order of half rotations.

        Raises:
            ModelError: the file lacks the tensor, or its shape or type is not a decoder's.
        """
        ...

    def others(self, used: Collection[str]) -> list[str]:
        """Tensors of the file beside those of `used`, without buffers that no computation needs."""
        ...


@dataclass(frozen=True)
class DecoderSource:
    """A decoder read from a file: dimensions, weights, tokenizer (tokenizers' JSON) and chat template.

    `origin` holds facts for the bundle's `source`, such as the license.
    """

    source: str
    config: DecoderConfig
    weights: DecoderWeights
    tokenizer: Mapping[str, Any]
    chat_template: str = ""
    bos: int | None = None
    eos: tuple[int, ...] = ()
    origin: Mapping[str, Any] = field(default_factory=dict)


def layer_precisions(text: str, cuts: Sequence[int], config: DecoderConfig) -> tuple[Precision, ...]:
    """The precision of each layer by `text`, one for all or one for each segment at `cuts`, separated by `/`.

    Raises:
        ModelError: an unknown precision, a count that does not fit, or a width that does not divide into blocks.
    """
    names = [name.strip() for name in text.split("/")]
    if unknown := [name for name in names if name not in PRECISIONS]:
        raise ModelError(
            f"{unknown[0][:40]!r} is no precision of weights; there are {', '.join(PRECISIONS)}",
            exists=list(PRECISIONS),
        )
    if len(names) not in (1, len(cuts) + 1):
        raise ModelError(
            f"weights are given for {len(names)} segments; the first partition has {len(cuts) + 1}",
            hint="give one for all, or one for each segment: --cut 10 --weights int4/float16",
        )
    if config.width % BLOCK and {"int8", "int4"} & set(names):
        # Rows of the embedding are read block by block.
        raise ModelError(
            f"int8 and int4 take a width of whole blocks of {BLOCK}; it is {config.width}", width=config.width
        )
    ends = [*cuts, config.layers] if len(names) > 1 else [config.layers]
    return tuple(
        cast(Precision, name)
        for name, start, end in zip(names, [0, *ends], ends, strict=False)
        for _ in range(start, end)
    )
