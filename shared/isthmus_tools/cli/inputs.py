"""Texts of the options --shape, --example and --tensor: shapes and arrays of a model's inputs by name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from isthmus.arrays import Array
from isthmus.errors import ModelError, RequestMalformed
from isthmus_tools import array_files

if TYPE_CHECKING:  # its module loads onnx
    from isthmus_tools.graph.exporting import ModelInputs

# Of a dimension: graphs hold sizes in 64 bits, and byte counts are products of several dimensions.
_MAX_SIZE = 2**31 - 1
# At most 18 digits, since `int` refuses texts of thousands.
_DIMENSION = re.compile(r"(?P<name>[A-Za-z_]\w*)(:(?P<size>\d{1,18}))?|(?P<number>\d{1,18})")
_BETWEEN_LETTERS = re.compile(r"[A-Za-z_]x[A-Za-z_]")


def read_model_inputs(shapes: Sequence[str] | None, examples: Sequence[Path] | None) -> ModelInputs:
    """The inputs that --shape and --example declare together.

    A free dimension without a size takes an example's size, or its name's elsewhere; a first dimension is 1 otherwise.

    Raises:
        ModelError: an entry is not of its form, a file cannot be read, or a free dimension has no size.
    """
    from isthmus_tools.graph.exporting import ModelInputs

    arrays = read_examples(examples)
    declared: dict[str, tuple[tuple[str, int | None], ...]] = {}
    for name, dims in map(_read_shape, shapes or []):
        if name in declared:
            raise ModelError(f"--shape gives {name} twice", input=name)
        declared[name] = dims
    sizes: dict[str, int] = {}
    for name, dims in declared.items():
        shape = arrays[name].shape if name in arrays else tuple(size for _, size in dims)
        if len(shape) != len(dims) or any(size not in (None, n) for (_, size), n in zip(dims, shape, strict=True)):
            raise ModelError(f"the example of {name} is {'x'.join(map(str, shape))}, not as --shape says", input=name)
        for (dim, _), size in zip(dims, shape, strict=True):
            if dim and size is not None and sizes.setdefault(dim, size) != size:
                raise ModelError(f"the free dimension {dim} is {sizes[dim]} and {size}", dimension=dim)
    return ModelInputs(
        {name: tuple(_sizes(name, dims, sizes)) for name, dims in declared.items()},
        {n: free for n, dims in declared.items() if (free := {a: d for a, (d, _) in enumerate(dims) if d})},
        arrays,
    )


def _sizes(name: str, dims: Sequence[tuple[str, int | None]], sizes: Mapping[str, int]) -> Iterator[int]:
    for axis, (dim, size) in enumerate(dims):
        # The first dimension is the batch by convention.
        length = size if not dim else sizes.get(dim, 1 if axis == 0 else None)
        if length is None:
            text = ",".join(f"{d}:{n or 128}" if d else str(n) for d, n in dims)
            raise ModelError(
                f"the free dimension {dim} of {name} has no size to count with",
                input=name,
                hint=f"give it one: --shape {name}={text}",
            )
        yield length


def _read_shape(entry: str) -> tuple[str, tuple[tuple[str, int | None], ...]]:
    """An input's name, and the name (empty for a fixed dimension) and size of each dimension."""
    # From the right: a name may hold a "=", a shape cannot.
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


def read_examples(entries: Sequence[Path] | None) -> Mapping[str, Array]:
    """The arrays of .npz files and of `NAME=FILE.npy` entries.

    Raises:
        ModelError: a file cannot be read, or two files give the same name.
    """
    arrays: dict[str, Array] = {}
    for entry in map(str, entries or []):
        # The name of a file may hold a "=".
        name, file = ("", entry) if Path(entry).is_file() else named_file(entry)
        try:
            loaded = array_files.read_one(Path(file)) if name else array_files.read(Path(file))
        except ValueError as e:
            raise ModelError(f"{e}", hint="--example is an .npz file, or NAME=FILE.npy") from e
        if not isinstance(loaded, Mapping):
            if not name:
                raise ModelError(f"{file} holds one array, without a name", hint=f"--example NAME={file}")
            loaded = {name: loaded}
        if repeated := sorted(arrays.keys() & loaded.keys()):
            raise ModelError(f"--example gives {', '.join(repeated)} twice", input=repeated[0])
        arrays.update(loaded)
    return arrays


def read_tensors(entries: Sequence[str] | None) -> dict[str, Array]:
    """The arrays of NAME=FILE.npy entries, by name.

    Raises:
        RequestMalformed: another form, a file that cannot be read, or the same name twice.
    """
    arrays: dict[str, Array] = {}
    for entry in entries or []:
        name, file = named_file(entry)
        if not name or not file:
            raise RequestMalformed(f"--tensor is {entry!r}; it is NAME=FILE.npy")
        if name in arrays:
            raise RequestMalformed(f"--tensor gives {name} twice", option="--tensor")
        try:
            arrays[name] = array_files.read_one(Path(file))
        except ValueError as e:
            raise RequestMalformed(f"{e}", option="--tensor") from e
    return arrays


def named_file(entry: str) -> tuple[str, str]:
    """The two sides of NAME=FILE; of several "=", the first before an existing file separates."""
    splits = [(entry[: match.start()], entry[match.end() :]) for match in re.finditer("=", entry)]
    return next((split for split in splits if Path(split[1]).is_file()), splits[0] if splits else ("", entry))
