"""`photo/1`: a compressed image file as the encoded form of the model's input tensor.

"Cloud only, with the JPEG" is the uncut model behind a hop, and the file the smallest encoding of its input. No array
is encoded this way: the caller has the file, and decoding is the bundle's pre-processing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from isthmus.arrays import Array
from isthmus.artifacts.tensors import TensorSpec
from isthmus.codecs import Encoding, NotEncodable
from isthmus.errors import ShapeMismatch
from isthmus.processing.image_budget import SHARED, ImageMemory


@dataclass(frozen=True)
class Recipe:
    """The bundle's pre-processing of an image to a tensor; `max_pixels` and `memory` bound the decoding."""

    spec: Mapping[str, Any]
    input: TensorSpec
    max_pixels: int
    memory: ImageMemory = SHARED


class Photo:
    """See `Codec`; its table is a `Recipe`."""

    calibrated = True

    def encode(self, array: Array, encoding: Encoding) -> NoReturn:
        """Unsupported: a tensor has no image file.

        Raises:
            NotEncodable: always.
        """
        raise NotEncodable("a tensor is no photo")

    def working_bytes(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
        """See `Codec`: none that follows from the tensor; the recipe bounds the picture's memory."""
        return 0

    def decode(self, payload: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...], table: object) -> Array:
        """The tensor that the bundle's pre-processing makes of the image.

        Raises:
            ValueError: no recipe, or another dtype or shape than the recipe's.
            ImageMalformed, MediaUnsupported, RequestTooLarge: the image, as for POST /.
        """
        if not isinstance(table, Recipe):
            raise ValueError("the bundle makes no tensor of that name from a photo")
        from isthmus.processing.image import preprocess  # Pillow is slow to import, and few functions decode images

        try:
            array = preprocess(
                bytes(payload), table.spec, input=table.input, max_pixels=table.max_pixels, memory=table.memory
            )
        except ShapeMismatch as e:
            raise ValueError(str(e)) from e
        if array.dtype != dtype or array.shape != shape:
            raise ValueError(f"the photo becomes {array.dtype.name}{list(array.shape)}")
        return array


PHOTO = Photo()
