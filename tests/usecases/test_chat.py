"""Conversations with a language model, in this process and by a router."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from isthmus.client import Client
from isthmus.errors import (
    HTTP_STATUS,
    CallerLimited,
    ContextTooLong,
    HopBusy,
    HopRejected,
    HopUnavailable,
    IsthmusError,
    Missing,
    Overloaded,
    RequestMalformed,
    http_status,
)
from isthmus.serving.openai.errors import openai_error
from isthmus.settings import RegistrySettings, RouterSettings
from isthmus_tools.usecases.chat import (
    Answer,
    ChatModel,
    ChatOptions,
    Conversation,
    LayerPlace,
    LocalChat,
    Message,
    RouterChat,
    open_chat,
)
from support.paths import ROOT
from support.ports import free_port
from support.published_decoders import PublishedDecoder
from support.routers import served_router
from support.scripted_router import ScriptedRouter, scripted_router

OPTIONS = ChatOptions(max_tokens=12, temperature=1.0, seed=7)


@pytest.fixture
def registry(tiny_decoder: PublishedDecoder, tmp_path: Path) -> RegistrySettings:
    return RegistrySettings(registry=str(tiny_decoder.registry), cache_dir=str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def url(tiny_decoder: PublishedDecoder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    cache = str(tmp_path_factory.mktemp("router"))
    settings = RouterSettings(
        registry=str(tiny_decoder.registry), cache_dir=cache, model="tiny", hops=("local",), cuts="1/2", threads=1
    )
    with served_router(settings) as url:
        yield url


def asked(model: ChatModel, prompt: str = "the cat sat", options: ChatOptions = OPTIONS) -> Answer:
    answer = Answer()
    assert "".join(Conversation(model, options).ask(prompt, answer)) == answer.text
    return answer


def test_an_answer_is_the_same_in_this_process_and_by_a_router(registry: RegistrySettings, url: str) -> None:
    local = asked(LocalChat("tiny", registry, threads=1))
    remote = asked(RouterChat(url, "", timeout_s=60))
    assert local.text == remote.text != ""
    assert local.model == remote.model == "tiny:1"
    assert (local.prompt_tokens, local.tokens, local.finish) == (remote.prompt_tokens, remote.tokens, remote.finish)
    assert local.layers == (LayerPlace(0, 2, "this process"),)
    assert remote.layers == (LayerPlace(0, 0, "local"), LayerPlace(1, 1, "local"), LayerPlace(2, 2, "local"))
    assert remote.first_token_s <= remote.whole_s


def test_a_partition_says_where_each_layer_runs(registry: RegistrySettings) -> None:
    answer = asked(LocalChat("tiny", registry, "1/2", threads=1))
    assert [(place.first, place.last) for place in answer.layers] == [(0, 0), (1, 1), (2, 2)]


def test_a_long_conversation_goes_on_without_its_oldest_turns(registry: RegistrySettings) -> None:
    options = ChatOptions(max_tokens=8, temperature=1.0, seed=3)
    conversation = Conversation(LocalChat("tiny", registry, threads=1), options, system="the mat")
    dropped = []
    for _ in range(6):  # of 128 tokens each turn takes a third
        answer = Answer()
        list(conversation.ask("xyz" * 10, answer))
        dropped.append(answer.dropped)
    assert dropped[0] == 0
    assert dropped == sorted(dropped)
    assert dropped[-1] >= 4
    with pytest.raises(ContextTooLong):
        list(conversation.ask("dog" * 300, Answer()))
    # A prompt that was refused is no part of it.
    assert list(conversation.ask("the cat", Answer()))


@dataclass
class Scripted:
    """A model that counts a word as a token, and says what it was given."""

    context: int = 0
    room: int = 100
    given: list[list[str]] = field(default_factory=list)

    def pieces(self, messages: Sequence[Message], options: ChatOptions, answer: Answer) -> Iterator[str]:
        words = " ".join(message["content"] for message in messages).split()
        if len(words) > self.room:
            raise ContextTooLong("too long", prompt_tokens=len(words), context=self.room)
        self.given.append([message["content"] for message in messages])
        answer.prompt_tokens = len(words)
        for word in ("one ", "two ", "three"):
            answer.tokens += 1
            yield word


def test_turns_and_the_system_message_go_with_every_question() -> None:
    model = Scripted()
    conversation = Conversation(model, system="be brief")
    for prompt in ("first", "second"):
        list(conversation.ask(prompt, Answer()))
    assert model.given == [["be brief", "first"], ["be brief", "first", "one two three", "second"]]


def test_an_answer_that_is_stopped_joins_the_conversation_as_far_as_it_was_read() -> None:
    model = Scripted()
    conversation = Conversation(model)
    pieces = conversation.ask("first", answer := Answer())
    assert next(pieces) == "one "
    pieces.close()  # type: ignore[attr-defined]
    assert answer.text == "one "
    list(conversation.ask("second", Answer()))
    assert model.given[1] == ["first", "one ", "second"]


def test_turns_are_dropped_until_the_model_takes_the_rest() -> None:
    model = Scripted(room=9)
    conversation = Conversation(model)
    for prompt in ("a b", "c d", "e f"):
        list(conversation.ask(prompt, answer := Answer()))
    assert model.given[-1] == ["c d", "one two three", "e f"]
    assert answer.dropped == 2


def test_turns_are_dropped_before_an_answer_would_lack_room() -> None:
    model = Scripted(context=30)
    conversation = Conversation(model, ChatOptions(max_tokens=20))
    for prompt in ("a b c d e f g h", "i"):
        list(conversation.ask(prompt, answer := Answer()))
    assert (model.given[-1], answer.dropped) == (["i"], 2)


def test_rates_leave_out_the_first_token() -> None:
    times = iter((0.0, 2.0, 3.0))
    answer = Answer()
    # The clock is read at the begin, at the first token, and at the end.
    list(Conversation(Scripted(), clock=lambda: next(times)).ask("a", answer))
    assert (answer.first_token_s, answer.whole_s, answer.tokens_per_s) == (2.0, 3.0, 2.0)
    assert Answer(tokens=1, whole_s=3.0).tokens_per_s == 0


def test_without_a_router_the_model_runs_here_only_where_none_was_named(registry: RegistrySettings) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    chat = open_chat("", nowhere, registry, is_default=True, timeout_s=5)
    assert isinstance(chat, LocalChat)
    with pytest.raises(HopUnavailable):
        open_chat("tiny", nowhere, registry, is_default=False, timeout_s=5)


def test_a_registry_without_a_single_language_model_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "registry").mkdir()
    with pytest.raises(Missing, match="no language model") as e:
        LocalChat("", RegistrySettings(registry=str(tmp_path / "registry"), cache_dir=str(tmp_path / "cache")))
    assert e.value.hint == "isthmus import llm:smollm2"


@pytest.fixture
def script() -> Iterator[ScriptedRouter]:
    with scripted_router() as script:
        yield script


def chunk(text: str) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    return b"data: " + json.dumps({"model": "m", "choices": [choice]}).encode() + b"\n\n"


def test_comments_and_chunks_of_a_stream_are_read(script: ScriptedRouter) -> None:
    script.replies.append((200, {}, b": waiting\n\n" + chunk("a\u2028") + chunk("b") + b"data: [DONE]\n\n"))
    assert asked(RouterChat(script.url, "m", timeout_s=5)).text == "a\u2028b"
    request = script.received[0]
    assert request.path == "/v1/chat/completions"
    assert request.headers["accept"] == "text/event-stream"
    body = json.loads(request.body)
    assert (body["model"], body["max_tokens"], body["seed"], body["stream"]) == ("m", 12, 7, True)


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        ((200, {}, chunk("a")), HopUnavailable),
        ((0, {}, b""), HopUnavailable),
        ((200, {}, b"<html>"), HopUnavailable),
        ((200, {}, b"data: {\n\n"), HopRejected),
        ((200, {}, b"data: []\n\n"), HopRejected),
        ((200, {}, b'data: {"choices": 3}\n\n'), HopRejected),
        ((200, {}, b"data: " + b"a" * 2**20), HopRejected),
        ((404, {}, b"no such page"), HopRejected),
        ((200, {}, chunk("a") + b'data: {"error": {"message": "m", "code": "hop_timeout", "facts": {}}}\n\n'), None),
    ],
)
def test_a_stream_that_is_none_is_an_error(
    script: ScriptedRouter, reply: tuple[int, dict[str, str], bytes], kind: type[IsthmusError] | None
) -> None:
    script.replies.append(reply)
    with pytest.raises(IsthmusError) as e:
        asked(RouterChat(script.url, "m", timeout_s=5))
    assert type(e.value).__name__ == ("HopTimeout" if kind is None else kind.__name__)


@pytest.mark.parametrize("kind", sorted(HTTP_STATUS, key=lambda c: c.__name__))
def test_every_error_of_the_api_is_raised_again_as_its_class(kind: type[IsthmusError], script: ScriptedRouter) -> None:
    error = kind("why", hint="what to do", kind="model")
    document = openai_error({"error": "why", "type": kind.__name__, "facts": dict(error.facts)}, http_status(error))
    script.replies.append((http_status(error), {}, json.dumps({"error": document}).encode()))
    with pytest.raises(IsthmusError) as e:
        list(Client(script.url, timeout_s=5).chat([]))
    # OpenAI has one code for a server and for a caller at their limits.
    assert type(e.value) is (Overloaded if kind in (HopBusy, CallerLimited) else kind)
    assert e.value.message == "why"


def test_an_error_without_facts_is_no_routers(script: ScriptedRouter) -> None:
    script.replies.append((400, {}, b'{"error": {"message": "m", "code": "request_malformed"}}'))
    with pytest.raises(HopRejected):
        list(Client(script.url, timeout_s=5).chat([]))


def test_a_request_that_the_model_refuses_has_the_routers_error(url: str) -> None:
    with pytest.raises(RequestMalformed, match="role"):
        list(Client(url).chat([{"role": "nobody", "content": "a"}]))
    with pytest.raises(ContextTooLong) as e:
        list(Client(url).chat([{"role": "user", "content": "dog" * 300}]))
    assert e.value.facts["context"] == 128
    with pytest.raises(Missing):
        list(Client(url).chat([{"role": "user", "content": "a"}], model="nobody"))


def test_the_example_of_a_conversation_runs(registry: RegistrySettings, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "reference" / "python.md").read_text()
    (block,) = re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    exec(block.replace("smollm2", "tiny").replace("=100", "=5"), {"registry": registry})  # noqa: S102
    assert "LayerPlace(first=0, last=2" in capsys.readouterr().out
