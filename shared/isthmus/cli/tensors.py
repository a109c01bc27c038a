"""What a model is run on to be measured: a photo, tensors from files, or random ones of the shapes it declares."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from isthmus.bundle import Bundle
from isthmus.cli.files import named_file
from isthmus.cli.photos import read_photo
from isthmus.client import Array
from isthmus.dtypes import DTYPES, restored
from isthmus.errors import RequestMalformed
from isthmus.planner.planning.examples import from_arrays, from_photos, random_examples
from isthmus.runners import check_tensors


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
        name, made = "tensors", from_arrays(bundle, [dict(read_tensor(entry) for entry in tensors)])
    else:
        name, made = "random", random_examples(bundle, 1)
    check_tensors(bundle.inputs, made[0].arrays)
    return name, dict(made[0].arrays)


def read_tensor(entry: str) -> tuple[str, Array]:
    """The name and the array of NAME=FILE.npy; two bytes a value without a type, as numpy writes bfloat16, are that.

    Raises:
        RequestMalformed: another form, or a file that cannot be read.
    """
    name, file = named_file(entry)
    if not name:
        raise RequestMalformed(f"--tensor is {entry!r}; it is NAME=FILE.npy")
    try:
        # numpy leaves a broken file open that it opened itself.
        with open(file, "rb") as opened:
            loaded = np.load(opened, allow_pickle=False)
    except (OSError, ValueError, EOFError, BadZipFile) as e:
        raise RequestMalformed(f"{file} cannot be read as a .npy file: {e}") from e
    if not isinstance(loaded, np.ndarray):
        loaded.close()
        raise RequestMalformed(f"{file} holds several arrays; --tensor takes a .npy file of one", option="--tensor")
    array: Array = restored(loaded)
    if array.dtype.newbyteorder("<") not in DTYPES.values():
        raise RequestMalformed(
            f"{file} holds {array.dtype}; a tensor is one of {', '.join(DTYPES)}",
            option="--tensor",
            hint="bfloat16 is what numpy writes of ml_dtypes.bfloat16: two bytes a value",
        )
    return name, array
