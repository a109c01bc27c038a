"""How commands are told the shapes of free dimensions: by numbers or by example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from isthmus.dtypes import restored
from isthmus.errors import ModelError

BindOption = Annotated[
    list[str] | None,
    typer.Option(help="The shape that an input's free dimensions are counted for: NAME=1x3x320x640; once per input."),
]
ExampleOption = Annotated[
    list[Path] | None,
    typer.Option(help="Example inputs: an .npz file with an array for each input, or NAME=FILE.npy; once per file."),
]


def read_bindings(given: Sequence[str] | None) -> dict[str, tuple[int, ...]]:
    """The shapes of `NAME=1x3x320x640` entries.

    Raises:
        ModelError: an entry is not of that form.
    """
    found: dict[str, tuple[int, ...]] = {}
    for entry in given or []:
        name, equals, dims = entry.rpartition("=")
        try:
            if not equals or not name:
                raise ValueError
            found[name] = tuple(int(n) for n in dims.replace(",", "x").split("x") if n)
        except ValueError as e:
            raise ModelError(f"--shape is {entry!r}; it is NAME=1x3x320x640") from e
    return found


def read_examples(given: Sequence[Path] | None) -> Mapping[str, np.ndarray[Any, Any]]:
    """The arrays of .npz files and of `NAME=FILE.npy` entries.

    Raises:
        ModelError: a file cannot be read as such.
    """
    found: dict[str, np.ndarray[Any, Any]] = {}
    for entry in map(str, given or []):
        name, equals, file = entry.partition("=")
        try:
            loaded = np.load(file if equals else entry, allow_pickle=False)
            if equals:
                found[name] = restored(loaded)
            else:
                with loaded:
                    found.update({key: restored(loaded[key]) for key in loaded.files})
        except (OSError, ValueError, AttributeError, TypeError) as e:
            raise ModelError(f"--example is {entry!r}; it is an .npz file, or NAME=FILE.npy: {e}") from e
    return found
