"""Arrays for the tests of codecs without a table, and their round trip."""

from __future__ import annotations

import numpy as np

from isthmus.arrays import Array
from isthmus.artifacts.choice import CODEC_IDS, INPUT_CODECS, RAW_ID
from isthmus.codecs import Encoding, find_codec

PLAIN = tuple(c for c in CODEC_IDS if c not in INPUT_CODECS | {RAW_ID} and not find_codec(c).calibrated)


def back(codec: str, array: Array, quality: float = 1.0) -> Array:
    """`array` encoded and decoded, whether or not that makes it smaller."""
    payload = find_codec(codec).encode(array, Encoding(codec, quality))
    return find_codec(codec).decode(memoryview(payload), array.dtype.newbyteorder("<"), array.shape, None)


def feature_map(*shape: int, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.standard_normal((1, shape[1], *[1] * (len(shape) - 2))))
    return (rng.laplace(size=shape) * scale).astype("float32")


def relu(*shape: int) -> Array:
    return np.maximum(feature_map(*shape), 0)


def bits(array: Array) -> bytes:
    return np.ascontiguousarray(array).tobytes()
