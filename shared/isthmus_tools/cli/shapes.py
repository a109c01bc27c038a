"""What commands are told of a model's inputs: shapes and free dimensions by `--shape`, arrays by `--example`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import ModelError
from isthmus_tools.cli.files import named_file

if TYPE_CHECKING:
    from isthmus.arrays import Array

BindOption = Annotated[
    list[str] | None,
    typer.Option(
        help="An input's shape: NAME=1x3x320x640, once per input. ONNX and .pt2: the sizes that its free dimensions are"
        " counted for. For package.module:factory, NAME is a parameter of forward, traced with float32 zeros of that"
        " shape;"
        " a dimension that is to stay free is named, with commas between: NAME=batch,3,320,640 or ids=batch:4,seq:128."
    ),
]
ExampleOption = Annotated[
    list[Path] | None,
    typer.Option(
        help="Example inputs: an .npz file with an array for each input, or NAME=FILE.npy; once per file. They give"
        " shapes as --shape does, and values where shapes depend on those; package.module:factory is traced with them,"
        " and takes their dtypes: inputs of whole numbers need one."
    ),
]
_MAX_SIZE = 2**31 - 1
"""Of a dimension: graphs hold sizes in 64 bits, and what is reckoned with them is a product of several."""
_DIMENSION = re.compile(r"(?P<name>[A-Za-z_]\w*)(:(?P<size>\d{1,18}))?|(?P<number>\d{1,18})")
_BETWEEN_LETTERS = re.compile(r"[A-Za-z_]x[A-Za-z_]")


@dataclass(frozen=True)
class InputsGiven:
    """What the options say: a shape to count with, names of free dimensions by axis, and an array, by input."""

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    free: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    examples: Mapping[str, Array] = field(default_factory=dict)

    def check_free(self, inputs: Mapping[str, TensorSpec]) -> None:
        """See that the dimensions which were named as free are free in the imported model.

        Raises:
            ModelError: one is fixed.
        """
        for name, axes in self.free.items():
            for axis, dim in axes.items():
                if isinstance(size := inputs[name].shape[axis], int):
                    raise ModelError(
                        f"{dim} of {name} is not free: axis {axis} is {size} in the model",
                        input=name,
                        axis=axis,
                        hint=f"give the number {size} there, or export the model anew with that dimension free",
                    )


def read_inputs(shapes: Sequence[str] | None, examples: Sequence[Path] | None) -> InputsGiven:
    """What `--shape` and `--example` say together.

    A free dimension without a size has that of an example, or of its name elsewhere; a first one is 1 otherwise.

    Raises:
        ModelError: an entry is not of its form, a file cannot be read, or a free dimension has no size.
    """
    arrays = read_examples(examples)
    given: dict[str, tuple[tuple[str, int | None], ...]] = {}
    for name, dims in map(_read_shape, shapes or []):
        if name in given:
            raise ModelError(f"--shape gives {name} twice", input=name)
        given[name] = dims
    sizes: dict[str, int] = {}
    for name, dims in given.items():
        shape = arrays[name].shape if name in arrays else tuple(size for _, size in dims)
        if len(shape) != len(dims) or any(size not in (None, n) for (_, size), n in zip(dims, shape, strict=True)):
            raise ModelError(f"the example of {name} is {'x'.join(map(str, shape))}, not as --shape says", input=name)
        for (dim, _), size in zip(dims, shape, strict=True):
            if dim and size is not None and sizes.setdefault(dim, size) != size:
                raise ModelError(f"the free dimension {dim} is {sizes[dim]} and {size}", dimension=dim)
    return InputsGiven(
        {name: tuple(_sizes(name, dims, sizes)) for name, dims in given.items()},
        {n: free for n, dims in given.items() if (free := {a: d for a, (d, _) in enumerate(dims) if d})},
        arrays,
    )


def _sizes(name: str, dims: Sequence[tuple[str, int | None]], sizes: Mapping[str, int]) -> Iterator[int]:
    for axis, (dim, size) in enumerate(dims):
        found = size if not dim else sizes.get(dim, 1 if axis == 0 else None)
        if found is None:
            text = ",".join(f"{d}:{n or 128}" if d else str(n) for d, n in dims)
            raise ModelError(
                f"the free dimension {dim} of {name} has no size to count with",
                input=name,
                hint=f"give it one: --shape {name}={text}",
            )
        yield found


def _read_shape(entry: str) -> tuple[str, tuple[tuple[str, int | None], ...]]:
    """An input's name, and the name (empty where it is fixed) and size of each dimension."""
    name, equals, text = entry.rpartition("=")
    if equals and name and "," not in text and _BETWEEN_LETTERS.search(text):
        raise ModelError(
            f"--shape is {entry!r}, where an x may belong to a name",
            hint="separate the dimensions by commas: NAME=batch,3,320,640",
        )
    parts = [_DIMENSION.fullmatch(part) for part in re.split("," if "," in text else "x", text)] if text else []
    dims = tuple((p["name"] or "", int(n) if (n := p["size"] or p["number"]) else None) for p in parts if p)
    if equals and any(size is not None and size > _MAX_SIZE for _, size in dims):
        raise ModelError(f"--shape is {entry!r}; a dimension is at most {_MAX_SIZE}", input=name)
    if not equals or not name or len(dims) != len(parts):
        raise ModelError(
            f"--shape is {entry!r}; it is NAME=1x3x320x640, or NAME=batch,3,320,640 with names for free dimensions"
        )
    return name, dims


def read_examples(given: Sequence[Path] | None) -> Mapping[str, Array]:
    """The arrays of .npz files and of `NAME=FILE.npy` entries.

    Raises:
        ModelError: a file cannot be read as such, or two give one name.
    """
    from isthmus_tools import array_files

    found: dict[str, Array] = {}
    for entry in map(str, given or []):
        # A file is a file, whatever its name holds.
        name, file = ("", entry) if Path(entry).is_file() else named_file(entry)
        try:
            loaded = array_files.read_one(Path(file)) if name else array_files.read(Path(file))
        except ValueError as e:
            raise ModelError(f"{e}", hint="--example is an .npz file, or NAME=FILE.npy") from e
        if not isinstance(loaded, Mapping):
            if not name:
                raise ModelError(f"{file} holds one array, without a name", hint=f"--example NAME={file}")
            loaded = {name: loaded}
        if again := sorted(found.keys() & loaded.keys()):
            raise ModelError(f"--example gives {', '.join(again)} twice", input=again[0])
        found.update(loaded)
    return found
