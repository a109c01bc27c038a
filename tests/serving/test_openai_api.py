"""The OpenAI API by OpenAI's client, over a router on a real socket: whole and streamed completions, models, errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from support.language_router import language_router, openai_client
from support.published_decoders import PublishedDecoder
from support.published_decoders import tiny_decoder as tiny_decoder

MESSAGES: Any = [{"role": "user", "content": "the cat sat on"}]
ENDLESS: Any = {"max_tokens": 12, "seed": 7, "extra_body": {"repetition_penalty": 1.2}}


@pytest.fixture(scope="module")
def url(tiny_decoder: PublishedDecoder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with language_router(tiny_decoder, tmp_path_factory.mktemp("router")) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai_client(url) as client:
        yield client


def test_a_stream_has_the_text_of_the_whole_completion(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=MESSAGES, **ENDLESS)
    chunks = list(client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True, **ENDLESS))
    assert whole.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "length"
    assert whole.choices[0].message.content
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len(chunks) > 5
    assert {c.id for c in chunks} == {chunks[0].id}


def test_usage_counts_tokens_of_prompt_and_completion(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="tiny", prompt=[5, 6, 7], max_tokens=4, temperature=0)
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (3, 4, 7)
    stream = client.completions.create(
        model="tiny", prompt=[5, 6, 7], max_tokens=4, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    last = list(stream)[-1]
    assert (last.choices, last.usage) == ([], whole.usage)


def test_models_that_generate_text_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "isthmus"
    with pytest.raises(openai.NotFoundError) as e:
        client.models.retrieve("nobody")
    assert (e.value.code, e.value.param, e.value.type) == ("model_not_found", "model", "invalid_request_error")


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"130 tokens.*room for 128") as e:
        client.completions.create(model="tiny", prompt=[5] * 130)
    assert e.value.code == "context_length_exceeded"
