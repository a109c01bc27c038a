"""Language models without weights, and profiles of their steps by formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from isthmus.artifacts.bundle import Blob, Bundle, Cut, Segment, TextModel, Weights
from isthmus.artifacts.profile import Profile, SegmentCost, StepCost, Timing, content_of
from isthmus.artifacts.segment_id import WHOLE, SegmentId
from isthmus.artifacts.state import State, StatePair
from isthmus.artifacts.tensors import TensorSpec
from isthmus_tools.planner.decoder_layers import DecoderLayers, layers_before
from support.plans import DIGEST, HOP, device

WIDTH, KV_HEADS, HEAD_SIZE, CONTEXT = 64, 2, 8, 4096
STATE_BYTES = 2 * KV_HEADS * HEAD_SIZE * 4
"""Keys and values of a token in a layer, in bytes."""
BLOB = Blob(DIGEST, 10)


def scripted_bundle(layers: int = 8) -> Bundle:
    """A bundle of so many layers, cut once; nothing runs."""
    pairs = tuple(StatePair(f"past_{k}.{i}", f"present_{k}.{i}") for i in range(layers) for k in ("key", "value"))
    past = ("batch", KV_HEADS, "past", HEAD_SIZE)
    ids = (TensorSpec("input_ids", "int64", ("batch", "tokens")), TensorSpec("lengths", "int32", ("batch",)))
    inputs = (*ids, TensorSpec("total", "int32", ()), *(TensorSpec(p.past, "float32", past) for p in pairs))
    outputs = (
        *(TensorSpec(p.present, "float32", past) for p in pairs),
        TensorSpec("logits", "float32", ("batch", "tokens", 300)),
    )
    hidden = TensorSpec("layer_1", "float32", ("batch", "tokens", WIDTH))
    return Bundle(
        name="scripted",
        inputs=inputs,
        outputs=outputs,
        weights=Weights(BLOB, ()),
        segment_list=(Segment(WHOLE, BLOB, inputs, outputs, ()),),
        cut_list=(Cut("layer_1", (hidden,), WIDTH * 4, 0.1),),
        state=State(pairs, "input_ids", "lengths", "total", CONTEXT),
        text=TextModel(BLOB, "logits"),
    )


@dataclass(frozen=True)
class StepFormula:
    """Seconds of a step: of the segment, its layers, the tokens and the pairs of attention; and its memory.

    `start` and `end` are those of the segments with the embedding and with the scores.
    """

    fixed: float = 0.001
    start: float = 0.0002
    end: float = 0.002
    layer: float = 0.004
    token: float = 0.0005
    attention: float = 1e-7
    layer_bytes: int = 10_000_000
    start_bytes: int = 30_000_000

    def seconds(self, segment: SegmentId, layers: int, tokens: int, past: int) -> float:
        """Seconds of a step on the segment."""
        ends = self.start * (not segment.start) + self.end * (not segment.stop)
        return self.fixed + ends + layers * (self.layer + self.token * (tokens - 1) + self.attention * tokens * past)

    def memory(self, layers: int) -> int:
        """Bytes of a segment."""
        return self.start_bytes + layers * self.layer_bytes


def layers_of(segment: SegmentId, count: int) -> int:
    stop = layers_before(segment.stop) if segment.stop else count
    return stop - (layers_before(segment.start) if segment.start else 0)


def scripted_profile(
    bundle: Bundle, tier: str, formula: StepFormula, cuts: Sequence[str] = ("layer_2", "layer_6")
) -> Profile:
    """The profile that a device of the formula would give, measured at these cuts."""
    count = DecoderLayers.of(bundle).count
    ends: Callable[[str], SegmentId] = (lambda c: SegmentId(stop=c)) if tier == "edge" else (lambda c: SegmentId(c))
    segments = [WHOLE, *map(ends, cuts)]

    def run(segment: SegmentId, tokens: int, past: int) -> Timing:
        seconds = formula.seconds(segment, layers_of(segment, count), tokens, past)
        return Timing(seconds, seconds, seconds, 5)

    def cost(segment: SegmentId) -> SegmentCost:
        memory = formula.memory(layers_of(segment, count))
        return SegmentCost(run(segment, 1, 32), 0, 0, 8, 8, memory // 2, memory // 4, memory)

    points = ((32, 0), (1, 32), (256, 0), (256, 512), (1, 512))
    return Profile(
        model=bundle.name,
        content=content_of(bundle),
        bundle=DIGEST,
        tier=tier,
        device=device(cpu=tier),
        nodes=(),
        segments={segment: cost(segment) for segment in segments},
        measured_at="2026-01-01T00:00:00+00:00",
        hop=HOP,
        steps=tuple(StepCost(s, *point, run(s, *point)) for s in segments for point in points),
    )
