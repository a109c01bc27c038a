"""Text of tokens as they come: whole characters, spaces between words, stop strings over tokens and inside of one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from isthmus.artifacts.bundle import Blob, TextModel
from isthmus.generation.completion import CompletionText
from isthmus.generation.text import TextCodec, TextStream
from isthmus.processing.sampling import SampledToken

NO_BLOB = Blob("sha256:" + "0" * 64, 1)
END = "<|end|>"


def codec(vocabulary: Sequence[str], decoder: Any) -> TextCodec:
    """A codec whose ids are the places in `vocabulary`."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel({name: i for i, name in enumerate(vocabulary)}, unk_token=END))
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens([END])
    return TextCodec(tokenizer.to_str().encode(), TextModel(NO_BLOB, "logits"))


def byte_characters() -> list[str]:
    """The characters that stand for the bytes 0 to 255, in the order of bytes."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    byte_level = codec(alphabet, decoders.ByteLevel())
    return [character for _, character in sorted((byte_level.token_bytes(i), c) for i, c in enumerate(alphabet))]


BYTES = byte_characters()
BYTE_LEVEL = codec([*BYTES, "Ġcats", "Ġat", END], decoders.ByteLevel())
CATS, AT, ENDS = 256, 257, 258
PIECES = ["▁the", "▁cat", "s", *(f"<0x{byte:02X}>" for byte in range(256)), END]
# The decoder of Llama's tokenizers.
SENTENCE_PIECE = codec(
    PIECES,
    decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    ),
)


def sampled(ids: Sequence[int]) -> list[SampledToken]:
    return [SampledToken(token, -1.0) for token in ids]


def pieces(ids: Sequence[int], stops: Sequence[str] = (), **options: Any) -> tuple[list[str], bool]:
    text = CompletionText(BYTE_LEVEL, stops, **options)
    return [piece.text for piece in text.pieces(iter(sampled(ids)))], text.stopped


def test_the_bytes_of_the_alphabet_are_all_there() -> None:
    assert [BYTE_LEVEL.token_bytes(i) for i in range(256)] == [bytes([i]) for i in range(256)]
    assert BYTE_LEVEL.token_bytes(CATS) == b" cats"
    assert BYTE_LEVEL.token_bytes(10_000) == b""
    assert SENTENCE_PIECE.token_bytes(0) == b" the"
    assert SENTENCE_PIECE.token_bytes(3 + 0xE2) == b"\xe2"
    assert BYTE_LEVEL.piece(ENDS) == END


@given(st.text())
def test_a_text_of_single_bytes_comes_as_whole_characters(text: str) -> None:
    stream = TextStream(BYTE_LEVEL)
    parts = [stream.add(byte) for byte in text.encode()]
    assert "".join(parts) + stream.rest() == text
    assert not any("\ufffd" in part for part in parts) or "\ufffd" in text


@given(st.text())
def test_a_text_of_byte_fallback_comes_as_whole_characters(text: str) -> None:
    stream = TextStream(SENTENCE_PIECE, [0])
    parts = [stream.add(3 + byte) for byte in text.encode()]
    assert "".join(parts) + stream.rest() == text


@given(st.binary(max_size=40))
def test_bytes_that_are_no_text_come_as_one_decoding_of_them_all(data: bytes) -> None:
    stream = TextStream(BYTE_LEVEL)
    parts = [stream.add(byte) for byte in data]
    text = "".join(parts) + stream.rest()
    assert text.replace("\ufffd", "") == data.decode("utf-8", "replace").replace("\ufffd", "")


def test_broken_bytes_are_no_reason_to_wait_for_ever() -> None:
    stream = TextStream(BYTE_LEVEL)
    parts = [stream.add(0xFF) for _ in range(12)]
    assert len("".join(parts)) >= 8
    assert len(stream._window) <= 8


def test_an_unfinished_character_at_the_end_is_shown_as_broken() -> None:
    assert pieces([65, 0xE2, 0x9D]) == (["A", "\ufffd"], False)


def test_a_space_before_the_first_token_depends_on_the_prompt() -> None:
    alone, after = TextStream(SENTENCE_PIECE), TextStream(SENTENCE_PIECE, [0])
    assert [alone.add(1), alone.add(2), alone.add(1)] == ["cat", "s", " cat"]
    assert [after.add(1), after.add(2), after.add(1)] == [" cat", "s", " cat"]


def test_special_tokens_have_no_text_and_lose_no_space() -> None:
    end = len(PIECES) - 1
    stream = TextStream(SENTENCE_PIECE, [0])
    assert [stream.add(1), stream.add(end), stream.add(1)] == [" cat", "", " cat"]


@pytest.mark.parametrize(
    ("stops", "expected", "stopped"),
    [
        ([], " cats at cats", False),
        (["ts a"], " ca", True),  # over two tokens
        (["s at c"], " cat", True),  # over three
        (["at"], " c", True),  # inside of one
        ([" "], "", True),  # at the begin
        (["cats at catsx", "zz"], " cats at cats", False),  # begun, and not ended
        (["ats", "cat"], " ", True),  # the first in the text, not in the list
        (["cats at cats"], " ", True),  # up to the last character
    ],
    ids=str,
)
def test_the_text_ends_before_the_first_stop_string(stops: list[str], expected: str, stopped: bool) -> None:
    parts, found = pieces([CATS, AT, CATS], stops)
    assert ("".join(parts), found) == (expected, stopped)


def test_a_stop_string_of_several_bytes_a_character_is_seen() -> None:
    parts, found = pieces([65, *"❤é".encode(), 66], ["❤"])
    assert ("".join(parts), found) == ("A", True)


@given(st.text("abc ", max_size=30), st.lists(st.text("abc ", min_size=1, max_size=4), max_size=3))
def test_stop_strings_cut_as_in_the_whole_text(text: str, stops: list[str]) -> None:
    places = [text.index(stop) for stop in stops if stop in text]
    parts, found = pieces(list(text.encode()), stops)
    assert "".join(parts) == text[: min(places, default=len(text))]
    assert found == bool(places)


def test_no_piece_is_taken_back_and_every_token_is_in_one() -> None:
    text = CompletionText(BYTE_LEVEL, ["never"])
    found = list(text.pieces(iter(sampled([CATS, AT, CATS, 110, 101, 65]))))
    assert [piece.text for piece in found] == [" cats", " at", " cats", "neA"]
    assert [len(piece.tokens) for piece in found] == [1, 1, 1, 3]


def test_the_token_that_ends_the_sequence_is_in_no_piece() -> None:
    text = CompletionText(BYTE_LEVEL, ends=[ENDS])
    found = list(text.pieces(iter(sampled([CATS, ENDS]))))
    assert [(piece.text, [t.token for t in piece.tokens]) for piece in found] == [(" cats", [CATS])]
    assert not text.stopped


def test_tokens_behind_a_stop_string_are_not_drawn() -> None:
    tokens = iter(sampled([CATS, AT, CATS]))
    text = CompletionText(BYTE_LEVEL, [" at"])
    assert [piece.text for piece in text.pieces(tokens)] == [" cats", ""]
    assert [t.token for t in tokens] == [CATS]


def test_windows_stay_short() -> None:
    stream = TextStream(BYTE_LEVEL, list(range(65, 91)))
    sizes = []
    for _ in range(50):
        stream.add(CATS)
        sizes.append(len(stream._window))
    assert max(sizes) <= 5
    assert all(a == b for a, b in pairwise(sizes[1:]))
