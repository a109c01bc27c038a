"""`isthmus draft`: fit exit branches that draft tokens at the edge, and publish them in the bundle."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from isthmus_tools.cli.console import errors, print_json, published_document, run, say, show_publication
from isthmus_tools.cli.options import (
    DEFAULT_REGISTRY,
    Alias,
    AsJson,
    ModelArgument,
    RegistryOption,
    RunThreads,
    cut_option,
    registry_settings,
)


def draft(
    model: ModelArgument,
    *,
    text: Annotated[
        Path | None,
        typer.Option(
            help="A text file whose passages the model goes on from; the documentation that comes with Python if none.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    at: Annotated[list[str] | None, cut_option("Cuts, once or more; the first default cut if none.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens that the model writes for the fit.", min=100, max=10**6)] = 8000,
    threads: RunThreads = 0,
    alias: Alias = "prod",
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: AsJson = False,
) -> None:
    """Fit an exit branch to a language model's cut; it drafts tokens at the edge. Publishes the next version.

    The model writes on passages of the text, and ridge regression maps the residual stream at the cut to what the final
    norm gives. One passage in five is held out: the agreement says how often the branch predicts what the model does.

    Example: `isthmus draft smollm2 --cut 20 --text notes.txt`
    """
    from isthmus_tools.usecases import draft as use_case

    with errors(as_json):
        request = use_case.DraftRequest(
            model=model,
            text=use_case.read_text(text),
            registry=registry_settings(registry),
            cuts=at or [],
            tokens=tokens,
            threads=threads,
            alias=alias,
        )
        result = run(use_case.draft, request, quiet=as_json)
        version = result.publication.version
        if as_json:
            exits = [asdict(each) for each in result.exits]
            print_json(published_document(result.publication, registry, tokens=result.tokens, exits=exits))
            return
        say(f"{version.name}:{version.version} {version.digest[:19]}…, fitted on {result.tokens:,} tokens")
        for each in result.exits:
            say(
                f"  {each.cut}: the model's own token in {each.agreement:.0%} of held-out positions, and in"
                f" {each.confident:.0%} of the {each.confident_tokens:.0%} where the branch is sure"
            )
        show_publication(result.publication, registry)
