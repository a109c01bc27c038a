"""`isthmus publish`: a version to another registry, run once before it is visible there."""

from __future__ import annotations

from typing import Annotated

import typer

from isthmus.units import format_size
from isthmus_tools.cli.completion import complete_aliases, complete_models
from isthmus_tools.cli.console import errors, print_json, run, say, say_command
from isthmus_tools.cli.options import (
    DEFAULT_REGISTRY,
    AsJson,
    ExpiresDays,
    RegistryOption,
    SignWith,
    Tensors,
    in_registry,
    registry_settings,
)
from isthmus_tools.cli.promote import move_document, show_move, undo_command


def publish(
    model: Annotated[
        str, typer.Argument(help="NAME, NAME:VERSION or NAME:ALIAS of the registry.", autocompletion=complete_models)
    ],
    *,
    to: Annotated[
        str, typer.Option(help="The registry to publish to: a folder, or s3://BUCKET/PREFIX; if none, in place.")
    ] = "",
    encrypt_for: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE.pub.pem[@SEGMENT,…]",
            help="Encrypt the content on its way to --to for this recipient, as isthmus encrypt --for; once for each.",
        ),
    ] = None,
    alias: Annotated[
        str, typer.Option("--as", help="An alias to move to the version there.", autocompletion=complete_aliases)
    ] = "",
    tensor: Tensors = None,
    sign_with: SignWith = None,
    expires_days: ExpiresDays = 90,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: AsJson = False,
) -> None:
    """Publish a version: copy its content, load and run each segment once, give it a number, move an alias.

    Nothing is visible before every segment has run. The same command again resumes an interrupted one.

    Example: `isthmus publish efficientnet-lite0:3 --to s3://models/edge --as prod`
    """
    from isthmus_tools.cli.inputs import read_tensors
    from isthmus_tools.usecases import publish as use_case
    from isthmus_tools.usecases.signing import open_signer

    with errors(as_json):
        request = use_case.PublishRequest(
            model=model,
            registry=registry_settings(registry),
            # The same secrets and S3 settings serve both registries.
            target=registry_settings(to) if to else None,
            alias=alias,
            encrypt_for=encrypt_for or (),
            arrays=read_tensors(tensor),
            signer=open_signer(sign_with, expires_days),
        )
        result = run(use_case.publish, request, quiet=as_json)
        # The target may have given another number than the source's.
        version, place = result.version, to or registry
        following = in_registry(f"isthmus promote {version.name} {version.version} --as prod", place)
        if result.serves:
            following = in_registry(f"isthmus versions {version.name}", place)
        if result.move is not None:
            following = undo_command(result.move, place, sign_with)
        if as_json:
            print_json(
                {
                    "name": version.name,
                    "version": version.version,
                    "digest": version.digest,
                    "registry": place,
                    "serves": result.serves,
                    "copied_bytes": result.copied_bytes,
                    "ran_s": {each.segment: round(each.seconds, 3) for each in result.runs},
                    "alias": move_document(result.move) if result.move is not None else None,
                    "next": following,
                }
            )
            return
        copied = f", {format_size(result.copied_bytes)} copied" if to else ""
        say(f"{version.name}:{version.version} in {place}: {len(result.runs)} segments ran{copied}", "bold")
        if result.move is not None:
            show_move(result.move, following)
        else:
            if result.serves:
                say(f"prod means {version.name}:{version.version}")
            say_command("next", following)
