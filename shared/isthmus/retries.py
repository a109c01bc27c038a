"""Retry policy: exponential backoff with jitter, a retry budget, and log lines for retries.

stamina runs the loop. Jitter has a generator of its own: stamina draws from the global `random`, and a draw in another
thread would break a program's seeded sequence.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator

import stamina.instrumentation
from stamina.instrumentation import RetryDetails

from isthmus.errors import IsthmusError

# Unseeded on purpose: equal seeds would synchronise the functions' retries.
_JITTER = random.Random()  # noqa: S311 - spreads callers; no secret


def backoff(initial_s: float, max_s: float) -> Iterator[float]:
    """Endless pauses in seconds: `initial_s`, doubled up to `max_s`, plus up to `initial_s` of jitter each."""
    pause_s = initial_s
    while True:
        yield jittered(pause_s, initial_s)
        pause_s = min(max_s, pause_s * 2)


def jittered(pause_s: float, max_jitter_s: float) -> float:
    """The pause plus up to `max_jitter_s` seconds, so that callers that failed together do not retry together."""
    return pause_s + _JITTER.uniform(0, max_jitter_s)


class RetryBudget:
    """Token bucket over all calls to a server, so that retries cannot become the load that keeps the server down.

    A retry takes a token. Tokens return with time and with successful calls, up to `burst`.

    Source: Google's SRE book, "Handling Overload" (retry budgets); Finagle's RetryBudget.
    """

    def __init__(
        self, *, burst: int, per_second: float, per_success: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._burst, self._per_second, self._per_success = float(burst), per_second, per_success
        self._clock = clock
        self._lock = threading.Lock()
        self._tokens, self._updated = self._burst, clock()

    def succeeded(self) -> None:
        """Credit a successful call."""
        with self._lock:
            self._tokens = min(self._burst, self._tokens + self._per_success)

    def take(self) -> bool:
        """Take a token for a retry; False without tokens."""
        with self._lock:
            # Refilled on demand: a timer thread would cost more than the subtraction.
            now = self._clock()
            self._tokens = min(self._burst, self._tokens + (now - self._updated) * self._per_second)
            self._updated = now
            if self._tokens < 1:
                return False
            self._tokens -= 1
            return True


def log_retries(log: logging.Logger) -> None:
    """Log a line for each retry in this process: the reason, the pause, and the number of earlier retries.

    stamina's own log line has these facts in fields that the JSON formatter does not print.
    """

    def log_retry(details: RetryDetails) -> None:
        error = details.caused_by
        reason = error.message if isinstance(error, IsthmusError) else f"{type(error).__name__}: {error}"
        facts = {
            "type": type(error).__name__,
            "retry": details.retry_num,
            "wait_s": round(details.wait_for, 3),
            "waited_s": round(details.waited_so_far, 3),
        }
        log.warning("retry %d in %.2f s: %s", details.retry_num, details.wait_for, reason, extra={"facts": facts})

    stamina.instrumentation.set_on_retry_hooks([log_retry])
