"""The text side of a decoder's bundle: tokenizer and chat template, tried before weights are written.

A file may bring any tokenizer and any template: functions would fail at the first request.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from isthmus.artifacts.bundle import MAX_TEMPLATE_LENGTH, Blob, TextModel, digest_of
from isthmus.errors import ModelError
from isthmus.generation.text import TextCodec
from isthmus_tools.graph.decoder.config import DecoderSource

# Accents, a symbol of several bytes, another script, digits, white space: bytes that a vocabulary of words lacks.
_SAMPLE = "Où est-ce ❤ 漢字,\tof 2024?\n{}"
_MAX_ENDS = 64


def text_model(decoder: DecoderSource, logits: str) -> tuple[TextModel, bytes]:
    """The bundle's entry for a decoder's text, and the tokenizer's document.

    Raises:
        ModelError: the tokenizer cannot be read, does not give every text back, or has tokens beyond the embedding;
            the chat template does not compile; a token that ends a sequence is none.
    """
    # As JSON of this writer, so that the same file gives the same digest.
    document = json.dumps(decoder.tokenizer, ensure_ascii=False).encode(errors="surrogatepass")
    template = decoder.chat_template
    if len(template) > MAX_TEMPLATE_LENGTH:
        raise _refusal(
            decoder, f"has a chat template of {len(template)} characters; at most {MAX_TEMPLATE_LENGTH} are taken"
        )
    model = TextModel(Blob(digest_of(document), len(document)), logits, template, decoder.bos, decoder.eos)
    try:
        codec = TextCodec(document, model)
        text = codec.decode(codec.encode(_SAMPLE))
    except ModelError as e:
        raise _refusal(decoder, f"cannot be used: {e.message}", hint=_hint(e)) from e
    # SentencePiece puts a space before the first word.
    if text.strip() != _SAMPLE:
        raise _refusal(
            decoder,
            "has a tokenizer that does not give every text back: it is no BPE of bytes",
            hint="byte-level BPE, and BPE that falls back to bytes, are taken",
            text=text[:80],
        )
    _check_tokens(decoder)
    return model, document


def _check_tokens(decoder: DecoderSource) -> None:
    vocabulary = decoder.config.vocabulary
    highest = max(_ids(decoder.tokenizer), default=-1)
    if highest >= vocabulary:
        raise _refusal(
            decoder,
            f"has a tokenizer with the token {highest}, and an embedding of {vocabulary} tokens",
            token=highest,
            vocabulary=vocabulary,
        )
    ends = [token for token in (decoder.bos, *decoder.eos) if token is not None]
    if wrong := [token for token in ends if not 0 <= token < vocabulary]:
        raise _refusal(decoder, f"names the token {wrong[0]} as a beginning or an end, of {vocabulary}", token=wrong[0])
    if len(ends) > _MAX_ENDS:
        raise _refusal(decoder, f"names {len(ends)} tokens that end a sequence; at most {_MAX_ENDS} are taken")


def _ids(tokenizer: Mapping[str, Any]) -> list[int]:
    model = tokenizer.get("model", {})
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    # A mapping for BPE; a list of pairs for Unigram, whose index is the id.
    ids = list(vocabulary.values()) if isinstance(vocabulary, Mapping) else [len(vocabulary or ()) - 1]
    added = (token.get("id") for token in (tokenizer.get("added_tokens") or ()) if isinstance(token, Mapping))
    return [token for token in (*ids, *added) if isinstance(token, int)]


def _hint(error: ModelError) -> str:
    return "correct or remove chat_template in tokenizer_config.json" if "template" in error.message else error.hint


def _refusal(decoder: DecoderSource, reason: str, **facts: Any) -> ModelError:
    return ModelError(f"{decoder.source} {reason}", source=decoder.source, **facts)
