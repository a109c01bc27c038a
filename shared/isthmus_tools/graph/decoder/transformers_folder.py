"""Decoders in Hugging Face's folder layout: config.json, safetensors and tokenizer.json; nothing in it is executed.

Tensors get the names of GGUF. Sources: transformers' modeling_llama.py, modeling_qwen2.py and modeling_gpt2.py.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.arrays import Array
from isthmus.errors import ModelError
from isthmus_tools.graph.decoder.config import DecoderConfig, DecoderSource, Family, llama3_factors
from isthmus_tools.graph.exporting import missing_package, read_bounded

_FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "GPT2LMHeadModel": "gpt2",
}
_BY_TYPE = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "gpt2": "GPT2LMHeadModel"}
_INDEX = "model.safetensors.index.json"
# Configurations and indices are some kB; a tokenizer.json has up to some 30 MB.
_MAX_JSON_BYTES, _MAX_TOKENIZER_BYTES = 2**24, 2**27
_LLAMA = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attn_{kind}": f"self_attn.{kind}_proj" for kind in "qkv"},
    "attn_output": "self_attn.o_proj",
    **{f"ffn_{kind}": f"mlp.{kind}_proj" for kind in ("gate", "up", "down")},
}
_GPT2 = {
    "token_embd.weight": "transformer.wte.weight",
    "position_embd.weight": "transformer.wpe.weight",
    "output_norm.weight": "transformer.ln_f.weight",
    "output_norm.bias": "transformer.ln_f.bias",
    "output.weight": "lm_head.weight",
    "attn_norm": "ln_1",
    "ffn_norm": "ln_2",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}

_LLAMA_KEYS = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "context": "max_position_embeddings",
    "epsilon": "rms_norm_eps",
}
_GPT2_KEYS = {
    "layers": "n_layer",
    "width": "n_embd",
    "heads": "n_head",
    "context": "n_positions",
    "epsilon": "layer_norm_epsilon",
}


def holds_decoder(folder: Path) -> bool:
    """Whether config.json names a decoder of these families; a classifier on a Llama is none.

    Raises:
        ModelError: config.json is malformed.
    """
    if not (path := folder / "config.json").is_file():
        return False
    return _architecture(_read_json(path, _MAX_JSON_BYTES)) in _FAMILIES


def read_folder(folder: Path) -> DecoderSource:
    """The decoder of a folder; weights are read one at a time.

    Raises:
        ModelError: safetensors is missing, a file is missing or malformed, or the model is of another family.
    """
    document = _read_json(folder / "config.json", _MAX_JSON_BYTES)
    architecture = _architecture(document)
    if (family := _FAMILIES.get(architecture)) is None:
        raise ModelError(
            f"{folder} holds a {architecture[:80]}; taken are {', '.join(_FAMILIES)}",
            spec=str(folder),
            architecture=architecture[:80],
        )
    weights = _FolderWeights(folder, family)
    config = _config(str(folder), document, family, weights)
    config.check(str(folder))
    if not (path := folder / "tokenizer.json").is_file():
        raise ModelError(
            f"{folder} has no tokenizer.json",
            spec=str(folder),
            hint="write it by transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)",
        )
    tokenizer = _read_json(path, _MAX_TOKENIZER_BYTES)
    return DecoderSource(
        str(folder),
        config,
        weights,
        tokenizer,
        _chat_template(folder),
        _bos(folder, document, tokenizer),
        _eos(folder, document),
    )


class _FolderWeights:
    """See `DecoderWeights`."""

    def __init__(self, folder: Path, family: Family) -> None:
        try:
            import safetensors
        except ImportError as e:
            raise missing_package(str(folder), "safetensors", "llm") from e
        self._open, self._folder, self._family = safetensors.safe_open, folder, family
        if (folder / _INDEX).is_file():
            places = _read_json(folder / _INDEX, _MAX_JSON_BYTES).get("weight_map")
            if not isinstance(places, dict):
                raise ModelError(f"{folder / _INDEX} has no weight_map", spec=str(folder))
            # Names of files come from the folder: none may lead out of it.
            self._files = {str(name): Path(str(file)).name for name, file in places.items()}
        else:
            _refuse_pickles(folder)
            with self._reader("model.safetensors") as reader:
                self._files = dict.fromkeys(reader.keys(), "model.safetensors")

    def __contains__(self, name: str) -> bool:
        return self._name(name) in self._files

    def others(self, used: Collection[str]) -> list[str]:
        own = {self._name(name) for name in used}
        # Masks and frequencies that older releases saved; a tied matrix that was saved twice.
        ignored = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", "lm_head.weight")
        return sorted(name for name in self._files if name not in own and not name.endswith(ignored))

    def get(self, name: str) -> Array:
        own = self._name(name)
        if own not in self._files:
            raise ModelError(f"{self._folder} lacks the tensor {own}", spec=str(self._folder), tensor=own)
        with self._reader(self._files[own]) as reader:
            try:
                array = np.asarray(reader.get_tensor(own)).astype(np.float32)
            except Exception as e:  # safetensors' own error is no subclass of any other
                raise ModelError(
                    f"{own} in {self._folder / self._files[own]} cannot be read: {e}",
                    spec=str(self._folder),
                    tensor=own,
                ) from e
        # GPT-2's matrices are (in, out), as its Conv1D multiplies.
        return array.T if self._family == "gpt2" and array.ndim == 2 and ".h." in own else array

    def _reader(self, file: str) -> Any:
        try:
            return self._open(self._folder / file, framework="numpy")
        except Exception as e:  # safetensors' own error is no subclass of any other
            raise ModelError(f"{self._folder / file} cannot be read: {e}", spec=str(self._folder)) from e

    def _name(self, name: str) -> str:
        """The folder's name of a tensor of GGUF's name, such as `blk.0.attn_q.weight`."""
        names = _GPT2 if self._family == "gpt2" else _LLAMA
        if name in names:
            return names[name]
        _, layer, part, kind = name.split(".")
        prefix = "transformer.h" if self._family == "gpt2" else "model.layers"
        return f"{prefix}.{layer}.{names[part]}.{kind}" if part in names else name


def _config(source: str, document: Mapping[str, Any], family: Family, weights: _FolderWeights) -> DecoderConfig:
    if document.get("use_sliding_window") is True:
        raise ModelError(f"{source} attends to a sliding window, which this import does not know", spec=source)
    keys = _GPT2_KEYS if family == "gpt2" else _LLAMA_KEYS
    values: dict[str, Any] = {name: document.get(key) for name, key in keys.items()}
    if missing := [keys[name] for name, value in values.items() if not isinstance(value, int | float)]:
        raise ModelError(f"{source}/config.json does not state {missing[0]}", spec=source, field=missing[0])
    heads, width = int(values["heads"]), int(values["width"])
    activation = document.get("activation_function", document.get("hidden_act"))
    if activation not in ("silu", "gelu_new", "gelu_pytorch_tanh"):
        raise ModelError(f"{source} has the activation {activation!r}, which this import does not know", spec=source)
    head_size = int(document.get("head_dim") or width // max(1, heads))
    theta = float(document.get("rope_theta") or _rope(document).get("rope_theta") or 10_000.0)
    return DecoderConfig(
        family=family,
        layers=int(values["layers"]),
        width=width,
        heads=heads,
        kv_heads=int(document.get("num_key_value_heads") or heads),
        head_size=head_size,
        ffn=int(document.get("intermediate_size") or document.get("n_inner") or 4 * width),
        vocabulary=int(document.get("vocab_size", 0)),
        context=int(values["context"]),
        epsilon=float(values["epsilon"]),
        rope_theta=theta,
        rope_factors=_rope_factors(source, theta, head_size, _rope(document)),
        tied=bool(document.get("tie_word_embeddings", family == "gpt2")) or "output.weight" not in weights,
        qkv_bias=family == "gpt2" or "blk.0.attn_q.bias" in weights,
    )


def _rope(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """Parameters of the rotary embedding, of releases of transformers before and after the fifth."""
    found = (document.get(key) for key in ("rope_parameters", "rope_scaling"))
    return next((parameters for parameters in found if isinstance(parameters, Mapping)), {})


def _rope_factors(source: str, theta: float, head_size: int, rope: Mapping[str, Any]) -> tuple[float, ...]:
    kind = rope.get("rope_type", rope.get("type", "default"))
    try:
        if kind == "llama3":
            return llama3_factors(theta, head_size, rope)
        if kind == "linear":
            return (float(rope["factor"]),) * (head_size // 2)
    except (KeyError, TypeError, ValueError) as e:
        raise ModelError(f"{source} scales its rotary embeddings by {kind} without a valid {e}", spec=source) from e
    if kind != "default":
        raise ModelError(
            f"{source} scales its rotary embeddings by {str(kind)[:40]}, which this import does not know", spec=source
        )
    return ()


def _architecture(document: Mapping[str, Any]) -> str:
    architectures = document.get("architectures")
    if isinstance(architectures, list) and architectures:
        return str(architectures[0])
    # Base models are saved without their class at times; the kind of a model decides then.
    return _BY_TYPE.get(str(document.get("model_type")), "")


def _refuse_pickles(folder: Path) -> None:
    if (folder / "model.safetensors").is_file():
        return
    for pattern in ("pytorch_model*.bin", "*.pth", "*.pt"):
        if files := sorted(folder.glob(pattern)):
            raise ModelError(
                f"{folder} holds its weights in {files[0].name}, a pickle: reading one executes what it says",
                spec=str(folder),
                file=files[0].name,
                hint="write safetensors by transformers, if you trust it: model.save_pretrained(folder)",
            )


def _eos(folder: Path, document: Mapping[str, Any]) -> tuple[int, ...]:
    """Tokens that end a sequence: of both files, as generation_config.json has those that end a turn too."""
    path = folder / "generation_config.json"
    generation = _read_json(path, _MAX_JSON_BYTES) if path.is_file() else {}
    tokens = (*_tokens(document.get("eos_token_id")), *_tokens(generation.get("eos_token_id")))
    return tuple(dict.fromkeys(tokens))


def _bos(folder: Path, document: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> int | None:
    """The token that the tokenizer puts before every text, if it does."""
    path = folder / "tokenizer_config.json"
    adds = path.is_file() and _read_json(path, _MAX_JSON_BYTES).get("add_bos_token") is True
    # Tokenizers of Llama 3 put it in front by a template of their own.
    processor = json.dumps(tokenizer.get("post_processor"))
    tokens = _tokens(document.get("bos_token_id"))
    in_template = any(
        added.get("id") in tokens and json.dumps(added.get("content")) in processor
        for added in tokenizer.get("added_tokens") or ()
        if isinstance(added, dict)
    )
    return tokens[0] if tokens and (adds or in_template) else None


def _chat_template(folder: Path) -> str:
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    path = folder / "tokenizer_config.json"
    template = _read_json(path, _MAX_JSON_BYTES).get("chat_template", "") if path.is_file() else ""
    return template if isinstance(template, str) else ""


def _tokens(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if isinstance(v, int))


def _read_json(path: Path, limit: int) -> dict[str, Any]:
    try:
        document = json.loads(read_bounded(path, limit))
    except (ValueError, RecursionError) as e:
        raise ModelError(f"{path} cannot be read: {e}", file=str(path)) from e
    if not isinstance(document, dict):
        raise ModelError(f"{path} holds no JSON object", file=str(path))
    return document
