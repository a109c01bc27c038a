"""Texts of a sentence encoder as rows of token ids, and rows of different lengths in common runs.

A row's vector is the same alone and beside longer rows: the mask keeps padding out of attention and pooling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence

import numpy as np

from isthmus.arrays import Array
from isthmus.artifacts.bundle import TextEmbedding
from isthmus.errors import ContextTooLong, RequestMalformed, RequestTooLarge
from isthmus.processing.text_masking import TextMasker
from isthmus.processing.tokenizer import read_tokenizer

# Of one text: hundreds of characters for each token that published encoders take.
MAX_TEXT_LENGTH = 2**18
# Of one run, padding included. A longer run gains nothing on CPUs, and its activations take memory in every function:
# at this size and MiniLM's width 6 MB cross a cut, and attention over rows of 256 tokens takes 50 MB.
MAX_RUN_TOKENS = 4096


class SentenceTokenizer:
    """Encodes texts with the bundle's tokenizer; no text is truncated."""

    def __init__(self, tokenizer: bytes, model: TextEmbedding, masker: TextMasker | None = None) -> None:
        """Read a tokenizer.json; `masker` masks the patterns of every text.

        Raises:
            ModelError: the tokenizer cannot be read.
        """
        self._tokenizer = read_tokenizer(tokenizer)
        self._vocabulary = self._tokenizer.get_vocab_size()
        self._max_tokens = model.max_tokens
        self.masker = masker

    def encode(self, text: str, counts: MutableMapping[str, int] | None = None) -> list[int]:
        """The ids of a text, special tokens included; `counts` gets the numbers of masked patterns.

        Raises:
            RequestTooLarge: more than MAX_TEXT_LENGTH characters.
            ContextTooLong: more tokens than the model takes.
        """
        if len(text) > MAX_TEXT_LENGTH:
            raise RequestTooLarge(
                f"a text has {len(text)} characters; at most {MAX_TEXT_LENGTH} are taken", limit=MAX_TEXT_LENGTH
            )
        if self.masker is not None:
            text = self.masker.mask(text, counts)
        # One by one: `encode_batch` starts a thread for each CPU of the machine, whatever this function may use.
        return self.check(self._tokenizer.encode(text).ids)

    def check(self, ids: list[int]) -> list[int]:
        """The ids of a text, which the caller may have made itself.

        Raises:
            RequestMalformed: no ids, or an id beyond the vocabulary.
            ContextTooLong: more tokens than the model takes.
        """
        if not ids:
            raise RequestMalformed("an input has no tokens", parameter="input")
        if len(ids) > self._max_tokens:
            raise ContextTooLong(
                f"an input has {len(ids)} tokens; the model takes at most {self._max_tokens}",
                parameter="input",
                prompt_tokens=len(ids),
                context=self._max_tokens,
                hint="split the text: a vector of its begin alone would be taken for the whole",
            )
        if not 0 <= min(ids) <= max(ids) < self._vocabulary:
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise RequestMalformed(
                f"the token id {wrong} is none of the vocabulary's {self._vocabulary}", parameter="input"
            )
        return ids


def runs_of(rows: Sequence[Sequence[int]], max_tokens: int = MAX_RUN_TOKENS) -> Iterator[list[int]]:
    """Indices of the rows of each run, which with their padding have at most `max_tokens` tokens, or are a single row.

    Rows of similar length share a run, so that little of it is padding.
    """
    run: list[int] = []
    for index in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        if run and (len(run) + 1) * len(rows[index]) > max_tokens:
            yield run
            run = []
        run.append(index)
    if run:
        yield run


def padded(rows: Sequence[Sequence[int]], model: TextEmbedding) -> dict[str, Array]:
    """The model's inputs for rows of ids. Shapes: ids and mask (rows, longest row), int64."""
    shape = (len(rows), max(map(len, rows)))
    ids, mask = np.full(shape, model.pad, np.int64), np.zeros(shape, np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return {model.ids: ids, model.mask: mask}


def embed(
    rows: Sequence[Sequence[int]], model: TextEmbedding, run: Callable[[Mapping[str, Array]], Mapping[str, Array]]
) -> Array:
    """The vectors of rows of ids by as few runs as their padding allows; `run` gives the model's outputs.

    Shapes: (rows, width), float32.
    """
    vectors: list[Array | None] = [None] * len(rows)
    for indices in runs_of(rows):
        outputs = run(padded([rows[i] for i in indices], model))[model.vector]
        for i, vector in zip(indices, outputs, strict=True):
            vectors[i] = vector
    return np.stack([vector for vector in vectors if vector is not None])
