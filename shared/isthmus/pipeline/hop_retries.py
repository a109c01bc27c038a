"""Retries of a hop's calls: within the deadline, the attempts, the age of the outage, and the budget of all calls."""

from __future__ import annotations

import math
import time
from typing import Literal

from isthmus.context import Context
from isthmus.errors import HopBusy, HopUnavailable, HopUntrusted
from isthmus.http.pool import BrokenOff
from isthmus.retries import RetryBudget, backoff, jittered

# How long a function may be away and still count as starting; the longest load measured, on a busy box, was 28 s.
MAX_OUTAGE_S = 60.0
# The same for a gateway's 404: deploying a function anew takes seconds, a wrong URL stays wrong.
MAX_REPLACED_S = 15.0
# Doubling from a pause that a caller hardly notices to a try a second.
_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.05, 1.0
# Retries of calls that may have cost the function work: a tenth of the calls that succeed, as the SRE book has it, and
# for low traffic one a second.
_RETRY_BURST, _RETRIES_PER_S, _RETRIES_PER_SUCCESS = 10, 1.0, 0.1
# Tries while the function is away, which cost it nothing: 32 callers, the default of max_concurrency, may wait through
# a start of some 7 s together, then at a try a second each. Where another route exists nobody waits.
_WAIT_BURST, _WAITS_PER_S = 256, 32.0


class HopRetries:
    """The retry policy of all calls to a hop."""

    def __init__(self, attempts: int) -> None:
        self.attempts = max(1, attempts)
        self.is_closed = False
        self.outage = Outage()
        self.budget = RetryBudget(burst=_RETRY_BURST, per_second=_RETRIES_PER_S, per_success=_RETRIES_PER_SUCCESS)
        self.waits = RetryBudget(burst=_WAIT_BURST, per_second=_WAITS_PER_S, per_success=0.0)

    def of(self, context: Context) -> CallRetries:
        """The policy of one call."""
        return CallRetries(self, context)

    def succeeded(self) -> None:
        """A call was answered."""
        self.outage.over()
        self.budget.succeeded()


class Outage:
    """The beginning of the time in which no call to a hop reached the function, over all requests.

    Threads share it without a lock: a race moves the beginning by a single failed call.
    """

    def __init__(self) -> None:
        self._began = self._latest = -math.inf

    def note(self, max_s: float) -> bool:
        """Note a call that did not reach the function; whether the outage is younger than `max_s` seconds."""
        now = time.monotonic()
        if now - self._latest > MAX_OUTAGE_S:  # a new outage, or the first
            self._began = now
        self._latest = now
        return now - self._began < max_s

    def over(self) -> None:
        """The function was reached."""
        self._latest = -math.inf


class CallRetries:
    """The retry policy of a call: stamina asks `pause` after each failed try."""

    def __init__(self, shared: HopRetries, context: Context) -> None:
        self._left = shared.attempts - 1
        self._shared, self._context = shared, context
        self._pauses = backoff(_FIRST_PAUSE_S, _MAX_PAUSE_S)

    def pause(self, error: Exception) -> float | Literal[False]:
        """Seconds to wait before the next try; False where the error stands."""
        if not isinstance(error, HopUnavailable | HopBusy) or self._shared.is_closed:
            return False
        if isinstance(error, HopUntrusted):
            return False
        if not self._context.waits or self._shared.attempts == 1:
            return False
        # A broken connection or 429 may have cost the function work; the other errors have not reached the function.
        is_reached = isinstance(error, HopBusy) or isinstance(error.__cause__, BrokenOff)
        limit_s = MAX_REPLACED_S if error.facts.get("status") == 404 else MAX_OUTAGE_S
        if is_reached or not self._shared.outage.note(limit_s):
            self._left -= 1
        if self._left < 0:
            return False
        after, left_s = error.facts.get("retry_after_s"), self._context.deadline.remaining()
        if after is None:
            # Near the deadline pauses halve with the time left: a function may start at the last moment.
            pause_s = min(next(self._pauses), max(_FIRST_PAUSE_S, left_s / 2))
        else:
            pause_s = jittered(float(after), _FIRST_PAUSE_S)
        if pause_s >= left_s:  # waiting would only delay the error
            return False
        return pause_s if (self._shared.budget if is_reached else self._shared.waits).take() else False
