"""GGUF files of the families Llama, Qwen2 and GPT-2, by the package `gguf`, the only importer.

Source: the specification of GGUF in github.com/ggml-org/ggml.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.arrays import Array
from isthmus.errors import ModelError
from isthmus_tools.graph.decoder.config import DecoderConfig, DecoderSource, Family
from isthmus_tools.graph.decoder.gguf_header import check_header
from isthmus_tools.graph.exporting import missing_package

_FAMILIES: dict[str, Family] = {"llama": "llama", "qwen2": "qwen2", "gpt2": "gpt2"}
_FACTORS = "rope_freqs.weight"
_CONTROL, _USER = 3, 4  # kinds of tokens in tokenizer.ggml.token_type
# How GGUF's names of pre-tokenizers split text before byte-level BPE: as GPT-2, digits apart, or by a pattern.
_GPT2 = {"", "default", "gpt-2"}
_DIGITS = {"smollm", "starcoder", "refact", "command-r"}
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_PATTERNS = {
    **dict.fromkeys(_LLAMA3, _WORDS % "{1,3}"),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _WORDS % ""),
}


def read_gguf(path: Path) -> DecoderSource:
    """The decoder of a .gguf file; weights are read and dequantised one at a time.

    Raises:
        ModelError: gguf is missing, the file is malformed, of another family, or has no byte-level BPE tokenizer.
    """
    try:
        import gguf
    except ImportError as e:
        raise missing_package(str(path), "gguf", "llm") from e
    try:
        check_header(path, {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()})
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (OSError, ValueError, KeyError, IndexError, OverflowError, RecursionError) as e:
        raise ModelError(f"{path} cannot be read as GGUF: {e}", file=str(path)) from e
    architecture = str(fields.get("general.architecture", ""))
    if (family := _FAMILIES.get(architecture)) is None:
        raise ModelError(
            f"{path} holds a model of the architecture {architecture[:80]!r}; taken are {', '.join(_FAMILIES)}",
            file=str(path),
            architecture=architecture[:80],
        )
    weights = _GgufWeights(path, reader, gguf.dequantize)
    config = _config(str(path), architecture, family, fields, weights)
    config.check(str(path))
    weights.config = config
    return DecoderSource(
        str(path),
        config,
        weights,
        _tokenizer(str(path), fields),
        str(fields.get("tokenizer.chat_template", "")),
        _token(fields, "bos") if fields.get("tokenizer.ggml.add_bos_token") else None,
        tuple(t for name in ("eos", "eot") if (t := _token(fields, name)) is not None),
    )


class _GgufWeights:
    """See `DecoderWeights`."""

    config: DecoderConfig

    def __init__(self, path: Path, reader: Any, dequantize: Any) -> None:
        self._path, self._dequantize = path, dequantize
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def others(self, used: Collection[str]) -> list[str]:
        return sorted(self._tensors.keys() - {*used, _FACTORS})

    def get(self, name: str) -> Array:
        if (tensor := self._tensors.get(name)) is None:
            raise ModelError(f"{self._path} lacks the tensor {name}", file=str(self._path), tensor=name)
        try:
            array = np.asarray(self._dequantize(tensor.data, tensor.tensor_type), np.float32)
        except (NotImplementedError, ValueError, KeyError) as e:
            raise ModelError(f"{name} in {self._path} cannot be dequantised: {e}", tensor=name) from e
        if name != _FACTORS and self.config.family == "llama" and (".attn_q." in name or ".attn_k." in name):
            return _half_rotation(array, self.config.heads if ".attn_q." in name else self.config.kv_heads)
        return array


def _half_rotation(array: Array, heads: int) -> Array:
    """Rows in the order of rotations by halves. llama.cpp interleaves the rows of Llama's queries and keys."""
    rows = array.shape[0]
    return array.reshape(heads, rows // heads // 2, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _config(source: str, key: str, family: Family, fields: dict[str, Any], weights: _GgufWeights) -> DecoderConfig:
    def number(name: str, default: float | None = None) -> float:
        value = fields.get(f"{key}.{name}", default)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ModelError(f"{source} does not state {key}.{name} as a number", file=source, field=name)
        return value

    heads = int(number("attention.head_count"))
    width = int(number("embedding_length"))
    epsilon = "attention.layer_norm_epsilon" if family == "gpt2" else "attention.layer_norm_rms_epsilon"
    if fields.get(f"{key}.rope.scaling.type") not in (None, "none"):
        raise ModelError(f"{source} scales its rotary embeddings, which this import does not know", file=source)
    return DecoderConfig(
        family=family,
        layers=int(number("block_count")),
        width=width,
        heads=heads,
        kv_heads=int(number("attention.head_count_kv", heads)),
        head_size=int(number("attention.key_length", width // max(1, heads))),
        ffn=int(number("feed_forward_length")),
        vocabulary=len(_list(source, fields, "tokens")),
        context=int(number("context_length")),
        epsilon=number(epsilon),
        rope_theta=number("rope.freq_base", 10_000.0),
        rope_factors=tuple(weights.get(_FACTORS).ravel().tolist()) if _FACTORS in weights else (),
        tied="output.weight" not in weights,
        qkv_bias="blk.0.attn_q.bias" in weights or "blk.0.attn_qkv.bias" in weights,
    )


def _list(source: str, fields: dict[str, Any], name: str) -> list[Any]:
    value = fields.get(f"tokenizer.ggml.{name}", [])
    if not isinstance(value, list):
        raise ModelError(f"{source} has tokenizer.ggml.{name} that is no list", file=source, field=name)
    return value


def _token(fields: dict[str, Any], name: str) -> int | None:
    value = fields.get(f"tokenizer.ggml.{name}_token_id")
    return int(value) if isinstance(value, int) else None


def _tokenizer(source: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer as the JSON document of `tokenizers`."""
    if (kind := fields.get("tokenizer.ggml.model")) != "gpt2":
        raise ModelError(
            f"{source} has a tokenizer of the kind {str(kind)[:40]!r}; byte-level BPE (gpt2) is taken",
            file=source,
            hint="import the transformers folder of the model, whose tokenizer.json is taken as it is",
        )
    tokens, kinds, merges = (_list(source, fields, name) for name in ("tokens", "token_type", "merges"))
    if len(kinds) > len(tokens) or not all(isinstance(text, str) for text in (*tokens, *merges)):
        raise ModelError(f"{source} has a vocabulary whose tokens and kinds contradict each other", file=source)
    added = [
        {
            "id": i,
            "content": tokens[i],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == _CONTROL,
        }
        for i, kind in enumerate(kinds)
        if kind in (_CONTROL, _USER)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": _pre_tokenizer(source, str(fields.get("tokenizer.ggml.pre", "")), byte_level),
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            # Llama 3 takes whole words of its vocabulary before merges.
            "ignore_merges": fields.get("tokenizer.ggml.pre") in _LLAMA3,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in merges],
        },
    }


def _pre_tokenizer(source: str, name: str, byte_level: dict[str, Any]) -> dict[str, Any]:
    if name in _GPT2:
        return byte_level
    if name in _DIGITS:
        before: dict[str, Any] = {"type": "Digits", "individual_digits": True}
    elif name in _PATTERNS:
        split = {"Regex": _PATTERNS[name]}
        before = {"type": "Split", "pattern": split, "behavior": "Isolated", "invert": False}
        byte_level = {**byte_level, "use_regex": False}
    else:
        # Splitting otherwise than the model was trained with costs quality without a sign.
        raise ModelError(
            f"{source} splits text as {name[:40]!r}, which this import does not know",
            file=source,
            hint="import the transformers folder of the model, whose tokenizer.json is taken as it is",
        )
    return {"type": "Sequence", "pretokenizers": [before, byte_level]}
