"""Arrays: the dtypes of frames, and validation of arrays against tensor specs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from isthmus.artifacts.tensors import DTYPE_NAMES, TensorSpec, TensorType, check_types

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

# The dtypes of frames by name, little-endian as on the wire.
DTYPES: Mapping[str, np.dtype[Any]] = {
    # numpy itself has no bfloat16.
    name: np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name).newbyteorder("<").str)
    for name in DTYPE_NAMES
}


def restore_bfloat16(array: Array) -> Array:
    """The array before numpy wrote a .npy file, in which bfloat16 is an unnamed two-byte type."""
    if array.dtype.kind == "V" and array.dtype.names is None and array.dtype.itemsize == 2:
        return array.view(DTYPES["bfloat16"])
    return array


# numpy computes a dtype's name at every access.
_name = lru_cache(64)(lambda dtype: dtype.name)


def check_tensors(specs: tuple[TensorSpec, ...], arrays: Mapping[str, Array]) -> None:
    """Check arrays against `specs`; a named free dimension has one size throughout.

    Raises:
        ShapeMismatch: the message names the tensor, the expected type and the received type.
    """
    check_types(specs, {name: TensorType(_name(array.dtype), array.shape) for name, array in arrays.items()})
