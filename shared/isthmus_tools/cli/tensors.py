"""What a model is run on to be measured: a photo, tensors from files, or random ones of the shapes it declares."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from isthmus.arrays import Array, check_tensors
from isthmus.artifacts.bundle import Bundle
from isthmus.errors import RequestMalformed
from isthmus_tools.array_files import read_one
from isthmus_tools.cli.files import named_file
from isthmus_tools.planner.examples import from_arrays, from_photos, random_examples
from isthmus_tools.zoo.photos import read_photo


def read_inputs(bundle: Bundle, photo: Path | None, tensors: Sequence[str]) -> tuple[str, dict[str, Array]]:
    """What the inputs are called in a profile, and each input's array.

    Raises:
        RequestMalformed: both a photo and tensors, or a file that cannot be read.
        MediaUnsupported: a photo for a model that declares no processing of one.
        ShapeMismatch: tensors that do not fit the model.
    """
    if photo is not None and tensors:
        raise RequestMalformed("give --input or --tensor, not both")
    if photo is not None:
        name, made = "photo", from_photos(bundle, [read_photo(photo)])
    elif tensors:
        name, made = "tensors", from_arrays(bundle, [read_tensors(tensors)])
    else:
        name, made = "random", random_examples(bundle, 1)
    check_tensors(bundle.inputs, made[0].arrays)
    return name, dict(made[0].arrays)


def read_tensor(entry: str) -> tuple[str, Array]:
    """The name and the array of NAME=FILE.npy.

    Raises:
        RequestMalformed: another form, or a file that cannot be read.
    """
    name, file = named_file(entry)
    if not name or not file:
        raise RequestMalformed(f"--tensor is {entry!r}; it is NAME=FILE.npy")
    try:
        return name, read_one(Path(file))
    except ValueError as e:
        raise RequestMalformed(f"{e}", option="--tensor") from e


def read_tensors(entries: Sequence[str]) -> dict[str, Array]:
    """The arrays of NAME=FILE.npy entries, by name.

    Raises:
        RequestMalformed: as `read_tensor`, or two of one name.
    """
    found: dict[str, Array] = {}
    for name, array in map(read_tensor, entries):
        if name in found:
            raise RequestMalformed(f"--tensor gives {name} twice", option="--tensor")
        found[name] = array
    return found
