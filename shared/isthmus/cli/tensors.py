"""What a model is run on to be measured: a photo, tensors from files, or random ones of the shapes it declares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from isthmus.bundle import Bundle
from isthmus.client import Array
from isthmus.errors import MediaUnsupported, RequestMalformed
from isthmus.frame import DTYPES
from isthmus.processing.image import preprocess
from isthmus.runners import check_tensors

_MAX_PIXELS = 64_000_000


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
        name, arrays = "photo", _of_photo(bundle, photo)
    elif tensors:
        name, arrays = "tensors", dict(read_tensor(entry) for entry in tensors)
    else:
        name, arrays = "random", random_inputs(bundle)
    check_tensors(bundle.inputs, arrays)
    return name, arrays


def read_tensor(entry: str) -> tuple[str, Array]:
    """The name and the array of NAME=FILE.npy.

    Raises:
        RequestMalformed: another form, or a file that cannot be read.
    """
    name, equals, file = entry.partition("=")
    if not equals or not name:
        raise RequestMalformed(f"--tensor is {entry!r}; it is NAME=FILE.npy")
    try:
        array: Array = np.load(file, allow_pickle=False)
    except (OSError, ValueError) as e:
        raise RequestMalformed(f"{file} cannot be read as a .npy file: {e}") from e
    return name, array


def random_inputs(bundle: Bundle) -> dict[str, Array]:
    """Normal numbers for floats, ones for whole numbers and truths, of the shapes that the bundle was cut for.

    Whole numbers are indices or counts more often than not, and a random one would lie outside. Those that the bundle
    gives as examples are taken as they are.
    """
    shapes: Mapping[str, Sequence[int]] = bundle.source.get("bind", {})
    examples = bundle.source.get("examples", {})
    rng = np.random.default_rng(0)
    found: dict[str, Array] = {}
    for spec in bundle.inputs:
        dtype = DTYPES[spec.dtype]
        if (example := examples.get(spec.name)) is not None:
            found[spec.name] = np.asarray(example["value"], dtype)
            continue
        shape = shapes.get(spec.name) or [n if isinstance(n, int) else 1 for n in spec.shape]
        made = np.ones(shape) if spec.dtype == "bool" or "int" in spec.dtype else rng.standard_normal(shape)
        found[spec.name] = made.astype(dtype)
    return found


def _of_photo(bundle: Bundle, path: Path) -> dict[str, Array]:
    if bundle.preprocess is None:
        raise MediaUnsupported(
            f"{bundle.name} declares no processing of photos", hint="give it tensors: --tensor NAME=FILE.npy"
        )
    try:
        data = path.read_bytes()
    except OSError as e:
        raise RequestMalformed(f"{path} cannot be read: {e.strerror}") from e
    taken = next(s for s in bundle.inputs if s.name == bundle.preprocess["input"])
    return {taken.name: preprocess(data, bundle.preprocess, input=taken, max_pixels=_MAX_PIXELS)}
