"""A request on its way: the router holds every value and hands each segment exactly what it takes.

So a value that skips a segment never travels through it, and nothing crosses the link twice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple

from isthmus.arrays import Array, check_tensors
from isthmus.artifacts.bundle import Segment
from isthmus.codecs import EncodedTensor, Encoding, encode_tensor
from isthmus.context import Context, Deadline
from isthmus.errors import HopRejected, ShapeMismatch
from isthmus.pipeline.hop import Hop
from isthmus.pipeline.route import Route
from isthmus.wire.frame import DTYPES, Frame


class Stage(NamedTuple):
    """One segment's part in an answer.

    Units: seconds. `total_s` is the whole call as the router saw it, `run_s` the segment's own computing, `pack_s` what
    packing its inputs took before that; `sent` and `received` are bytes on the wire; `tensor_bytes` is what its inputs
    weigh unpacked. `codecs` names how those that did not go raw were packed. `linked`: the call went over the link.
    """

    segment: str
    hop: str
    total_s: float
    run_s: float
    sent: int
    received: int
    tensor_bytes: int
    encode_s: float
    codecs: Mapping[str, str]
    linked: bool = False

    def document(self) -> dict[str, Any]:
        """This stage as answers show it, times in milliseconds."""
        doc = {
            "segment": self.segment,
            "hop": self.hop,
            "ms": round(self.total_s * 1000, 3),
            "run_ms": round(self.run_s * 1000, 3),
            "sent_bytes": self.sent,
            "received_bytes": self.received,
            "input_bytes": self.tensor_bytes,
        }
        if self.codecs:
            doc |= {"pack_ms": round(self.encode_s * 1000, 3), "codecs": dict(self.codecs)}
        return doc


@dataclass
class Passage:
    """The values that are known by now, and what each call took."""

    route: Route
    context: Context
    values: dict[str, Array]
    stages: list[Stage] = field(default_factory=list)

    def outputs(self) -> dict[str, Array]:
        """The model's outputs, once all segments have run."""
        return {spec.name: self.values[spec.name] for spec in self.route.bundle.outputs}

    def again(self, route: Route, deadline: Deadline) -> Passage:
        """Another passage along `route` that starts with the same values and no stages."""
        return Passage(route, replace(self.context, deadline=deadline), dict(self.values))

    def through(self, start_at: int = 0, ready: Mapping[str, EncodedTensor] = MappingProxyType({})) -> None:
        """Run the segments from that one on, each with its inputs from the values, which take what it gives.

        `ready` are those of the first one's inputs that the caller has encoded.

        Raises:
            DeadlineExceeded, HopError: as the segments' hops report.
        """
        route, values, context = self.route, self.values, self.context
        for i, (segment, hop) in enumerate(zip(route.segments, route.hops, strict=True)):
            if i < start_at:
                continue
            context.deadline.check(f"segment {segment.id} ran")
            start = time.perf_counter()
            encoded = ready if i == start_at else {}
            taken = {spec.name: values[spec.name] for spec in segment.inputs if spec.name in values}
            weight = sum(array.nbytes for array in taken.values())
            # A photo as it came stands for the input that the hop makes of it.
            weight += sum(_raw_bytes(tensor) for name, tensor in encoded.items() if name not in taken)
            coded = encode_all(taken, route.encoding(i), encoded)
            for name in coded:
                taken.pop(name, None)
            encode_s = time.perf_counter() - start
            start = time.perf_counter()
            sent = Frame(taken, route.digest, segment.id, context.call_id, coded)
            reply = hop.call(sent, context)
            values.update(_checked(reply.frame, sent, segment, hop))
            self.stages.append(
                Stage(
                    segment.id,
                    hop.name,
                    time.perf_counter() - start,
                    reply.run_s,
                    reply.sent,
                    reply.received,
                    weight,
                    encode_s,
                    {name: tensor.codec for name, tensor in coded.items()},
                    linked=reply.sent > 0 and hop.name != route.near,
                )
            )


def encode_all(
    arrays: Mapping[str, Array],
    encodings: Mapping[str, Encoding],
    ready: Mapping[str, EncodedTensor] = MappingProxyType({}),
) -> dict[str, EncodedTensor]:
    """What is `ready`, and those others of `arrays` that `encodings` pack.

    What a codec would not keep is not among them, and goes raw.
    """
    wanted = {name: how for name, how in encodings.items() if name in arrays and name not in ready}
    made = {name: encode_tensor(arrays[name], how) for name, how in wanted.items()}
    return {**ready, **{name: tensor for name, tensor in made.items() if isinstance(tensor, EncodedTensor)}}


def _raw_bytes(tensor: EncodedTensor) -> int:
    return math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize


def _checked(reply: Frame, sent: Frame, segment: Segment, hop: Hop) -> Mapping[str, Array]:
    """The reply's tensors, if it answers this very frame and they are the ones that this segment gives."""
    for what in ("bundle", "segment", "request"):
        if (got := getattr(reply, what)) != (expected := getattr(sent, what)):
            raise HopRejected(
                f"{hop.name} answered for {what} {got[:80]!r}, not {expected!r}",
                hop=hop.name,
                status=200,
                expected=expected,
                got=got,
            )
    try:
        check_tensors(segment.outputs, reply.tensors)
    except ShapeMismatch as e:
        raise HopRejected(
            f"{hop.name} did not answer as segment {segment.id} does: {e}",
            hop=hop.name,
            status=200,
            hint=_hint(reply, segment),
            **e.facts,
        ) from e
    return reply.tensors


def _hint(reply: Frame, segment: Segment) -> str:
    """What to do about a reply with other tensors than `segment` declares."""
    declared = {spec.name: spec.dtype for spec in segment.outputs}
    if declared == {name: array.dtype.name for name, array in reply.tensors.items()}:
        return "the bundle declares shapes that the model does not keep for this input: import the model again"
    return "both sides must run the same version of Isthmus"
