"""Completion in shells: models, versions, aliases and cuts of a registry in a folder.

A shell waits for each Tab: a registry on S3 is not asked, a share that hangs is given up after a second, and an error
completes nothing.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import replace
from typing import TYPE_CHECKING

import typer

from isthmus.errors import IsthmusError

if TYPE_CHECKING:  # its package takes 40 ms, too long for help
    from isthmus.registry import Registry

COMPLETE = "_ISTHMUS_COMPLETE"
"""The variable of a shell's request for completions."""
_PATIENCE_S = 1.0


def complete_models(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of models; of the model that is named, its versions and aliases too."""
    name, colon, _ = incomplete.partition(":")

    def texts(registry: Registry) -> Iterable[str]:
        names = [each for each in registry.models() if each.startswith(name)]
        if colon or len(names) == 1:
            for each in names:
                yield from (f"{each}:{version.version}" for version in registry.versions(each))
                yield from (f"{each}:{alias}" for alias in registry.aliases(each))
        yield from names

    return _ask(ctx, texts, incomplete)


def complete_aliases(ctx: typer.Context, incomplete: str) -> list[str]:
    """The aliases of the model that the command names, and prod."""
    return _ask(ctx, lambda registry: {"prod", *registry.aliases(_model(ctx).partition(":")[0])}, incomplete)


def complete_cuts(ctx: typer.Context, incomplete: str) -> list[str]:
    """The cuts of the version that the command names; behind a "/", the cuts that may follow."""
    before, slash, _ = incomplete.rpartition("/")

    def texts(registry: Registry) -> Iterable[str]:
        cuts = registry.resolve(_model(ctx)).bundle.cuts
        return (f"{before}{slash}{name}" for name in cuts if name not in before.split("/"))

    return _ask(ctx, texts, incomplete)


def _ask(ctx: typer.Context, texts: Callable[[Registry], Iterable[str]], incomplete: str) -> list[str]:
    from isthmus.registry import open_registry, parse_address
    from isthmus_tools.cli.options import DEFAULT_REGISTRY, registry_settings

    try:
        settings = registry_settings(ctx.params.get("registry") or DEFAULT_REGISTRY)
        if not parse_address(settings.registry).folder:
            return []
        patient = replace(settings, registry_attempts=1, registry_timeout_s=_PATIENCE_S)
        return sorted(text for text in texts(open_registry(patient)) if text.startswith(incomplete))
    except (IsthmusError, OSError):
        return []


def _model(ctx: typer.Context) -> str:
    # Behind an option without its value yet, as `--cut`, words are not assigned to arguments.
    return str(ctx.params.get("model") or next(iter(ctx.args), ""))


def complete_in_bash(run: Callable[[], None]) -> None:
    """Run the command for bash: NAME:VERSION is three words there, and only the text behind the colon is completed."""
    words = os.environ["COMP_WORDS"].split("\n")[: int(os.environ["COMP_CWORD"]) + 1]
    joined = words[:1]
    for word in words[1:]:
        if word == ":" or joined[-1].endswith(":"):
            joined[-1] += word
        else:
            joined.append(word)
    os.environ.update(COMP_WORDS="\n".join(joined), COMP_CWORD=str(len(joined) - 1))
    prefix, colon, _ = joined[-1].rpartition(":")
    output = io.StringIO()
    try:
        with redirect_stdout(output):
            run()
    finally:
        for line in output.getvalue().splitlines():
            typer.echo(line.removeprefix(prefix + colon))
