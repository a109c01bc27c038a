"""Arrays and tensor specs: the dtypes that frames carry, and the check of tensors against what is declared."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from isthmus.artifacts.tensors import TensorSpec, TensorType, check_types

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

DTYPES: Mapping[str, np.dtype[Any]] = {
    **{
        name: np.dtype(np.dtype(name).newbyteorder("<").str)
        for name in (
            *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
            *("float16", "float32", "float64"),
        )
    },
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""The dtypes that a frame can carry, by the name that it writes."""


def restored(array: Array) -> Array:
    """An array as it was before numpy wrote it to a .npy file, where bfloat16 is two bytes a value without a name."""
    if array.dtype.kind == "V" and array.dtype.names is None and array.dtype.itemsize == 2:
        return array.view(DTYPES["bfloat16"])
    return array


_name = lru_cache(64)(lambda dtype: dtype.name)  # numpy makes it anew whenever it is asked


def check_tensors(specs: tuple[TensorSpec, ...], arrays: Mapping[str, Array]) -> None:
    """Refuse arrays that are not what `specs` declare; a free dimension of one name has one size everywhere.

    Raises:
        ShapeMismatch: names the tensor, what was expected and what came.
    """
    check_types(specs, {name: TensorType(_name(array.dtype), array.shape) for name, array in arrays.items()})
