"""`isthmus chat`: one prompt, a pipe, JSON, and the conversation of a terminal."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from typer.testing import CliRunner

from isthmus.errors import HopTimeout
from isthmus_tools.cli import app
from isthmus_tools.cli import chat as command
from isthmus_tools.usecases.chat import Answer, ChatOptions, Conversation, LayerPlace, Message
from support.cli import document, isthmus
from support.ports import free_port
from support.published_decoders import PublishedDecoder
from support.published_decoders import tiny_decoder as tiny_decoder

SAMPLED = ["--max-tokens", 6, "--temperature", 1, "--seed", 7]


@pytest.fixture
def place(tiny_decoder: PublishedDecoder, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    monkeypatch.delenv("ISTHMUS_URL", raising=False)
    return ["--registry", tiny_decoder.registry]


def test_one_prompt_gives_its_answer_and_the_numbers_beside(place: list[object]) -> None:
    result = isthmus("chat", "tiny", "--once", "the cat", "--local", *SAMPLED, *place)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip()
    assert re.fullmatch(
        r"6 tokens, [\d.]+/s, the first after \S+( \S+)?, cut at --max-tokens or the context;"
        r" nothing over the link; layers 0-2 in this process\n",
        result.stderr,
    )


def test_json_is_one_document_with_the_same_text(place: list[object]) -> None:
    plain = isthmus("chat", "--once", "the cat", "--local", "--cut", "1/2", *SAMPLED, *place)
    answer = document(isthmus("chat", "tiny", "--once", "the cat", "--local", "--json", *SAMPLED, *place))
    assert answer["text"] == plain.stdout.removesuffix("\n")
    assert (answer["model"], answer["finish"], answer["usage"]["completion_tokens"]) == ("tiny:1", "length", 6)
    assert answer["layers"] == [{"first": 0, "last": 2, "hop": "this process"}]
    assert answer["tokens_per_s"] > 0
    assert "layers 0 in this process, 1 in this process, 2 in this process" in plain.stderr


def test_a_pipe_is_a_prompt_and_without_a_router_the_model_runs_here(
    place: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "ROUTER", f"http://127.0.0.1:{free_port()}")
    arguments = [str(each) for each in ("chat", "tiny", *SAMPLED, *place)]
    result = CliRunner().invoke(app, arguments, input="the cat\n")
    assert result.exit_code == 0, result.output
    assert result.stdout == isthmus("chat", "tiny", "--once", "the cat", "--local", *SAMPLED, *place).stdout
    assert "no router answers at" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "text", "reason"),
    [
        ([], b"", "there is no prompt"),
        ([], b"\xff\xfe", "is no UTF-8"),
        ([], b"a" * (2**20 + 1), "more than 1048576 characters"),
        (["--once", "a", "--cut", "1"], b"", "--cut needs --local"),
        (["--once", "a", "--url", "nowhere"], b"", "is no URL"),
        (["--once", "a", "--local", "--cut", "9"], b"", "no cut"),
        (["nobody", "--once", "a", "--local"], b"", "nobody"),
    ],
)
def test_what_is_no_question_is_refused(arguments: list[str], text: bytes, reason: str, place: list[object]) -> None:
    result = CliRunner().invoke(app, ["chat", *arguments, "--json", *map(str, place)], input=text)
    assert result.exit_code == 1, result.output
    assert reason in json.loads(result.stderr)["error"]


class Talking:
    """A model that says what it was asked, and fails as its question says."""

    context = 0

    def pieces(self, messages: Sequence[Message], options: ChatOptions, answer: Answer) -> Iterator[str]:
        question = messages[-1]["content"]
        yield f"{len(messages)} "
        if question == "stop":
            raise KeyboardInterrupt
        if question == "fail":
            raise HopTimeout("too late", hint="again")
        answer.tokens, answer.layers = 2, (LayerPlace(0, 2, "here"),)
        yield question


def talk(
    lines: Sequence[str | type[BaseException]],
    monkeypatch: pytest.MonkeyPatch,
    conversation: Conversation | None = None,
) -> None:
    """Have a conversation with these lines of a terminal; it must leave at their end."""
    rest = iter(lines)

    def read(_: str) -> str:
        line = next(rest)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    command._talk(conversation or Conversation(Talking()))
    assert list(rest) == []


def test_a_conversation_goes_on_until_the_end_of_input(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    talk(["first", " ", "second", EOFError], monkeypatch)
    out, err = capsys.readouterr()
    assert out == "1 first\n3 second\n"
    assert err.count("2 tokens") == 2
    assert "layers 0-2 at here" in err


def test_ctrl_c_stops_an_answer_and_leaves_at_the_second(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    talk(["stop", KeyboardInterrupt], monkeypatch)
    talk([KeyboardInterrupt, "first", KeyboardInterrupt, KeyboardInterrupt], monkeypatch)
    out, err = capsys.readouterr()
    assert out == "1 \n1 first\n"
    assert "stopped" in err
    assert err.count("Ctrl-C again leaves") == 2


def test_a_conversation_survives_an_answer_that_fails(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    talk(["fail", "first", EOFError], monkeypatch)
    out, err = capsys.readouterr()
    assert "too late" in err
    assert "first" in out


def test_text_that_steers_a_terminal_is_shown_as_escapes() -> None:
    assert command._safe("a\x1b[2J\tb\nc") == "a\\x1b[2J\tb\nc"


def test_turns_that_were_dropped_are_told(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    class Dropping(Talking):
        context = 1000

        def pieces(self, messages: Sequence[Message], options: ChatOptions, answer: Answer) -> Iterator[str]:
            yield from super().pieces(messages, options, answer)
            answer.tokens = 900

    talk(["first", "second", EOFError], monkeypatch, Conversation(Dropping(), ChatOptions(max_tokens=500)))
    assert "the first 2 messages are no longer part" in capsys.readouterr().err
