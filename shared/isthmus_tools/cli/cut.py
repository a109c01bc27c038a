"""`isthmus cut`: publish more cuts of a bundle under the same weights."""

from __future__ import annotations

from typing import Annotated

import typer

from isthmus.units import format_size
from isthmus_tools.cli.console import errors, print_json, published_document, run, say, show_publication, warn
from isthmus_tools.cli.options import (
    DEFAULT_REGISTRY,
    Alias,
    AsJson,
    DropPlan,
    ModelArgument,
    RegistryOption,
    cut_option,
    registry_settings,
)


def cut(
    model: ModelArgument,
    *,
    at: Annotated[list[str], cut_option("A partition, once each: n cuts make n + 1 segments.")],
    default: Annotated[bool, typer.Option("--default", help="Make the first --cut what requests take.")] = False,
    alias: Alias = "prod",
    drop_plan: DropPlan = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: AsJson = False,
) -> None:
    """Cut a bundle again and publish the result as its next version; no weights are copied. A plan stays in force.

    Example: `isthmus cut efficientnet-lite0 --cut 20/65 --default`
    """
    from isthmus_tools.usecases import cut as use_case

    with errors(as_json):
        request = use_case.CutRequest(
            model=model,
            cuts=at,
            registry=registry_settings(registry),
            default=default,
            alias=alias,
            drop_plan=drop_plan,
        )
        result = run(use_case.cut, request, quiet=as_json)
        version = result.publication.version
        if as_json:
            print_json(
                published_document(
                    result.publication,
                    registry,
                    new_segments=result.new_segments,
                    new_bytes=result.new_bytes,
                    default_cuts=list(result.bundle.default_cuts),
                    warnings=result.warnings,
                )
            )
            return
        say(
            f"{version.name}:{version.version} {version.digest[:19]}…, new segments"
            f" {', '.join(result.new_segments) or 'none'} ({format_size(result.new_bytes)})"
        )
        show_publication(result.publication, registry)
        warn(result.warnings)
        if not default and not result.publication.plan and (taken := result.bundle.default_cuts):
            say(f"requests go on taking {'/'.join(taken)}: --default makes the first --cut what they take")
        # A router asks the plan before the default cuts, so --default alone changes nothing that is served.
        if default and result.publication.plan:
            say("requests take the way of the plan, not the default cuts: --drop-plan lets the default cuts decide")
