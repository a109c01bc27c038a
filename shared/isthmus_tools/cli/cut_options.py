"""The option `--cut`, and the spellings that it had in earlier releases."""

from __future__ import annotations

from typing import Annotated

import typer

SYNTAX = (
    "A cut is a position as `isthmus cuts` lists it, the tensors a,b that cross it, or NAME=a,b; cuts in order are"
    " separated by '/'."
)
OldAt = Annotated[list[str] | None, typer.Option("--at", hidden=True)]
OldCuts = Annotated[str, typer.Option("--cuts", hidden=True)]
