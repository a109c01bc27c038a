"""Chat completions and completions: from a request's body to the prompt and the parameters of its generation."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cachetools import LRUCache, cached
from flask import Response

from isthmus.errors import ContextTooLong, RequestMalformed
from isthmus.generation.generator import GenerationRequest
from isthmus.generation.text import TextCodec, codec_of
from isthmus.processing.text_masking import refuse_token_ids
from isthmus.registry import Registry
from isthmus.routing import ServedModel
from isthmus.serving.generations import Generations
from isthmus.serving.openai.documents import ChatDocuments, CompletionDocuments, CompletionHead, TextDocuments
from isthmus.serving.openai.models import context_of, generating
from isthmus.serving.openai.requests import ChatRequestBody, CompletionRequestBody, GenerationBody, read_request
from isthmus.serving.openai.responses import CompletionJob, CompletionResponder
from isthmus.serving.redaction import state_masking
from isthmus.serving.request import FunctionRequest
from isthmus.serving.version_choice import VersionChoice
from isthmus.settings import RouterSettings

# Tokens where the request names no bound; OpenAI goes on to the end of the context, which takes minutes on a small CPU.
DEFAULT_MAX_TOKENS = 256
# A vocabulary of 50,000 tokens takes 15 MB.
_MAX_CODECS = 8
# English has four characters a token; of a text with more than these for each token of the context the begin is read
# first.
_MANY_CHARACTERS = 8
# Of a token in a Python list of ids, and in the generation's copy.
_TOKEN_BYTES = 80


class CompletionRoutes:
    """Handlers of `POST /v1/chat/completions` and `POST /v1/completions`."""

    def __init__(
        self, settings: RouterSettings, versions: VersionChoice, registry: Registry, generations: Generations
    ) -> None:
        self._settings, self._versions, self._registry = settings, versions, registry
        self._responder = CompletionResponder(settings, generations)
        cache = LRUCache[str, TextCodec](_MAX_CODECS)
        self._codec = cached(cache, key=lambda model: model.digest, lock=threading.Lock())(self._read_codec)

    def chat(self, request: FunctionRequest) -> Response:
        """A chat completion."""
        body = read_request(request, ChatRequestBody)
        if body.top_logprobs and not body.logprobs:
            raise RequestMalformed("top_logprobs needs logprobs: true", parameter="top_logprobs")
        return self._respond(request, body, lambda model: self._chat(request, body, model))

    def _chat(self, request: FunctionRequest, body: ChatRequestBody, model: ServedModel) -> Response:
        codec = self._codec(model)
        messages = [message.document() for message in body.messages]
        self._check_length("messages", "".join(message["content"] for message in messages), model, codec)
        masked = Counter[str]()
        prompt = _Prompt("messages", codec.encode_chat(messages, masked), model, codec)
        state_masking(request, masked)
        limit = body.max_completion_tokens or body.max_tokens
        documents = ChatDocuments(_head("chatcmpl", request, model), codec, bool(body.logprobs))
        return self._complete(
            request, body, prompt, documents, self._parameters(body, prompt, limit, body.top_logprobs)
        )

    def complete(self, request: FunctionRequest) -> Response:
        """A completion of a text."""
        body = read_request(request, CompletionRequestBody)
        return self._respond(request, body, lambda model: self._text(request, body, model))

    def _text(self, request: FunctionRequest, body: CompletionRequestBody, model: ServedModel) -> Response:
        codec = self._codec(model)
        if isinstance(body.prompt, str):
            self._check_length("prompt", body.prompt, model, codec)
        masked = Counter[str]()
        prompt = _Prompt("prompt", _prompt_ids(body, codec, model, masked), model, codec)
        state_masking(request, masked)
        documents = TextDocuments(_head("cmpl", request, model), codec, body.logprobs is not None)
        generation = self._parameters(body, prompt, body.max_tokens, body.logprobs)
        return self._complete(request, body, prompt, documents, generation)

    def _complete(
        self,
        request: FunctionRequest,
        body: GenerationBody,
        prompt: _Prompt,
        documents: CompletionDocuments,
        generation: GenerationRequest,
    ) -> Response:
        request.memory.hold(_TOKEN_BYTES * len(prompt.ids))
        job = CompletionJob(
            prompt.model, prompt.codec, generation, body.stops, documents, body.includes_usage, self._settings
        )
        return self._responder.stream(request, job) if body.stream else self._responder.whole(request, job)

    def _parameters(
        self, body: GenerationBody, prompt: _Prompt, limit: int | None, logprobs: int | None
    ) -> GenerationRequest:
        """The generation, of as many tokens as the request allows and the context has room for.

        Raises:
            RequestMalformed: an empty prompt.
            ContextTooLong: no room.
        """
        bundle, count = prompt.model.bundle, len(prompt.ids)
        if not count:
            raise RequestMalformed("the prompt is empty", parameter=prompt.field)
        context = context_of(prompt.model, self._settings)
        if count >= context:
            raise _too_long(prompt.field, str(count), count, context)
        return GenerationRequest(
            prompt=prompt.ids,
            max_tokens=min(limit or DEFAULT_MAX_TOKENS, context - count),
            sampling=body.sampling(logprobs or 0),
            stop=frozenset(bundle.text.eos if bundle.text is not None else ()),
        )

    def _check_length(self, field: str, text: str, model: ServedModel, codec: TextCodec) -> None:
        """Refuse a text whose begin fills the context: a megabyte takes seconds as tokens.

        Raises:
            ContextTooLong: no room.
        """
        context = context_of(model, self._settings)
        begin = text[: _MANY_CHARACTERS * context]
        if len(begin) < len(text) and (count := len(codec.encode(begin))) >= context:
            raise _too_long(field, f"more than {count}", count, context)

    def _respond(
        self, request: FunctionRequest, body: GenerationBody, respond: Callable[[ServedModel], Response]
    ) -> Response:
        name = body.model or self._settings.model
        return self._versions.respond(request, name, lambda model: respond(generating(model)))

    def _read_codec(self, model: ServedModel) -> TextCodec:
        """The tokenizer and chat template of a version.

        Raises:
            RegistryError, ModelError: the tokenizer cannot be read.
        """
        return codec_of(model.bundle, self._registry.blob)


@dataclass(frozen=True)
class _Prompt:
    """Token ids, from a field of the request, of a model."""

    field: str
    ids: Sequence[int]
    model: ServedModel
    codec: TextCodec


def _too_long(field: str, number: str, count: int, context: int) -> ContextTooLong:
    return ContextTooLong(
        f"the prompt has {number} tokens, and the context has room for {context}, completion included",
        prompt_tokens=count,
        context=context,
        parameter=field,
    )


def _prompt_ids(body: CompletionRequestBody, codec: TextCodec, model: ServedModel, masked: Counter[str]) -> list[int]:
    """The token ids of a prompt; `masked` gets the numbers of its masked patterns.

    Raises:
        RequestMalformed: several prompts, an id beyond the vocabulary, or ids for a model that masks texts.
    """
    if isinstance(body.prompt, str):
        return codec.encode(body.prompt, masked)
    texts = [entry for entry in body.prompt if isinstance(entry, str)]
    ids = [entry for entry in body.prompt if isinstance(entry, int)]
    if texts:
        if len(body.prompt) > 1:
            raise RequestMalformed("a request has one prompt: a text, or a list of token ids", parameter="prompt")
        return codec.encode(texts[0], masked)
    if codec.masker is not None:
        raise refuse_token_ids("prompt")
    size = _vocabulary(model, codec)
    if (highest := max(ids, default=0)) >= size:
        raise RequestMalformed(f"the token id {highest} is beyond the vocabulary of {size} ids", parameter="prompt")
    return ids


def _vocabulary(model: ServedModel, codec: TextCodec) -> int:
    """Token ids that the model takes; tokenizers may know fewer, or more."""
    text = model.bundle.text
    sizes = [spec.shape[-1] for spec in model.bundle.outputs if text is not None and spec.name == text.logits]
    return next((size for size in sizes if isinstance(size, int)), codec.vocabulary)


def _head(prefix: str, request: FunctionRequest, model: ServedModel) -> CompletionHead:
    # OpenAI's fingerprint is of the back end; here of weights and graph, which decide the tokens.
    fingerprint = f"fp_{model.digest.rpartition(':')[2][:12]}"
    name = f"{model.name}:{model.version}"
    return CompletionHead(f"{prefix}-{request.context.call_id}", int(time.time()), name, fingerprint)
