"""Tokenizers of bundles, by the package `tokenizers`."""

from __future__ import annotations

import tokenizers

from isthmus.errors import ModelError


def read_tokenizer(data: bytes) -> tokenizers.Tokenizer:
    """The tokenizer of a tokenizer.json; it truncates and pads nothing, as published files often do without a word.

    Raises:
        ModelError: the tokenizer cannot be read.
    """
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(data)
    except Exception as e:  # tokenizers raises Exception itself
        raise ModelError(f"the bundle's tokenizer cannot be read: {e}") from e
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
