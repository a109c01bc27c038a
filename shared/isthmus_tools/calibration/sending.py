"""Ways to send what crosses a cut, tried in one process: what arrives, and what that costs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from isthmus.arrays import Array
from isthmus.artifacts.choice import Choice
from isthmus.codecs import EncodedTensor, Encoding, encode_tensor, find_codec
from isthmus.codecs.choice import encodings
from isthmus.wire.frame import DTYPES, Frame, encode_parts
from isthmus_tools.calibration.crossing import Crossing

FINER_BY = 0.2
"""Rise in quality from one look to the next: a third of the quantiser step of tables as calibration learns them."""
_NEAR = 1e-3
_CALL_ID = "0" * 36
_DIGEST = "sha256:" + "0" * 64


class Cost(NamedTuple):
    """Units: bytes of payloads; seconds of this thread's CPU time."""

    bytes: int
    encode_s: float = 0.0
    decode_s: float = 0.0

    def plus(self, other: Cost) -> Cost:
        """Both together."""
        return Cost(self.bytes + other.bytes, self.encode_s + other.encode_s, self.decode_s + other.decode_s)


@dataclass(frozen=True)
class Sent:
    """Tensors after encoding and decoding, and what that cost.

    `frame_bytes` is the size of the whole frame, which a closer look costs: the first transmission has a header under
    any codec, and the header of a look comes on top of it.
    """

    tensors: Mapping[str, Array]
    cost: Cost
    frame_bytes: int = 0
    fell_back: bool = False


class Way(Protocol):
    """One way to send what crosses a cut."""

    @property
    def name(self) -> str:
        """What tallies call it."""
        ...

    def send(self, tensors: Mapping[str, Array]) -> Sent:
        """The tensors as they arrive, and what that cost."""
        ...


@dataclass(frozen=True)
class Trial:
    """One codec at one quality: how each tensor is packed that goes to `segment`."""

    choice: Choice
    encodings: Mapping[str, Encoding]
    segment: str = ""

    @property
    def name(self) -> str:
        """As settings write it."""
        return str(self.choice)

    def send(self, tensors: Mapping[str, Array]) -> Sent:
        """Pack and unpack, as a hop would."""
        arrived, encoded = dict(tensors), dict[str, EncodedTensor]()
        whole, fell_back = Cost(0), False
        for name, array in tensors.items():
            how = self.encodings.get(name)
            cost = Cost(array.nbytes)
            if how is not None:
                start = time.thread_time()
                tensor = encode_tensor(array, how)
                encode_s, decode_s = time.thread_time() - start, 0.0
                if isinstance(tensor, EncodedTensor):
                    payload, dtype = memoryview(tensor.payload), DTYPES[tensor.dtype]
                    start = time.thread_time()
                    arrived[name] = find_codec(tensor.codec).decode(payload, dtype, tensor.shape, how.table)
                    decode_s = time.thread_time() - start
                    encoded[name] = tensor
                else:
                    fell_back = fell_back or how.codec == self.choice.codec
                cost = Cost(tensor.nbytes, encode_s, decode_s)
            whole = whole.plus(cost)
        rest = {name: array for name, array in tensors.items() if name not in encoded}
        frame_bytes = sum(map(len, encode_parts(Frame(rest, _DIGEST, self.segment, _CALL_ID, encoded))))
        return Sent(arrived, whole, frame_bytes, fell_back)


def trials(crossing: Crossing, choices: Sequence[Choice], tables: Mapping[str, object]) -> list[Trial]:
    """Those of `choices` that can be tried at a cut: a calibrated codec needs a table for a tensor that crosses."""
    to = crossing.tail[0].id if crossing.tail else ""
    made = [Trial(choice, encodings(crossing.tensors, choice, tables.get), to) for choice in choices]
    return [
        t
        for t in made
        if not find_codec(t.choice.codec).calibrated or t.choice.codec in {p.codec for p in t.encodings.values()}
    ]


def finer_than(choice: Choice, others: Sequence[Choice]) -> Choice | None:
    """The one of `others` that a closer look after `choice` would send."""
    wanted = choice.quality + FINER_BY
    return next((o for o in others if o.codec == choice.codec and abs(o.quality - wanted) < _NEAR), None)
