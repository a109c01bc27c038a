"""Retry policy: exponential backoff, jitter from a generator of its own, a retry budget, and retries in the log.

stamina runs the loop. Its own jitter draws from the global `random`, which belongs to the program: a thread that draws
from it spoils a seeded run elsewhere in the process.
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

_JITTER = random.Random()  # noqa: S311 - spreads callers; no secret


def backoff(initial_s: float, max_s: float) -> Iterator[float]:
    """Endless pauses in seconds: `initial_s`, doubling up to `max_s`, each with up to `initial_s` of jitter added."""
    pause_s = initial_s
    while True:
        yield jittered(pause_s, initial_s)
        pause_s = min(max_s, pause_s * 2)


def jittered(pause_s: float, most_s: float) -> float:
    """The pause with up to `most_s` seconds added, so that callers who failed together do not come back together."""
    return pause_s + _JITTER.uniform(0, most_s)


class RetryBudget:
    """Token bucket over all calls to one server: retries stop before they become the load that keeps it down.

    A retry takes one token. Tokens come back with time and with calls that succeed, up to `burst`.

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
        """Credit a call that succeeded."""
        with self._lock:
            self._tokens = min(self._burst, self._tokens + self._per_success)

    def take(self) -> bool:
        """Take a token for one retry; False if none is left."""
        with self._lock:
            now = self._clock()
            self._tokens = min(self._burst, self._tokens + (now - self._updated) * self._per_second)
            self._updated = now
            if self._tokens < 1:
                return False
            self._tokens -= 1
            return True


def log_retries(log: logging.Logger) -> None:
    """Write one line for each retry of this process: the reason, the wait, and how many came before.

    stamina's own line holds them in fields that no JSON formatter of ours prints.
    """

    def tell(details: RetryDetails) -> None:
        error = details.caused_by
        reason = error.message if isinstance(error, IsthmusError) else f"{type(error).__name__}: {error}"
        facts = {
            "type": type(error).__name__,
            "retry": details.retry_num,
            "wait_s": round(details.wait_for, 3),
            "waited_s": round(details.waited_so_far, 3),
        }
        log.warning("retry %d in %.2f s: %s", details.retry_num, details.wait_for, reason, extra={"facts": facts})

    stamina.instrumentation.set_on_retry_hooks([tell])
