"""A benchmark of the codecs on this machine: encoding and decoding of one tensor like a layer's output."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median

import numpy as np

from isthmus.arrays import Array
from isthmus.artifacts.choice import CODEC_IDS, INPUT_CODECS, RAW_ID
from isthmus.artifacts.profile import CodecSpeed
from isthmus.codecs import EncodedTensor, Encoding, encode_tensor, find_codec

VALUES = 2**16
# A batch is longer than a slice of most CPU quotas: within one slice, codecs look too fast.
_BATCHES, _BATCH_S = 2, 0.012
_UNTIMED = INPUT_CODECS | {RAW_ID}


def speeds(max_s: float = 2.0) -> dict[str, CodecSpeed]:
    """Seconds per value of each codec without calibration, the least mean of a few batches; as many as `max_s` allows.

    The tensor is the same on every machine, so that machines can be compared: 64 maps of 32 x 32 values, half of them
    zeros, as after a ReLU.
    """
    until = time.monotonic() + max_s
    result: dict[str, CodecSpeed] = {}
    array = _synthetic_activations()
    for codec in CODEC_IDS:
        if time.monotonic() > until:
            break
        if codec in _UNTIMED or (instance := find_codec(codec)).calibrated:
            continue
        encoding = Encoding(codec)
        encoded = encode_tensor(array, encoding)
        if not isinstance(encoded, EncodedTensor):
            continue
        payload = memoryview(encoded.payload)
        encode_s = _seconds(partial(encode_tensor, array, encoding), until)
        decode_s = _seconds(partial(instance.decode, payload, array.dtype, array.shape, None), until)
        result[codec] = CodecSpeed(encode_s / VALUES, decode_s / VALUES)
    return result


def compared(remote: Mapping[str, CodecSpeed], local: Mapping[str, CodecSpeed]) -> dict[str, CodecSpeed]:
    """The slowdown of each codec on the remote machine; the median where a measurement is missing."""
    both = remote.keys() & local.keys()
    if not both:
        return {}
    factors = {
        codec: CodecSpeed(remote[codec].pack_s / local[codec].pack_s, remote[codec].unpack_s / local[codec].unpack_s)
        for codec in both
    }
    typical = CodecSpeed(median(s.pack_s for s in factors.values()), median(s.unpack_s for s in factors.values()))
    return dict.fromkeys(CODEC_IDS, typical) | factors


def _synthetic_activations() -> Array:
    rng = np.random.default_rng(0)
    maps = rng.standard_normal((1, 64, 32, 32), dtype=np.float32)
    return np.maximum(np.cumsum(maps, axis=3, dtype=np.float32), 0)


def _seconds(call: Callable[[], object], until: float) -> float:
    call()
    shortest = float("inf")
    for _ in range(_BATCHES):
        count, start = 0, time.perf_counter()
        while (spent := time.perf_counter() - start) < _BATCH_S or not count:
            call()
            count += 1
        shortest = min(shortest, spent / count)
        if time.monotonic() > until:
            break
    return shortest
