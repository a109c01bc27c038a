"""Request bodies of the OpenAI API: fields, bounds, and fields that are refused.

An unsupported field that would change the completion is refused; fields for OpenAI's own accounting are ignored.
Source: platform.openai.com/docs/api-reference; docs/reference/openai.md.
"""

from __future__ import annotations

import re
import secrets
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from isthmus.artifacts.sampling import MAX_LOGPROBS, MAX_SEED, Sampling
from isthmus.errors import RequestMalformed
from isthmus.serving.request import FunctionRequest
from isthmus.wire.json_bounds import parsed_bytes

# OpenAI takes 4. Each is compared with the text's end at every token.
MAX_STOPS, MAX_STOP_LENGTH = 16, 256
MAX_MESSAGES = 4096
MAX_PARTS = 256
MAX_REASON_LENGTH = 200
# OpenAI sends seeds of either sign; JSON numbers of 53 bits pass through every client.
_MAX_DRAWN_SEED = 2**53
_Probability = Annotated[float, Meta(ge=0, le=1)]
_Penalty = Annotated[float, Meta(ge=-2, le=2)]
# The model's context is the bound: larger numbers mean "to its end".
_MaxTokens = Annotated[int, Meta(ge=1, le=2**63 - 1)]
_TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
_Stop = Annotated[str, Meta(max_length=MAX_STOP_LENGTH)]

# The field in msgspec's messages: `$.stop[3]`.
_FIELD = re.compile(r" - at `\$\.(\w+)(.*)`$")
_Body = TypeVar("_Body", bound=Struct)


class MessagePartBody(Struct, frozen=True):
    """A part of a message's content; text is the only type."""

    type: str
    text: str = ""


class MessageBody(Struct, frozen=True):
    """A message of a conversation."""

    role: Annotated[str, Meta(max_length=64)]
    content: str | Annotated[list[MessagePartBody], Meta(max_length=MAX_PARTS)] | None = None
    name: Annotated[str, Meta(max_length=64)] | None = None

    def document(self) -> dict[str, str]:
        """The message as chat templates take it.

        Raises:
            RequestMalformed: a part of the content is no text.
        """
        # OpenAI's newer name of the role, which no template of an open model knows.
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self._text(), **({"name": self.name} if self.name else {})}

    def _text(self) -> str:
        """The content as one text.

        Raises:
            RequestMalformed: a part is no text.
        """
        if not isinstance(self.content, list):
            return self.content or ""
        if other := next((part.type for part in self.content if part.type != "text"), None):
            raise RequestMalformed(
                f"a message has a part of type {other[:40]!r}; text is supported alone", parameter="messages"
            )
        return "".join(part.text for part in self.content)


class StreamOptionsBody(Struct, frozen=True):
    """`include_usage`: a last chunk of a stream has the numbers of tokens."""

    include_usage: bool = False


class GenerationBody(Struct, frozen=True, kw_only=True):
    """Fields that chat completions and completions share; null is the default."""

    model: Annotated[str, Meta(max_length=256)] | None = None
    max_tokens: _MaxTokens | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    min_p: _Probability | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: _Stop | Annotated[list[_Stop], Meta(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptionsBody | None = None
    user: Annotated[str, Meta(max_length=512)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the completion; an empty one would end every completion, and counts as none."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(filter(None, stops))

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, logprobs: int) -> Sampling:
        """The parameters of each step, with as many alternatives; OpenAI's defaults."""
        seed = secrets.randbelow(_MAX_DRAWN_SEED) if self.seed is None else self.seed & MAX_SEED
        given = {
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
        }
        parameters: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        temperature = 1.0 if self.temperature is None else self.temperature
        return Sampling(temperature=temperature, seed=seed, logprobs=logprobs, **parameters)


class ChatRequestBody(GenerationBody, frozen=True, kw_only=True):
    """A request for a chat completion."""

    messages: Annotated[list[MessageBody], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: _MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None


class CompletionRequestBody(GenerationBody, frozen=True, kw_only=True):
    """A request for a completion of a text, or of token ids."""

    prompt: str | list[str | _TokenId]
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None


# Fields that would change the completion, with the values that ask for nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "logit_bias": (None, {}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
    "suffix": (None, ""),
    "best_of": (None, 1),
    "echo": (None, False),
    "n": (None, 1),
}


class _UserBody(Struct):
    user: str | None = None


def user_of(data: bytes | memoryview) -> str:
    """The field `user` of a body; empty where there is none, or no JSON: reading the request says so later."""
    try:
        return msgspec.json.decode(data, type=_UserBody).user or ""
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""


def read_request(request: FunctionRequest, kind: type[_Body]) -> _Body:
    """A request's body.

    Raises:
        RequestMalformed: not JSON of that form, or a field asks for an unsupported feature; `parameter` is the field.
        RequestTooLarge, Overloaded: as `Reservation.hold`.
    """
    try:
        with request.memory.scope():
            request.memory.hold(parsed_bytes(request.body))
            document = msgspec.json.decode(request.body)
            body = msgspec.convert(document, kind)
    except msgspec.ValidationError as e:
        field = _FIELD.search(str(e))
        where = f"{field[1]}{field[2]}" if field else "the body"
        # msgspec repeats a value that is none of those allowed.
        reason = (str(e)[: field.start()] if field else str(e))[:MAX_REASON_LENGTH]
        raise RequestMalformed(f"{where}: {reason}", parameter=field[1] if field else "") from e
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise RequestMalformed(f"the body is not JSON: {e}") from e
    for name, neutral in _REFUSED.items():
        if document.get(name) not in neutral:
            raise RequestMalformed(f"{name} is not supported", parameter=name)
    return body
