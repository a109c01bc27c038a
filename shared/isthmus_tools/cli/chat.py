"""`isthmus chat`: a conversation with a language model in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from isthmus.errors import IsthmusError, RequestMalformed
from isthmus.units import format_duration, format_size
from isthmus_tools.cli.completion import complete_models
from isthmus_tools.cli.console import err, errors, print_json, tell, warn
from isthmus_tools.cli.infer import ROUTER, ModelPlace
from isthmus_tools.cli.options import (
    DEFAULT_REGISTRY,
    ApiKey,
    AsJson,
    RegistryOption,
    cut_option,
    read_api_key,
    registry_settings,
)
from isthmus_tools.printable import printable

if TYPE_CHECKING:
    from isthmus_tools.usecases.chat import Answer, ChatModel, Conversation, LayerPlace

# Of a prompt that comes through a pipe; the model's context is far shorter.
_MAX_PROMPT = 2**20


def chat(
    model: Annotated[
        str,
        typer.Argument(
            help="NAME or NAME:VERSION; empty takes the router's own, or the registry's only language model.",
            autocompletion=complete_models,
        ),
    ] = "",
    *,
    once: Annotated[str, typer.Option(help="One prompt: print its answer, and leave.", metavar="PROMPT")] = "",
    system: Annotated[str, typer.Option(help="A first message that says how to answer.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 512,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token each time; more varies.", min=0, max=2)
    ] = 0.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.", min=0)] = None,
    url: Annotated[
        str,
        typer.Option(
            envvar="ISTHMUS_URL",
            help=f"The router; by default {ROUTER}, and this process where no router answers there.",
        ),
    ] = "",
    local: Annotated[bool, typer.Option("--local", help="Run every layer in this process; no router.")] = False,
    cut: Annotated[str, cut_option("With --local: a partition of the bundle.")] = "",
    timeout: Annotated[
        float, typer.Option(help="Longest time for one answer, in seconds.", min=0.001, max=86_400)
    ] = 600.0,
    registry: RegistryOption = DEFAULT_REGISTRY,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Talk with a language model: tokens as they come, then their rate, bytes over the link, and each layer's place.

    Ctrl-C stops an answer; twice, or the end of input, leaves. Input that is no terminal is a single prompt.

    Example: `isthmus chat smollm2`, or `echo 'Name three rivers.' | isthmus chat smollm2 --json`
    """
    from isthmus_tools.usecases.chat import ChatOptions, Conversation

    with errors(as_json):
        prompt = once or ("" if sys.stdin.isatty() else _piped())
        if len(prompt) > _MAX_PROMPT:
            raise RequestMalformed(f"the prompt has more than {_MAX_PROMPT} characters", limit=_MAX_PROMPT)
        if as_json and not prompt:
            raise RequestMalformed("--json prints one answer: give its prompt with --once")
        if cut and not local:
            raise RequestMalformed("--cut needs --local: a router has routes of its own", option="--cut")
        options = ChatOptions(max_tokens=max_tokens, temperature=temperature, seed=seed, timeout_s=timeout)
        conversation = Conversation(
            _open(model, ModelPlace(url, local, cut, timeout, registry, read_api_key(api_key))), options, system
        )
        if prompt:
            _answer_once(conversation, prompt, as_json)
        else:
            _talk(conversation)


def _piped() -> str:
    """The prompt that comes through a pipe.

    Raises:
        RequestMalformed: none, or no UTF-8.
    """
    try:
        prompt = sys.stdin.read(_MAX_PROMPT + 1).strip()
    except UnicodeDecodeError as e:
        raise RequestMalformed(f"the prompt is no UTF-8: {e.reason} at byte {e.start}") from e
    if not prompt:
        raise RequestMalformed("there is no prompt", hint="isthmus chat --once 'Name three rivers.'")
    return prompt


def _open(model: str, place: ModelPlace) -> ChatModel:
    from isthmus_tools.usecases.chat import LocalChat, open_chat

    settings = registry_settings(place.registry)
    if place.local:
        return LocalChat(model, settings, place.cuts)
    opened = open_chat(
        model,
        place.url or ROUTER,
        settings,
        is_default=not place.url,
        timeout_s=place.timeout_s,
        api_key=place.api_key,
    )
    if isinstance(opened, LocalChat):
        tell(f"no router answers at {ROUTER}: the model runs in this process; isthmus up serves it")
    return opened


def _answer_once(conversation: Conversation, prompt: str, as_json: bool) -> None:
    from isthmus_tools.usecases.chat import Answer

    answer = Answer()
    for piece in conversation.ask(prompt, answer):
        if not as_json:
            _write(piece)
    if as_json:
        print_json(answer.document())
        return
    _write("\n")
    _show_numbers(answer)


def _talk(conversation: Conversation) -> None:
    """Read prompts and print answers, until the end of input or a second Ctrl-C."""
    from isthmus_tools.usecases.chat import Answer

    tell("Ctrl-C stops an answer; twice, or Ctrl-D, leaves")
    dropped, interrupted = 0, False
    while True:
        try:
            prompt = input("> ").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if interrupted:
                return
            interrupted = True
            tell("\nCtrl-C again leaves")
            continue
        interrupted = False
        if not prompt:
            continue
        answer = Answer()
        try:
            _print_pieces(conversation.ask(prompt, answer))
        except KeyboardInterrupt:
            interrupted = True
            answer.finish = "stopped"
        except IsthmusError as e:
            # The conversation goes on: a router may come back.
            warn([e.message, *([e.hint] if e.hint else [])])
            continue
        _write("\n")
        if answer.dropped > dropped:
            dropped = answer.dropped
            tell(f"the context is full: the first {dropped} messages are no longer part of the conversation")
        _show_numbers(answer)


def _print_pieces(pieces: Iterator[str]) -> None:
    try:
        for piece in pieces:
            _write(piece)
    finally:
        # Now, and not when memory is collected: a router stops generating where nobody reads.
        pieces.close()  # type: ignore[attr-defined]


def _write(text: str) -> None:
    # A model may write what steers a terminal; a file gets the text as it is.
    sys.stdout.write(_safe(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _safe(text: str) -> str:
    return "\t".join(printable(part) for part in text.split("\t"))


def _show_numbers(answer: Answer) -> None:
    """Print the rate, the time to the first token, bytes over the link, and where the layers run."""
    err.print(numbers_text(answer), style="dim", highlight=False, markup=False, soft_wrap=True)


def numbers_text(answer: Answer) -> str:
    """An answer's numbers in a line: `38 tokens, 17.2/s, the first after 180 ms; 108 kB over the link; layers …`."""
    parts = [f"{answer.tokens} tokens"]
    if answer.tokens_per_s:
        parts.append(f"{answer.tokens_per_s:.1f}/s")
    if answer.first_token_s:
        # Two digits: the rest is the machine's noise.
        parts.append(f"the first after {format_duration(float(f'{answer.first_token_s:.2g}'))}")
    if answer.finish == "length":
        parts.append("cut at --max-tokens or the context")
    elif answer.finish == "stopped":
        parts.append("stopped")
    text = ", ".join(parts)
    # Of an answer that was stopped a router says no more.
    if not answer.layers:
        return text
    sent = format_size(answer.link_bytes) if answer.link_bytes else "nothing"
    return f"{text}; {sent} over the link; layers {', '.join(map(_place_text, answer.layers))}"


def _place_text(place: LayerPlace) -> str:
    layers = str(place.first) if place.first == place.last else f"{place.first}-{place.last}"
    return f"{layers} {'in' if place.hop == 'this process' else 'at'} {place.hop}"
