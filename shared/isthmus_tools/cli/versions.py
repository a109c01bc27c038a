"""`isthmus versions`: the versions of a model, what its aliases mean, and how they moved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus_tools.cli.canary import share_text
from isthmus_tools.cli.completion import complete_models
from isthmus_tools.cli.console import errors, print_json, say, say_command, table
from isthmus_tools.cli.models import cuts_text
from isthmus_tools.cli.options import DEFAULT_REGISTRY, AsJson, RegistryOption, in_registry, registry_settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from isthmus.artifacts.alias import Alias
    from isthmus_tools.usecases.versions import VersionSummary

# Earlier moves of an alias in the table; --json has all.
_MOVES = 5


def versions(
    model: Annotated[str, typer.Argument(help="NAME of a model in the registry.", autocompletion=complete_models)],
    *,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: AsJson = False,
) -> None:
    """List the versions of a model, what its aliases mean, and who moved them when.

    Example: `isthmus versions efficientnet-lite0`
    """
    from isthmus.registry import open_registry
    from isthmus_tools.usecases.versions import list_aliases, list_versions, next_command

    with errors(as_json):
        store = open_registry(registry_settings(registry))
        # Reads every manifest of the model once.
        rows, aliases = list_versions(store, model), list_aliases(store, model)
        following = in_registry(next_command(store, f"{model}:{rows[-1].version}"), registry)
        if as_json:
            print_json(
                {
                    "name": model,
                    "versions": [
                        {
                            "version": row.version,
                            "digest": row.digest,
                            "published": row.published.isoformat(),
                            "aliases": list(row.aliases),
                            "serves": row.serves,
                            "ran": row.ran,
                            "calibrated": list(row.calibrated),
                            "plan": row.plan,
                            "default_cuts": list(row.bundle.default_cuts),
                        }
                        for row in rows
                    ],
                    "aliases": {alias: [_document(each) for each in moves] for alias, moves in aliases.items()},
                    "next": following,
                }
            )
            return
        table(
            f"versions of {model}",
            ["version", "aliases", "published", "ran", "calibrated", "plan", "default cuts", "digest"],
            [
                (
                    f"→ {row.version}" if row.serves else row.version,
                    _names(row, aliases),
                    f"{row.published.astimezone():%Y-%m-%d %H:%M}",
                    "yes" if row.ran else "no",
                    cuts_text(row.calibrated),
                    row.plan or "none",
                    "/".join(row.bundle.default_cuts),
                    row.digest[7:19],
                )
                for row in rows
            ],
            numbers=["version"],
            drop=["digest", "default cuts", "published", "ran"],
        )
        say("→ serves requests without a version")
        table(
            "moves of aliases, newest first",
            ["alias", "counter", "version", "moved", "by"],
            [(alias, *_row(each)) for alias, moves in aliases.items() for each in moves[:_MOVES]],
            numbers=["counter", "version"],
            drop=["by", "moved"],
        )
        say_command("next", following)


def _names(row: VersionSummary, aliases: Mapping[str, Sequence[Alias]]) -> str:
    """The aliases that mean a version, and those of which it is the canary at present."""
    canaries = {alias: moves[0].canary for alias, moves in aliases.items()}
    tried = [
        f"{alias} (canary, {share_text(canary.share)})"
        for alias, canary in canaries.items()
        if canary is not None and str(canary.version) == row.version
    ]
    return ", ".join([*row.aliases, *tried])


def _document(alias: Alias) -> dict[str, Any]:
    canary = alias.canary
    return {
        "version": alias.number,
        "digest": alias.digest,
        "counter": alias.counter,
        "moved_at": alias.moved_at.isoformat() if alias.moved_at is not None else None,
        "moved_by": alias.moved_by,
        "restores": alias.restores,
        "canary": None if canary is None else {"version": str(canary.version), "share": canary.share},
    }


def _row(alias: Alias) -> tuple[Any, ...]:
    moved = f"{alias.moved_at.astimezone():%Y-%m-%d %H:%M}" if alias.moved_at is not None else ""
    # A rollback restores an earlier move, and the next rollback goes on from there.
    back = "" if alias.restores is None else f" (back to move {alias.restores})"
    return alias.counter, f"{alias.number or 'none'}{back}", moved, alias.moved_by
