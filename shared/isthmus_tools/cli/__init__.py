"""The command `isthmus`."""

from __future__ import annotations

import importlib
import io
import json
import logging
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

import isthmus
from isthmus_tools.cli import environment  # noqa: F401  set before numpy loads
from isthmus_tools.cli.completion import COMPLETE, complete_in_bash
from isthmus_tools.cli.termination import unwinding

# With the first sentence of each help text, so that the list of commands imports no command.
COMMANDS = {
    "import": "Import a model: its weights in one file, its segments as small graphs, all under one digest.",
    "train": "Train a classifier: collect, clean, train, evaluate and publish, as a TOML file says.",
    "train-tail": "Serve the layers behind the cut to an edge that trains the head: split learning, until Ctrl-C.",
    "federate": "Train on the data of several nodes without moving it: a server averages the nodes' changes of the"
    " weights.",
    "cuts": "List the cuts of a model along its graph: the boundary tensors, their bytes, and the work before them.",
    "cut": "Cut a bundle again and publish the result as its next version; no weights are copied. A plan stays in"
    " force.",
    "calibrate": "Calibrate a bundle's codecs with inputs and measure how many predictions each keeps; publishes the"
    " next version.",
    "codec": "Show the fidelity and cost of every codec, beside JPEG and WebP of the input; or choose one by targets.",
    "redact": "Publish what the router redacts in a model's photos or texts before anything of them leaves the edge.",
    "leak": "Measure how well attackers reconstruct inputs from what crosses each cut, by codec. Publishes the next"
    " version.",
    "draft": "Fit an exit branch to a language model's cut; it drafts tokens at the edge. Publishes the next version.",
    "exits": "Fit early exits to a classifier's cuts: clear inputs are answered at the edge, with a bound on the risk.",
    "compress": "Compress a head for the edge: int8, pruned channels, and more; each measured. Publishes the next"
    " version.",
    "fuse": "Learn a weighted sum of edge and cloud: a model's exit and tail, or several models. Publishes a version.",
    "models": "List the models of a registry: what serves, when it was published, whether it is calibrated, its plan.",
    "versions": "List the versions of a model, what its aliases mean, and who moved them when.",
    "show": "Show a version of a model: its inputs, cuts, calibration and plan.",
    "diff": "Show how a version differs from another one: segments, cuts, exits, fusion, sizes, fidelity, plan.",
    "verify": "Verify a version: the digest of every blob, then a run of every segment; exits with 1 at a fault.",
    "publish": "Publish a version: copy its content, load and run each segment once, give it a number, move an alias.",
    "promote": "Let an alias mean a version from now on; prod is what requests without a version reach.",
    "pull": "Pull a version to a registry's folder, or one segment with its bytes alone to a function's cache.",
    "rollback": "Move an alias back to the version that it meant before; once more goes further back.",
    "canary": "Show the canaries of a model: their share and rule, and in a router the requests of both versions.",
    "key": "Create a key of a signer or a recipient, or change the keyring that functions trust.",
    "sign": "Sign a version; named by an alias, the alias too, which renews its expiry.",
    "rm": "Remove a version that no alias means; its content goes with the next `isthmus gc`.",
    "gc": "List content of the registry that no version reaches: of removed versions, tried plans, killed publishes.",
    "audit": "List who changed what in a registry; with --verify, check the chain of entries.",
    "encrypt": "Encrypt a version in the registry: each recipient can read its segments, and nobody anything else.",
    "grant": "Let further recipients read segments of an encrypted version; nothing is encrypted again.",
    "revoke": "Remove a recipient's grant of an encrypted version: from now on the registry gives it no key.",
    "caller": "Make an API key for a caller of functions, and the line of the secret `callers` that lets it in.",
    "chat": "Talk with a language model: tokens as they come, then their rate, bytes over the link, and each layer's"
    " place.",
    "infer": "Classify photos, or run tensors through a model.",
    "why": "Show which parts of a photo, or which tokens, decided for a class.",
    "up": "Run the functions of a stack file on this machine, behind OpenFaaS's provider API, until Ctrl-C.",
    "send": "Send files to the queue that a trigger reads; by reference where they are too large for its broker.",
    "trigger": "Send messages of a queue through the router and their results on, each once, until Ctrl-C.",
    "link": "Relay to a target over an emulated network with set bandwidth, delay and faults, until Ctrl-C.",
    "top": "Show a router's routes, links, circuit breakers and queue, live, until Ctrl-C.",
    "package": "Write a stack file in which each segment of one model is a function with its segment inside the image.",
    "profile": "Measure a model, its segments and its nodes on deployed functions, and keep the profiles in the"
    " registry.",
    "plan": "Find the best way to serve a model over a link: the cut and its codec, or no split at all.",
    "explain": "Explain a plan's choice: the terms of its cost, the runners-up, and why candidates were refused.",
    "demo": "Classify real photos with EfficientNet-Lite0 five ways: at the edge, in the cloud, and split in two.",
    "doctor": "List missing software on this machine; exits with 1 if a required part is missing.",
}


def load(name: str) -> Callable[..., None]:
    """The function of a command, from the module of its name; `import` is no name for a module."""
    plain = name.replace("-", "_")
    module, function = ("importing", "import_model") if name == "import" else (plain, plain)
    command: Callable[..., None] = getattr(importlib.import_module(f"isthmus_tools.cli.{module}"), function)
    return command


# typer exports no base class of its usage errors: unknown options, missing arguments, bad values.
_UsageError: Any = typer.BadParameter.__base__


_HELP = {"help_option_names": ["-h", "--help"]}


class _Commands(TyperGroup):
    """Commands by name, imported when called: importing all of them takes a second."""

    _lists = False

    def list_commands(self, ctx: Any) -> list[str]:
        """All names, in the order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> TyperCommand | None:
        """The command; a stub with its help alone while commands are listed."""
        if cmd_name not in COMMANDS:
            return None
        # A Typer with a single command is that command, without a group around it.
        single = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False, rich_markup_mode="markdown")
        if self._lists:
            single.command(cmd_name, help=COMMANDS[cmd_name], context_settings=_HELP)(lambda: None)
        else:
            single.command(cmd_name, context_settings=_HELP)(load(cmd_name))
        command = get_command(single)
        return command if isinstance(command, TyperCommand) else None

    def invoke(self, ctx: Any) -> Any:
        """Run the command; with --json a usage error is a JSON document too."""
        # The raw arguments: a usage error is raised before options have values.
        as_json = "--json" in ctx.args
        try:
            return super().invoke(ctx)
        except _UsageError as e:
            if not as_json:
                raise
            document = {"error": e.format_message(), "type": "UsageError", "facts": {}, "hint": ""}
            sys.stderr.write(json.dumps(document) + "\n")
            raise typer.Exit(e.exit_code) from e

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """Names of commands with their help, for a shell."""
        self._lists = True
        try:
            return super().shell_complete(ctx, incomplete)
        finally:
            self._lists = False

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Help with the list of commands."""
        self._lists = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._lists = False


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    context_settings=_HELP,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="markdown",
    help="Split inference as a bundle of serverless functions: cut a model, serve its two sides, ask them.",
)


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.", is_eager=True)] = False,
) -> None:
    """Options before a command."""
    if version:
        typer.echo(f"isthmus {isthmus.__version__}")
        raise typer.Exit


def main() -> None:
    """The entry point."""
    # The last attempt's error reports failed retries.
    logging.getLogger("stamina").addHandler(logging.NullHandler())
    # File names may hold bytes that are not UTF-8.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    with unwinding():
        if os.environ.get(COMPLETE) == "complete_bash":
            complete_in_bash(app)
        else:
            app()
