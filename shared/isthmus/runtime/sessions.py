"""Sessions: what segments with declared state keep between the steps of a generation.

State never leaves the function. A frame names the session and its position; a step at an earlier position takes the
tokens behind it back, so that a repeated call and rejected proposals need nothing else. Bounds: rows for each segment,
and bytes for all; a session reserves its bytes when it begins, so none that runs loses state for a new one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from isthmus.arrays import Array
from isthmus.artifacts.sampling import ALTERNATIVE_LOGPROBS, ALTERNATIVES, LOGPROBS, TOKENS
from isthmus.artifacts.state import State
from isthmus.errors import Overloaded, ShapeMismatch, StateMissing
from isthmus.processing.sampling import sample
from isthmus.runtime.ort_runner import OrtRunner
from isthmus.runtime.state_memory import StateMemory
from isthmus.wire.frame import Step

Key = tuple[str, str]
"""A bundle's digest and a segment's id."""


@dataclass
class _KeptSession:
    row: int
    reserved: int
    used: float
    length: int = 0
    history: list[int] = field(default_factory=list)
    running: bool = False
    # Forgotten once its step under way is over.
    ended: bool = False


@dataclass
class _KeptSegment:
    memory: StateMemory
    sessions: dict[str, _KeptSession] = field(default_factory=dict)


class Sessions:
    """The sessions of a function's segments; thread-safe.

    Units: `max_bytes` bounds the state of all sessions, `max_tokens` a session's length, `idle_s` is how long a session
    without a step is kept where others need its place.
    """

    def __init__(
        self,
        *,
        max_sessions: int,
        max_bytes: int,
        max_tokens: int,
        idle_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_sessions, self._max_bytes, self._max_tokens = max_sessions, max_bytes, max_tokens
        self._idle_s, self._clock = idle_s, clock
        self._lock = threading.Lock()
        self._segments: dict[Key, _KeptSegment] = {}
        self._reserved = 0

    def step(
        self, key: Key, runner: OrtRunner, state: State, step: Step, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Run a segment for a session's next tokens; the scores become tokens where the step samples.

        Shapes: arrays (1, tokens, …).

        Raises:
            StateMissing: the session's state here ends before `position`.
            Overloaded: no place for another session, or the session has a step under way.
            ShapeMismatch: more than one row, or the session would be longer than it may be.
            As `Runner.run`.
        """
        count = _tokens(arrays)
        session, kept = self._take(key, runner, state, step, count)
        try:
            supplied = {
                state.lengths: np.array([step.position + count - 1], np.int32),
                state.total: np.array(step.position + count, np.int32),
            }
            taken = {spec.name for spec in runner.segment.inputs}
            feeds = {**arrays, **{name: array for name, array in supplied.items() if name in taken}}
            outputs = runner.run_step(feeds, kept.memory.buffers(session.row))
            with self._lock:
                session.length = step.position + count
            return self._sampled(session, step, outputs, count)
        finally:
            with self._lock:
                session.running, session.used = False, self._clock()
                if session.ended:
                    self._drop(kept, step.session)

    def end(self, session: str) -> None:
        """Forget a session in every segment; one with a step under way goes when that is over."""
        with self._lock:
            for kept in self._segments.values():
                if (entry := kept.sessions.get(session)) is None:
                    continue
                entry.ended = entry.running
                if not entry.running:
                    self._drop(kept, session)

    def _take(
        self, key: Key, runner: OrtRunner, state: State, step: Step, count: int
    ) -> tuple[_KeptSession, _KeptSegment]:
        with self._lock:
            if (kept := self._segments.get(key)) is None:
                tokens = min(state.context, self._max_tokens)
                memory = StateMemory(runner.segment, state, rows=self._max_sessions, tokens=tokens)
                kept = self._segments[key] = _KeptSegment(memory)
            if step.position + count > kept.memory.tokens:
                raise ShapeMismatch(
                    f"the session would have {step.position + count} tokens; at most {kept.memory.tokens} are kept",
                    limit=kept.memory.tokens,
                    hint="shorten the prompt or max_tokens, or raise max_session_tokens",
                )
            session = kept.sessions.get(step.session)
            if session is None:
                if step.position:
                    raise StateMissing(
                        f"session {step.session} has no state here",
                        segment=key[1],
                        session=step.session,
                        position=0,
                    )
                session = self._begin(kept, step, count)
            if session.running:
                raise Overloaded(f"session {step.session} has a step under way", retry_after_s=1)
            if session.length < step.position:
                raise StateMissing(
                    f"session {step.session} has {session.length} tokens here, not {step.position}",
                    segment=key[1],
                    session=step.session,
                    position=session.length,
                )
            del session.history[step.position :]
            session.length, session.running = step.position, True
            return session, kept

    def _begin(self, kept: _KeptSegment, step: Step, count: int) -> _KeptSession:
        needed = min(max(step.reserve, count), kept.memory.tokens) * kept.memory.token_bytes
        rows = set(range(self._max_sessions)) - {s.row for s in kept.sessions.values()}
        while not rows or self._reserved + needed > self._max_bytes:
            if not self._evict(kept if not rows else None):
                raise Overloaded(
                    f"{len(kept.sessions)} sessions are kept, with {self._reserved} of {self._max_bytes} bytes taken:"
                    " there is no place for another",
                    retry_after_s=1,
                )
            rows = set(range(self._max_sessions)) - {s.row for s in kept.sessions.values()}
        # The lowest row: sessions that decode together lie beside each other.
        session = kept.sessions[step.session] = _KeptSession(min(rows), needed, self._clock())
        self._reserved += needed
        return session

    def _evict(self, among: _KeptSegment | None) -> bool:
        """Drop the session without a step for longest, of one segment or of all; False where all are in use."""
        oldest = self._clock() - self._idle_s
        idle = [
            (session.used, name, kept)
            for kept in ([among] if among is not None else self._segments.values())
            for name, session in kept.sessions.items()
            if not session.running and session.used < oldest
        ]
        if not idle:
            return False
        _, name, kept = min(idle, key=lambda each: each[0])
        self._drop(kept, name)
        return True

    def _drop(self, kept: _KeptSegment, name: str) -> None:
        session = kept.sessions.pop(name)
        self._reserved -= session.reserved
        kept.memory.release(session.row)

    def _sampled(self, session: _KeptSession, step: Step, outputs: dict[str, Array], count: int) -> dict[str, Array]:
        if (sampling := step.sampling) is None:
            return outputs
        if sampling.has_penalty:
            session.history += sampling.tokens
        (scores,) = outputs.values()
        last = min(sampling.last, count)
        first = count - last
        drawn = [
            sample(scores[0, i], sampling, step.position + i + 1, session.history[: step.position + i + 1])
            for i in range(first, count)
        ]
        sampled: dict[str, Array] = {
            TOKENS: np.array([[d.token for d in drawn]], np.int64),
            LOGPROBS: np.array([[d.logprob for d in drawn]], np.float32),
        }
        if sampling.logprobs:
            shape = (1, last, sampling.logprobs)
            sampled[ALTERNATIVES] = np.array([[t for d in drawn for t, _ in d.alternatives]], np.int64).reshape(shape)
            sampled[ALTERNATIVE_LOGPROBS] = np.array(
                [[p for d in drawn for _, p in d.alternatives]], np.float32
            ).reshape(shape)
        return sampled


def _tokens(arrays: Mapping[str, Array]) -> int:
    shapes: Sequence[tuple[int, ...]] = [a.shape[:2] for a in arrays.values()]
    if not shapes or any(len(s) < 2 or s[0] != 1 or s != shapes[0] or not s[1] for s in shapes):
        raise ShapeMismatch(
            "a step takes tensors of one row and the same tokens", got={n: list(a.shape) for n, a in arrays.items()}
        )
    return shapes[0][1]
