"""Text and token ids: the bundle's tokenizer and chat template.

Templates are Jinja by their authors: they run in a sandbox, with bounds on what they may write.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from isthmus.artifacts.bundle import TextModel
from isthmus.errors import ModelError, RequestMalformed, RequestTooLarge

# Four times the characters of the longest context that models of this size have.
MAX_TEXT_LENGTH = 2**20
ROLES = ("system", "user", "assistant", "tool")
_REPLACEMENT = "\ufffd"


class TextCodec:
    """Encodes prompts and decodes tokens as they come."""

    def __init__(self, tokenizer: bytes, model: TextModel) -> None:
        """Read a tokenizer.json and compile the chat template.

        Raises:
            ModelError: the tokenizer or the template cannot be read.
        """
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(tokenizer)
        except Exception as e:  # tokenizers raises Exception itself
            raise ModelError(f"the bundle's tokenizer cannot be read: {e}") from e
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._model = model
        self._template = _compiled(model.chat_template) if model.chat_template else None
        added = json.loads(tokenizer).get("added_tokens", [])
        self._special = {t["id"]: t["content"] for t in added if t.get("special")}

    def encode(self, text: str) -> list[int]:
        """The ids of a text; special tokens in it are plain text."""
        return self._begin(self._encode_plain(text))

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The ids of a conversation that the assistant continues.

        Special tokens come from the template alone: a message's text cannot end its own turn.

        Raises:
            RequestMalformed: an unknown role, or messages that the template refuses.
            RequestTooLarge: more text than MAX_TEXT_LENGTH.
        """
        if self._template is None:
            raise RequestMalformed("this model has no chat template", hint="use /v1/completions")
        if sum(len(str(m.get("content") or "")) for m in messages) > MAX_TEXT_LENGTH:
            raise RequestTooLarge(f"the messages have more than {MAX_TEXT_LENGTH} characters", limit=MAX_TEXT_LENGTH)
        # Private-use characters stand for the contents, so that the template decides where they go and not what they
        # mean: a content is encoded apart from the special tokens around it.
        marks, contents = [], []
        for i, message in enumerate(messages):
            if (role := message.get("role")) not in ROLES:
                raise RequestMalformed(
                    f"the role is {str(role)[:40]!r}; it is one of {', '.join(ROLES)}", parameter="role"
                )
            marks.append({**message, "content": f"\U000f0000{i}\U000f0001"})
            contents.append(str(message.get("content") or "").replace("\U000f0000", "").replace("\U000f0001", ""))
        try:
            text = self._template.render(
                messages=marks,
                add_generation_prompt=True,
                bos_token=self._token(self._model.bos),
                eos_token=self._token(self._model.eos[0] if self._model.eos else None),
                raise_exception=_refuse,
            )
        except jinja2.TemplateError as e:
            raise RequestMalformed(f"the chat template refuses these messages: {e}", parameter="messages") from e
        ids: list[int] = []
        for piece in text.split("\U000f0000"):
            number, mark, rest = piece.partition("\U000f0001")
            if mark:
                ids += self._encode_plain(contents[int(number)])
                piece = rest
            ids += self._tokenizer.encode(piece, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def piece(self, token: int) -> str:
        """A single token as text, for lists of alternatives."""
        return self._special.get(token) or str(self._tokenizer.decode([token], skip_special_tokens=False))

    def _encode_plain(self, text: str) -> list[int]:
        if len(text) > MAX_TEXT_LENGTH:
            raise RequestTooLarge(f"the text has more than {MAX_TEXT_LENGTH} characters", limit=MAX_TEXT_LENGTH)
        ids: list[int] = []
        # The tokenizer reads special tokens anywhere; a zero-width split inside their text prevents that.
        for piece in _without_special(text, tuple(self._special.values())):
            ids += self._tokenizer.encode(piece, add_special_tokens=False).ids
        return ids

    def _begin(self, ids: list[int]) -> list[int]:
        return ids if self._model.bos is None else [self._model.bos, *ids]

    def _token(self, token: int | None) -> str:
        return "" if token is None else self._special.get(token, "")


class TextStream:
    """The text of tokens as they come: whole characters only, since a character may take several tokens."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._ids: list[int] = []
        self._start = self._read = 0

    def add(self, token: int) -> str:
        """The text that this token completes; empty within a character."""
        self._ids.append(token)
        # Both with the same context before: spaces depend on it.
        before = self._codec.decode(self._ids[self._start : self._read])
        text = self._codec.decode(self._ids[self._start :])
        if len(text) <= len(before) or text.endswith(_REPLACEMENT):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return text[len(before) :]

    def rest(self) -> str:
        """What is left at the end, an unfinished character included."""
        before = self._codec.decode(self._ids[self._start : self._read])
        return self._codec.decode(self._ids[self._start :])[len(before) :]


def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as e:
        raise ModelError(f"the bundle's chat template cannot be read: {e}") from e


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _without_special(text: str, special: Sequence[str]) -> list[str]:
    """The text in pieces, none of which holds a special token's text."""
    pieces = [text]
    for token in special:
        split: list[str] = []
        for piece in pieces:
            parts = piece.split(token)
            for i, part in enumerate(parts):
                head = token[len(token) // 2 :] if i else ""
                tail = token[: len(token) // 2] if i < len(parts) - 1 else ""
                split.append(head + part + tail)
        pieces = [piece for piece in split if piece]
    return pieces
