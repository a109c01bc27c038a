"""`isthmus gc`: content that no version reaches, listed or removed."""

from __future__ import annotations

from typing import Annotated

import typer

from isthmus.units import format_size, parse_duration
from isthmus_tools.cli.console import errors, print_json, progress_bars, say, say_command
from isthmus_tools.cli.options import (
    DEFAULT_REGISTRY,
    AsJson,
    RegistryOption,
    in_registry,
    read_option,
    registry_settings,
)


def gc(
    *,
    delete: Annotated[bool, typer.Option("--delete", help="Remove it; without, nothing is changed.")] = False,
    older_than: Annotated[
        str,
        typer.Option(
            help="Least age of what is removed, such as 90m: longer than the longest publish or plan takes. 0s only"
            " while nobody publishes."
        ),
    ] = "24h",
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: AsJson = False,
) -> None:
    """List content of the registry that no version reaches: of removed versions, tried plans, killed publishes.

    With --delete it is removed; a publish waits meanwhile.

    Example: `isthmus gc`, then `isthmus gc --delete`
    """
    from isthmus.registry import open_registry
    from isthmus.registry.collection import collect, find_garbage

    with errors(as_json):
        age = read_option(parse_duration, "--older-than", older_than)
        store = open_registry(registry_settings(registry))
        with progress_bars(as_json) as progress:
            progress(f"reading every version in {registry}")
            garbage = (collect if delete else find_garbage)(store, age)
        # A removal ends before its lease does, so a large one takes several runs.
        left = len(garbage.removable) - garbage.removed
        following = "isthmus models"
        if left:
            # The removal must have the age of the listing, or it removes something else.
            option = "" if older_than == "24h" else f" --older-than {older_than}"
            following = f"isthmus gc --delete{option}"
        following = in_registry(following, registry)
        if as_json:
            print_json(
                {
                    "removable": [
                        {"key": e.key, "bytes": e.size, "written": e.written.isoformat()} for e in garbage.removable
                    ],
                    "bytes": garbage.bytes,
                    "younger": len(garbage.younger),
                    "removed": garbage.removed,
                    "next": following,
                }
            )
            return
        count, size = len(garbage.removable), format_size(garbage.bytes)
        files = "1 file" if count == 1 else f"{count} files"
        say(f"{files} ({size}) that no version reaches" + (f", {garbage.removed} removed" if delete else ""))
        if garbage.younger:
            say(f"{len(garbage.younger)} more are younger than {older_than} and stay: a publish or plan may need them")
        if left:
            say_command("next", following)
