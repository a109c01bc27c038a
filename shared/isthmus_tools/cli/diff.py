"""`isthmus diff`: how two versions differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from isthmus.units import format_size
from isthmus_tools.cli.completion import complete_models
from isthmus_tools.cli.console import errors, print_json, say, table
from isthmus_tools.cli.options import DEFAULT_REGISTRY, AsJson, RegistryOption, registry_settings

if TYPE_CHECKING:
    from isthmus_tools.usecases.version_diff import NameChanges


def diff(
    first: Annotated[
        str, typer.Argument(help="NAME, NAME:VERSION or NAME:ALIAS of the registry.", autocompletion=complete_models)
    ],
    second: Annotated[str, typer.Argument(help="Another; a number or an alias alone is of the same model.")],
    *,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: AsJson = False,
) -> None:
    """Show how a version differs from another one: segments, cuts, exits, fusion, sizes, fidelity, plan.

    Example: `isthmus diff efficientnet-lite0:prod 8`
    """
    from isthmus.registry import open_registry
    from isthmus_tools.usecases.version_diff import NAMED, diff_versions

    with errors(as_json):
        store = open_registry(registry_settings(registry))
        name = first.partition(":")[0]
        # Of a name that is a model's as well as an alias's, the model is meant.
        other = second if ":" in second or second in store.models() else f"{name}:{second}"
        result = diff_versions(store, first, other)
        if as_json:
            print_json(result.document())
            return
        one, two = (f"{each.name}:{each.version}" for each in (result.first, result.second))
        if result.first.digest == result.second.digest:
            say(f"{one} and {two} are the same bundle")
            return
        cuts = ["/".join(each) or "none" for each in result.default_cuts]
        rows = [
            ("default cuts", *cuts),
            ("weights", *map(format_size, result.weights_bytes)),
            ("graphs", *map(format_size, result.graph_bytes)),
            ("plan", *(plan or "none" for plan in result.plans)),
        ]
        table(f"{two} beside {one}", ["", one, two], rows)
        for what in NAMED:
            _show(what, getattr(result, what))
        say(f"a registry with {one} lacks {format_size(result.new_bytes)} of {two}")
        if result.agreements:
            table(
                "agreement",
                ["cut", "codec", one, two],
                [(each.cut, each.codec, _share(each.before), _share(each.after)) for each in result.agreements],
                numbers=[one, two],
            )


def _show(what: str, changes: NameChanges) -> None:
    for verb, names in (("new", changes.added), ("gone", changes.removed), ("changed", changes.changed)):
        if names:
            say(f"{verb} {what}: {', '.join(names)}")


def _share(share: float | None) -> str:
    return "not measured" if share is None else f"{share:.1%}"
