"""The concurrency limit of the router, adapted to its refusals, and the availability of other counterparts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from isthmus.errors import IsthmusError
from isthmus.events.route import Outcome
from isthmus.retries import backoff, jittered

Value = TypeVar("Value")

# A refusal takes a quarter of the limit; successes of as many rounds add a request: about nine in ten slots are
# used beside a router with a fixed bound. Source: AIMD, Chiu and Jain 1989.
_DECREASE, _ROUNDS_PER_INCREASE = 0.75, 4
# Concurrent refusals have a single cause, and take from the limit once.
_SAME_CAUSE_S = 0.1
_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.1, 5.0


class Stopping(Exception):
    """The trigger ends; the message goes back to its broker."""


class RouteLimit:
    """Slots for requests: at most `limit` at a time, a single slot while the router is away.

    Requests wait for a slot in the order of their threads' arrival.
    """

    def __init__(
        self,
        max_limit: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        first_pause_s: float | None = None,
        max_pause_s: float | None = None,
    ) -> None:
        self._max, self._clock = max_limit, clock
        self._first_pause_s = _FIRST_PAUSE_S if first_pause_s is None else first_pause_s
        self._max_pause_s = _MAX_PAUSE_S if max_pause_s is None else max_pause_s
        self._limit = float(max_limit)
        self._changed = threading.Condition()
        self._requests = 0
        self._is_away = self._is_closed = False
        self._resume_at = self._decreased_at = 0.0
        self._pause_s = self._first_pause_s

    @property
    def max_limit(self) -> int:
        """The most requests at a time."""
        return self._max

    @property
    def is_away(self) -> bool:
        """Whether the latest response said so, or there was none."""
        return self._is_away

    @property
    def limit(self) -> int:
        """Requests that may be sent at a time."""
        return 1 if self._is_away else int(self._limit)

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Wait for a slot, held for the block.

        Raises:
            Stopping: closed meanwhile.
        """
        with self._changed:
            while not self._is_closed and (self._requests >= self.limit or self._paused_s() > 0):
                self._changed.wait(self._paused_s() or None)
            if self._is_closed:
                raise Stopping
            self._requests += 1
        try:
            yield
        finally:
            with self._changed:
                self._requests -= 1
                self._changed.notify()

    def note(self, outcome: Outcome, retry_after_s: float | None = None) -> None:
        """Learn from a response."""
        with self._changed:
            now, before = self._clock(), self.limit
            if outcome in (Outcome.AWAY, Outcome.UNCLEAR):
                if self._is_away and self._paused_s() > 0:
                    return  # of the same cause: requests that were under way
                # Other requests would end alike: a single probe at a time until a success.
                self._is_away = True
                pause_s = retry_after_s or jittered(self._pause_s, self._pause_s / 4)
                self._resume_at = now + min(self._max_pause_s, pause_s)
                self._pause_s = min(self._max_pause_s, self._pause_s * 2)
                return
            self._is_away, self._pause_s = False, self._first_pause_s
            self._resume_at = now
            if outcome is Outcome.BUSY:
                if now - self._decreased_at >= _SAME_CAUSE_S:
                    self._decreased_at, self._limit = now, max(1.0, self._limit * _DECREASE)
            else:
                self._limit = min(self._max, self._limit + 1 / (_ROUNDS_PER_INCREASE * self._limit))
            # The end of a request wakes a single thread; all threads at each response would contend for the lock.
            if self.limit > before:
                self._changed.notify_all()

    def try_soon(self) -> None:
        """There are signs that an absent router is back: no further pause than the first."""
        with self._changed:
            if self._is_away:
                self._resume_at = min(self._resume_at, self._clock() + self._first_pause_s)
                self._pause_s = self._first_pause_s
                self._changed.notify_all()

    def close(self) -> None:
        """End all waits."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _paused_s(self) -> float:
        return max(0.0, self._resume_at - self._clock())


class Availability:
    """Retries while a counterpart is away (records, places, source), and lists absent counterparts with reasons.

    A counterpart is away until each operation that waits for it has succeeded: success of another operation proves
    little (a full spool can be read), and the state would change with every success.
    """

    def __init__(self, stop: threading.Event, on_change: Callable[[str, str], None]) -> None:
        self._stop, self._on_change = stop, on_change
        self._lock = threading.Lock()
        # By counterpart and operation.
        self._reasons: dict[tuple[str, object], str] = {}

    @property
    def away(self) -> dict[str, str]:
        """The latest reason of each absent counterpart by its name; empty where everything answers."""
        with self._lock:
            return {name: reason for (name, _), reason in self._reasons.items()}

    def note(self, name: str, reason: str, operation: object = None) -> None:
        """`name` is away for `reason`, or answers `operation`, where that is empty. A change is told once."""
        with self._lock:
            was_away = self._is_away(name)
            self._reasons.pop((name, operation), None)
            if reason:
                self._reasons[name, operation] = reason
            is_away = self._is_away(name)
        if is_away != was_away:
            self._on_change(name, reason)

    def until(self, name: str, operation: Callable[[], Value], errors: tuple[type[IsthmusError], ...]) -> Value:
        """The result of `operation`, repeated while `errors` are raised.

        Raises:
            Stopping: the trigger ends, and the operation still fails.
        """
        pauses, waiting = backoff(_FIRST_PAUSE_S, 2 * _MAX_PAUSE_S), object()
        while True:
            reason = ""
            try:
                return operation()
            except errors as e:
                reason = e.message
            finally:
                self.note(name, reason, waiting)
            self.pause(next(pauses))

    def pause(self, seconds: float) -> None:
        """Wait.

        Raises:
            Stopping: the trigger ends.
        """
        if self._stop.wait(seconds):
            raise Stopping

    def _is_away(self, name: str) -> bool:
        return any(name == absent for absent, _ in self._reasons)
