"""Text and token ids: special tokens come from templates alone, and characters from whole tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from isthmus.artifacts.bundle import Blob, TextModel
from isthmus.errors import ModelError, RequestMalformed, RequestTooLarge
from isthmus.generation import text as text_module
from isthmus.generation.text import TextCodec, TextStream
from support.published_decoders import CHAT_TEMPLATE, PublishedDecoder


@pytest.fixture
def tokenizer(tiny_decoder: PublishedDecoder) -> bytes:
    return Path(tiny_decoder.folder, "tokenizer.json").read_bytes()


def codec(tokenizer: bytes, template: str = "", **facts: Any) -> TextCodec:
    return TextCodec(tokenizer, TextModel(Blob("sha256:" + "0" * 64, 1), "logits", template, **facts))


def end_of(tokenizer: bytes) -> int:
    return next(t["id"] for t in json.loads(tokenizer)["added_tokens"] if t["content"] == "<|end|>")


def test_a_text_comes_back(tokenizer: bytes) -> None:
    both = codec(tokenizer)
    for text in ("the cat sat on the mat", "émile ❤ 漢字", ""):
        assert both.decode(both.encode(text)) == text


def test_a_sequence_begins_with_its_token(tokenizer: bytes) -> None:
    assert codec(tokenizer, bos=7).encode("the cat") == [7, *codec(tokenizer).encode("the cat")]


@pytest.mark.parametrize("text", ["<|end|>", "a<|end|>b", "<|end|><|end|>", "<|e<|end|>nd|>"])
def test_a_special_token_in_a_text_is_plain_text(text: str, tokenizer: bytes) -> None:
    end, both = end_of(tokenizer), codec(tokenizer, CHAT_TEMPLATE)
    assert end not in both.encode(text)
    assert both.decode(both.encode(text)) == text
    ids = both.encode_chat([{"role": "user", "content": text}])
    assert ids.count(end) == 2
    assert text in both.decode(ids)


def test_a_conversation_is_what_the_template_says(tokenizer: bytes) -> None:
    both, end = codec(tokenizer, CHAT_TEMPLATE), end_of(tokenizer)
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "the {{ messages }}"}]
    ids = both.encode_chat(messages)
    assert ids.count(end) == 3
    assert both.decode(ids) == "system: be kinduser: the {{ messages }}assistant:"


def test_a_name_is_text_as_a_content_is(tokenizer: bytes) -> None:
    template = "{% for m in messages %}{{ m.name }}: {{ m.content }}<|end|>{% endfor %}"
    both, end = codec(tokenizer, template), end_of(tokenizer)
    ids = both.encode_chat([{"role": "user", "content": "a", "name": "<|end|>\U000f0000999\U000f0001"}])
    assert ids.count(end) == 1
    assert both.decode(ids) == "<|end|>999: a"


def test_a_template_that_writes_marks_of_its_own_gets_no_text_for_them(tokenizer: bytes) -> None:
    both = codec(tokenizer, "the \U000f0000999\U000f0001cat")
    assert both.decode(both.encode_chat([{"role": "user", "content": "a"}])) == "the cat"


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        ("", [{"role": "user", "content": "x"}], "no chat template"),
        (CHAT_TEMPLATE, [{"role": "root", "content": "x"}], "the role is 'root'"),
        ("{{ raise_exception('roles must alternate') }}", [{"role": "user", "content": "x"}], "roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", [{"role": "user", "content": "x"}], "refuses these messages"),
        ("{{ messages.append(1) }}", [{"role": "user", "content": "x"}], "refuses these messages"),
    ],
)
def test_messages_that_cannot_be_encoded(template: str, messages: Any, reason: str, tokenizer: bytes) -> None:
    with pytest.raises(RequestMalformed, match=reason):
        codec(tokenizer, template).encode_chat(messages)


def test_bounds_and_broken_parts(tokenizer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "MAX_TEXT_LENGTH", 10)
    with pytest.raises(RequestTooLarge):
        codec(tokenizer).encode("x" * 11)
    with pytest.raises(RequestTooLarge):
        codec(tokenizer, CHAT_TEMPLATE).encode_chat([{"role": "user", "content": "x" * 11}])
    with pytest.raises(ModelError, match="tokenizer cannot be read"):
        codec(b"{}")
    with pytest.raises(ModelError, match="template cannot be read"):
        codec(tokenizer, "{% if %}")


def test_a_stream_has_whole_characters_alone(tokenizer: bytes) -> None:
    both = codec(tokenizer)
    text = "the émile ❤ cat"
    stream = TextStream(both)
    pieces = [stream.add(token) for token in both.encode(text)]
    assert "".join(pieces) + stream.rest() == text
    assert "" in pieces  # within a character of several tokens
    assert not any("\ufffd" in piece for piece in pieces)


def test_the_rest_of_a_stream_is_its_unfinished_character(tokenizer: bytes) -> None:
    both = codec(tokenizer)
    stream = TextStream(both)
    assert [stream.add(token) for token in both.encode("❤")[:2]] == ["", ""]
    assert stream.rest() == "\ufffd"
