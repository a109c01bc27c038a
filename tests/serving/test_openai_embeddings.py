"""Embeddings by OpenAI's client: over a head and a tail, against transformers, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest

from isthmus.client import Client
from isthmus.errors import ContextTooLong, RequestMalformed
from isthmus.serving import create_segment_app
from isthmus.serving.openai import embeddings
from isthmus.settings import RouterSettings, SegmentSettings
from support.bundles import served
from support.encoders import TEXTS, expected_vectors, token_rows
from support.language_router import openai_client
from support.published_encoders import PublishedEncoder
from support.published_encoders import tiny_encoder as tiny_encoder
from support.routers import served_router


@pytest.fixture(scope="module")
def url(tiny_encoder: PublishedEncoder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A router before a tail on a socket; the head runs in its process."""
    registry = str(tiny_encoder.registry)

    def cache() -> str:
        return str(tmp_path_factory.mktemp("cache"))

    tail = create_segment_app(SegmentSettings(registry=registry, cache_dir=cache(), threads=1))
    with served(tail) as tail_url:
        hops = ("local", tail_url)
        settings = RouterSettings(registry=registry, cache_dir=cache(), model="sentences", hops=hops, threads=1)
        with served_router(settings) as router_url:
            yield router_url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai_client(url) as client:
        yield client


def test_vectors_are_those_of_transformers_in_both_encodings(
    client: openai.OpenAI, tiny_encoder: PublishedEncoder
) -> None:
    rows = token_rows(tiny_encoder.folder, TEXTS)
    expected = expected_vectors(tiny_encoder.folder, rows)
    default = client.embeddings.create(model="sentences", input=TEXTS)  # the client asks for base64
    numbers = client.embeddings.create(model="sentences", input=rows, encoding_format="float")
    for response in (default, numbers):
        assert [entry.index for entry in response.data] == [0, 1, 2, 3]
        assert response.model == "sentences:1"
        count = sum(map(len, rows))
        assert (response.usage.prompt_tokens, response.usage.total_tokens) == (count, count)
        np.testing.assert_allclose([entry.embedding for entry in response.data], expected, atol=2e-6)
    facts: Any = default.model_extra
    assert facts["isthmus"]["runs"] == 1
    # The residual stream of all rows crosses, padded, and the mask.
    assert facts["isthmus"]["link_bytes"] > 4 * max(map(len, rows)) * (32 * 4 + 8)


def test_a_text_gives_alone_what_it_gives_beside_longer_ones(client: openai.OpenAI) -> None:
    together = client.embeddings.create(model="sentences", input=TEXTS)
    for text, entry in zip(TEXTS, together.data, strict=True):
        alone = client.embeddings.create(model="sentences", input=text)
        np.testing.assert_allclose(alone.data[0].embedding, entry.embedding, atol=1e-6)


def test_long_requests_take_several_runs(client: openai.OpenAI) -> None:
    texts = TEXTS * 400
    response: Any = client.embeddings.create(model="sentences", input=texts)
    assert response.isthmus["runs"] > 3
    vectors = np.array([entry.embedding for entry in response.data])
    np.testing.assert_allclose(vectors, np.tile(vectors[:4], (400, 1)), atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"input": ""}, "input", "an input is empty"),
        ({"input": []}, "input", "an input is empty"),
        ({"input": ["a", ""]}, "input", "an input is empty"),
        ({"input": [[]]}, "input", "an input is empty"),
        ({"input": ["a", 1]}, "input", "a list of token ids"),
        ({"input": ["a", [1]]}, "input", "a list of token ids"),
        ({"input": [1, -1]}, "input", "input"),
        ({"input": [119, 120]}, "input", "the token id 120"),
        ({"input": {"text": "a"}}, "input", "input"),
        ({"input": ["a"] * 2049}, "input", "has 2049 inputs; at most 2048"),
        ({"input": "a", "dimensions": 16}, "dimensions", "sentences have 32"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "encoding_format"),
    ],
)
def test_what_is_no_request_is_refused(client: openai.OpenAI, fields: dict[str, Any], param: str, reason: str) -> None:
    with pytest.raises(openai.BadRequestError, match=reason) as e:
        client.post("/embeddings", body={"model": "sentences", **fields}, cast_to=object)
    assert (e.value.param, e.value.type) == (param, "invalid_request_error")


def test_a_text_that_is_too_long_is_refused_with_both_numbers(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="has 32 tokens; the model takes at most 24") as e:
        client.embeddings.create(model="sentences", input=["the cat", "the cat " * 15])
    assert e.value.code == "context_length_exceeded"


def test_a_request_of_too_many_tokens_is_refused(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "MAX_TOKENS", 20)
    with pytest.raises(openai.BadRequestError, match="the first 3 inputs have 24 tokens; a request has at most 20"):
        client.embeddings.create(model="sentences", input=["the cat sat on the mat"] * 5)


def test_dimensions_that_are_the_models_ask_for_nothing(client: openai.OpenAI) -> None:
    assert len(client.embeddings.create(model="sentences", input="a", dimensions=32).data[0].embedding) == 32


def test_encoders_are_listed_and_generate_nothing(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["sentences"]
    assert client.models.retrieve("sentences").id == "sentences"
    with pytest.raises(
        openai.BadRequestError, match="generates no text; it encodes texts: send them to /v1/embeddings"
    ):
        client.completions.create(model="sentences", prompt="a")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="nobody", input="a")


def test_isthmus_own_client_gives_arrays_and_the_routers_errors(url: str, tiny_encoder: PublishedEncoder) -> None:
    client = Client(url)
    expected = expected_vectors(tiny_encoder.folder, token_rows(tiny_encoder.folder, TEXTS))
    np.testing.assert_allclose(client.embed(TEXTS), expected, atol=2e-6)
    with pytest.raises(ContextTooLong) as e:
        client.embed(["the cat " * 15], model="sentences")
    assert e.value.facts["context"] == 24
    with pytest.raises(RequestMalformed, match="empty"):
        client.embed([])
