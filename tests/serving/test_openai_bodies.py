"""Bodies of the OpenAI API are as /openapi.json describes them: whole responses, chunks, errors, requests."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from flask.testing import FlaskClient
from jsonschema import Draft202012Validator

from isthmus.serving.openai.documents import ChatChunkBody, TextCompletionBody
from isthmus.serving.openapi import openapi_document
from support.language_router import decoder_router
from support.published_decoders import PublishedDecoder
from support.published_decoders import tiny_decoder as tiny_decoder

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
CHAT_REQUEST = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "the cat"}],
    "max_tokens": 4,
    "logprobs": True,
    "top_logprobs": 2,
    "stop": ["zzz"],
}
TEXT_REQUEST = {"prompt": "the cat", "max_tokens": 4, "logprobs": 2, "seed": 3}


@pytest.fixture(scope="module")
def router(tiny_decoder: PublishedDecoder, tmp_path_factory: pytest.TempPathFactory) -> FlaskClient:
    return decoder_router(tiny_decoder, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def document(router: FlaskClient) -> Any:
    return openapi_document(router.application.url_map)


def closed(schema: Any) -> Any:
    """The schema without room for keys that it does not name."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    end = {"additionalProperties": False} if "properties" in schema else {}
    return {**{key: closed(value) for key, value in schema.items()}, **end}


def check(document: Any, schema: Any, body: Any) -> None:
    Draft202012Validator({**closed(schema), "components": closed(document["components"])}).validate(body)


def operation(document: Any, path: str, method: str = "post") -> Any:
    return document["paths"][path][method]


@pytest.mark.parametrize(("path", "body"), [(CHAT, CHAT_REQUEST), (TEXT, TEXT_REQUEST)])
def test_requests_and_responses_are_as_described(
    router: FlaskClient, document: Any, path: str, body: dict[str, Any]
) -> None:
    described = operation(document, path)
    check(document, described["requestBody"]["content"]["application/json"]["schema"], body)
    response = router.post(path, json=body)
    check(document, described["responses"]["200"]["content"]["application/json"]["schema"], response.json)
    assert "text/event-stream" in described["responses"]["200"]["content"]


@pytest.mark.parametrize(
    ("path", "kind", "body"), [(CHAT, ChatChunkBody, CHAT_REQUEST), (TEXT, TextCompletionBody, TEXT_REQUEST)]
)
def test_chunks_are_of_their_type(router: FlaskClient, path: str, kind: Any, body: dict[str, Any]) -> None:
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    with router.post(path, json=asked) as response:
        assert response.mimetype == "text/event-stream"
        *chunks, done = response.data.decode().strip().split("\n\n")
    assert done == "data: [DONE]"
    for chunk in chunks:
        text = chunk.removeprefix("data: ")
        # Nothing in a chunk beside the type's fields.
        assert json.loads(msgspec.json.encode(msgspec.json.decode(text, type=kind))) == json.loads(text)


def test_models_and_errors_are_as_described(router: FlaskClient, document: Any) -> None:
    one = operation(document, "/v1/models/{name}", "get")
    for name, status in (("tiny", "200"), ("nobody", "404")):
        schema = one["responses"][status]["content"]["application/json"]["schema"]
        check(document, schema, router.get(f"/v1/models/{name}").json)
    refused = router.post(TEXT, json={"prompt": [5] * 200})
    described = operation(document, TEXT)["responses"]["400"]
    assert "ContextTooLong" in described["description"]
    check(document, described["content"]["application/json"]["schema"], refused.json)
