"""How fast codecs are on this machine: one tensor like a layer's output, packed and unpacked by each."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median

import numpy as np

from isthmus.arrays import Array
from isthmus.artifacts.choice import KNOWN, NEVER_CHOSEN, RAW_ID
from isthmus.artifacts.profile import CodecSpeed
from isthmus.codecs import EncodedTensor, Encoding, encode_tensor, find_codec

VALUES = 2**16
_BATCHES, _BATCH_S = 2, 0.012
"""A batch is longer than the periods of most CPU quotas' slices: what fits into one slice looks faster than it is."""
_UNTIMED = NEVER_CHOSEN | {RAW_ID}


def speeds(longest_s: float = 2.0) -> dict[str, CodecSpeed]:
    """What each codec that needs no calibration takes for a value, the least mean of a few batches; those that no time
    was left for are not among them.

    The tensor is the same on every machine, so that two machines' seconds may be set against each other: 64 maps of
    32 x 32 values, half of them zeros, as after a ReLU.
    """
    until = time.monotonic() + longest_s
    found: dict[str, CodecSpeed] = {}
    array = _like_a_layers_output()
    for codec in KNOWN:
        if time.monotonic() > until:
            break
        if codec in _UNTIMED or (made := find_codec(codec)).calibrated:
            continue
        how = Encoding(codec)
        encoded = encode_tensor(array, how)
        if not isinstance(encoded, EncodedTensor):
            continue
        payload = memoryview(encoded.payload)
        encode_s = _seconds(partial(encode_tensor, array, how), until)
        decode_s = _seconds(partial(made.decode, payload, array.dtype, array.shape, None), until)
        found[codec] = CodecSpeed(encode_s / VALUES, decode_s / VALUES)
    return found


def compared(there: Mapping[str, CodecSpeed], here: Mapping[str, CodecSpeed]) -> dict[str, CodecSpeed]:
    """How many times slower each codec is there than here; those that either lacks go by the median of the others."""
    both = there.keys() & here.keys()
    if not both:
        return {}
    known = {
        codec: CodecSpeed(there[codec].pack_s / here[codec].pack_s, there[codec].unpack_s / here[codec].unpack_s)
        for codec in both
    }
    typical = CodecSpeed(median(s.pack_s for s in known.values()), median(s.unpack_s for s in known.values()))
    return dict.fromkeys(KNOWN, typical) | known


def _like_a_layers_output() -> Array:
    rng = np.random.default_rng(0)
    maps = rng.standard_normal((1, 64, 32, 32), dtype=np.float32)
    return np.maximum(np.cumsum(maps, axis=3, dtype=np.float32), 0)


def _seconds(do: Callable[[], object], until: float) -> float:
    do()
    least = float("inf")
    for _ in range(_BATCHES):
        count, start = 0, time.perf_counter()
        while (spent := time.perf_counter() - start) < _BATCH_S or not count:
            do()
            count += 1
        least = min(least, spent / count)
        if time.monotonic() > until:
            break
    return least
