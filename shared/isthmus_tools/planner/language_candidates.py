"""The candidates of a language model with predictions for any link: a prompt in chunks, then a call for each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.choice import RAW_ID, Choice
from isthmus.artifacts.conditions import Conditions
from isthmus.artifacts.plan import TERMS, Candidate, Coding, Error, GenerationLoad, Terms, TokenCosts
from isthmus.artifacts.profile import CodecSpeed, Profile
from isthmus.artifacts.segment_id import SegmentId
from isthmus_tools.planner.candidates import CLOUD, EDGE, PlannedBundle
from isthmus_tools.planner.costs import NO_RUN, CallBytes, Prices, Workload, terms, with_prices
from isthmus_tools.planner.decoder_layers import DecoderLayers, layers_before
from isthmus_tools.planner.layer_times import LayerTimes
from isthmus_tools.planner.step_frames import Placement, StepFrames

_NO_CALL = CallBytes(0, 0)
_SAME_SPEED = CodecSpeed(1.0, 1.0)


@dataclass
class LanguageCandidates(PlannedBundle):
    """The candidates of one bundle, by their placements.

    `profiles` are by tier; `errors` are those that calibration measured, by cut and codec; `codec_slowdown` is the
    ratio of each tier's codec times to this process's. With `private_layers`, as many first layers run at the edge, and
    no token id crosses the link. `files` holds new graphs by digest, `notes` explain omissions.
    """

    bundle: Bundle
    layers: DecoderLayers
    profiles: Mapping[str, Profile]
    load: GenerationLoad
    frames: StepFrames
    placements: Sequence[Placement]
    errors: Mapping[tuple[str, Choice], Error] = field(default_factory=dict)
    private_layers: int = 0
    codec_slowdown: Mapping[str, Mapping[str, CodecSpeed]] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    input_kind: str = "text"
    variant: None = None

    def predict(self, conditions: Conditions, prices: Prices | None = None) -> tuple[Candidate, ...]:
        """Every candidate with predicted costs under `conditions`."""
        return tuple(with_prices(self._candidate(p, conditions), prices, self.cpus) for p in self.placements)

    def growth(self, candidate: Candidate, steps: int) -> float:
        """Seconds of an answer's mean step over those of its first `steps`, without the link: attention grows."""
        # A link takes as long for every token: bytes do not grow with the session.
        placement = next(p for p in self.placements if p.name == candidate.name)
        first = self._step(placement, 1, self.load.prompt + (steps - 1) // 2, Conditions()).total
        return self._step(placement, 1, self._mean_past, Conditions()).total / first if first else 1.0

    @cached_property
    def _times(self) -> Mapping[str, LayerTimes]:
        return {tier: LayerTimes(profile, self.layers) for tier, profile in self.profiles.items()}

    @property
    def _mean_past(self) -> int:
        """Tokens behind which the mean further token of an answer is computed: a step's time is linear in these."""
        return self.load.prompt + max(0, self.load.tokens - 2) // 2

    def _candidate(self, placement: Placement, conditions: Conditions) -> Candidate:
        choice, is_remote = placement.choice, placement.tail is not None
        load, further = self.load, self.load.tokens - 1
        # As the generator runs prompts: whole chunks, and the rest.
        chunks = [(min(load.chunk, load.prompt - at), at) for at in range(0, load.prompt, load.chunk)]
        first = _sum([(1.0, self._step(placement, count, past, conditions)) for count, past in chunks])
        each = self._step(placement, 1, self._mean_past, conditions)
        prompt, token = [self._call(placement, count) for count, _ in chunks], self._call(placement, 1)
        costs = TokenCosts(
            first_token=first,
            per_token=each,
            # Speculation, if any, makes fewer calls than tokens; none is assumed.
            prompt_calls=len(chunks) if is_remote else 0,
            token_calls=further if is_remote else 0,
            prompt_up_bytes=sum(call.sent for call in prompt),
            prompt_down_bytes=sum(call.received for call in prompt),
            token_up_bytes=token.sent,
            token_down_bytes=token.received,
            edge_state_bytes=self._state(EDGE, placement),
            cloud_state_bytes=self._state(CLOUD, placement),
        )
        return Candidate(
            name=placement.name,
            kind=placement.kind,
            predicted=_sum([(1.0, first), (float(further), each)]),
            cuts=(placement.cut,) if placement.cut else (),
            codecs={placement.cut: Coding(choice.codec, choice.quality)} if choice.codec != RAW_ID else {},
            up_bytes=costs.prompt_up_bytes + further * token.sent,
            down_bytes=costs.prompt_down_bytes + further * token.received,
            error=self.errors.get((placement.cut, choice), Error(0.0, 0)),
            edge_memory_bytes=self._memory(EDGE, placement.head, costs.edge_state_bytes),
            cloud_memory_bytes=self._memory(CLOUD, placement.tail, costs.cloud_state_bytes),
            generation=costs,
        )

    def _step(self, placement: Placement, tokens: int, past: int, conditions: Conditions) -> Terms:
        """The terms of a step: a call of the function at the edge, and of the function in the cloud."""
        head, tail, choice = placement.head, placement.tail, placement.choice
        far = self.frames.far(placement, tokens)
        slowdown = {tier: self.codec_slowdown.get(tier, {}).get(choice.codec, _SAME_SPEED) for tier in (EDGE, CLOUD)}
        work = Workload(
            near=self.frames.near(placement, tokens),
            far=None if far is None else far.call,
            edge=NO_RUN if head is None else self._times[EDGE].seconds(head, tokens, past),
            cloud=NO_RUN if tail is None else self._times[CLOUD].seconds(tail, tokens, past),
            encode_s=0.0 if far is None else far.encode_s * slowdown[EDGE].pack_s,
            decode_s=0.0 if far is None else far.decode_s * slowdown[CLOUD].unpack_s,
        )
        return terms(work, self.profiles[EDGE].hop, self.profiles[CLOUD].hop, conditions)

    def _call(self, placement: Placement, tokens: int) -> CallBytes:
        far = self.frames.far(placement, tokens)
        return _NO_CALL if far is None else far.call

    def _state(self, tier: str, placement: Placement) -> int:
        """Bytes of a session's keys and values on a tier, at the plan's context."""
        # Keys and values stay with the layer that computed them, so a cut divides a session's state.
        before = layers_before(placement.cut) if placement.cut else (self.layers.count if placement.head else 0)
        layers = before if tier == EDGE else self.layers.count - before
        return layers * self.layers.state_bytes * self.load.context

    def _memory(self, tier: str, segment: SegmentId | None, state: int) -> int:
        """Bytes of a segment with the state of as many sessions as the plan asks for."""
        return 0 if segment is None else self._times[tier].memory_bytes(segment) + self.load.sessions * state


def _sum(weighted: Sequence[tuple[float, Terms]]) -> Terms:
    total = {name: sum(weight * getattr(each, name) for weight, each in weighted) for name in TERMS}
    return Terms(**total, sources=weighted[0][1].sources)
