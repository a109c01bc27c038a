"""One request along one route: the router holds every value and hands each segment exactly what it takes.

So a value that skips a segment never travels through it, and nothing crosses the link twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from isthmus.bundle import Bundle, Segment
from isthmus.codecs import Packed, Packing, pack
from isthmus.context import Context, Deadline
from isthmus.errors import HopRejected, IsthmusError, ShapeMismatch
from isthmus.frame import Frame
from isthmus.hop import Hop
from isthmus.runners import Array, check_tensors

SECOND_LOOKS = ("sure", "asked", "late", "failed")
"""The answer was clear; it was asked for again; there was no time to; the hop gave none, and the first one stands."""

_LEAST_S, _PATIENCE = 1.0, 10.0


@dataclass(frozen=True)
class SecondLook:
    """Where the answer's margin is below `margin`, what crosses is sent once more, packed at `quality`.

    `margin_of` reads the margin off the outputs, in nats (`calibration.agreement.margin_of`).
    """

    quality: float
    margin: float
    margin_of: Callable[[Mapping[str, Array]], float]


@dataclass(frozen=True)
class Route:
    """What one request will do: these segments of this bundle, in order, each on its hop."""

    digest: str
    bundle: Bundle
    segments: tuple[Segment, ...]
    hops: tuple[Hop, ...]
    packings: tuple[Mapping[str, Packing], ...] = ()
    """For each segment, how its inputs are packed on their way over HTTP; raw where nothing is said."""
    again: SecondLook | None = None

    def packing(self, segment: int) -> Mapping[str, Packing]:
        """How the inputs of that segment travel; a hop in this process takes them as they are."""
        return self.packings[segment] if self.packings and self.hops[segment].packs else {}

    def finer(self, again: SecondLook) -> Route:
        """The same route with what the second look sends, and none after it."""
        made = tuple(
            {name: replace(p, quality=again.quality) if p.quality < again.quality else p for name, p in each.items()}
            for each in self.packings
        )
        return replace(self, packings=made, again=None)


class Stage(NamedTuple):
    """One segment's part in an answer.

    Units: seconds. `total_s` is the whole call as the router saw it, `run_s` the segment's own computing, `pack_s` what
    packing its inputs took before that; `sent` and `received` are bytes on the wire; `tensor_bytes` is what its inputs
    weigh unpacked. `codecs` names how those that did not go raw were packed.
    """

    segment: str
    hop: str
    total_s: float
    run_s: float
    sent: int
    received: int
    tensor_bytes: int
    pack_s: float
    codecs: Mapping[str, str]

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
            doc |= {"pack_ms": round(self.pack_s * 1000, 3), "codecs": dict(self.codecs)}
        return doc


@dataclass(frozen=True)
class Result:
    """The model's outputs, and what each segment took; those of a second look come after the first's."""

    outputs: dict[str, Array]
    stages: tuple[Stage, ...]
    second_look: str = ""
    """How that went, one of SECOND_LOOKS; empty where the route has none, or nothing was packed for the first."""
    notes: Mapping[str, str | int] = field(default_factory=dict)
    """What else an answer says of its route: that its codecs are not those that were chosen."""

    @property
    def crossed_bytes(self) -> int:
        """Bytes of tensors handed from one segment to the next, before packing; 0 for an uncut model."""
        return sum(stage.tensor_bytes for stage in self.stages[1:])

    def facts(self) -> dict[str, Any]:
        """The route as an Open Inference Protocol answer's parameters tell it."""
        codecs = [f"{name}={codec}" for stage in self.stages for name, codec in stage.codecs.items()]
        facts = {"segments": ",".join(s.segment for s in self.stages), "crossed_bytes": self.crossed_bytes}
        looked = {"second_look": self.second_look} if self.second_look else {}
        return {**facts, **({"codecs": ",".join(codecs)} if codecs else {}), **looked, **self.notes}


def plan_route(digest: str, bundle: Bundle, hops: tuple[Hop, ...], cuts: tuple[str, ...] | None = None) -> Route:
    """The route along `cuts` (default: the bundle's own); segments beyond the last hop run on the last hop.

    Raises:
        Missing: the bundle has no such cut, or not the segment between two.
    """
    segments = bundle.partition(cuts)
    return Route(digest, bundle, segments, tuple(hops[min(i, len(hops) - 1)] for i in range(len(segments))))


def run(
    route: Route, inputs: Mapping[str, Array], context: Context, packed: Mapping[str, Packed] | None = None
) -> Result:
    """Take `inputs` through every segment of `route`.

    Shapes: `inputs` and the outputs are as the bundle declares them. `packed` are inputs that the caller has packed
    already, such as a photo as it came; only the first segment's hop, over HTTP, can take those.

    Raises:
        ShapeMismatch: the inputs do not fit the model; nothing was called.
        DeadlineExceeded, HopError: as the segments' hops report.
    """
    ready = packed or {}
    check_tensors(tuple(spec for spec in route.bundle.inputs if spec.name not in ready), inputs)
    values: dict[str, Array] = dict(inputs)
    stages: list[Stage] = []
    _through(route, 0, values, stages, context, ready)
    looked = "" if route.again is None else _look_again(route, route.again, values, stages, context)
    return Result({spec.name: values[spec.name] for spec in route.bundle.outputs}, tuple(stages), looked)


def _through(
    route: Route,
    start_at: int,
    values: dict[str, Array],
    stages: list[Stage],
    context: Context,
    ready: Mapping[str, Packed],
) -> None:
    """Run the segments from that one on, each with its inputs from `values`, which takes what it gives."""
    for i, (segment, hop) in enumerate(zip(route.segments, route.hops, strict=True)):
        if i < start_at:
            continue
        context.deadline.check(f"segment {segment.id} ran")
        taken = {spec.name: values[spec.name] for spec in segment.inputs if i or spec.name not in ready}
        weight = sum(array.nbytes for array in taken.values())
        start = time.perf_counter()
        coded = pack_all(taken, route.packing(i)) if i or not ready else dict(ready)
        for name in coded:
            taken.pop(name, None)
        pack_s = time.perf_counter() - start
        start = time.perf_counter()
        sent = Frame(taken, route.digest, segment.id, context.call_id, coded)
        reply = hop.call(sent, context)
        values.update(_checked(reply.frame, sent, segment, hop))
        stages.append(
            Stage(
                segment.id,
                hop.name,
                time.perf_counter() - start,
                reply.run_s,
                reply.sent,
                reply.received,
                weight,
                pack_s,
                {name: tensor.codec for name, tensor in coded.items()},
            )
        )


def _look_again(
    route: Route, again: SecondLook, values: dict[str, Array], stages: list[Stage], context: Context
) -> str:
    """Send once more what a clear answer did not need: one of SECOND_LOOKS, or nothing where nothing was packed.

    The first answer stands where no time is left for another as long, or the second cannot be had. No hop that hangs
    must keep it: the second look has half of the time left, and no more than some times what the first one took.
    """
    finer = route.finer(again)
    coarse = [
        i
        for i, stage in enumerate(stages)
        if any(
            stage.codecs.get(name) == how.codec and finer.packing(i)[name].quality > how.quality
            for name, how in route.packing(i).items()
        )
    ]
    if not coarse:
        return ""
    outputs = {spec.name: values[spec.name] for spec in route.bundle.outputs}
    if again.margin_of(outputs) >= again.margin:
        return "sure"
    once_s = sum(stage.pack_s + stage.total_s for stage in stages[coarse[0] :])
    longest_s = min(context.deadline.remaining() / 2, max(_LEAST_S, _PATIENCE * once_s))
    if longest_s < once_s:
        return "late"
    found, taken = dict(values), list[Stage]()
    try:
        _through(finer, coarse[0], found, taken, replace(context, deadline=Deadline.after(longest_s)), {})
    except IsthmusError:
        return "failed"
    values.update(found)
    stages += taken
    return "asked"


def pack_all(arrays: Mapping[str, Array], packings: Mapping[str, Packing]) -> dict[str, Packed]:
    """Those of `arrays` that `packings` pack; what a codec would not keep is not among them, and goes raw."""
    made = {name: pack(arrays[name], packing) for name, packing in packings.items() if name in arrays}
    return {name: tensor for name, tensor in made.items() if isinstance(tensor, Packed)}


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
            hint="both sides must run the same version of Isthmus",
            **e.facts,
        ) from e
    return reply.tensors
