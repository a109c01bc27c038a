"""`isthmus pull`: a version to a folder, or a segment to a function's cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from isthmus.errors import RequestMalformed
from isthmus.units import format_size
from isthmus_tools.cli.completion import complete_models
from isthmus_tools.cli.console import errors, print_json, run, say
from isthmus_tools.cli.options import DEFAULT_REGISTRY, AsJson, RegistryOption, TrustedKeys, registry_settings


def pull(
    model: Annotated[
        str, typer.Argument(help="NAME, NAME:VERSION or NAME:ALIAS of the registry.", autocompletion=complete_models)
    ],
    *,
    to: Annotated[str, typer.Option(help="A registry's folder, for the whole version.")] = "",
    cache: Annotated[
        Path | None, typer.Option(help="A function's cache_dir, for the segments of the default cuts or --segment.")
    ] = None,
    segment: Annotated[
        str, typer.Option(help="One segment by its id, such as ..31: its bytes alone are fetched.")
    ] = "",
    trusted_keys: TrustedKeys = None,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: AsJson = False,
) -> None:
    """Pull a version to a registry's folder, or one segment with its bytes alone to a function's cache.

    The same command again resumes an interrupted one. The version keeps its number; a name without a version, or with
    an alias, takes the alias along.

    Example: `isthmus pull efficientnet-lite0 --segment ..31 --cache /var/cache/isthmus --registry s3://models/edge`
    """
    from isthmus_tools.usecases import pull as use_case

    with errors(as_json):
        # No default: one place holds what a function serves, the other what a registry publishes.
        if bool(to) == (cache is not None):
            raise RequestMalformed("pull needs one target: --to FOLDER or --cache FOLDER")
        settings = registry_settings(registry, trusted_keys=trusted_keys)
        if cache is not None:
            settings = replace(settings, cache_dir=str(cache))
        request = use_case.PullRequest(model=model, registry=settings, folder=to, segment=segment)
        result = run(use_case.pull, request, quiet=as_json)
        version = result.version
        if as_json:
            print_json(
                {
                    "name": version.name,
                    "version": version.version,
                    "digest": version.digest,
                    "to": result.place,
                    "segments": list(result.segments),
                    "fetched_bytes": result.fetched_bytes,
                }
            )
            return
        what = f", segments {', '.join(result.segments)}" if result.segments else ""
        say(f"{version.name}:{version.version}{what} in {result.place}; {format_size(result.fetched_bytes)} fetched")
