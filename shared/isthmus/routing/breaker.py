"""Circuit breaker of a hop: after failures no request waits for the hop until a probe has reached it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Literal, NamedTuple

# Failures without a success in between. Envoy's outlier detection ejects after five; here each may cost a request its
# sub-deadline, so three.
MAX_CONSECUTIVE = 3
# The share of failed calls in the window, judged from so many calls on: a hop that fails every other call never fails
# three times in a row.
MAX_FAILURE_SHARE, MIN_CALLS, WINDOW_S = 0.5, 10, 10.0
# Calls in the window; at higher rates the window is shorter than WINDOW_S.
_MAX_CALLS = 1024
# From an opening to the first probe, doubled by each opening that follows soon. The best route must be back within 3 s
# of the hop's return, probe and trials included.
_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.25, 1.0
# Trials that must succeed one after the other before every request may call, doubled likewise: a hop that comes and
# goes does not move the whole traffic to and fro.
_MAX_TRIALS = 8
# A breaker that stayed shut for so long has no history.
CALM_S = 10.0
# Where no probe succeeds, as with a server that has no GET /ready, a request tries after so long.
UNPROBED_S = 30.0

BreakerState = Literal["closed", "open", "half-open"]


class BreakerPass(NamedTuple):
    """A call's place in its breaker's history."""

    opening: int
    is_trial: bool = False


class Breaker:
    """Closed while calls succeed, open after failures, half-open while one call at a time tries; thread-safe.

    It opens after MAX_CONSECUTIVE failures in a row, or where at least MAX_FAILURE_SHARE of at least MIN_CALLS calls
    in the last WINDOW_S seconds failed. It becomes half-open when a probe reaches the hop, and closes after trials.

    Source: Nygard, Release It!, "Circuit Breaker"; Envoy's outlier detection.
    """

    def __init__(
        self, *, clock: Callable[[], float] = time.monotonic, on_open: Callable[[], None] = lambda: None
    ) -> None:
        self.on_open = on_open
        self.openings = 0
        self._clock = clock
        self._lock = threading.Lock()
        self._state: BreakerState = "closed"
        self._calls: deque[tuple[float, bool]] = deque(maxlen=_MAX_CALLS)
        self._consecutive = self._level = self._trials_left = 0
        self._has_trial = False
        self._changed_at = self._probe_at = clock()

    @property
    def state(self) -> BreakerState:
        """The present state."""
        return self._state

    def allows(self) -> bool:
        """Whether a call may be made now; of a half-open breaker's callers, one."""
        # Asked for each hop of each request: without the lock, since `enter` decides.
        if self._state == "open":
            return self._clock() >= self._changed_at + UNPROBED_S
        return self._state == "closed" or not self._has_trial

    def enter(self, *, always: bool = False) -> BreakerPass | None:
        """Begin a call, which ends by `succeeded`, `failed` or `left`; None where the breaker refuses the call.

        `always` is for calls that no other hop can take: refused ones pass as well.
        """
        with self._lock:
            if self._state == "open" and self._clock() >= self._changed_at + UNPROBED_S:
                self._become_half_open()
            if self._state == "half-open" and not self._has_trial:
                self._has_trial = True
                return BreakerPass(self.openings, is_trial=True)
            return BreakerPass(self.openings) if self._state == "closed" or always else None

    def succeeded(self, passed: BreakerPass) -> None:
        """The hop gave a response."""
        with self._lock:
            self._end(passed)
            self._consecutive = 0
            if self._state == "closed":
                self._calls.append((self._clock(), True))
                return
            # Of calls that pass an open breaker as well: any response shows that the hop is back.
            self._trials_left -= 1
            if self._trials_left <= 0:
                self._state, self._changed_at = "closed", self._clock()
                self._calls.clear()

    def failed(self, passed: BreakerPass) -> None:
        """The hop gave no response, or none that makes sense."""
        with self._lock:
            self._end(passed)
            # Calls from before the latest opening have been judged: those of a stopped process end long after it.
            if self._state == "open" or passed.opening < self.openings:
                return
            now = self._clock()
            self._consecutive += 1
            self._calls.append((now, False))
            if self._state == "closed" and not self._is_failing(now):
                return
            self._open(now)
        self.on_open()

    def left(self, passed: BreakerPass) -> None:
        """The call ended and says nothing about the hop: its caller gave it too little time, or abandoned it."""
        with self._lock:
            self._end(passed)

    def probe_at(self) -> float | None:
        """The moment of an open breaker's next probe, by its clock; None in another state."""
        return self._probe_at if self._state == "open" else None

    def probed(self, is_ready: bool) -> None:
        """A probe of an open breaker's hop ended; one that is ready gets a trial."""
        with self._lock:
            if self._state != "open":
                return
            if is_ready:
                self._become_half_open()
            else:  # a long outage is probed once a second
                now = self._clock()
                self._probe_at = now + min(_MAX_PAUSE_S, max(_FIRST_PAUSE_S, (now - self._changed_at) / 4))

    def _end(self, passed: BreakerPass) -> None:
        if passed.is_trial and passed.opening == self.openings:
            self._has_trial = False

    def _is_failing(self, now: float) -> bool:
        while self._calls[0][0] < now - WINDOW_S:
            self._calls.popleft()
        failures = sum(not is_success for _, is_success in self._calls)
        is_unreliable = len(self._calls) >= MIN_CALLS and failures >= MAX_FAILURE_SHARE * len(self._calls)
        return self._consecutive >= MAX_CONSECUTIVE or is_unreliable

    def _open(self, now: float) -> None:
        is_soon = self.openings > 0 and (self._state == "half-open" or now - self._changed_at < CALM_S)
        self._level = self._level + 1 if is_soon else 0
        self.openings += 1
        self._state, self._changed_at = "open", now
        self._probe_at = now + min(_MAX_PAUSE_S, _FIRST_PAUSE_S * 2**self._level)
        self._trials_left = min(_MAX_TRIALS, 2**self._level)
        self._has_trial = False

    def _become_half_open(self) -> None:
        self._state, self._has_trial = "half-open", False
