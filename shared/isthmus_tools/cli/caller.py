"""`isthmus caller`: API keys for callers of functions."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from isthmus.units import parse_size
from isthmus_tools.cli.completion import complete_models
from isthmus_tools.cli.console import errors, print_json, say, say_command
from isthmus_tools.cli.options import AsJson, read_option


class CallerAction(StrEnum):
    """What to do about callers."""

    NEW = "new"


def caller(
    action: Annotated[CallerAction, typer.Argument(help="new: make a key.")],
    name: Annotated[str, typer.Argument(help="The caller's name, in logs and metrics.")],
    *,
    role: Annotated[
        list[str] | None,
        typer.Option(help="infer, pin (choose a route), metrics, profile or administer; repeatable. infer by default."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A model that the roles are for; repeatable. All by default.", autocompletion=complete_models
        ),
    ] = None,
    requests_per_s: Annotated[float, typer.Option(min=0, help="Requests per second; 0 is no limit.")] = 0.0,
    bytes_per_s: Annotated[
        str, typer.Option(metavar="SIZE", help="Bytes of request bodies per second, such as 5MB; 0 is no limit.")
    ] = "0",
    burst_s: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds of either rate at once.")] = 10.0,
    file: Annotated[Path | None, typer.Option(help="Append the line to this list of callers.", dir_okay=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Make an API key for a caller of functions, and the line of the secret `callers` that lets it in.

    The key is printed once and stored nowhere; the line holds its SHA-256.

    Example: `isthmus caller new ann --role infer --model efficientnet-lite0 --file callers.jsonl`
    """
    from isthmus_tools.usecases.new_caller import NewCallerRequest, new_caller

    with errors(as_json):
        made = new_caller(
            NewCallerRequest(
                name=name,
                roles=role or ("infer",),
                models=model or (),
                requests_per_s=requests_per_s,
                bytes_per_s=read_option(parse_size, "--bytes-per-s", bytes_per_s),
                burst_s=burst_s,
                file=file,
            )
        )
        if as_json:
            print_json(made.document())
            return
        say(f"key, shown this once: {made.key}")
        say(f"in {file}" if file else "the line for the secret callers:")
        if not file:
            say(made.line)
        say_command("next", made.following)
