"""Text and token ids: the bundle's tokenizer and chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

from isthmus.artifacts.bundle import Blob, Bundle, TextModel
from isthmus.errors import RequestMalformed, RequestTooLarge
from isthmus.generation.chat_template import ChatTemplate
from isthmus.processing.text_masking import TextMasker, masker_of
from isthmus.processing.tokenizer import read_tokenizer

# Four times the characters of the longest context that models of this size have.
MAX_TEXT_LENGTH = 2**20
ROLES = ("system", "user", "assistant", "tool")
# Private-use characters that stand for a message's texts in a template's output.
_MARK = re.compile("\U000f0000([0-9]{1,6})\U000f0001")
_MARKS = str.maketrans("", "", "\U000f0000\U000f0001")
_REPLACEMENT = "\ufffd"
# UTF-8 takes four bytes a character at most, and a token has one of them at least.
_MAX_CHARACTER_TOKENS = 4
# Tokens on which the space before a text's first token depends.
_CONTEXT_TOKENS = 4
_SPACE = "\u2581"  # SentencePiece's
_BYTE = re.compile("<0x([0-9A-F]{2})>")


class TextCodec:
    """Encodes prompts and decodes tokens as they come."""

    def __init__(self, tokenizer: bytes, model: TextModel, masker: TextMasker | None = None) -> None:
        """Read a tokenizer.json and compile the chat template; `masker` masks the patterns of every text.

        Raises:
            ModelError: the tokenizer or the template cannot be read.
        """
        self._tokenizer = read_tokenizer(tokenizer)
        self._model = model
        self.masker = masker
        self._template = ChatTemplate(model.chat_template) if model.chat_template else None
        document = json.loads(tokenizer)
        added = document.get("added_tokens", [])
        self._added = {t["id"]: t["content"] for t in added}
        self._special = {t["id"]: t["content"] for t in added if t.get("special")}
        self._bytes = _byte_alphabet() if _has_byte_level(document.get("decoder")) else {}

    def encode(self, text: str, counts: MutableMapping[str, int] | None = None) -> list[int]:
        """The ids of a text; special tokens in it are plain text. `counts` gets the numbers of masked patterns."""
        return self._begin(self._encode_plain(text, counts))

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], counts: MutableMapping[str, int] | None = None
    ) -> list[int]:
        """The ids of a conversation that the assistant continues.

        Patterns are masked in each text of each message by itself; `counts` gets their numbers.
        Special tokens come from the template alone: a message's text cannot end its own turn.

        Raises:
            RequestMalformed: an unknown role, or messages that the template refuses.
            RequestTooLarge: more text than MAX_TEXT_LENGTH.
        """
        if self._template is None:
            raise RequestMalformed("this model has no chat template", hint="use /v1/completions")
        if sum(len(str(m.get("content") or "")) for m in messages) > MAX_TEXT_LENGTH:
            raise RequestTooLarge(f"the messages have more than {MAX_TEXT_LENGTH} characters", limit=MAX_TEXT_LENGTH)
        # Marks stand for the texts, so that the template decides where they go and not what they mean: a text is
        # encoded apart from the special tokens around it.
        texts: list[str] = []

        def mark(text: str) -> str:
            texts.append(text.translate(_MARKS))
            return f"\U000f0000{len(texts) - 1}\U000f0001"

        marked = []
        for message in messages:
            if (role := message.get("role")) not in ROLES:
                raise RequestMalformed(
                    f"the role is {str(role)[:40]!r}; it is one of {', '.join(ROLES)}", parameter="messages"
                )
            others = {key: mark(value) if isinstance(value, str) else value for key, value in message.items()}
            marked.append({**others, "role": role, "content": mark(str(message.get("content") or ""))})
        text = self._template.render(
            messages=marked,
            add_generation_prompt=True,
            bos_token=self._token(self._model.bos),
            eos_token=self._token(self._model.eos[0] if self._model.eos else None),
        )
        ids: list[int] = []
        # Texts of the template and numbers of marks in turn.
        for i, piece in enumerate(_MARK.split(text)):
            if i % 2 == 0:
                ids += self._tokenizer.encode(piece, add_special_tokens=False).ids
            elif int(piece) < len(texts):
                ids += self._encode_plain(texts[int(piece)], counts)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    @property
    def vocabulary(self) -> int:
        """The number of token ids."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def piece(self, token: int) -> str:
        """A single token as text, for lists of alternatives; part of a character is a replacement."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token adds to a text, its leading space included; empty for an unknown id."""
        if (name := self._added.get(token)) is not None:
            return str(name).encode()
        name = str(self._tokenizer.id_to_token(token) or "")
        if match := _BYTE.fullmatch(name):
            return bytes([int(match[1], 16)])
        if self._bytes and all(character in self._bytes for character in name):
            return bytes(self._bytes[character] for character in name)
        return name.replace(_SPACE, " ").encode()

    def _encode_plain(self, text: str, counts: MutableMapping[str, int] | None = None) -> list[int]:
        if len(text) > MAX_TEXT_LENGTH:
            raise RequestTooLarge(f"the text has more than {MAX_TEXT_LENGTH} characters", limit=MAX_TEXT_LENGTH)
        if self.masker is not None:
            text = self.masker.mask(text, counts)
        ids: list[int] = []
        # The tokenizer reads special tokens anywhere; a zero-width split inside their text prevents that.
        for piece in _without_special(text, tuple(self._special.values())):
            ids += self._tokenizer.encode(piece, add_special_tokens=False).ids
        return ids

    def _begin(self, ids: list[int]) -> list[int]:
        return ids if self._model.bos is None else [self._model.bos, *ids]

    def _token(self, token: int | None) -> str:
        return "" if token is None else self._special.get(token, "")


def codec_of(bundle: Bundle, blob: Callable[[Blob], bytes]) -> TextCodec:
    """The codec of a bundle's texts, with the patterns that the bundle masks; `blob` reads its tokenizer.

    Raises:
        RequestMalformed: the bundle generates no text.
        RegistryError, ModelError: the tokenizer or a pattern cannot be read.
    """
    if bundle.text is None:
        raise RequestMalformed(f"{bundle.name} generates no text", parameter="model")
    return TextCodec(blob(bundle.text.tokenizer), bundle.text, masker_of(bundle))


class TextStream:
    """The text of tokens as they come: whole characters only, since a character may take several tokens.

    `context` are the tokens before, on which the first token's leading space depends.
    """

    def __init__(self, codec: TextCodec, context: Sequence[int] = ()) -> None:
        self._codec = codec
        # Tokens whose text was given already, and then those of an unfinished character. Decoders drop a space at the
        # begin, so that the text of new tokens is the difference of two decodings with the same begin.
        self._window = list(context[-_CONTEXT_TOKENS:])
        self._context = len(self._window)
        self._read = len(codec.decode(self._window).rstrip(_REPLACEMENT))

    def add(self, token: int) -> str:
        """The text that this token completes; empty within a character."""
        self._window.append(token)
        text = self._codec.decode(self._window)
        # A replacement that more tokens leave is the text itself.
        is_open = text.endswith(_REPLACEMENT) and len(self._window) - self._context < _MAX_CHARACTER_TOKENS
        new = (text.rstrip(_REPLACEMENT) if is_open else text)[self._read :]
        self._read += len(new)
        if is_open:
            return new
        if not new:
            self._window.pop()  # a special token: no text, and no context
        else:
            self._window = self._window[self._context :]
            self._context = len(self._window)
            self._read = len(self._codec.decode(self._window))
        return new

    def rest(self) -> str:
        """The text of an unfinished character at the end."""
        return self._codec.decode(self._window)[self._read :]


def _has_byte_level(decoder: Mapping[str, Any] | None) -> bool:
    if not decoder:
        return False
    return decoder.get("type") == "ByteLevel" or any(map(_has_byte_level, decoder.get("decoders", ())))


def _byte_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in byte-level vocabularies. Source: openai/gpt-2, encoder.py."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


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
