"""Sessions: what segments with declared state keep between the steps of a generation.

State never leaves the function. A frame names the session and its position; a step at an earlier position takes the
tokens behind it back, so that a repeated call and rejected proposals need nothing else. Bounds: rows for each segment,
and bytes for all; a session reserves its bytes when it begins, so none that runs loses state for a new one.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from isthmus.errors import Overloaded, ShapeMismatch, StateMissing
from isthmus.runtime.ort_runner import OrtRunner
from isthmus.runtime.state_memory import StateMemory
from isthmus.runtime.step_trial import StepTrial
from isthmus.wire.frame import Step

# Of a refusal: the seconds until the first idle session makes room, within these bounds.
MIN_RETRY_S, MAX_RETRY_S = 1, 30
# A session without a token for longer is not stalled by a chunk of a prompt.
_DECODING_S = 1.0
# How often expired sessions are looked for, in shares of their time, and at least so many seconds apart.
_LOOKS, _MIN_LOOK_S = 4, 0.05


@dataclass(eq=False)
class Session:
    """A session of a segment. Units: `reserved` in bytes, `length` and `written` in tokens, moments of the clock.

    `written` is the longest that it was. `ran` is the end of its latest run, and `gaps` the seconds from such ends to
    the next steps: when the next one is due.
    """

    name: str
    row: int
    reserved: int
    used: float
    length: int = 0
    written: int = 0
    history: list[int] = field(default_factory=list)
    # From the moment that a step is accepted until its response is known, and until its run is over.
    is_stepping: bool = False
    awaits_run: bool = False
    # Forgotten once its step under way is over.
    is_ended: bool = False
    decodes: bool = False
    ran: float = 0.0
    gaps: tuple[float, ...] = ()


@dataclass(frozen=True)
class RowSpan:
    """Rows beside each other that run together. `sessions` are those that step; the others' rows are idle."""

    first: int
    lengths: tuple[int, ...]
    sessions: tuple[Session, ...]


class SegmentSessions:
    """The sessions of a segment, and the rows of its state; its methods are called from any thread."""

    def __init__(
        self,
        memory: StateMemory,
        trial: StepTrial,
        clock: Callable[[], float],
        lock: threading.Lock,
        runs: Counter[int],
    ) -> None:
        self.memory, self.trial, self._clock, self._runs = memory, trial, clock, runs
        self.sessions: dict[str, Session] = {}
        # The lock of all sessions, since places change hands under it.
        self._changed = threading.Condition(lock)
        self._rows_in_run: set[int] = set()

    def free_row(self) -> int | None:
        """The lowest free row, so that sessions lie beside each other; None where all are taken."""
        taken = {session.row for session in self.sessions.values()}
        return next((row for row in range(self.memory.rows) if row not in taken), None)

    def expected(self, within_s: float) -> int:
        """How many further sessions will step within so many seconds, by their latest gaps between steps."""
        now = self._clock()
        away = [each for each in list(self.sessions.values()) if each.decodes and not each.awaits_run]
        return sum(abs(each.ran + max(each.gaps) - now) <= within_s for each in away if each.gaps)

    def others_decode(self, session: Session) -> bool:
        """Whether another session decodes: its latest step is of one token, and waits or ran a moment ago."""
        since = self._clock() - _DECODING_S
        others = [each for each in list(self.sessions.values()) if each is not session and each.decodes]
        return any(each.awaits_run or each.ran > since for each in others)

    def ran(self, session: Session, length: int) -> None:
        """Note the end of a session's run."""
        session.length, session.written = length, max(session.written, length)
        session.ran, session.awaits_run = self._clock(), False

    def take_rows(self, sessions: Sequence[Session], max_rows: int) -> list[RowSpan]:
        """Spans of rows for a run of each; nobody else runs on these rows until `give_back`.

        A row between those of two sessions runs along idle: its new key and value go where its session's next token
        will write its own, so its state is unharmed. A row whose session is full has no such place.
        """
        with self._changed:
            while any(session.row in self._rows_in_run for session in sessions):
                self._changed.wait()
            if len(sessions) > 1:
                self._move_together(sessions)
            spans = [self._span(group) for group in self._groups(sessions, max_rows)]
            self._rows_in_run.update(row for span in spans for row in rows_of(span))
            return spans

    def count_run(self, steps: int) -> None:
        """Count a run that so many steps shared."""
        with self._changed:
            self._runs[1 << (steps - 1).bit_length()] += 1

    def give_back(self, span: RowSpan) -> None:
        """Others may run on the rows."""
        with self._changed:
            self._rows_in_run.difference_update(rows_of(span))
            self._changed.notify_all()

    def _move_together(self, sessions: Sequence[Session]) -> None:
        """Move the highest rows to free ones below: once for each session that ended, and cheaper than a step."""
        for session in sorted(sessions, key=lambda each: -each.row):
            free = self.free_row()
            if free is None or free > session.row or free in self._rows_in_run:
                return
            self.memory.move(session.row, free, session.length)
            session.row, session.written = free, session.length

    def _groups(self, sessions: Sequence[Session], max_rows: int) -> Iterator[list[Session]]:
        group: list[Session] = []
        for session in sorted(sessions, key=lambda each: each.row):
            if group and not (
                session.row - group[0].row < max_rows
                and all(self._idle_length(row) is not None for row in range(group[-1].row + 1, session.row))
            ):
                yield group
                group = []
            group.append(session)
        yield group

    def _idle_length(self, row: int) -> int | None:
        """The tokens of the row's session where it may run along idle; else None."""
        session = next((each for each in self.sessions.values() if each.row == row), None)
        if session is None or row in self._rows_in_run or session.length >= self.memory.tokens:
            return None
        return session.length

    def _span(self, group: Sequence[Session]) -> RowSpan:
        rows = {session.row: session.length for session in group}
        first, last = min(rows), max(rows)
        lengths = [rows[row] if row in rows else self._idle_length(row) or 0 for row in range(first, last + 1)]
        return RowSpan(first, tuple(lengths), tuple(group))


def rows_of(span: RowSpan) -> range:
    """The rows of a span."""
    return range(span.first, span.first + len(span.lengths))


@dataclass(frozen=True)
class SessionCounts:
    """Sessions now, and counts since the start. Units: bytes."""

    sessions: int
    reserved: int
    resident: int
    steps: Mapping[str, int]
    """By kind: `prefill`, `decode`, `verify`."""
    dropped: Mapping[str, int]
    """By reason: `ended`, `evicted`, `expired`."""
    refused: int
    runs: Mapping[int, int]
    """By the steps that shared them, up to the next power of two."""


class Sessions:
    """The sessions of a function's segments; thread-safe. State of an unloaded segment goes with its runner.

    Units: `max_bytes` bounds the state of all sessions, `max_tokens` a session's length, `idle_s` is how long a session
    without a step is kept where others need its place, `expiry_s` how long it is kept at all.
    """

    def __init__(
        self,
        *,
        max_sessions: int,
        max_bytes: int,
        max_tokens: int,
        idle_s: float,
        expiry_s: float,
        batches: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_sessions, self._max_bytes, self._max_tokens = max_sessions, max_bytes, max_tokens
        self._idle_s, self._expiry_s, self._batches, self._clock = idle_s, expiry_s, batches, clock
        self._lock = threading.Lock()
        # Weak: with an unloaded segment its sessions' state goes as well. Versions of a model with equal segments share
        # a runner, and so the state.
        self._segments: weakref.WeakKeyDictionary[OrtRunner, SegmentSessions] = weakref.WeakKeyDictionary()
        self._steps: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._runs: Counter[int] = Counter()
        self._refused = 0
        self._timer: threading.Timer | None = None
        self._is_closed = False

    def begin(self, runner: OrtRunner, step: Step, count: int) -> tuple[SegmentSessions, Session]:
        """Accept a step of `count` tokens; until `finish` the session takes no other.

        Raises:
            StateMissing: the session's state here ends before the step.
            Overloaded: no place for the session, or the session has a step under way; nobody's state was dropped.
            ShapeMismatch: the session would be longer, or take more, than it may ever.
        """
        segment_id, end = str(runner.segment.id), step.position + count
        with self._lock:
            segment = self._segment(runner)
            if end > segment.memory.tokens:
                raise ShapeMismatch(
                    f"the session would have {end} tokens; at most {segment.memory.tokens} are kept",
                    limit=segment.memory.tokens,
                    hint="shorten the prompt or max_tokens, or raise max_session_tokens",
                )
            session = segment.sessions.get(step.session)
            if session is not None and session.is_stepping:
                raise self._refusal(f"session {step.session!r} has a step under way")
            length = 0 if session is None else session.length
            if length < step.position:
                raise StateMissing(
                    f"session {step.session!r} has {length} tokens in segment {segment_id}, not {step.position}",
                    segment=segment_id,
                    session=step.session,
                    position=length,
                )
            if session is None:
                session = self._enter(segment, step, count)
            self._reserve(segment, session, segment.memory.row_bytes(end))
            session.is_stepping = session.awaits_run = True
            if session.length:
                session.gaps = (*session.gaps[-1:], self._clock() - session.ran)
            session.decodes = count == 1
            self._steps[kind_of(step.position, count)] += 1
            self._look_later()
            return segment, session

    def finish(self, segment: SegmentSessions, session: Session) -> None:
        """Let the session take its next step."""
        with self._lock:
            session.is_stepping = session.awaits_run = False
            session.used = self._clock()
            if session.is_ended:
                self._drop(segment, session, "ended")

    def end(self, name: str) -> None:
        """Forget a session in every segment; one with a step under way goes when that is over."""
        with self._lock:
            for segment in self._segments.values():
                if (session := segment.sessions.get(name)) is None:
                    continue
                session.is_ended = session.is_stepping
                if not session.is_stepping:
                    self._drop(segment, session, "ended")

    def drop_expired(self) -> None:
        """Forget the sessions that had no step for the expiry's time."""
        with self._lock:
            self._timer = None
            oldest = self._clock() - self._expiry_s
            for segment in self._segments.values():
                for session in list(segment.sessions.values()):
                    if not session.is_stepping and session.used <= oldest:
                        self._drop(segment, session, "expired")
            self._look_later()

    def close(self) -> None:
        """Look for expired sessions no more."""
        with self._lock:
            self._is_closed = True
            if self._timer is not None:
                self._timer.cancel()

    @property
    def largest_batch(self) -> int:
        """The most steps that run together for any segment; 1 where none do."""
        with self._lock:
            return max((segment.trial.max_size for segment in self._segments.values()), default=1)

    def counts(self) -> SessionCounts:
        """The present state and the counts since the start."""
        with self._lock:
            everyone = [(segment, s) for segment in self._segments.values() for s in segment.sessions.values()]
            resident = sum(segment.memory.row_bytes(session.written) for segment, session in everyone)
            return SessionCounts(
                len(everyone),
                self._reserved(),
                resident,
                dict(self._steps),
                dict(self._dropped),
                self._refused,
                dict(self._runs),
            )

    def _segment(self, runner: OrtRunner) -> SegmentSessions:
        if (segment := self._segments.get(runner)) is None:
            if (state := runner.state) is None:
                raise ShapeMismatch(f"segment {runner.segment.id} has no state")
            tokens = min(state.context, self._max_tokens)
            memory = StateMemory(runner.segment, state, rows=self._max_sessions, tokens=tokens)
            trial = StepTrial(str(runner.segment.id), enabled=self._batches)
            segment = self._segments[runner] = SegmentSessions(memory, trial, self._clock, self._lock, self._runs)
        return segment

    def _enter(self, segment: SegmentSessions, step: Step, count: int) -> Session:
        needed = segment.memory.row_bytes(min(max(step.reserve, count), segment.memory.tokens))
        self._check_size(needed)  # before another loses its place for it
        while (row := segment.free_row()) is None:
            self._evict([segment], None)
        session = Session(step.session, row, 0, self._clock())
        self._reserve(segment, session, needed)
        segment.sessions[step.session] = session
        return session

    def _reserve(self, segment: SegmentSessions, session: Session, needed: int) -> None:
        """Raise the session's reservation to `needed` bytes, idle sessions of others making room."""
        self._check_size(needed)
        while self._reserved() - session.reserved + max(needed, session.reserved) > self._max_bytes:
            self._evict(list(self._segments.values()), session)
        session.reserved = max(needed, session.reserved)

    def _check_size(self, needed: int) -> None:
        if needed > self._max_bytes:
            raise ShapeMismatch(
                f"the session would take {needed} bytes of state; session_bytes is {self._max_bytes}",
                limit=self._max_bytes,
                hint="shorten the prompt or max_tokens, or raise session_bytes and the function's memory limit",
            )

    def _reserved(self) -> int:
        return sum(s.reserved for segment in self._segments.values() for s in segment.sessions.values())

    def _evict(self, segments: Sequence[SegmentSessions], but: Session | None) -> None:
        """Drop the session without a step for longest.

        Raises:
            Overloaded: all had a step lately.
        """
        waiting = [
            (session.used, segment, session)
            for segment in segments
            for session in segment.sessions.values()
            if not session.is_stepping and session is not but
        ]
        oldest = min(waiting, key=lambda each: each[0], default=None)
        left_s = 0.0 if oldest is None else oldest[0] + self._idle_s - self._clock()
        if oldest is None or left_s > 0:
            count = sum(len(each.sessions) for each in segments)
            raise self._refusal(
                f"{count} sessions are kept, with {self._reserved()} of {self._max_bytes} bytes reserved: there is no"
                " place for another",
                left_s,
            )
        self._drop(oldest[1], oldest[2], "evicted")

    def _refusal(self, message: str, left_s: float = 0.0) -> Overloaded:
        self._refused += 1
        return Overloaded(message, retry_after_s=min(MAX_RETRY_S, max(MIN_RETRY_S, math.ceil(left_s))))

    def _drop(self, segment: SegmentSessions, session: Session, reason: str) -> None:
        del segment.sessions[session.name]
        segment.memory.release(session.row)
        self._dropped[reason] += 1

    def _look_later(self) -> None:
        if self._timer is None and not self._is_closed and any(s.sessions for s in self._segments.values()):
            self._timer = threading.Timer(max(_MIN_LOOK_S, self._expiry_s / _LOOKS), self.drop_expired)
            self._timer.daemon = True
            self._timer.name = "session-expiry"
            self._timer.start()


# The tokens of a step that verifies proposals, at most; longer ones are of a prompt.
MAX_VERIFIED = 32


def kind_of(position: int, count: int) -> str:
    """What a step does, as metrics count: `prefill`, `decode` or `verify`."""
    if count == 1 and position:
        return "decode"
    return "verify" if position and count <= MAX_VERIFIED else "prefill"
