"""Rank sentences by their similarity to a query: similar.py TOKENIZER.json QUERY SENTENCE…"""

import os
import sys

import numpy as np
from tokenizers import Tokenizer

from isthmus import Client, RegistrySettings
from isthmus_tools import LocalModel


def encode(tokenizer: Tokenizer, sentences: list[str]) -> dict[str, np.ndarray]:
    """Ids and mask, (sentences, tokens), padded to the longest."""
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    encodings = tokenizer.encode_batch(sentences)
    return {
        "input_ids": np.array([encoding.ids for encoding in encodings], np.int64),
        "attention_mask": np.array([encoding.attention_mask for encoding in encodings], np.int64),
    }


def run(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """A vector of length 1 for each sentence, by a router or in this process."""
    if url := os.environ.get("ISTHMUS_URL"):
        return Client(url).infer(arrays, model="minilm").outputs["embedding"]
    registry = RegistrySettings(registry=os.environ.get("ISTHMUS_REGISTRY", ".isthmus/registry"), cache_dir="cache")
    return LocalModel("minilm", registry).run(arrays).outputs["embedding"]


def main(tokenizer: str, *sentences: str) -> None:
    """Print the sentences after the first, the most similar first, with their cosine similarity."""
    vectors = run(encode(Tokenizer.from_file(tokenizer), list(sentences)))
    similarity = vectors[1:] @ vectors[0]
    for index in np.argsort(-similarity):
        print(f"{similarity[index]:.3f} {sentences[1 + index]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
