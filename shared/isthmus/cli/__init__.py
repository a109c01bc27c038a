"""The command `isthmus`."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

import isthmus
from isthmus.cli import one_thread, private_caches  # noqa: F401 - see there
from isthmus.cli.calibrate import calibrate
from isthmus.cli.codec import codec
from isthmus.cli.cut import cut
from isthmus.cli.cuts import cuts
from isthmus.cli.demo import demo
from isthmus.cli.doctor import doctor
from isthmus.cli.explain import explain
from isthmus.cli.importing import import_model
from isthmus.cli.infer import infer
from isthmus.cli.link import link
from isthmus.cli.models import models
from isthmus.cli.package import package
from isthmus.cli.plan import plan
from isthmus.cli.profile import profile
from isthmus.cli.up import up

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="markdown",
    help="Split inference as a bundle of serverless functions: cut a model, serve its two sides, ask them.",
)
app.command("import")(import_model)
for command in (cuts, cut, calibrate, codec, models, infer, up, link, package, profile, plan, explain, demo, doctor):
    app.command()(command)


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
    # Tries that failed are told by the error of the last one.
    logging.getLogger("stamina").addHandler(logging.NullHandler())
    app()
