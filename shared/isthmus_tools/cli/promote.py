"""`isthmus promote`: let a name such as prod mean a version that was run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus.errors import RequestMalformed
from isthmus_tools.cli.completion import complete_aliases, complete_models
from isthmus_tools.cli.console import FOLLOWING, errors, print_json, run, say, say_command
from isthmus_tools.cli.options import (
    DEFAULT_REGISTRY,
    AsJson,
    ExpiresDays,
    RegistryOption,
    SignWith,
    Tensors,
    in_registry,
    registry_settings,
    signed,
)

if TYPE_CHECKING:
    from pathlib import Path

    from isthmus.registry.aliases import Move


def promote(
    model: Annotated[
        str,
        typer.Argument(
            help="NAME:VERSION, or NAME:ALIAS for what another alias means.", autocompletion=complete_models
        ),
    ],
    version: Annotated[str, typer.Argument(help="The version, where MODEL is a name alone.")] = "",
    *,
    alias: Annotated[
        str, typer.Option("--as", help="The alias to move, such as prod or live.", autocompletion=complete_aliases)
    ] = "prod",
    expect: Annotated[
        int | None,
        typer.Option(help="Move only if the alias's counter is still this one; see `isthmus versions`.", min=0),
    ] = None,
    canary: Annotated[
        str,
        typer.Option(
            metavar="SHARE",
            help="Let so many of the alias's callers get the version on trial, such as 10%, or more of"
            " them than before.",
        ),
    ] = "",
    rule: Annotated[
        str,
        typer.Option(
            metavar="LIMITS",
            help="With --canary: when routers roll it back, such as errors=1%,disagreement=5%,"
            "latency=1.5,requests=200,confidence=99.9%.",
        ),
    ] = "",
    finish: Annotated[bool, typer.Option("--finish", help="Let the alias mean its canary, for all callers.")] = False,
    abort: Annotated[bool, typer.Option("--abort", help="End the canary; the alias keeps its version.")] = False,
    tensor: Tensors = None,
    sign_with: SignWith = None,
    expires_days: ExpiresDays = 90,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: AsJson = False,
) -> None:
    """Let an alias mean a version from now on; prod is what requests without a version reach.

    Segments that have never been loaded and run are run first.

    Example: `isthmus promote efficientnet-lite0:7 --as prod --canary 10%`
    """
    from isthmus_tools.cli.canary import CanaryChoice, change_canary
    from isthmus_tools.cli.inputs import read_tensors
    from isthmus_tools.usecases import publish as use_case
    from isthmus_tools.usecases.signing import open_signer

    with errors(as_json):
        if version and ":" in model:
            raise RequestMalformed(
                f"{model} names a version, and so does {version}", hint=f"isthmus promote {model} --as {alias}"
            )
        signer = open_signer(sign_with, expires_days)
        if canary or finish or abort or rule:
            reference = f"{model}:{version}" if version else model
            trial = CanaryChoice(reference, alias, expect, canary, rule, finish, abort, signer)
            change_canary(trial, read_tensors(tensor), registry, as_json)
            return
        request = use_case.PromoteRequest(
            # A reference, as every other command takes it.
            model=f"{model}:{version}" if version else model,
            registry=registry_settings(registry),
            alias=alias,
            expected=expect,
            arrays=read_tensors(tensor),
            signer=signer,
        )
        result = run(use_case.promote, request, quiet=as_json)
        undo = undo_command(result.move, registry, sign_with)
        if as_json:
            ran = {each.segment: round(each.seconds, 3) for each in result.runs}
            print_json({"name": result.move.after.name, **move_document(result.move), "ran_s": ran, "next": undo})
            return
        if result.runs:
            say(f"ran {len(result.runs)} segments that had never run")
        show_move(result.move, undo)


def move_document(move: Move) -> dict[str, Any]:
    """A move of an alias, JSON-ready."""
    return {
        "alias": move.after.alias,
        "version": move.after.number,
        "digest": move.after.digest,
        "counter": move.after.counter,
        "alias_was": move.before.number,
        "alias_moved": move.moved,
        "expires": None if move.after.expires is None else move.after.expires.isoformat(),
    }


def undo_command(move: Move, registry: str, key: Path | None = None) -> str:
    """The command that usually follows a move: its undo."""
    name, alias = move.after.name, move.after.alias
    # rollback moves prod unless told otherwise, and has nowhere to go where the alias meant nothing before.
    if not (move.moved and move.before.number):
        return in_registry(f"isthmus versions {name}", registry)
    undo = f"isthmus rollback {name}{'' if alias == 'prod' else f' --alias {alias}'}"
    return signed(in_registry(undo, registry), key)


def show_move(move: Move, undo: str) -> None:
    """Print the versions before and after an alias's move, and the command of the undo."""
    after, was = move.after, move.before.number
    if after.expires is not None:
        say(f"signed, valid until {after.expires:%Y-%m-%d %H:%M} UTC")
    if was == after.number:
        say(f"{after.alias} means {after.name}:{after.number}, as before")
    else:
        before = f"; it meant {after.name}:{was}" if was else ""
        say(f"{after.alias} means {after.name}:{after.number} now{before}")
        say(FOLLOWING)
    say_command("to go back" if move.moved and was else "next", undo)
