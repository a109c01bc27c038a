"""`isthmus federate`: federated averaging, as the server or as a node."""

from __future__ import annotations

import os
import socket
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from isthmus.errors import RequestMalformed
from isthmus_tools.cli.console import errors, print_json, print_json_line, progress_bars, say
from isthmus_tools.cli.options import DEFAULT_REGISTRY, registry_settings
from isthmus_tools.cli.termination import until_signal
from isthmus_tools.cli.train_tail import AsLines, Host, Port, show_url


class Part(StrEnum):
    """Who this process is."""

    SERVE = "serve"
    JOIN = "join"


def federate(
    part: Annotated[Part, typer.Argument(help="serve: average the nodes' weights. join: train as a node.")],
    config: Annotated[Path, typer.Argument(help="The file; the same for all but its sources.", metavar="CONFIG.toml")],
    *,
    url: Annotated[str, typer.Option("--with", help="join: the URL of the server.", metavar="URL")] = "",
    name: Annotated[str, typer.Option(help="join: this node's name; by default the machine's.")] = "",
    host: Host = "127.0.0.1",
    port: Port = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="serve: remove the rounds of an earlier run.")] = False,
    as_json: AsLines = False,
) -> None:
    """Train on the data of several nodes without moving it: a server averages the nodes' changes of the weights.

    Nodes call the server. A node that does not answer within a round is left out of it. The last weights are a graph in
    the folder of each node, to publish with `isthmus import`.

    Example: `isthmus federate serve train.toml --port 9200`, then on each node `isthmus federate join train.toml
    --with https://cloud.example:9200 --name north`
    """
    with errors(as_json):
        if part is Part.JOIN:
            _join(config, url, name or socket.gethostname(), as_json)
        else:
            _serve(config, host, port, fresh, as_json)


def _serve(config: Path, host: str, port: int, fresh: bool, as_json: bool) -> None:
    from isthmus_tools.learning.training.config import read_config
    from isthmus_tools.usecases.train_apart import ServeRequest, serve_rounds

    with until_signal() as stop, progress_bars(as_json) as progress:
        request = ServeRequest(
            config=read_config(config, dict(os.environ)),
            settings=registry_settings(DEFAULT_REGISTRY),
            host=host,
            port=port,
            fresh=fresh,
            stop=stop,
            on_url=lambda address: show_url(address, as_json, f"isthmus federate join {config} --with {address}"),
        )
        served = serve_rounds(request, progress)
    document = {"rounds": served.rounds, "nodes": served.nodes, "left_out": served.left_out}
    if as_json:
        print_json_line(document)
        return
    say(f"{served.rounds} rounds, the first of the inputs' statistics")
    for node, count in served.nodes.items():
        missed = served.left_out.get(node, 0)
        say(f"  {node}: {count} rounds" + (f", left out of {missed}" if missed else ""))


def _join(config: Path, url: str, name: str, as_json: bool) -> None:
    from isthmus_tools.learning.training.config import read_config
    from isthmus_tools.usecases.train_apart import JoinRequest, join_rounds

    if not url:
        raise RequestMalformed("a node needs the server's URL: --with URL", option="--with")
    with progress_bars(as_json) as progress:
        request = JoinRequest(
            config=read_config(config, dict(os.environ)),
            registry=registry_settings(DEFAULT_REGISTRY),
            url=url,
            name=name,
        )
        result = join_rounds(request, progress)
    if as_json:
        print_json(
            {
                "rounds": result.rounds,
                "examples": result.examples,
                "accuracy": result.accuracy,
                "graph": result.graph,
            }
        )
        return
    held_out = "" if result.accuracy is None else f"; {result.accuracy:.1%} of the held-out part are right"
    say(f"{name} was in {result.rounds} rounds with {result.examples} examples{held_out}")
    say(f"the graph with the last weights: {result.graph}")
