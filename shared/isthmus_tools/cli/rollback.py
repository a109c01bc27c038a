"""`isthmus rollback`: back to the version that an alias meant before."""

from __future__ import annotations

from typing import Annotated

import typer

from isthmus_tools.cli.completion import complete_aliases, complete_models
from isthmus_tools.cli.console import FOLLOWING, errors, print_json, say, say_command
from isthmus_tools.cli.options import (
    DEFAULT_REGISTRY,
    AsJson,
    ExpiresDays,
    RegistryOption,
    SignWith,
    in_registry,
    registry_settings,
    signed,
)
from isthmus_tools.cli.promote import move_document


def rollback(
    model: Annotated[str, typer.Argument(help="NAME of a model in the registry.", autocompletion=complete_models)],
    *,
    alias: Annotated[str, typer.Option(help="The alias to move back.", autocompletion=complete_aliases)] = "prod",
    sign_with: SignWith = None,
    expires_days: ExpiresDays = 90,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: AsJson = False,
) -> None:
    """Move an alias back to the version that it meant before; once more goes further back.

    Example: `isthmus rollback efficientnet-lite0`
    """
    from isthmus.registry import open_registry
    from isthmus.registry.versions import roll_back
    from isthmus_tools.usecases.signing import open_signer

    with errors(as_json):
        signer = open_signer(sign_with, expires_days)
        move = roll_back(open_registry(registry_settings(registry)), model, alias, signer=signer)
        # Not by rollback: another one goes further back.
        after, was = move.after, move.before.number
        undo = signed(in_registry(f"isthmus promote {after.name}:{was} --as {after.alias}", registry), sign_with)
        if as_json:
            print_json({"name": after.name, **move_document(move), "next": undo})
            return
        say(f"{after.alias} means {after.name}:{after.number} again; it meant {after.name}:{was}")
        say(FOLLOWING)
        say_command("to undo", undo)
