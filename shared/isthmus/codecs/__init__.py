"""How one tensor is packed inside a frame: a table of codecs by the id that the frame's header names.

A codec turns an array into bytes and back, purely: what it needs beyond them is in a *table*, learned from inputs and
stored in the bundle. Decoding checks what it reads before it allocates, and gives the same array on every machine. An
id ends in the version of what it writes. docs/codecs.md says what each is for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, TypeAlias

import numpy as np

from isthmus.arrays import Array
from isthmus.artifacts.choice import KNOWN, LOSSLESS_ID, RAW_ID, SPARSE_ID, TRANSFORM_ID
from isthmus.codecs import raw


class NotEncodable(ValueError):
    """This codec would not keep what is in the array: the tensor travels raw instead."""


@dataclass(frozen=True)
class EncodedTensor:
    """A tensor as it lies in a frame: its payload, and the dtype and shape that unpacking gives."""

    codec: str
    dtype: str
    shape: tuple[int, ...]
    payload: bytes | memoryview

    @property
    def nbytes(self) -> int:
        return len(self.payload)


@dataclass(frozen=True)
class Encoding:
    """How one tensor is to be packed.

    `quality`, from 0 to 1, matters to codecs that trade bytes for error; `table` to those that were calibrated.
    """

    codec: str
    quality: float = 1.0
    table: object = None


class Codec(Protocol):
    """What each entry of the table has."""

    @property
    def calibrated(self) -> bool:
        """Whether unpacking needs a table."""
        ...

    def encode(self, array: Array, encoding: Encoding) -> bytes | memoryview:
        """The payload of `array` (any shape and strides).

        Raises:
            NotEncodable: the codec cannot keep it: a dtype that it does not take, NaN, values out of range.
        """
        ...

    def working_bytes(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
        """Upper bound on what `decode` allocates besides the array and the payload, in bytes.

        Readers count it in their bound before they decode; a dtype that the codec refuses counts as any other.
        """
        ...

    def decode(self, payload: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...], table: object) -> Array:
        """The array of the dtype and shape that the header states, which the reader has bounded.

        Raises:
            ValueError: the payload is not one of that dtype and shape.
        """
        ...


Tables: TypeAlias = Callable[[str, str, str], object]
"""What a calibrated codec needs to know of a tensor, by the bundle's digest, the tensor's name and the codec's id."""

_PLACES: Mapping[str, str] = {
    "half/1": "half:HALF",
    "bfloat16/1": "half:BFLOAT16",
    LOSSLESS_ID: "lossless:LOSSLESS",
    "int8/1": "affine:INT8",
    "int4/1": "affine:INT4",
    SPARSE_ID: "sparse:SPARSE",
    TRANSFORM_ID: "transform:TRANSFORM",
    "photo/1": "photo:PHOTO",
}


@lru_cache(maxsize=len(KNOWN))
def find_codec(codec: str) -> Codec:
    """The codec of that id, imported on first use: a function pays for those that it is sent.

    Raises:
        KeyError: there is none.
    """
    if codec == RAW_ID:
        return raw.RAW
    module, _, name = _PLACES[codec].partition(":")
    found: Codec = getattr(importlib.import_module(f"isthmus.codecs.{module}"), name)
    return found


MAX_DECODING_BYTES = 64 * 2**20
"""What decoding one tensor may take, the array included: the default of the setting max_request_bytes. A tensor that
would take more travels raw, since a reader would refuse it."""


def encode_tensor(array: Array, encoding: Encoding) -> EncodedTensor | Array:
    """`array` packed, or as it is where the codec would not keep it, would not make it smaller, or where decoding takes
    more memory than readers allow.

    Raises:
        KeyError: no such codec.
    """
    if encoding.codec == RAW_ID:
        return array
    codec = find_codec(encoding.codec)
    if array.nbytes + codec.working_bytes(array.dtype, array.shape) > MAX_DECODING_BYTES:
        return array
    try:
        payload = codec.encode(array, encoding)
    except NotEncodable:
        return array
    if len(payload) >= array.nbytes:
        return array
    return EncodedTensor(encoding.codec, _name(array.dtype), array.shape, payload)


@lru_cache(maxsize=32)
def _name(dtype: np.dtype[Any]) -> str:
    return dtype.name  # which takes numpy 10 µs to say
