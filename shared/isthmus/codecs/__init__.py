"""How one tensor is packed inside a frame: a table of codecs by the id that the frame's header names.

A codec is a pair of pure functions over (array) and (bytes, dtype, shape). Decoding checks that the length fits before
it allocates. There is one so far, `raw`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from isthmus.codecs import raw

Array = np.ndarray[Any, np.dtype[Any]]


class Codec(Protocol):
    """The two functions that a codec module has."""

    def encode(self, array: Array) -> memoryview:
        """Pack `array` (any shape and strides); the bytes are the payload."""
        ...

    def decode(self, payload: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
        """Unpack a payload of the dtype and shape that the header states.

        Raises:
            ValueError: the payload is not one of that dtype and shape.
        """
        ...


CODECS: Mapping[str, Codec] = {"raw": raw}
