"""The OpenAI API by OpenAI's client, over a router on a real socket: whole and streamed completions, models, errors."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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


def streamed_text(client: openai.OpenAI, **fields: Any) -> str:
    chunks = client.completions.create(model="tiny", stream=True, **fields)
    return "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)


def test_a_stop_string_over_tokens_ends_the_text_before_it(client: openai.OpenAI) -> None:
    asked: Any = {"prompt": "the dog", "max_tokens": 24, "seed": 3}
    whole = client.completions.create(model="tiny", **asked, logprobs=0).choices[0]
    assert whole.logprobs is not None
    tokens = whole.logprobs.tokens or []
    # The end of one token and the begin of the next, at the first place where the text has it.
    place = next(i for i in range(3, 20) if tokens[i].strip() and tokens[i + 1].strip() and "\ufffd" not in tokens[i])
    stop = tokens[place][-1] + tokens[place + 1][0]
    expected = whole.text[: whole.text.index(stop)]
    cut = client.completions.create(model="tiny", **asked, stop=["never", stop]).choices[0]
    assert (cut.text, cut.finish_reason) == (expected, "stop")
    assert streamed_text(client, **asked, stop=stop) == expected


def test_log_probabilities_are_those_of_the_tokens_whole_and_streamed(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": MESSAGES, "logprobs": True, "top_logprobs": 3, **ENDLESS}
    whole = client.chat.completions.create(**asked).choices[0].logprobs
    assert whole is not None
    assert whole.content is not None
    assert len(whole.content) == 12
    for token in whole.content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert token.logprob <= token.top_logprobs[0].logprob
        assert [t.logprob for t in token.top_logprobs] == sorted((t.logprob for t in token.top_logprobs), reverse=True)
    streamed = [
        token
        for chunk in client.chat.completions.create(**asked, stream=True)
        if (scores := chunk.choices[0].logprobs) is not None
        for token in scores.content or []
    ]
    assert [t.token for t in streamed] == [t.token for t in whole.content]
    assert [t.logprob for t in streamed] == pytest.approx([t.logprob for t in whole.content], abs=1e-4)


def test_a_seed_decides_the_tokens(client: openai.OpenAI) -> None:
    def text(seed: int | None) -> str:
        asked: Any = {} if seed is None else {"seed": seed}
        return client.completions.create(model="tiny", prompt="the", max_tokens=16, **asked).choices[0].text

    assert text(1) == text(1)
    assert text(-3) == text(-3)
    assert len({text(1), text(2), text(None), text(None)}) == 4


def test_eight_clients_at_once_get_what_each_gets_alone(client: openai.OpenAI) -> None:
    alone = [streamed_text(client, prompt="the cat", max_tokens=40, seed=seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(
            pool.map(lambda seed: streamed_text(client, prompt="the cat", max_tokens=40, seed=seed), range(8))
        )
    assert together == alone
    assert len(set(alone)) == 8


def test_the_response_states_route_version_and_digest(client: openai.OpenAI, tiny_decoder: PublishedDecoder) -> None:
    raw = client.chat.completions.with_raw_response.create(model="tiny:prod", messages=MESSAGES, max_tokens=3)
    whole = raw.parse()
    facts = whole.model_extra["isthmus"]
    assert raw.headers["Isthmus-Route"] == facts["route"]
    assert raw.headers["Isthmus-Version"] == "tiny:1"
    assert whole.model == "tiny:1"
    digest = tiny_decoder.model.digest.removeprefix("sha256:")
    assert whole.system_fingerprint == f"fp_{digest[:12]}"
    assert facts["steps"] >= 1
    last = list(client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=3, stream=True))[-1]
    assert last.model_extra["isthmus"]["route"] == facts["route"]


def test_the_end_of_the_context_ends_a_completion(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="tiny", prompt="the cat", max_tokens=10**9, temperature=0)
    assert whole.usage is not None
    assert (whole.usage.total_tokens, whole.choices[0].finish_reason) == (128, "length")
