"""A conversation with a language model: by a router's API, or in this process."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.layers import layers_of
from isthmus.artifacts.sampling import MAX_SEED, Sampling
from isthmus.artifacts.segment_id import WHOLE
from isthmus.client import Client
from isthmus.context import Context, Deadline
from isthmus.errors import ContextTooLong, HopRejected, HopUnavailable, Missing, RequestMalformed
from isthmus.generation.completion import CompletionText
from isthmus.generation.generator import Generated, GenerationRequest, Generator
from isthmus.generation.text import codec_of
from isthmus.http.tls import TlsTrust, open_trust
from isthmus.pipeline import LocalHop, local_route, plan_route
from isthmus.registry import Registry, open_cache, open_registry
from isthmus.runtime.session_store import open_store
from isthmus.settings import RegistrySettings, SegmentSettings

Message = Mapping[str, str]
IN_PROCESS = "this process"
_LOAD_S = 600.0
# Of English text.
_TOKEN_CHARACTERS = 4


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """How answers are generated; without a temperature the model's likeliest tokens. Units: tokens and seconds."""

    max_tokens: int = 512
    temperature: float = 0.0
    seed: int | None = None
    timeout_s: float = 600.0


class LayerPlace(NamedTuple):
    """Consecutive layers of a model, and the hop that runs them."""

    first: int
    last: int
    hop: str


@dataclass
class Answer:
    """An answer as far as it is generated. Units: seconds and bytes; times are those of whoever reads it."""

    model: str = ""
    text: str = ""
    finish: str = ""
    prompt_tokens: int = 0
    tokens: int = 0
    link_bytes: int = 0
    first_token_s: float = 0.0
    whole_s: float = 0.0
    route: str = ""
    layers: tuple[LayerPlace, ...] = ()
    dropped: int = 0
    """Messages of the conversation that no longer fitted the context, from its begin on."""

    @property
    def tokens_per_s(self) -> float:
        """Tokens behind the first by their seconds; 0 for a single token."""
        seconds = self.whole_s - self.first_token_s
        return (self.tokens - 1) / seconds if self.tokens > 1 and seconds > 0 else 0.0

    def document(self) -> dict[str, Any]:
        """The answer as JSON."""
        return {
            "model": self.model,
            "text": self.text,
            "finish": self.finish,
            "usage": {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.tokens},
            "first_token_ms": round(self.first_token_s * 1000, 3),
            "tokens_per_s": round(self.tokens_per_s, 3),
            "link_bytes": self.link_bytes,
            "route": self.route,
            "layers": [place._asdict() for place in self.layers],
            "dropped": self.dropped,
        }


class ChatModel(Protocol):
    """A model that continues conversations. `context` is the number of tokens that it takes, 0 where unknown."""

    context: int

    def pieces(self, messages: Sequence[Message], options: ChatOptions, answer: Answer) -> Iterator[str]:
        """The text as it comes; `answer` has its numbers once the text is over.

        Raises:
            ContextTooLong: the messages leave no room for an answer.
        """
        ...


class RouterChat:
    """A model behind a router. Units: `timeout_s`, in seconds, bounds an answer."""

    def __init__(
        self, url: str, model: str, *, timeout_s: float, trust: TlsTrust | None = None, api_key: str | None = None
    ) -> None:
        self._client, self._model = Client(url, timeout_s=timeout_s, trust=trust, api_key=api_key), model
        self.context = 0

    def check(self) -> None:
        """Ask the router for its models.

        Raises:
            HopUnavailable: no response.
        """
        self._client.get("/v1/models")

    def pieces(self, messages: Sequence[Message], options: ChatOptions, answer: Answer) -> Iterator[str]:
        """See `ChatModel.pieces`."""
        fields: dict[str, Any] = {"max_tokens": options.max_tokens, "temperature": options.temperature}
        if options.seed is not None:
            fields["seed"] = options.seed
        for chunk in self._client.chat(messages, model=self._model, options=fields):
            try:
                self._read_numbers(chunk, answer)
                choices = [(c["delta"].get("content") or "", c["finish_reason"]) for c in chunk["choices"]]
            except (KeyError, TypeError, ValueError, AttributeError) as e:
                raise HopRejected(f"{self._client.url} answered, but not as a router does", hop=self._client.url) from e
            for text, finish in choices:
                answer.finish = finish or answer.finish
                if text:
                    answer.tokens += 1  # of an answer that is stopped: a chunk mostly has one token
                    yield text

    def _read_numbers(self, chunk: Mapping[str, Any], answer: Answer) -> None:
        answer.model = chunk["model"]
        if usage := chunk.get("usage"):
            answer.prompt_tokens, answer.tokens = usage["prompt_tokens"], usage["completion_tokens"]
        if facts := chunk.get("isthmus"):
            answer.route, answer.link_bytes = facts["route"], facts["link_bytes"]
            self.context = facts["context"]
            places = [(s["layers"], s["hop"]) for s in facts["segments"]]
            answer.layers = tuple(LayerPlace(layers[0], layers[1], hop) for layers, hop in places if layers)


class LocalChat:
    """A model of the registry, NAME or NAME:VERSION, run by this process.

    `cuts` is a partition as text; without any the uncut model runs. `threads` of one run; 0 for the CPUs available.

    Raises:
        RegistryError: unknown model, version or cut.
        RequestMalformed: the model generates no text.
    """

    def __init__(self, model: str, registry: RegistrySettings, cuts: str = "", *, threads: int = 0) -> None:
        settings = SegmentSettings(**vars(registry), threads=threads)
        store = open_registry(settings)
        resolved = store.resolve(model or _language_model(store))
        self._name, bundle = f"{resolved.name}:{resolved.version}", resolved.bundle
        if bundle.text is None or bundle.state is None:
            hint = "isthmus models lists the language models, by their layers; isthmus import llm:smollm2 makes one"
            raise RequestMalformed(f"{self._name} generates no text", model=self._name, hint=hint)
        sessions = open_store(open_cache(settings, store), settings)
        hop = LocalHop(sessions)
        if cuts:
            self._route = plan_route(resolved.digest, bundle, (hop,), cuts)
        else:
            self._route = local_route(resolved.digest, bundle, (bundle.segment(WHOLE),), hop)
        self._codec = codec_of(bundle, store.blob)
        self._ends = frozenset(bundle.text.eos)
        self.context = min(bundle.state.context, settings.max_session_tokens)
        # Now, so that the time to the first token is that of the model and not of its load.
        for segment in self._route.segments:
            sessions.store.runner(resolved.digest, segment.id, Deadline.after(_LOAD_S))

    def pieces(self, messages: Sequence[Message], options: ChatOptions, answer: Answer) -> Iterator[str]:
        """See `ChatModel.pieces`."""
        prompt = self._codec.encode_chat(messages)
        if len(prompt) >= self.context:
            raise ContextTooLong(
                f"the conversation has {len(prompt)} tokens, and the context has room for {self.context}",
                prompt_tokens=len(prompt),
                context=self.context,
            )
        seed = secrets.randbelow(MAX_SEED) if options.seed is None else options.seed
        request = GenerationRequest(
            prompt=prompt,
            max_tokens=min(options.max_tokens, self.context - len(prompt)),
            sampling=Sampling(temperature=options.temperature, seed=seed),
            stop=self._ends,
        )
        done, context = Generated(), Context.from_headers({}, longest_s=options.timeout_s)
        text = CompletionText(self._codec, prompt=prompt, ends=self._ends)
        answer.model, answer.prompt_tokens = self._name, len(prompt)
        layers = layers_of(self._route.bundle, self._route.segments)
        answer.layers = tuple(LayerPlace(each[0], each[-1], IN_PROCESS) for each in layers if each)
        try:
            for piece in text.pieces(Generator(self._route).run(request, context, done)):
                if piece.text:
                    yield piece.text
        finally:
            answer.tokens, answer.finish = len(done.tokens), done.finish


@dataclass
class Conversation:
    """Turns with a model, kept within its context: where they no longer fit, the oldest are dropped."""

    model: ChatModel
    options: ChatOptions = field(default_factory=ChatOptions)
    system: str = ""
    clock: Callable[[], float] = time.monotonic
    _turns: list[Message] = field(default_factory=list)
    _dropped: int = 0
    _tokens: int = 0
    """Tokens of the conversation after the last answer."""

    def ask(self, prompt: str, answer: Answer) -> Iterator[str]:
        """The answer's text as it comes; it joins the conversation as far as it was read.

        Raises:
            ContextTooLong: the prompt alone is too long.
            Further errors as the model's; the prompt is no part of the conversation then.
        """
        self._turns.append({"role": "user", "content": prompt})
        began = self.clock()
        self._make_room(prompt)
        try:
            for piece in self._pieces(answer):
                answer.first_token_s = answer.first_token_s or self.clock() - began
                answer.text += piece
                yield piece
        finally:
            answer.whole_s, answer.dropped = self.clock() - began, self._dropped
            if answer.text:
                self._turns.append({"role": "assistant", "content": answer.text})
                # Of an answer that was stopped a router does not say the prompt's.
                prompt_tokens = answer.prompt_tokens or self._tokens + len(prompt) // _TOKEN_CHARACTERS
                self._tokens = prompt_tokens + answer.tokens
            elif self._turns[-1]["role"] == "user":
                self._turns.pop()

    def _make_room(self, prompt: str) -> None:
        """Drop turns where the next answer would have less room than it may take."""
        needed = len(prompt) // _TOKEN_CHARACTERS + self.options.max_tokens
        # A prompt that is still too long is refused with the model's own count, and more turns go.
        while self.model.context and self._tokens + needed > self.model.context and self._drop():
            pass

    def _pieces(self, answer: Answer) -> Iterator[str]:
        while True:
            try:
                yield from self.model.pieces(self._messages(), self.options, answer)
                return
            except ContextTooLong:
                if not self._drop():
                    raise

    def _messages(self) -> list[Message]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self._turns]

    def _drop(self) -> bool:
        """Drop the oldest question with its answer; False where the last question is alone."""
        if len(self._turns) < 3:
            return False
        dropped, self._turns = self._turns[:2], self._turns[2:]
        self._tokens -= sum(len(turn["content"]) for turn in dropped) // _TOKEN_CHARACTERS
        self._dropped += len(dropped)
        return True


def open_chat(
    model: str,
    url: str,
    registry: RegistrySettings,
    *,
    is_default: bool,
    timeout_s: float,
    api_key: str | None = None,
) -> ChatModel:
    """The model behind the router at `url`; with `is_default`, where no router answers, the registry's in this process.

    Raises:
        HopUnavailable: no router answers.
        Errors of LocalChat.
    """
    chat = RouterChat(url, model, timeout_s=timeout_s, trust=open_trust(registry), api_key=api_key)
    try:
        chat.check()
    except HopUnavailable:
        if not is_default:
            raise
        return LocalChat(model, registry)
    return chat


def _language_model(registry: Registry) -> str:
    """The registry's only language model.

    Raises:
        Missing: none, or several.
    """
    names = [name for name in registry.models() if _generates(registry.resolve(name).bundle)]
    if len(names) == 1:
        return names[0]
    why = "several language models: name one" if names else "no language model"
    hint = f"isthmus chat {names[0]}" if names else "isthmus import llm:smollm2"
    raise Missing(f"{registry.url} has {why}", kind="model", name="", exists=names, hint=hint)


def _generates(bundle: Bundle) -> bool:
    return bundle.text is not None and bundle.state is not None
