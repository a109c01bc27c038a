"""Response bodies of the OpenAI API: whole completions, and chunks of a stream.

Source: platform.openai.com/docs/api-reference; docs/reference/openai.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from msgspec import UNSET, Meta, Struct, UnsetType

if TYPE_CHECKING:  # the description of the API needs no tokenizer
    from isthmus.generation.completion import TextPiece
    from isthmus.generation.text import TextCodec
    from isthmus.processing.sampling import SampledToken

# JSON has no infinity; OpenAI gives this number for a token that cannot be drawn.
_MIN_LOGPROB = -9999.0
_Count = Annotated[int, Meta(ge=0)]
FinishReason = Literal["stop", "length"]


class UsageBody(Struct):
    """Numbers of tokens."""

    prompt_tokens: _Count
    completion_tokens: _Count
    total_tokens: _Count


class SegmentPlaceBody(Struct):
    """A segment, the hop that runs it, and its first and last layer; null for a segment between two layers."""

    segment: str
    hop: str
    layers: tuple[int, int] | None


class GenerationFactsBody(Struct, omit_defaults=True):
    """How Isthmus generated: the route, what it costs in fidelity if anything, steps, and bytes over the link.

    `context` is the number of tokens that prompt and completion have room for, `proposed` and `accepted` are tokens of
    speculation, and `recoveries` counts rebuilds of lost state.
    """

    route: str
    steps: _Count
    link_bytes: _Count
    first_token_ms: float
    segments: list[SegmentPlaceBody]
    context: _Count
    degraded: str = ""
    proposed: _Count = 0
    accepted: _Count = 0
    recoveries: _Count = 0


class TokenScoreBody(Struct):
    """A token's text and bytes, and the natural logarithm of its probability."""

    token: str
    logprob: float
    bytes: list[int]


class DrawnTokenBody(TokenScoreBody):
    """A token of the completion, and the likeliest tokens at its place."""

    top_logprobs: list[TokenScoreBody]


class ChatLogprobsBody(Struct):
    """Scores of a message's tokens."""

    content: list[DrawnTokenBody]
    refusal: None = None


class AssistantMessageBody(Struct):
    """The completion of a conversation."""

    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoiceBody(Struct):
    """The one choice of a chat completion."""

    message: AssistantMessageBody
    logprobs: ChatLogprobsBody | None
    finish_reason: FinishReason
    index: int = 0


class ChatDeltaBody(Struct, omit_defaults=True):
    """What a chunk adds to the message."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoiceBody(Struct):
    """The one choice of a chunk; the last chunk has the reason to end."""

    delta: ChatDeltaBody
    logprobs: ChatLogprobsBody | None = None
    finish_reason: FinishReason | None = None
    index: int = 0


class TextLogprobsBody(Struct):
    """Scores of a text's tokens; `text_offset` is where each begins in the completion."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoiceBody(Struct):
    """The one choice of a completion, or of a chunk, whose reason to end is null before the last one."""

    text: str
    logprobs: TextLogprobsBody | None
    finish_reason: FinishReason | None
    index: int = 0


class _AnyCompletionBody(Struct, kw_only=True):
    """The fields of CompletionHead, numbers and facts."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: UsageBody | UnsetType | None = UNSET
    isthmus: GenerationFactsBody | UnsetType = UNSET


class ChatCompletionBody(_AnyCompletionBody, kw_only=True):
    """A chat completion."""

    choices: list[ChatChoiceBody]
    object: Literal["chat.completion"] = "chat.completion"


class ChatChunkBody(_AnyCompletionBody, kw_only=True):
    """A chunk of a chat completion's stream; without choices where it has the numbers of tokens."""

    choices: list[ChatChunkChoiceBody]
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


class TextCompletionBody(_AnyCompletionBody, kw_only=True):
    """A completion of a text, or a chunk of its stream."""

    choices: list[TextChoiceBody]
    object: Literal["text_completion"] = "text_completion"


@dataclass(frozen=True)
class CompletionHead:
    """What every document of a completion states; `created` in seconds since the epoch."""

    id: str
    created: int
    model: str
    system_fingerprint: str


@dataclass(frozen=True)
class Ending:
    """How a completion ended, and its numbers."""

    finish: FinishReason
    usage: UsageBody
    facts: GenerationFactsBody


class CompletionDocuments(Protocol):
    """Builds the documents of one completion; chunks in the order of their calls."""

    def whole(self, pieces: Sequence[TextPiece], ending: Ending) -> Struct:
        """The completion in one document."""
        ...

    def opening(self) -> Sequence[Struct]:
        """Chunks before the first text."""
        ...

    def chunk(self, piece: TextPiece) -> Struct:
        """The chunk of a piece."""
        ...

    def closing(self, ending: Ending) -> Struct:
        """The chunk with the reason to end."""
        ...

    def usage(self, ending: Ending) -> Struct:
        """The chunk with the numbers of tokens."""
        ...


@dataclass
class ChatDocuments:
    """Documents of a chat completion."""

    head: CompletionHead
    codec: TextCodec
    logprobs: bool

    def whole(self, pieces: Sequence[TextPiece], ending: Ending) -> Struct:
        """See `CompletionDocuments.whole`."""
        message = AssistantMessageBody("".join(piece.text for piece in pieces))
        choice = ChatChoiceBody(message, self._scores(_tokens(pieces)), ending.finish)
        return ChatCompletionBody(**vars(self.head), choices=[choice], usage=ending.usage, isthmus=ending.facts)

    def opening(self) -> Sequence[Struct]:
        """See `CompletionDocuments.opening`."""
        return [self._chunk(ChatChunkChoiceBody(ChatDeltaBody("assistant", "")))]

    def chunk(self, piece: TextPiece) -> Struct:
        """See `CompletionDocuments.chunk`."""
        return self._chunk(ChatChunkChoiceBody(ChatDeltaBody(content=piece.text), self._scores(piece.tokens)))

    def closing(self, ending: Ending) -> Struct:
        """See `CompletionDocuments.closing`."""
        return self._chunk(ChatChunkChoiceBody(ChatDeltaBody(), None, ending.finish), isthmus=ending.facts)

    def usage(self, ending: Ending) -> Struct:
        """See `CompletionDocuments.usage`."""
        return ChatChunkBody(**vars(self.head), choices=[], usage=ending.usage)

    def _chunk(self, choice: ChatChunkChoiceBody, **facts: Any) -> Struct:
        return ChatChunkBody(**vars(self.head), choices=[choice], **facts)

    def _scores(self, tokens: Sequence[SampledToken]) -> ChatLogprobsBody | None:
        if not self.logprobs:
            return None
        return ChatLogprobsBody([self._drawn(token) for token in tokens])

    def _drawn(self, drawn: SampledToken) -> DrawnTokenBody:
        others = [TokenScoreBody(*self._score(*other)) for other in drawn.alternatives]
        return DrawnTokenBody(*self._score(drawn.token, drawn.logprob), others)

    def _score(self, token: int, logprob: float) -> tuple[str, float, list[int]]:
        return self.codec.piece(token), max(logprob, _MIN_LOGPROB), list(self.codec.token_bytes(token))


@dataclass
class TextDocuments:
    """Documents of a completion."""

    head: CompletionHead
    codec: TextCodec
    logprobs: bool
    _offset: int = field(default=0, init=False)

    def whole(self, pieces: Sequence[TextPiece], ending: Ending) -> Struct:
        """See `CompletionDocuments.whole`."""
        text = "".join(piece.text for piece in pieces)
        choice = TextChoiceBody(text, self._scores(_tokens(pieces)), ending.finish)
        return self._document([choice], usage=ending.usage, isthmus=ending.facts)

    def opening(self) -> Sequence[Struct]:
        """See `CompletionDocuments.opening`."""
        return []

    def chunk(self, piece: TextPiece) -> Struct:
        """See `CompletionDocuments.chunk`."""
        return self._document([TextChoiceBody(piece.text, self._scores(piece.tokens), None)])

    def closing(self, ending: Ending) -> Struct:
        """See `CompletionDocuments.closing`."""
        return self._document([TextChoiceBody("", None, ending.finish)], isthmus=ending.facts)

    def usage(self, ending: Ending) -> Struct:
        """See `CompletionDocuments.usage`."""
        return self._document([], usage=ending.usage)

    def _document(self, choices: list[TextChoiceBody], **facts: Any) -> Struct:
        return TextCompletionBody(**vars(self.head), choices=choices, **facts)

    def _scores(self, tokens: Sequence[SampledToken]) -> TextLogprobsBody | None:
        if not self.logprobs:
            return None
        scores = TextLogprobsBody([], [], [], [])
        for drawn in tokens:
            text = self.codec.piece(drawn.token)
            scores.tokens.append(text)
            scores.token_logprobs.append(max(drawn.logprob, _MIN_LOGPROB))
            scores.top_logprobs.append({self.codec.piece(i): max(p, _MIN_LOGPROB) for i, p in drawn.alternatives})
            scores.text_offset.append(self._offset)
            self._offset += len(text)
        return scores


def _tokens(pieces: Sequence[TextPiece]) -> list[SampledToken]:
    return [token for piece in pieces for token in piece.tokens]
