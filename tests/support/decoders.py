"""Tiny decoders of random weights in transformers' folder layout, and runs of a decoder bundle's segments."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
import transformers

from isthmus.arrays import Array, supplied_inputs
from isthmus.artifacts.bundle import Bundle
from isthmus.runtime.ort_runner import UnpublishedRunner
from isthmus_tools.graph.decoder.transformers_folder import read_folder

VOCABULARY = 300


def tiny_config(family: str) -> Any:
    """A configuration of three layers and 300 tokens."""
    if family == "gpt2":
        return transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=64, n_layer=3, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0
        )
    cls = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[family]
    return cls(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=family == "llama",
        bos_token_id=0,
        eos_token_id=0,
    )


def save_decoder(folder: Path, config: Any) -> Path:
    """Write a model of random weights, and a byte-level tokenizer of its vocabulary."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # the default's small weights would hide errors of scale
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = byte_level, tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat, and the dog on the log"] * 9, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def with_swapped_tokens(tokenizer: bytes) -> bytes:
    """The tokenizer.json of another vocabulary of the same size: two tokens have each other's id."""
    document = json.loads(tokenizer)
    vocabulary = document["model"]["vocab"]
    first, second = list(vocabulary)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    return json.dumps(document).encode()


def write_gguf(folder: Path, out: Path, changes: Mapping[str, str] | None = None) -> Path:
    """The folder's Llama as GGUF, its queries and keys in the order of llama.cpp; `changes` are texts of its header."""
    texts = {"tokenizer.ggml.model": "gpt2", **(changes or {})}
    decoder = read_folder(folder)
    c, document = decoder.config, decoder.tokenizer
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_block_count(c.layers)
    writer.add_embedding_length(c.width)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_feed_forward_length(c.ffn)
    writer.add_context_length(c.context)
    writer.add_layer_norm_rms_eps(c.epsilon)
    writer.add_rope_freq_base(c.rope_theta)
    for name, value in texts.items():
        writer.add_string(name, value)
    vocabulary = sorted(document["model"]["vocab"], key=document["model"]["vocab"].__getitem__)
    # A vocabulary has a token for each row of the embedding.
    vocabulary += [f"<unused {i}>" for i in range(len(vocabulary), c.vocabulary)]
    special = {t["content"] for t in document["added_tokens"]}
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in special else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in document["model"]["merges"]])
    writer.add_eos_token_id(0)
    parts = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
    names = ["token_embd.weight", "output_norm.weight"]
    for name in [*names, *(f"blk.{i}.{part}.weight" for i in range(c.layers) for part in parts)]:
        array = decoder.weights.get(name)
        if ".attn_q." in name or ".attn_k." in name:
            heads = c.heads if ".attn_q." in name else c.kv_heads
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(name, np.ascontiguousarray(array))
    if c.rope_factors:
        writer.add_tensor("rope_freqs.weight", np.array(c.rope_factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def generate_scores(bundle: Bundle, files: Mapping[str, Path], cuts: Sequence[str], chunks: Sequence[Array]) -> Array:
    """The logits of `chunks` of token ids, in order, by the segments of a partition with their state."""
    assert bundle.state is not None
    state = bundle.state
    runs: list[dict[str, Array]] = [{state.tokens: chunk} for chunk in chunks]
    folder = files[bundle.weights.blob.digest].parent
    for segment in bundle.partition(cuts):
        runner = UnpublishedRunner(files[segment.graph.digest].read_bytes(), segment, folder, threads=1, repack=True)
        specs = {spec.name: spec for spec in segment.inputs}
        kept = {
            pair.past: np.zeros((1, *(d if isinstance(d, int) else 0 for d in specs[pair.past].shape[1:])), np.float32)
            for pair in state.pairs
            if pair.past in specs
        }
        count = 0
        for values in runs:
            tokens = next(iter(values.values())).shape[1]
            count += tokens
            supplied = supplied_inputs(state, np.array([count - 1], np.int32), tokens)
            arrays = {**values, **supplied, **kept}
            outputs = runner.run({name: arrays[name] for name in specs})
            kept = {pair.past: outputs.pop(pair.present) for pair in state.pairs if pair.present in outputs}
            values.clear()
            values.update(outputs)
    assert bundle.text is not None
    return np.concatenate([values[bundle.text.logits] for values in runs], axis=1)
