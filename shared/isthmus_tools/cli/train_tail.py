"""`isthmus train-tail`: the cloud's side of split learning."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from isthmus_tools.cli.console import errors, print_json_line, progress_bars, say
from isthmus_tools.cli.options import DEFAULT_REGISTRY, registry_settings
from isthmus_tools.cli.termination import until_signal

Host = Annotated[
    str, typer.Option(help="Where to listen; beyond this machine only with the secret hop-keys.", metavar="ADDRESS")
]
Port = Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)]
# Not `AsJson`: documents follow each other, the address first.
AsLines = Annotated[bool, typer.Option("--json", help="Print a JSON object a line instead of text.")]


def train_tail(
    config: Annotated[Path, typer.Argument(help="The file that the edge has too.", metavar="CONFIG.toml")],
    *,
    host: Host = "127.0.0.1",
    port: Port = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove the checkpoints of an earlier run.")] = False,
    as_json: AsLines = False,
) -> None:
    """Serve the layers behind the cut to an edge that trains the head: split learning, until Ctrl-C.

    The edge runs `isthmus train CONFIG.toml --split-with URL`. After a kill, start it again: both sides go back to the
    last checkpoint that both have.

    Example: `isthmus train-tail train.toml --host 0.0.0.0 --port 9100`
    """
    from isthmus_tools.learning.training.config import read_config
    from isthmus_tools.usecases.train_apart import ServeRequest, serve_tail

    with errors(as_json), until_signal() as stop, progress_bars(as_json) as progress:
        request = ServeRequest(
            config=read_config(config, dict(os.environ)),
            settings=registry_settings(DEFAULT_REGISTRY),
            host=host,
            port=port,
            fresh=fresh,
            stop=stop,
            on_url=lambda url: show_url(url, as_json, f"isthmus train {config} --split-with {url}"),
        )
        steps = serve_tail(request, progress)
        if as_json:
            print_json_line({"steps": steps})
        else:
            say(f"{steps} steps")


def show_url(url: str, as_json: bool, other_side: str) -> None:
    """Print where a training listens, and the command of the other side."""
    if as_json:
        print_json_line({"url": url})
    else:
        say(f"{url}, until Ctrl-C; the other side: {other_side}")
