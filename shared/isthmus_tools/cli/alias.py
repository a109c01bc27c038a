"""`isthmus alias`: let a name such as prod mean a version."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus_tools.cli.completion import complete_aliases, complete_models
from isthmus_tools.cli.console import FOLLOWING, errors, print_json, say, say_command
from isthmus_tools.cli.options import DEFAULT_REGISTRY, AsJson, RegistryOption, in_registry, registry_settings

if TYPE_CHECKING:
    from isthmus.registry.aliases import Move


def alias(
    model: Annotated[
        str,
        typer.Argument(
            help="NAME:VERSION, or NAME:ALIAS for what another alias means.", autocompletion=complete_models
        ),
    ],
    name: Annotated[
        str,
        typer.Argument(
            metavar="ALIAS", help="The alias to move, such as prod or canary.", autocompletion=complete_aliases
        ),
    ],
    *,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: AsJson = False,
) -> None:
    """Let an alias mean a version from now on; prod is what requests without a version reach.

    Example: `isthmus alias efficientnet-lite0:3 prod`
    """
    from isthmus.registry import open_registry

    with errors(as_json):
        store = open_registry(registry_settings(registry))
        version = store.resolve(model)
        show_move(store.move_alias(version.name, name, version.version), registry, as_json)


def show_move(move: Move, registry: str, as_json: bool) -> None:
    """Print the versions before and after an alias's move, and the command of the undo."""
    after, was, moved = move.after, move.before.number, move.moved
    option = "" if after.alias == "prod" else f" --alias {after.alias}"
    # rollback moves prod unless told otherwise, and has nowhere to go where the alias meant nothing before.
    undo = f"isthmus rollback {after.name}{option}" if moved and was else f"isthmus show {after.name}"
    undo = in_registry(undo, registry)
    if as_json:
        document: dict[str, Any] = {
            "name": after.name,
            "alias": after.alias,
            "version": after.number,
            "counter": after.counter,
            "alias_was": was,
            "alias_moved": moved,
            "next": undo,
        }
        print_json(document)
        return
    if not moved:
        say(f"{after.alias} means {after.name}:{after.number}, as before")
    else:
        before = f"; it meant {after.name}:{was}" if was else ""
        say(f"{after.alias} means {after.name}:{after.number} now{before}")
        say(FOLLOWING)
    say_command("to go back" if moved and was else "next", undo)
