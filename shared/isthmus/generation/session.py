"""The session of a generation along its route: how far each function has run the sequence, and how state is rebuilt.

A function that lost the session's state, another replica, and a function of another route are brought up by replay:
each runs the positions that it lacks, from the boundary tensors that were sent to its segment before. Segments before
the cut run again only for positions whose boundary tensors were not stored.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
from msgspec import structs

from isthmus.arrays import Array
from isthmus.artifacts.bundle import EXIT_PROBABILITIES, EXIT_TOKENS
from isthmus.artifacts.sampling import ALTERNATIVE_LOGPROBS, ALTERNATIVES, LOGPROBS, TOKENS
from isthmus.artifacts.state import State
from isthmus.codecs import EncodedTensor
from isthmus.context import Context, Deadline
from isthmus.errors import DeadlineExceeded, HopError, StateMissing
from isthmus.generation.boundary import BoundaryTensors, exact_encodings
from isthmus.generation.policy import GenerationPolicy, Rerouting
from isthmus.generation.request import EarlyToken, Generated, GenerationRequest
from isthmus.pipeline import Hop, Result, Route, encode_tensors, execute, local_route
from isthmus.processing.sampling import SampledToken
from isthmus.retries import jittered
from isthmus.wire.frame import Frame, Step

# A chunk's hidden states and scores stay small, and a step of another session waits no longer than for this many.
CHUNK = 256
# Failures without a completed call in between: state that is lost again and again is a defect, not an accident.
_MAX_FAILURES = 8
# Between two looks at an exhausted recovery budget.
_PAUSE_S = 0.1
# Weight of a call in the mean seconds of calls of its size, and the least that a call is expected to take: less would
# give up a hop for a pause of its machine.
_WEIGHT, _MIN_EXPECTED_S = 0.3, 0.5


class _Call(NamedTuple):
    """The next call: segments from index `first` to before `until`, positions from `start` to before `stop`."""

    first: int
    until: int
    start: int
    stop: int


class RoutedSession:
    """One generation's session; not thread-safe."""

    def __init__(
        self,
        route: Route,
        state: State,
        request: GenerationRequest,
        rerouting: Rerouting,
        policy: GenerationPolicy,
        done: Generated,
    ) -> None:
        self._state, self._sampling = state, request.sampling
        self._rerouting, self._policy, self._done = rerouting, policy, done
        # Not to be guessed: whoever knows a session's name can extend its state.
        self._name = secrets.token_hex(16)
        self._reserve = min(state.context, len(request.prompt) + request.max_tokens)
        self._boundary = BoundaryTensors(policy.replay_bytes, policy.memory)
        self._positions: dict[tuple[str, str, str], int] = {}
        self._hops: dict[str, Hop] = {}
        self._mean_s: dict[int, float] = {}
        self._sampled_to = self._calling = self._failures = 0
        # Of the latest call, and how many of them are not proposals.
        self._tokens: list[int] = []
        self._agreed = 0
        self._heard = time.monotonic()
        self._take(route)

    def sample(self, tokens: Sequence[int], last: int, context: Context) -> list[SampledToken]:
        """The tokens sampled behind each of the `last` positions of `tokens`; functions run the positions they lack.

        Raises:
            DeadlineExceeded: the deadline, or the time without a completed call, passed.
            HopError, StateMissing: recovery did not help.
            Further errors as `execute`.
        """
        self._keep_common(tokens, len(tokens) - last)
        # The sequence itself, without proposals, only grows.
        self._agreed = len(tokens) - last
        self._heard = time.monotonic()
        if self._is_ahead:
            # All that is sampled belongs to one call of the segments behind.
            self._run_ahead(tokens, context)
        while True:
            call = self._next(len(tokens), last)
            within = self._within(context)
            try:
                result = self._run(call, tokens, last, within)
            except StateMissing as e:
                self._positions[self._place(self._calling)] = _position(e, call.start)
                self._recover(e, within.deadline)
            except HopError as e:
                # Without time left another route could not answer either, and a reader that left needs none.
                is_over = within.deadline.remaining() <= 0 or _is_abandoned(context)
                other = None if is_over else self._rerouting.instead(e, context)
                if other is None:
                    raise
                self._take(other)
                self._recover(e, within.deadline)
            except DeadlineExceeded as e:
                context.deadline.check("the generation ended")
                raise self._silence() from e
            else:
                if call.stop == len(tokens) and call.until == len(self._route.segments):
                    return _sampled(result)

    def early(self, tokens: Sequence[int], context: Context) -> EarlyToken | None:
        """The prediction of the exit branch at the route's first cut; the segment before it runs up to `tokens`' end.

        None where the bundle has no such branch, or a function lacks state, which the next `sample` rebuilds.

        Raises:
            DeadlineExceeded: as `sample`.
        """
        head = self._route.segments[0]
        if len(self._route.segments) < 2 or (early := self._route.bundle.exit_at(head.id.stop)) is None:
            return None
        branch = early.segment
        self._keep_common(tokens, len(tokens) - 1)
        self._heard = time.monotonic()
        if (result := self._run_ahead(tokens, context)) is None:
            return None
        streams = {spec.name: result.tensors[spec.name][:, -1:] for spec in branch.inputs}
        route = local_route(self._route.digest, self._route.bundle, (branch,), self._route.hops[0])
        try:
            tensors = execute(route, streams, self._within(context)).tensors
        except HopError:
            return None
        return EarlyToken(int(tensors[EXIT_TOKENS][0, -1]), float(tensors[EXIT_PROBABILITIES][0, -1]))

    def end(self) -> None:
        """Have all functions of the session drop its state, in the background, and drop the stored tensors."""
        self._boundary.close()
        self._policy.ender.end(self._name, self._hops.values())

    def _take(self, route: Route) -> None:
        # Looks repeat segments for a clearer prediction; sampling has none to clear.
        self._route = replace(route, looks=None)
        self._hops |= {hop.name: hop for hop in route.hops}

    def _place(self, index: int) -> tuple[str, str, str]:
        return self._route.digest, self._route.hops[index].name, self._route.segments[index].id

    @property
    def _is_ahead(self) -> bool:
        """Whether the first segment ran positions that the second did not."""
        if len(self._route.segments) < 2:
            return False
        first, second = (self._positions.get(self._place(i), 0) for i in (0, 1))
        return first > second

    def _run_ahead(self, tokens: Sequence[int], context: Context) -> Result | None:
        """Run the first segment alone up to the end of `tokens`, and store what the second one takes."""
        start, second = self._positions.get(self._place(0), 0), self._route.segments[1]
        # With a gap in what is stored, the first segment would run again for the second.
        if not 0 < start < len(tokens) or self._boundary.covered(second.id) != start:
            return None
        call = _Call(0, 1, start, len(tokens))
        try:
            result = self._run(call, tokens, 1, self._within(context))
        except StateMissing as e:
            self._positions[self._place(0)] = _position(e, start)
            return None
        except HopError:
            return None
        arrays = {spec.name: result.tensors[spec.name] for spec in second.inputs if spec.name in result.tensors}
        encodings = self._route.encodings_of(1)
        encoded = encode_tensors(arrays, encodings)
        raw = {name: array for name, array in arrays.items() if name not in encoded}
        self._boundary.add(second.id, start, len(tokens), raw, encoded, encodings)
        return result

    def _keep_common(self, tokens: Sequence[int], sampled_from: int) -> None:
        """Keep what ran for the tokens that are the same now; a step at an earlier position drops the rest.

        Segments behind the first run again from `sampled_from` on: their last positions are sampled together.
        """
        count = self._agreed + common_length(self._tokens[self._agreed :], tokens[self._agreed :])
        self._tokens = list(tokens)
        ahead = self._place(0) if len(self._route.segments) > 1 else None
        self._positions = {
            place: min(position, count if place == ahead else min(count, sampled_from))
            for place, position in self._positions.items()
        }
        self._sampled_to = min(self._sampled_to, count, sampled_from)
        self._boundary.truncate(count)

    def _next(self, end: int, last: int) -> _Call:
        """The segments that are furthest behind run first, as far as the others are or one chunk."""
        positions = [self._positions.get(self._place(i), 0) for i in range(len(self._route.segments))]
        start = min(positions)
        first = until = positions.index(start)
        while until < len(positions) and positions[until] == start:
            until += 1
        # Without stored inputs the segments before compute them again.
        while first and (covered := self._covered(first, until)) <= start:
            first -= 1
        stop = min(start + max(CHUNK, last), end, *(p for p in (*positions[:first], *positions[until:]) if p > start))
        if first:
            stop = min(stop, covered)
        if start < end - last < stop < end:
            # Positions that are sampled together belong to one call.
            stop = end - last
        return _Call(first, until, start, stop)

    def _covered(self, first: int, until: int) -> int:
        """How many positions of the inputs of these segments are stored."""
        needed = {spec.name for spec in self._route.between(first, until).inputs}
        segments = self._route.segments[first:until]
        return min(self._boundary.covered(s.id) for s in segments if any(spec.name in needed for spec in s.inputs))

    def _within(self, context: Context) -> Context:
        """The context of a call: within the deadline, and within the time that may pass without a completed call."""
        context.deadline.check("the generation ended")
        silent = Deadline(self._heard + self._policy.silence_s)
        if silent.remaining() <= 0:
            raise self._silence()
        return replace(context, deadline=min(silent, context.deadline, key=lambda d: d.at))

    def _silence(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"the generation made no progress for {self._policy.silence_s:g} s")

    def _run(self, call: _Call, tokens: Sequence[int], last: int, within: Context) -> Result:
        count = call.stop - call.start
        route = self._route.between(call.first, call.until)
        arrays, encoded = self._inputs(call, route, tokens)
        if call.first:
            # Stored values as they were received: encoded already, or raw where the codec would change them further.
            route = replace(route, encodings=({}, *route.encodings[1:]) if route.encodings else ())
        began = time.perf_counter()
        context = self._rerouting.limited(within, self._expected_s(count))
        step, begin = self._step(call, tokens, last), partial(self._begin, call)
        result = execute(route, arrays, context, encoded, step=step, before_call=begin)
        self._positions[self._place(call.until - 1)] = call.stop
        self._completed(call, result, time.perf_counter() - began)
        return result

    def _inputs(
        self, call: _Call, route: Route, tokens: Sequence[int]
    ) -> tuple[dict[str, Array], dict[str, EncodedTensor]]:
        if not call.first:
            return {self._state.tokens: np.array([tokens[call.start : call.stop]], np.int64)}, {}
        names = frozenset(spec.name for spec in route.inputs)
        arrays: dict[str, Array] = {}
        # A tensor that skips a segment was stored with the segment that takes it.
        for segment in reversed(route.segments):
            if names.intersection(spec.name for spec in segment.inputs):
                arrays |= self._boundary.read(segment.id, names, call.start, call.stop)
        encoded = exact_encodings(arrays, route.encodings_of(0))
        return {name: array for name, array in arrays.items() if name not in encoded}, encoded

    def _step(self, call: _Call, tokens: Sequence[int], last: int) -> Step:
        """The step of a call; only a call of the model's last segment samples."""
        if call.until < len(self._route.segments):
            return Step(self._name, call.start, None, self._reserve)
        # Also in a chunk before the end: scores stay in the function, and penalties need the history.
        drawn = min(last, call.stop - call.start) if call.stop == len(tokens) else 1
        history = tuple(tokens[call.start : call.stop]) if self._sampling.has_penalty else ()
        return Step(self._name, call.start, structs.replace(self._sampling, last=drawn, tokens=history), self._reserve)

    def _begin(self, call: _Call, index: int, frame: Frame) -> None:
        """Before each hop's call: note the progress of the segment before it, and store what is sent."""
        self._calling = call.first + index
        if index:
            self._positions[self._place(self._calling - 1)] = call.stop
        # A call drops the state behind its position even where its response is lost.
        self._positions[self._place(self._calling)] = call.start
        segment = self._route.segments[self._calling]
        if segment.id.start:
            encodings = self._route.encodings_of(self._calling)
            self._boundary.add(segment.id, call.start, call.stop, frame.tensors, frame.encoded, encodings)

    def _expected_s(self, count: int) -> float | None:
        mean_s = self._mean_s.get(count.bit_length())
        return None if mean_s is None else max(mean_s, _MIN_EXPECTED_S)

    def _completed(self, call: _Call, result: Result, seconds: float) -> None:
        self._failures, self._heard = 0, time.monotonic()
        self._policy.recoveries.succeeded()
        size = (call.stop - call.start).bit_length()
        mean_s = self._mean_s.get(size, seconds)
        self._mean_s[size] = mean_s + _WEIGHT * (seconds - mean_s)
        done = self._done
        done.link_bytes += result.link_bytes
        if call.start < self._sampled_to:
            done.replayed += min(call.stop, self._sampled_to) - call.start
            done.replayed_bytes += sum(run.sent_bytes for run in result.runs)
        if call.until == len(self._route.segments):
            self._sampled_to = max(self._sampled_to, call.stop)

    def _recover(self, error: HopError | StateMissing, deadline: Deadline) -> None:
        """Count a recovery, and wait for its turn: the replays of many sessions would keep a function down.

        Raises:
            HopError, StateMissing: `error`, after too many failures, or without time left.
        """
        self._done.recoveries += 1
        self._failures += 1
        if self._failures >= _MAX_FAILURES:
            raise error
        while not self._policy.recoveries.take():
            if deadline.remaining() < _PAUSE_S:
                raise error
            time.sleep(jittered(_PAUSE_S, _PAUSE_S))


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """The number of tokens at the beginning that are the same."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _is_abandoned(context: Context) -> bool:
    return context.abandonment is not None and context.abandonment.is_abandoned


def _position(error: StateMissing, start: int) -> int:
    """The positions that the function has, by its own word, and never more than it was asked to extend."""
    position = error.facts.get("position")
    return min(position, start) if type(position) is int and position >= 0 else 0


def _sampled(result: Result) -> list[SampledToken]:
    ids, logprobs = result.outputs[TOKENS][0].tolist(), result.outputs[LOGPROBS][0].tolist()
    if ALTERNATIVES not in result.outputs:
        return [SampledToken(i, p) for i, p in zip(ids, logprobs, strict=True)]
    others = zip(
        result.outputs[ALTERNATIVES][0].tolist(), result.outputs[ALTERNATIVE_LOGPROBS][0].tolist(), strict=True
    )
    return [
        SampledToken(i, p, tuple(zip(tokens, scores, strict=True)))
        for i, p, (tokens, scores) in zip(ids, logprobs, others, strict=True)
    ]
