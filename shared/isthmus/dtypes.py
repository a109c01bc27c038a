"""The dtypes that frames carry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

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


def restored(array: np.ndarray[Any, np.dtype[Any]]) -> np.ndarray[Any, np.dtype[Any]]:
    """An array as it was before numpy wrote it to a .npy file, where bfloat16 is two bytes a value without a name."""
    if array.dtype.kind == "V" and array.dtype.names is None and array.dtype.itemsize == 2:
        return array.view(DTYPES["bfloat16"])
    return array
