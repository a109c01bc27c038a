"""Codecs: the encoding of a tensor inside a frame, by the id in the frame's header.

A codec is a pure function from an array to bytes and back. Learned parameters are in a *table*, stored in the bundle.
Decoding checks its input before allocation, and gives the same array on every machine. An id ends in the version of
its format. Source: docs/reference/codecs.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np

from isthmus.arrays import DTYPES, Array
from isthmus.artifacts.choice import LOSSLESS_ID, PHOTO_ID, RAW_ID, SPARSE_ID, TRANSFORM_ID, Choice
from isthmus.artifacts.tensors import TensorSpec

MAX_DECODING_BYTES = 64 * 2**20
"""Memory bound for decoding a tensor, its array included: the default of the setting max_request_bytes. Larger
tensors travel raw, since readers would refuse their decoding."""

_CODECS: Mapping[str, str] = {
    RAW_ID: "raw:RAW",
    "half/1": "half:HALF",
    "bfloat16/1": "half:BFLOAT16",
    LOSSLESS_ID: "lossless:LOSSLESS",
    "int8/1": "affine:INT8",
    "int4/1": "affine:INT4",
    "int8-token/1": "affine:INT8_TOKEN",
    SPARSE_ID: "sparse:SPARSE",
    TRANSFORM_ID: "transform.codec:TRANSFORM",
    PHOTO_ID: "image:PHOTO",
}
# Ids, masks and states of counters have no redundancy that a lossy codec may use.
_EXACT_DEFAULT = LOSSLESS_ID
_EXACT = frozenset({RAW_ID, LOSSLESS_ID, PHOTO_ID})
_ACTIVATIONS = frozenset({"float16", "bfloat16", "float32"})


class NotEncodable(ValueError):
    """The codec cannot represent this array: the tensor travels raw instead."""


@dataclass(frozen=True)
class EncodedTensor:
    """An encoded tensor: its payload, and the dtype and shape of the decoded array."""

    codec: str
    dtype: str
    shape: tuple[int, ...]
    payload: bytes | memoryview

    @property
    def nbytes(self) -> int:
        return len(self.payload)


@dataclass(frozen=True)
class Encoding:
    """How to encode a tensor.

    `quality`, from 0 to 1, is for codecs that trade bytes for error, `table` for calibrated codecs.
    """

    codec: str
    quality: float = 1.0
    table: object = None


class Codec(Protocol):
    """The interface of a codec."""

    @property
    def calibrated(self) -> bool:
        """Whether decoding needs a table."""
        ...

    def encode(self, array: Array, encoding: Encoding) -> bytes | memoryview:
        """The payload of `array` (any shape and strides).

        Raises:
            NotEncodable: an unsupported dtype, NaN, or values out of range.
        """
        ...

    def working_bytes(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
        """Upper bound on the memory that `decode` allocates besides the array and the payload, in bytes.

        Readers count this in their bound before decoding; dtypes that the codec refuses have a bound as well.
        """
        ...

    def decode(self, payload: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...], table: object) -> Array:
        """The array of the dtype and shape in the header, within the reader's bounds.

        Raises:
            ValueError: the payload is malformed, or has another dtype or shape.
        """
        ...


Tables: TypeAlias = Callable[[str, str, str], object]
"""The table of a tensor, by the bundle's digest, the tensor's name and the codec's id."""


def find_codec(codec: str) -> Codec:
    """The codec of that id, imported on first use: a function loads only the codecs of its frames.

    Raises:
        KeyError: an unknown id.
    """
    module, _, name = _CODECS[codec].partition(":")
    instance: Codec = getattr(importlib.import_module(f"isthmus.codecs.{module}"), name)
    return instance


def encode_tensor(array: Array, encoding: Encoding) -> EncodedTensor | Array:
    """Encode `array`; returns the array unchanged if the codec cannot represent its values or gains nothing, or if
    decoding would exceed MAX_DECODING_BYTES.

    Raises:
        KeyError: an unknown codec.
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
    return EncodedTensor(encoding.codec, array.dtype.name, array.shape, payload)


def encodings(
    specs: Iterable[TensorSpec], choice: Choice, table: Callable[[str], object] | None = None
) -> dict[str, Encoding]:
    """The encodings of the tensors of a hop: `choice` for activations, an exact codec for all other tensors.

    `table` is called with a tensor's name, for calibrated codecs only. A tensor without a table is no activation:
    calibration found, say, an attention mask of two values.
    """
    if choice.codec == RAW_ID:
        return {}
    calibrated = find_codec(choice.codec).calibrated
    result = {}
    for spec in specs:
        learned = table(spec.name) if calibrated and table is not None and is_activation(spec) else None
        exact = not is_activation(spec) or (calibrated and learned is None)
        result[spec.name] = Encoding(_EXACT_DEFAULT) if exact else Encoding(choice.codec, choice.quality, learned)
    return result


def decode_tensor(tensor: EncodedTensor, table: object = None) -> Array:
    """The array of an encoded tensor, as its receiver decodes it.

    Raises:
        KeyError: an unknown codec or dtype.
        ValueError: the payload is malformed.
    """
    return find_codec(tensor.codec).decode(memoryview(tensor.payload), DTYPES[tensor.dtype], tensor.shape, table)


def is_exact(encoding: Choice | Encoding) -> bool:
    """Whether decoding restores every bit, so that predictions cannot differ."""
    return encoding.codec in _EXACT or (encoding.codec == SPARSE_ID and encoding.quality >= 1)


def is_activation(spec: TensorSpec) -> bool:
    """Whether a lossy codec may encode this tensor: floats of at most 32 bits."""
    return spec.dtype in _ACTIVATIONS
