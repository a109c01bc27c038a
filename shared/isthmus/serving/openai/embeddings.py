"""Embeddings: from texts or token ids to a vector for each, along the model's route.

Source: platform.openai.com/docs/api-reference/embeddings; docs/reference/openai.md, "Embeddings".
"""

from __future__ import annotations

import base64
import threading
import time
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
import numpy as np
from cachetools import LRUCache, cached
from flask import Response
from msgspec import UNSET, Meta, Struct, UnsetType

from isthmus.arrays import Array
from isthmus.artifacts.bundle import TextEmbedding
from isthmus.errors import RequestMalformed
from isthmus.pipeline import Result
from isthmus.processing.sentences import SentenceTokenizer, embed
from isthmus.processing.text_masking import masker_of, refuse_token_ids
from isthmus.registry import Registry
from isthmus.routing import ServedModel
from isthmus.serving.openai.requests import read_request
from isthmus.serving.prediction import Predictor
from isthmus.serving.redaction import state_masking
from isthmus.serving.request import FunctionRequest
from isthmus.serving.version_choice import VersionChoice
from isthmus.settings import RouterSettings

# OpenAI's own bounds on a request.
MAX_INPUTS, MAX_TOKENS = 2048, 300_000
# A tokenizer of 30,000 tokens takes 10 MB.
_MAX_TOKENIZERS = 8
# Of a token: its place in a Python list, twice in an array, and its boundary tensors' share of a run.
_TOKEN_BYTES = 64
# Of a component: the array, and a number of JSON in the document and in the body.
_COMPONENT_BYTES = 80
_TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]


class EmbeddingRequestBody(Struct, frozen=True, kw_only=True):
    """A request for embeddings; null is the default."""

    input: str | list[str | _TokenId | list[_TokenId]]
    model: Annotated[str, Meta(max_length=256)] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    user: Annotated[str, Meta(max_length=512)] | None = None

    def inputs(self) -> list[str | list[int]]:
        """The inputs, each a text or token ids.

        Raises:
            RequestMalformed: none, too many, an empty text, or a list of several kinds.
        """
        if isinstance(self.input, str):
            inputs: list[str | list[int]] = [self.input]
        elif ids := [entry for entry in self.input if isinstance(entry, int)]:
            if len(ids) < len(self.input):
                raise _mixed()
            inputs = [ids]
        else:
            inputs = [entry for entry in self.input if not isinstance(entry, int)]
            if len({type(entry) for entry in inputs}) > 1:
                raise _mixed()
        if not inputs or not all(inputs):
            raise RequestMalformed("an input is empty", parameter="input")
        if len(inputs) > MAX_INPUTS:
            raise RequestMalformed(
                f"the request has {len(inputs)} inputs; at most {MAX_INPUTS} are taken",
                parameter="input",
                inputs=len(inputs),
                limit=MAX_INPUTS,
            )
        return inputs


class EmbeddingBody(Struct):
    """The vector of an input: numbers, or little-endian float32 in base64."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingUsageBody(Struct):
    """Numbers of tokens, special tokens included."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingFactsBody(Struct):
    """How Isthmus computed the vectors: routes, what they cost in fidelity if anything, runs, bytes over the link."""

    route: str
    runs: int
    link_bytes: int
    degraded: str | UnsetType = UNSET


class EmbeddingListBody(Struct):
    """The vectors, in the order of the inputs."""

    data: list[EmbeddingBody]
    model: str
    usage: EmbeddingUsageBody
    isthmus: EmbeddingFactsBody
    object: Literal["list"] = "list"


class EmbeddingRoutes:
    """The handler of `POST /v1/embeddings`."""

    def __init__(
        self, settings: RouterSettings, versions: VersionChoice, registry: Registry, predictor: Predictor
    ) -> None:
        self._settings, self._versions, self._registry, self._predictor = settings, versions, registry, predictor
        cache = LRUCache[str, SentenceTokenizer](_MAX_TOKENIZERS)
        self._tokenizer = cached(cache, key=lambda model, _: model.digest, lock=threading.Lock())(self._read_tokenizer)

    def embed(self, request: FunctionRequest) -> Response:
        """A vector for each input."""
        body = read_request(request, EmbeddingRequestBody)
        name = body.model or self._settings.model
        return self._versions.respond(request, name, lambda model: self._respond(request, body, model))

    def _respond(self, request: FunctionRequest, body: EmbeddingRequestBody, model: ServedModel) -> Response:
        embedding = _embedding_of(model, body)
        rows = self._rows(request, model, embedding, body)
        tokens = sum(map(len, rows))
        request.memory.hold(_TOKEN_BYTES * tokens + _COMPONENT_BYTES * len(rows) * _width(model, embedding))
        results: list[Result] = []

        def run(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
            results.append(self._predictor.predict(request, model, inputs))
            return results[-1].outputs

        vectors = embed(rows, embedding, run)
        document = EmbeddingListBody(
            _vectors(vectors, as_base64=body.encoding_format == "base64"),
            f"{model.name}:{model.version}",
            EmbeddingUsageBody(tokens, tokens),
            _facts(results),
        )
        return Response(msgspec.json.encode(document), mimetype="application/json")

    def _rows(
        self, request: FunctionRequest, model: ServedModel, embedding: TextEmbedding, body: EmbeddingRequestBody
    ) -> list[list[int]]:
        """The token ids of each input.

        Raises:
            RequestMalformed: an input is too long, or all of them are; or token ids for a model that masks texts.
        """
        start = time.perf_counter()
        tokenizer, rows, tokens = self._tokenizer(model, embedding), list[list[int]](), 0
        masked = Counter[str]()
        for entry in body.inputs():
            if not isinstance(entry, str) and tokenizer.masker is not None:
                raise refuse_token_ids("input")
            rows.append(tokenizer.encode(entry, masked) if isinstance(entry, str) else tokenizer.check(entry))
            # Within the loop: texts beyond the bound are not read to their end.
            if (tokens := tokens + len(rows[-1])) > MAX_TOKENS:
                raise RequestMalformed(
                    f"the first {len(rows)} inputs have {tokens} tokens; a request has at most {MAX_TOKENS}",
                    parameter="input",
                    tokens=tokens,
                    limit=MAX_TOKENS,
                )
            request.context.deadline.check("the inputs were tokenized")
        state_masking(request, masked)
        request.timings.add("preprocess", time.perf_counter() - start)
        return rows

    def _read_tokenizer(self, model: ServedModel, embedding: TextEmbedding) -> SentenceTokenizer:
        return SentenceTokenizer(self._registry.blob(embedding.tokenizer), embedding, masker_of(model.bundle))


def _embedding_of(model: ServedModel, body: EmbeddingRequestBody) -> TextEmbedding:
    """How the model takes texts.

    Raises:
        RequestMalformed: it takes none, or has vectors of other dimensions.
    """
    if (embedding := model.bundle.embedding) is None:
        raise RequestMalformed(
            f"{model.name} makes no embeddings of texts",
            parameter="model",
            hint="import a sentence encoder: isthmus import all-minilm-l6-v2",
        )
    # A shortened vector is of use only where the model was trained for it.
    if body.dimensions not in (None, width := _width(model, embedding)):
        raise RequestMalformed(
            f"dimensions is {body.dimensions}; vectors of {model.name} have {width}, and no fewer",
            parameter="dimensions",
            dimensions=width,
        )
    return embedding


def _width(model: ServedModel, embedding: TextEmbedding) -> int:
    # A bundle declares vectors of a fixed width.
    return next(int(spec.shape[1]) for spec in model.bundle.outputs if spec.name == embedding.vector)


def _vectors(vectors: Array, *, as_base64: bool) -> list[EmbeddingBody]:
    if as_base64:
        texts = [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
        return [EmbeddingBody(i, text) for i, text in enumerate(texts)]
    return [EmbeddingBody(i, vector) for i, vector in enumerate(vectors.astype(np.float64).tolist())]


def _facts(results: list[Result]) -> EmbeddingFactsBody:
    # Runs may take several routes.
    routes = dict.fromkeys(result.route for result in results)
    degraded = "; ".join(dict.fromkeys(result.degraded for result in results if result.degraded))
    link_bytes = sum(result.link_bytes for result in results)
    return EmbeddingFactsBody("; ".join(routes), len(results), link_bytes, degraded or UNSET)


def _mixed() -> RequestMalformed:
    return RequestMalformed(
        "input is a text, a list of texts, a list of token ids, or a list of such lists", parameter="input"
    )
