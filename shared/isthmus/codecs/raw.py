"""`raw`: the tensor's own bytes, row-major and little-endian, without a copy where strides and byte order allow."""

from __future__ import annotations

from typing import Any

import numpy as np

from isthmus.arrays import Array
from isthmus.codecs import Encoding
from isthmus.codecs.payload import bytes_of, count_of


class Raw:
    """See `Codec`."""

    calibrated = False

    def encode(self, array: Array, encoding: Encoding | None = None) -> memoryview:
        """The bytes of `array` in row-major little-endian order; copied only if its strides or byte order differ."""
        return bytes_of(np.ascontiguousarray(array, array.dtype.newbyteorder("<")))

    def working_bytes(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
        """See `Codec`: none, the array is a view of the payload."""
        return 0

    def decode(self, payload: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...], table: object = None) -> Array:
        """A view of `payload`, read-only if the payload is.

        Raises:
            ValueError: another length than that of the dtype and shape, or a bool that is neither 0 nor 1.
        """
        if len(payload) != (size := count_of(shape) * dtype.itemsize):
            raise ValueError(f"{len(payload)} bytes are not {dtype.name}{list(shape)} ({size} bytes)")
        array: Array = np.ndarray(shape, dtype, buffer=payload)
        if dtype == np.bool_ and array.size and int(array.view(np.uint8).max()) > 1:
            raise ValueError("a bool is stored as 0 or 1")
        return array


RAW = Raw()
