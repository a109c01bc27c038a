"""What goes to the last hop, sent and received here: bytes of the frames, seconds of packing and unpacking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

from isthmus.arrays import Array
from isthmus.codecs import EncodedTensor, Encoding, find_codec
from isthmus.pipeline import encode_tensors
from isthmus.wire import frame as frames
from isthmus.wire.frame import DTYPES, Frame
from isthmus_tools.planner.timing import timed

_CALL_ID = "0" * 36
_DIGEST = "sha256:" + "0" * 64


class Send(NamedTuple):
    """One send: bytes of its frame, seconds here, what went packed, and the same as it arrives."""

    nbytes: int
    encode_s: float
    decode_s: float
    coded: Mapping[str, EncodedTensor]
    arrived: Mapping[str, Array]


def send(arrays: Mapping[str, Array], segment: str, how: Mapping[str, Encoding]) -> Send:
    """`arrays` on their way to that segment, packed as `how` says."""
    encode_s, coded = timed(partial(encode_tensors, arrays, how))
    rest = {name: array for name, array in arrays.items() if name not in coded}
    decode_s, unpacked = timed(partial(_unpack, coded, how))
    nbytes = frame_bytes(rest, segment, coded)
    return Send(nbytes, encode_s if coded else 0.0, decode_s if coded else 0.0, coded, unpacked)


def sends(arrays: Mapping[str, Array], segment: str, hows: Sequence[Mapping[str, Encoding]]) -> list[Send]:
    """The transmissions of closer looks one after the other, each of all `arrays`.

    Only the first, where it encoded nothing that could be finer.
    """
    first = send(arrays, segment, hows[0])
    if not any(hows[0][name].quality < hows[-1][name].quality for name in first.coded):
        return [first]
    return [first, *(send(arrays, segment, how) for how in hows[1:])]


def frame_bytes(arrays: Mapping[str, Array], segment: str, encoded: Mapping[str, EncodedTensor] | None = None) -> int:
    """Bytes of the frame that takes these to a segment, or back."""
    return sum(map(len, frames.encode_parts(Frame(arrays, _DIGEST, segment, _CALL_ID, encoded or {}))))


def _unpack(coded: Mapping[str, EncodedTensor], how: Mapping[str, Encoding]) -> dict[str, Array]:
    return {
        name: find_codec(p.codec).decode(memoryview(p.payload), DTYPES[p.dtype], p.shape, how[name].table)
        for name, p in coded.items()
    }
