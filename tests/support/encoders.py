"""Tiny sentence encoders of random weights in sentence-transformers' folder layout, and what transformers computes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers

from isthmus.arrays import Array

TEXTS = [
    "the cat sat on the mat",
    "a dog",
    "an isthmus joins two lands, and a cat and a dog sat on the log beside the mat",
    "the log",
]
SIZE = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def save_encoder(folder: Path, family: str = "bert", pooling: str = "mean", *, normalize: bool = True) -> Path:
    """Write an encoder of the family bert or roberta."""
    torch.manual_seed(0)
    cls = {
        "bert": (transformers.BertConfig, transformers.BertModel),
        "roberta": (transformers.XLMRobertaConfig, transformers.XLMRobertaModel),
    }[family]
    model = cls[1](cls[0](**SIZE, pad_token_id=0, type_vocab_size=2 if family == "bert" else 1))
    for parameter in model.parameters():  # the default's small weights would hide errors of scale
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Normalize", "Normalize")] if normalize else [])]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    mode = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}[pooling]
    (folder / "1_Pooling").mkdir()
    write_json(folder / "1_Pooling" / "config.json", {f"pooling_mode_{mode}": True, "word_embedding_dimension": 32})
    write_json(folder / "modules.json", modules)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 24, "do_lower_case": False})
    save_tokenizer(folder / "tokenizer.json")
    return folder


def save_tokenizer(path: Path) -> Path:
    """Write a tokenizer that cuts texts at 4 tokens, and pads them to as many."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=120, special_tokens=_SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 9, trainer)
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(path))
    return path


def write_json(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document))


def token_rows(folder: Path, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each whole text."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return [tokenizer.encode(text).ids for text in texts]


def expected_vectors(
    folder: Path, rows: Sequence[Sequence[int]], pooling: str = "mean", *, normalize: bool = True
) -> Array:
    """Vectors of rows of ids by transformers and torch, each row alone."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    vectors = []
    with torch.no_grad():
        for row in rows:
            hidden = model(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.int64)).last_hidden_state[0]
            vector = {"cls": hidden[0], "mean": hidden.mean(0), "max": hidden.amax(0)}[pooling]
            vectors.append((vector / vector.norm() if normalize else vector).numpy())
    return np.stack(vectors)
