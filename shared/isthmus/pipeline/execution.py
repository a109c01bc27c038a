"""Execution of a route: the only loop over segments.

The router holds every value and passes each segment exactly its inputs, so a value that skips a segment never travels
through it, and no tensor crosses the link twice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple

from msgspec import structs

from isthmus.arrays import Array, check_tensors
from isthmus.artifacts.sampling import SAMPLED, sampled_outputs
from isthmus.artifacts.tensors import TensorSpec
from isthmus.codecs import EncodedTensor, Encoding, encode_tensor
from isthmus.context import Context, Deadline
from isthmus.errors import HopRejected, HopTimeout, HopUnavailable, ShapeMismatch
from isthmus.pipeline.closer_looks import LookPolicy, LooksTaken, take_looks
from isthmus.pipeline.exits import ExitBranch, ExitOutcome, exit_outcome, expected_outputs
from isthmus.pipeline.fusion import fused_outputs
from isthmus.pipeline.hop import Hop
from isthmus.pipeline.route import Route
from isthmus.wire.frame import DTYPES, Frame, Step

_NO_TENSORS: Mapping[str, EncodedTensor] = MappingProxyType({})
BeforeCall = Callable[[int, Frame], None]
"""Called with the index of a segment in its route and the frame that its hop gets, tensors as encoded."""


class SegmentRun(NamedTuple):
    """A hop's call for a segment.

    Units: seconds and bytes. `total_s` is the call as the caller measured it; `run_s` the segment's own computation;
    `encode_s` the codecs' encoding of its inputs, before the call; `decode_s` the decoding of the frame behind the hop,
    as far as the hop reports that. `sent_bytes` and `received_bytes` are sizes of frames, 0 in this process;
    `raw_bytes` is the size of the inputs as arrays, `payload_bytes` their size as sent.
    """

    segment: str
    hop: str
    total_s: float
    run_s: float
    encode_s: float = 0.0
    decode_s: float = 0.0
    sent_bytes: int = 0
    received_bytes: int = 0
    raw_bytes: int = 0
    payload_bytes: int = 0
    codecs: Mapping[str, str] = MappingProxyType({})
    """Codec ids of the inputs that were not sent raw, by tensor."""
    over_link: bool = False

    def document(self) -> dict[str, Any]:
        """This run in a response's JSON, times in milliseconds. Source: docs/reference/api.md, "Photos"."""
        doc = {
            "segment": self.segment,
            "hop": self.hop,
            "ms": round(self.total_s * 1000, 3),
            "run_ms": round(self.run_s * 1000, 3),
            "sent_bytes": self.sent_bytes,
            "received_bytes": self.received_bytes,
            "input_bytes": self.raw_bytes,
        }
        if self.codecs:
            doc |= {"pack_ms": round(self.encode_s * 1000, 3), "codecs": dict(self.codecs)}
        return doc


@dataclass(frozen=True)
class Result:
    """The model's outputs, the segment runs in order (those of closer looks last), and every tensor at hand.

    `tensors` are inputs, boundary tensors and outputs by name. `outputs` are the
    bundle's outputs as far as the route computes them: all where it leads to the model's end.
    """

    outputs: dict[str, Array]
    runs: tuple[SegmentRun, ...]
    tensors: Mapping[str, Array] = field(default_factory=dict)
    closer_looks: LooksTaken | None = None
    """None where the route has none, or encoded nothing that a look could send finer."""
    notes: Mapping[str, str | int] = field(default_factory=dict)
    """Further facts about the route for the response, such as the fallback codec in force."""
    route: str = ""
    degraded: str = ""
    """The name of the route, and what its approximation costs; set by the dispatcher."""
    segments: int = 0
    """Segments of the route; runs after as many are of closer looks."""
    preprocess_s: float | None = None
    """Seconds in which the caller made the inputs of a photo; None where they came as tensors."""
    exit: ExitOutcome | None = None
    """What the request met at the route's exit; None where the route has none."""
    unfused: Mapping[str, Array] | None = None
    """The model's own outputs where `outputs` are fused with the exit's; None elsewhere."""
    fusion_target: str = ""

    @property
    def comparable(self) -> Mapping[str, Array]:
        """The outputs to compare with another run of the model: as calibration measured these.

        A fusion by labels is to differ from the model, so its own outputs stand for it; a fusion for agreement with the
        model is compared itself. Source: docs/how-to/fusion.md, "What the guard compares".
        """
        return self.outputs if self.unfused is None or self.fusion_target == "agreement" else self.unfused

    @property
    def is_early(self) -> bool:
        """Whether the exit gave the prediction, and no segment behind it ran."""
        return self.exit is not None and self.exit.is_taken

    @property
    def link_bytes(self) -> int:
        """Bytes sent over the link: the frames of every call to a hop behind it, tensors as encoded."""
        return sum(run.sent_bytes for run in self.runs if run.over_link)

    @property
    def link_raw_bytes(self) -> int:
        """Size of the tensors in those frames as arrays, each counted once: closer looks repeat tensors."""
        return sum({run.segment: run.raw_bytes for run in reversed(self.runs) if run.over_link}.values())

    def facts(self) -> dict[str, Any]:
        """The route as parameters of an Open Inference Protocol response."""
        codecs = [f"{name}={codec}" for run in self.runs for name, codec in run.codecs.items()]
        facts = {"segments": ",".join(run.segment for run in self.runs), **self.sizes()}
        taken = {"isthmus.route": self.route, "isthmus.degraded": self.degraded}
        taken = {name: value for name, value in taken.items() if value}
        return {**facts, **({"codecs": ",".join(codecs)} if codecs else {}), **self.gates(), **self.notes, **taken}

    def sizes(self) -> dict[str, int]:
        """Bytes over the link as responses state them. Source: docs/reference/api.md, "Bytes over the link"."""
        return {"link_bytes": self.link_bytes, "link_raw_bytes": self.link_raw_bytes}

    def gates(self) -> dict[str, str | int | float]:
        """The exit, the fusion and the closer looks as responses state them; empty without any."""
        facts: dict[str, str | int | float] = {}
        if self.exit is not None:
            facts |= self.exit.facts()
        if self.unfused is not None:
            facts["fused"] = True
        if (looks := self.closer_looks) is not None:
            facts |= {"looks": looks.count, "looks_ended": looks.outcome}
        return facts


@dataclass(frozen=True)
class Interruption:
    """A route whose later hop gave no response: `execute(rest, tensors, …)` finishes it without the first segments."""

    error: HopUnavailable | HopTimeout
    rest: Route
    tensors: Mapping[str, Array]
    runs: tuple[SegmentRun, ...]
    exit: ExitOutcome | None = None
    """The early prediction that was not sure, for a caller that prefers it to an error."""

    def unsure(self) -> Result | None:
        """The early prediction as a result; None where the route has no exit."""
        if (outcome := self.exit) is None:
            return None
        outputs = {outcome.output: outcome.scores}
        return Result(outputs, self.runs, {**self.tensors, **outputs}, exit=outcome, segments=len(self.runs))


def execute(
    route: Route,
    inputs: Mapping[str, Array],
    context: Context,
    encoded: Mapping[str, EncodedTensor] | None = None,
    *,
    step: Step | None = None,
    before_call: BeforeCall | None = None,
) -> Result:
    """Run every segment of `route` on its hop, up to its exit where that is sure, then the route's closer looks.

    Shapes: as the bundle declares them. A route from the model's start takes exactly its inputs; a route from a cut
    takes the inputs of its segments, and ignores further tensors. `encoded` are inputs that the caller has encoded
    already, such as a photo, for the first segment, whose hop must encode. `step` is the step of a session, for a
    bundle with state; where it samples, the last segment's outputs are tokens (`SAMPLED`). `before_call` sees the frame
    of each call.

    Raises:
        ShapeMismatch: the inputs do not fit; no hop was called.
        DeadlineExceeded, HopError: as the hops report.
    """
    outcome = execute_resumably(route, inputs, context, encoded, step=step, before_call=before_call)
    if isinstance(outcome, Interruption):
        raise outcome.error
    return outcome


def execute_resumably(
    route: Route,
    inputs: Mapping[str, Array],
    context: Context,
    encoded: Mapping[str, EncodedTensor] | None = None,
    wait_s: float | None = None,
    step: Step | None = None,
    before_call: BeforeCall | None = None,
) -> Result | Interruption:
    """As `execute`; where a hop after the first gives no response, what the rest of the route needs.

    Units: each hop after the first has at most `wait_s` seconds, which begin with its call.

    Raises:
        As `execute`, for the first hop, and for every hop that refuses.
    """
    encoded = encoded or _NO_TENSORS
    _check_inputs(route, inputs, encoded)
    execution = _Execution(route, context, dict(inputs), wait_s, step, before_call)
    try:
        execution.run(0, encoded)
    except (HopUnavailable, HopTimeout) as e:
        if not (done := len(execution.runs)):
            raise
        rest = route.after(done)
        tensors = {s.name: execution.tensors[s.name] for s in rest.inputs}
        return Interruption(e, rest, tensors, tuple(execution.runs), execution.exit)
    is_early = execution.exit is not None and execution.exit.is_taken
    looks = execution.look_closer(route.looks) if route.looks is not None and not is_early else None
    outputs, fusion = execution.outputs(), route.bundle.fusion
    # After the closer looks, whose margins are those of the model's own scores.
    fused = fused_outputs(fusion, execution.exit, execution.tensors, outputs)
    return Result(
        outputs if fused is None else fused,
        tuple(execution.runs),
        execution.tensors,
        looks,
        segments=len(route.segments),
        exit=execution.exit,
        unfused=None if fused is None else outputs,
        fusion_target=fusion.target if fusion is not None else "",
    )


def encode_tensors(
    arrays: Mapping[str, Array],
    encodings: Mapping[str, Encoding],
    encoded: Mapping[str, EncodedTensor] = _NO_TENSORS,
) -> dict[str, EncodedTensor]:
    """`encoded`, and the other `arrays` that `encodings` name, except those that their codec refuses."""
    remaining = {name: how for name, how in encodings.items() if name in arrays and name not in encoded}
    results = {name: encode_tensor(arrays[name], how) for name, how in remaining.items()}
    return {**encoded, **{name: tensor for name, tensor in results.items() if isinstance(tensor, EncodedTensor)}}


@dataclass
class _Execution:
    """The tensors at hand and the runs so far; a closer look repeats the later segments on a copy."""

    route: Route
    context: Context
    tensors: dict[str, Array]
    wait_s: float | None = None
    step: Step | None = None
    before_call: BeforeCall | None = None
    runs: list[SegmentRun] = field(default_factory=list)
    exit: ExitOutcome | None = None

    def outputs(self) -> dict[str, Array]:
        names = (*(spec.name for spec in self.route.bundle.outputs), *SAMPLED)
        return {name: self.tensors[name] for name in names if name in self.tensors}

    def run(self, start: int = 0, encoded: Mapping[str, EncodedTensor] = _NO_TENSORS) -> None:
        """Run the segments from index `start` on, up to the exit; `encoded` belong to the first of them."""
        for index in range(start, len(self.route.segments)):
            self.runs.append(self._call(index, encoded if index == start else _NO_TENSORS))
            if self.exit is not None and self.exit.is_taken:
                self.tensors[self.exit.output] = self.exit.scores
                return

    def _call(self, index: int, encoded: Mapping[str, EncodedTensor]) -> SegmentRun:
        route, segment, hop = self.route, self.route.segments[index], self.route.hops[index]
        self.context.deadline.check(f"segment {segment.id} ran")
        began = time.perf_counter()
        arrays = {spec.name: self.tensors[spec.name] for spec in segment.inputs if spec.name in self.tensors}
        # An encoded photo counts as the input that the hop makes of it.
        raw_bytes = sum(array.nbytes for array in arrays.values())
        raw_bytes += sum(_raw_bytes(tensor) for name, tensor in encoded.items() if name not in arrays)
        encoded = encode_tensors(arrays, route.encodings_of(index), encoded)
        for name in encoded:
            arrays.pop(name, None)
        # The hop's time begins after encoding: plans price the two apart.
        called = time.perf_counter()
        step = self._step_at(index)
        branch = None if index else route.exit
        threshold = None if branch is None else branch.gate.threshold
        frame = Frame(arrays, route.digest, segment.id, self.context.call_id, encoded, step=step, exit=threshold)
        context = self.context
        if index and self.wait_s is not None:
            context = replace(context, deadline=Deadline.after(min(self.wait_s, context.deadline.remaining())))
        if self.before_call is not None:
            self.before_call(index, frame)
        reply = hop.call(frame, context)
        tensors = _checked(reply.frame, frame, self._outputs_at(index, reply.frame), hop)
        if branch is not None:
            self.exit = _outcome(branch, tensors, arrays, hop)
        self.tensors.update(tensors)
        return SegmentRun(
            segment.id,
            hop.name,
            total_s=time.perf_counter() - called,
            run_s=reply.run_s,
            encode_s=called - began,
            decode_s=reply.decode_s,
            sent_bytes=reply.sent_bytes,
            received_bytes=reply.received_bytes,
            raw_bytes=raw_bytes,
            payload_bytes=sum(a.nbytes for a in arrays.values()) + sum(t.nbytes for t in encoded.values()),
            codecs={name: tensor.codec for name, tensor in encoded.items()},
            over_link=reply.sent_bytes > 0 and hop.name != route.near,
        )

    def _step_at(self, index: int) -> Step | None:
        """The step as a segment gets it: only the last one samples."""
        if self.step is None or index == len(self.route.segments) - 1:
            return self.step
        return structs.replace(self.step, sampling=None)

    def _outputs_at(self, index: int, reply: Frame) -> tuple[TensorSpec, ...]:
        is_last, step = index == len(self.route.segments) - 1, self.step
        if is_last and step is not None and step.sampling is not None:
            return sampled_outputs(step.sampling)
        outputs = self.route.bundle.carried(self.route.segments[index].outputs)
        if index or self.route.exit is None:
            return outputs
        return expected_outputs(self.route.exit, outputs, reply.tensors)

    def look_closer(self, policy: LookPolicy) -> LooksTaken | None:
        """Take closer looks from the first segment whose inputs can be sent finer; None without such a segment."""
        indices = range(len(self.route.segments))
        first = next((i for i in indices if self._can_be_finer(i, policy.looks[-1].quality)), None)
        if first is None:
            return None

        def repeat(quality: float, deadline: Deadline) -> float:
            finer = _Execution(
                self.route.full().finer(quality), replace(self.context, deadline=deadline), dict(self.tensors)
            )
            finer.run(first)
            # Only now, since a look that fails half-way must not leave outputs of two transmissions.
            self.tensors.update(finer.tensors)
            self.runs += finer.runs
            return _seconds(finer.runs)

        return take_looks(policy, self.context.deadline, _seconds(self.runs[first:]), self.outputs, repeat)

    def _can_be_finer(self, index: int, finest: float) -> bool:
        # Without the array, as with an encoded photo, there is nothing to encode again.
        if any(spec.name not in self.tensors for spec in self.route.segments[index].inputs):
            return False
        codecs = self.runs[index].codecs
        return any(name in codecs and how.quality < finest for name, how in self.route.encodings_of(index).items())


def _seconds(runs: list[SegmentRun]) -> float:
    return sum(run.encode_s + run.total_s for run in runs)


def _raw_bytes(tensor: EncodedTensor) -> int:
    return math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize


def _check_inputs(route: Route, inputs: Mapping[str, Array], encoded: Mapping[str, EncodedTensor]) -> None:
    specs = tuple(spec for spec in route.inputs if spec.name not in encoded)
    if route.starts_at_cut:
        inputs = {spec.name: inputs[spec.name] for spec in specs if spec.name in inputs}
    check_tensors(specs, inputs)


def _checked(reply: Frame, request: Frame, outputs: tuple[TensorSpec, ...], hop: Hop) -> Mapping[str, Array]:
    """The reply's tensors, provided that the reply belongs to this request and holds the segment's outputs."""
    for field_name in ("bundle", "segment", "request"):
        if (got := getattr(reply, field_name)) != (expected := getattr(request, field_name)):
            raise HopRejected(
                f"{hop.name} answered for {field_name} {got[:80]!r}, not {expected!r}",
                hop=hop.name,
                status=200,
                expected=expected,
                got=got,
            )
    try:
        check_tensors(outputs, reply.tensors)
    except ShapeMismatch as e:
        raise HopRejected(
            f"{hop.name} did not answer as segment {request.segment} does: {e}",
            hop=hop.name,
            status=200,
            hint=_hint(reply, outputs),
            **e.facts,
        ) from e
    return reply.tensors


def _outcome(branch: ExitBranch, tensors: Mapping[str, Array], inputs: Mapping[str, Array], hop: Hop) -> ExitOutcome:
    """The outcome at an exit, by the reply of the first segment's hop, which ran the branch too."""
    try:
        return exit_outcome(branch, tensors, inputs, is_alone=len(tensors) == len(branch.segment.outputs))
    except ValueError as e:
        raise HopRejected(f"{hop.name} answered with {e}", hop=hop.name, status=200) from e


def _hint(reply: Frame, outputs: tuple[TensorSpec, ...]) -> str:
    declared = {spec.name: spec.dtype for spec in outputs}
    if declared == {name: array.dtype.name for name, array in reply.tensors.items()}:
        return "the bundle declares shapes that the model does not keep for this input: import the model again"
    return "both sides must run the same version of Isthmus"
