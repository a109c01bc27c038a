"""The frames of a language model's steps: bytes each way, and seconds of a codec on hidden states.

Frames are real, and hidden states noise: codecs without calibration take as long for any values.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np

from isthmus.arrays import Array
from isthmus.artifacts.choice import RAW, Choice
from isthmus.artifacts.sampling import LOGPROBS, TOKENS, Sampling
from isthmus.artifacts.segment_id import WHOLE, SegmentId
from isthmus.artifacts.tensors import TensorSpec
from isthmus.codecs import EncodedTensor, decode_tensor, encode_tensor, encodings
from isthmus.wire import frame as frames
from isthmus.wire.frame import Frame, Step
from isthmus_tools.planner.costs import CallBytes
from isthmus_tools.planner.decoder_layers import DecoderLayers

T = TypeVar("T")
# Codecs are timed by the least of a few tries, since the machine may be busy.
_TRIES = 3
# A session's name and a call's id, as the router makes them.
_ID = "0" * 32


class Placement(NamedTuple):
    """The segments of a candidate at the edge and in the cloud, and the codec of the tensor between."""

    name: str
    kind: str
    head: SegmentId | None
    tail: SegmentId | None
    cut: str = ""
    choice: Choice = RAW


class CodedStep(NamedTuple):
    """A step's call of the function in the cloud. Units: bytes of frames, seconds of the codec on this machine."""

    call: CallBytes
    encode_s: float = 0.0
    decode_s: float = 0.0
    is_encoded: bool = False


@dataclass
class StepFrames:
    """Frames of the bundle `digest`."""

    digest: str
    layers: DecoderLayers
    _coded: dict[tuple[Choice, int], CodedStep] = field(default_factory=dict)
    _raw: dict[tuple[str, int], int] = field(default_factory=dict)
    """Bytes of raw hidden states by cut and by the tokens of the step; several codecs share them."""

    def near(self, placement: Placement, tokens: int) -> CallBytes | None:
        """The call of the function at the edge; None without one."""
        if placement.head is None:
            return None
        # The head's reply is raw: router and head are beside each other, before the link.
        ids = self._size(self._ids(tokens), WHOLE)
        if placement.tail is None:
            return CallBytes(ids, self._reply())
        key = (placement.cut, tokens)
        if key not in self._raw:
            self._raw[key] = self._size({placement.cut: self._hidden(tokens)}, WHOLE)
        return CallBytes(ids, self._raw[key])

    def far(self, placement: Placement, tokens: int) -> CodedStep | None:
        """The call of the function in the cloud, over the link; None without one."""
        if placement.tail is None:
            return None
        if placement.head is None:
            return CodedStep(CallBytes(self._size(self._ids(tokens), WHOLE), self._reply()))
        return self.coded(placement.cut, placement.choice, tokens)

    def coded(self, cut: str, choice: Choice, tokens: int) -> CodedStep:
        """A step's hidden states under a codec; timed once."""
        # Codecs of steps have no tables, and so treat the tensors of all cuts alike.
        key = (choice, tokens)
        if key not in self._coded:
            self._coded[key] = self._encode(cut, choice, tokens)
        return self._coded[key]

    def _encode(self, cut: str, choice: Choice, tokens: int) -> CodedStep:
        hidden, segment = self._hidden(tokens), SegmentId(cut)
        spec = TensorSpec(cut, str(hidden.dtype), hidden.shape)
        how = encodings([spec], choice).get(cut)
        # The raw codec encodes nothing.
        if how is None:
            return CodedStep(CallBytes(self._size({cut: hidden}, segment), self._reply()))
        encoded, encode_s = _timed(lambda: encode_tensor(hidden, how))
        if not isinstance(encoded, EncodedTensor):
            return CodedStep(CallBytes(self._size({cut: hidden}, segment), self._reply()), encode_s)
        sent = len(frames.encode(Frame({}, self.digest, segment, _ID, {cut: encoded}, step=_STEP)))
        _, decode_s = _timed(lambda: decode_tensor(encoded))
        return CodedStep(CallBytes(sent, self._reply()), encode_s, decode_s, is_encoded=True)

    def _size(self, tensors: Mapping[str, Array], segment: SegmentId) -> int:
        return len(frames.encode(Frame(tensors, self.digest, segment, _ID, step=_STEP)))

    def _reply(self) -> int:
        """The last segment's reply: a token and its log-probability."""
        reply: dict[str, Array] = {TOKENS: np.zeros((1, 1), np.int64), LOGPROBS: np.zeros((1, 1), np.float32)}
        return len(frames.encode(Frame(reply, self.digest, WHOLE, _ID)))

    def _ids(self, tokens: int) -> Mapping[str, Array]:
        return {self.layers.state.tokens: np.zeros((1, tokens), np.int64)}

    def _hidden(self, tokens: int) -> Array:
        # Seeded: equal profiles give equal plans.
        return np.random.default_rng(tokens).standard_normal((1, tokens, self.layers.width)).astype(np.float32)


# A position and a reservation of three digits.
_STEP = Step(_ID, 512, Sampling(), 640)


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    """The result, and the least seconds of a few tries."""
    tries: list[tuple[float, T]] = []
    for _ in range(_TRIES):
        start = time.perf_counter()
        result = work()
        tries.append((time.perf_counter() - start, result))
    return tries[-1][1], min(seconds for seconds, _ in tries)
