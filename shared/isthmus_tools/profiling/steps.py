"""Profiling of a language model on a function: seconds of a session's steps, in segments with state.

Prefill in chunks and decoding take different times by token, and both grow with the tokens before; steps of three sizes
behind few and behind many tokens tell all of that.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np

from isthmus.arrays import DTYPES, Array, empty_state, supplied_inputs
from isthmus.artifacts.bundle import Bundle, Segment
from isthmus.artifacts.profile import Profile, SegmentCost, StepCost, content_of
from isthmus.artifacts.sampling import Sampling
from isthmus.artifacts.segment_id import WHOLE
from isthmus.artifacts.state import State
from isthmus.context import Context
from isthmus.errors import IsthmusError, ProfileMalformed
from isthmus.pipeline import HttpHop, hops_by_url
from isthmus.wire.frame import Frame, Step
from isthmus_tools.budget import UNLIMITED, Budget
from isthmus_tools.profiling.measure import hop_cost, timing
from isthmus_tools.profiling.remote import ProfiledFunction, SegmentMeasurement
from isthmus_tools.profiling.slow_edge import AT_FULL_SPEED, SlowEdge
from isthmus_tools.progress import Progress

# Rounds over all segments, so that each meets several states of the device.
ROUNDS = 3
# Tokens before a step of the long kind: the growth by attention is above the noise, and the session soon that long.
_MAX_PAST = 512
_MIDDLE = 32
# A chunk of a large model on a slow device, within a gateway's usual limit.
_MAX_STEP_S = 300.0


@dataclass(frozen=True)
class StepSizes:
    """Sizes of the measured steps. Units: tokens; `past` is the length of the session before the long ones."""

    middle: int
    chunk: int
    past: int

    @classmethod
    def of(cls, context: int, chunk: int) -> StepSizes:
        """Sizes for a model of this context."""
        largest = max(1, min(chunk, context // 2))
        return cls(min(_MIDDLE, max(1, largest // 2)), largest, min(_MAX_PAST, context - largest))

    @property
    def points(self) -> tuple[tuple[int, int], ...]:
        """The tokens of each kind of step, and the tokens before."""
        return (self.middle, 0), (1, self.middle), (self.chunk, 0), (self.chunk, self.past), (1, self.past)


@dataclass(frozen=True)
class StepSubject:
    """The measured language model: a bundle's version, and the sizes of its steps."""

    bundle: Bundle
    digest: str
    state: State
    sizes: StepSizes

    def arrays(self, segment: Segment, tokens: int) -> dict[str, Array]:
        """Inputs of a step: token ids, or hidden states of noise, as speed does not depend on values."""
        noise = np.random.default_rng(0)
        return {
            spec.name: np.ones((1, tokens), np.int64)
            if spec.name == self.state.tokens
            else noise.standard_normal((1, tokens, int(spec.shape[-1]))).astype(DTYPES[spec.dtype])
            for spec in self.bundle.carried(segment.inputs)
        }

    def first_arrays(self, segment: Segment) -> dict[str, Array]:
        """Inputs of a session's first chunk, its empty state among these."""
        count = self.sizes.chunk
        # One position is scored, as in the steps.
        supplied = supplied_inputs(self.state, np.array([count - 1], np.int32), 1)
        taken = {spec.name for spec in segment.inputs}
        given = {name: array for name, array in supplied.items() if name in taken}
        return {**self.arrays(segment, count), **given, **empty_state(self.state, segment.inputs)}


def measure_steps(
    function: ProfiledFunction,
    subject: StepSubject,
    tier: str,
    segments: Sequence[Segment],
    *,
    runs: int,
    progress: Progress,
    edge: SlowEdge = AT_FULL_SPEED,
    budget: Budget = UNLIMITED,
) -> Profile:
    """Profile the steps of the whole model and of `segments` on the function's device: `runs` of each decoding step.

    Where `edge` knows the function's processes, a step takes no longer than these computed: other work on the machine
    lengthens runs and not their CPU time.

    Raises:
        HopError, RequestError, SegmentError: the function cannot be reached, or refuses.
        ProfileMalformed: the response is no measurement.
    """
    whole = subject.bundle.segment(WHOLE)
    with hops_by_url([function.url], function.protection, function.trust) as hops:
        hop = hops[function.url]
        series = [_StepSeries(hop, subject, s, max(1, -(-runs // ROUNDS)), edge) for s in (whole, *segments)]
        device = function.device()
        for number in range(1, ROUNDS + 1):
            for i, each in enumerate(series, start=1):
                if budget.spent and number > 1:
                    break
                progress(f"{tier}, round {number} of {ROUNDS}: steps of {each.segment.id}, {i} of {len(series)}")
                each.run_round()
        progress(f"{tier}: memory, and the cost of a call itself and of encoding")
        costs = {each.segment.id: each.cost(function) for each in series}
    steps = tuple(step for each in series for step in each.steps())
    unsteady = [s for s in steps if not s.run.steady]
    warnings = [warning for each in series for warning in each.warnings]
    if unsteady:
        names = ", ".join(dict.fromkeys(str(s.segment) for s in unsteady))
        warnings.append(f"steps of {names} were unsteady: the device changed its speed, or others use it")
    return Profile(
        model=subject.bundle.name,
        content=content_of(subject.bundle),
        bundle=subject.digest,
        tier=tier,
        device=device,
        nodes=(),
        segments=costs,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        inputs="tokens",
        hop=hop_cost(function),
        codecs=function.codecs(),
        steady=not unsteady,
        warnings=tuple(warnings),
        steps=steps,
    )


@dataclass
class _StepSeries:
    """The rounds of a segment on a function: for each kind of step a series of runs."""

    hop: HttpHop
    subject: StepSubject
    segment: Segment
    runs: int
    edge: SlowEdge
    rounds: dict[tuple[int, int], list[list[float]]] = field(default_factory=dict)
    bytes: dict[int, tuple[int, int]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def run_round(self) -> None:
        """Steps of every kind in a session of its own.

        A step at an earlier position takes the tokens behind it back, so that a session serves for all of them.
        """
        session, sizes = secrets.token_hex(16), self.subject.sizes
        if not self.rounds:
            # Loads the segment, and has the runtime allocate for the largest step.
            self._step(session, sizes.chunk, 0)
        # The first step of a round finds the device's caches as other segments left these.
        self._step(session, sizes.middle, 0)
        for tokens, past in sizes.points:
            if (tokens, past) == (sizes.chunk, sizes.past):
                # The session has the chunk of the point before.
                self._fill(session, sizes.chunk, past)
            count = self.runs if tokens == 1 else 1
            self.rounds.setdefault((tokens, past), []).append([self._step(session, tokens, past) for _ in range(count)])
        self.hop.end_session(session, Context.from_headers({}, longest_s=_MAX_STEP_S).deadline)

    def _fill(self, session: str, start: int, stop: int) -> None:
        for at in range(start, stop, self.subject.sizes.chunk):
            self._step(session, min(self.subject.sizes.chunk, stop - at), at)

    def _step(self, session: str, tokens: int, past: int) -> float:
        subject, sampling = self.subject, None if self.segment.id.stop else Sampling()
        step = Step(session, past, sampling, subject.sizes.past + subject.sizes.chunk)
        arrays = subject.arrays(self.segment, tokens)
        frame = Frame(arrays, subject.digest, self.segment.id, step=step)
        before = self.edge.work().function_s
        reply = self.hop.call(frame, Context.from_headers({}, longest_s=_MAX_STEP_S))
        computed_s = self.edge.work().function_s - before
        self.bytes[tokens] = sum(a.nbytes for a in arrays.values()), sum(a.nbytes for a in reply.frame.tensors.values())
        return min(reply.run_s, computed_s) if self.edge.pids else reply.run_s

    def steps(self) -> Iterator[StepCost]:
        for (tokens, past), series in self.rounds.items():
            # A chunk runs once a round: the rounds together are its series.
            grouped = series if tokens == 1 else [[s[0] for s in series]]
            yield StepCost(self.segment.id, tokens, past, timing(grouped))

    def cost(self, function: ProfiledFunction) -> SegmentCost:
        """The segment's cost: a step of one token, and the memory of the largest chunk."""
        memory = self._memory(function)
        weights = sum(t.length for t in self.subject.bundle.weight_ranges(self.segment))
        sent, received = self.bytes[1]
        return SegmentCost(
            run=timing(self.rounds[1, self.subject.sizes.middle]),
            decode_s=memory.decode_s if memory else 0.0,
            encode_s=memory.encode_s if memory else 0.0,
            input_bytes=sent,
            output_bytes=received,
            weights_bytes=weights,
            activation_bytes=memory.activation_bytes if memory else 0,
            memory_bytes=weights + (memory.arena_bytes if memory else 0),
        )

    def _memory(self, function: ProfiledFunction) -> SegmentMeasurement | None:
        frame = Frame(self.subject.first_arrays(self.segment), self.subject.digest, self.segment.id)
        try:
            return function.measure(frame, runs=1, warmup=0)
        except ProfileMalformed:
            raise
        except IsthmusError as e:
            self.warnings.append(f"the memory of {self.segment.id} was not measured, its weights count: {e.message}")
            return None
