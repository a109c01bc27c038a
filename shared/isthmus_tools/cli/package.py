"""`isthmus package`: each segment of a model as a function of its own, baked in, by the plan or `--cut`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from isthmus.units import format_size
from isthmus_tools.cli.console import errors, print_json, run, say
from isthmus_tools.cli.options import (
    DEFAULT_REGISTRY,
    AsJson,
    ModelArgument,
    RegistryOption,
    cut_option,
    registry_settings,
)


def package(
    model: ModelArgument,
    *,
    cuts: Annotated[str, cut_option("A partition of the bundle; its plan's, else its default, if none.")] = "",
    output: Annotated[Path, typer.Option(help="Folder for the stack file and the functions.")] = Path("build/package"),
    stack: Annotated[Path, typer.Option(help="The stack file to take templates and limits from.")] = Path("stack.yml"),
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: AsJson = False,
) -> None:
    """Write a stack file in which each segment of one model is a function with its segment inside the image.

    The functions need no registry. Where the bundle has a plan, the functions are the plan's, and the router follows
    the plan. Run this command, then faas-cli, in the folder of `template/`.

    Example: `isthmus package efficientnet-lite0 && faas-cli up -f build/package/efficientnet-lite0/stack.yml`
    """
    from isthmus_tools.usecases import package as use_case

    with errors(as_json):
        request = use_case.PackageRequest(
            model=model,
            registry=registry_settings(registry),
            # As faas-cli fills ${…} in a stack file.
            variables=os.environ,
            cuts=cuts,
            output=output,
            stack=stack,
        )
        result = run(use_case.package, request, quiet=as_json)
        if as_json:
            print_json(
                {
                    "stack": str(result.stack),
                    "functions": result.functions,
                    "weights_bytes": result.weights_bytes,
                    "cuts": list(result.cuts),
                    "plan": result.plan,
                    "next": f"faas-cli up -f {result.stack}",
                }
            )
            return
        say(f"as planned: {result.plan}" if result.plan else f"cut at {'/'.join(result.cuts) or 'nothing'}")
        for name, count in result.weights_bytes.items():
            say(f"{name}: {format_size(count)} of weights")
        say(f"written: {result.stack}\nnext: faas-cli up -f {result.stack}")
