"""`isthmus rm`: remove a version, or a whole model."""

from __future__ import annotations

from typing import Annotated

import typer

from isthmus.errors import RequestMalformed
from isthmus_tools.cli.completion import complete_models
from isthmus_tools.cli.console import errors, print_json, say
from isthmus_tools.cli.options import DEFAULT_REGISTRY, AsJson, RegistryOption, in_registry, registry_settings


def rm(
    model: Annotated[
        str, typer.Argument(help="NAME:VERSION; with --all-versions NAME.", autocompletion=complete_models)
    ],
    *,
    all_versions: Annotated[
        bool, typer.Option("--all-versions", help="Remove the model: every version and every alias.")
    ] = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: AsJson = False,
) -> None:
    """Remove a version that no alias means; its content goes with the next `isthmus gc`.

    Its number is never given again.

    Example: `isthmus rm efficientnet-lite0:2`
    """
    from isthmus.registry import open_registry
    from isthmus.registry.versions import remove_model, remove_version
    from isthmus_tools.usecases.versions import serving_version

    with errors(as_json):
        store = open_registry(registry_settings(registry))
        name, colon, number = model.partition(":")
        # A removal is final, so no reference is guessed.
        if bool(colon) == all_versions:
            raise RequestMalformed(
                f"{model!r} is {'a version' if colon else 'a model'}: name NAME:VERSION, or NAME with --all-versions"
            )
        # Before the removal, since the serving version may go.
        before = serving_version(store, name)
        if all_versions:
            removed = remove_model(store, name)
        else:
            remove_version(store, name, number)
            removed = [number]
        serving, following = serving_version(store, name), in_registry("isthmus gc", registry)
        if as_json:
            print_json({"name": name, "removed": removed, "serving": serving, "serving_was": before, "next": following})
            return
        say(f"removed: {', '.join(f'{name}:{n}' for n in removed)}")
        as_before = " as before" if serving == before else f"; it was {name}:{before}"
        say(f"requests without a version reach {name}:{serving}{as_before}" if serving else f"{name} is gone")
        say(f"next: {following}, which lists what can be freed")
