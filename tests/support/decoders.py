"""Tiny decoders of random weights in transformers' folder layout, and runs of a decoder bundle's segments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Bundle
from isthmus.runtime.ort_runner import UnpublishedRunner

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
            count += next(iter(values.values())).shape[1]
            supplied = {state.lengths: np.array([count - 1], np.int32), state.total: np.array(count, np.int32)}
            arrays = {**values, **supplied, **kept}
            outputs = runner.run({name: arrays[name] for name in specs})
            kept = {pair.past: outputs.pop(pair.present) for pair in state.pairs if pair.present in outputs}
            values.clear()
            values.update(outputs)
    assert bundle.text is not None
    return np.concatenate([values[bundle.text.logits] for values in runs], axis=1)
