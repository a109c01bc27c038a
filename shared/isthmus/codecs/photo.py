"""A photo as it came, as the packed form of the tensor that a model's pre-processing makes of it.

So "cloud only, with the JPEG" is the uncut model behind a hop, and the smallest codec of its input. Nothing packs an
array this way: the caller has the photo.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import ShapeMismatch
from isthmus.processing.image_budget import SHARED, ImageMemory

if TYPE_CHECKING:
    from isthmus.codecs import Encoding


@dataclass(frozen=True)
class Recipe:
    """How the bundle makes a tensor of a photo; `max_pixels` and `memory` bound what is decoded."""

    spec: Mapping[str, Any]
    input: TensorSpec
    max_pixels: int
    memory: ImageMemory = SHARED


class Photo:
    """See `Codec`; its table is a `Recipe`."""

    calibrated = True

    def encode(self, array: np.ndarray[Any, np.dtype[Any]], encoding: Encoding) -> NoReturn:
        """Nothing makes a photo of a tensor.

        Raises:
            NotEncodable: always.
        """
        from isthmus.codecs import NotEncodable

        raise NotEncodable("a tensor is no photo")

    def working_bytes(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
        """Nothing that follows from the tensor: the recipe bounds what a picture may take."""
        return 0

    def decode(
        self, payload: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...], table: object
    ) -> np.ndarray[Any, np.dtype[Any]]:
        """The tensor that the bundle's pre-processing makes of the photo.

        Raises:
            ValueError: the bundle makes no photo into this tensor, or not one of that dtype and shape.
            ImageMalformed, MediaUnsupported, RequestTooLarge: the photo, as POST / would say.
        """
        if not isinstance(table, Recipe):
            raise ValueError("the bundle makes no tensor of that name from a photo")
        from isthmus.processing.image import preprocess  # Pillow, for those who are sent photos

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
