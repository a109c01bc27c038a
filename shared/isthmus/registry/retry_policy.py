"""The registry's retry policy, and its bound on parallel requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TypeVar

import stamina

from isthmus.errors import Corrupt, Missing, RegistryUnavailable
from isthmus.retries import RetryBudget, backoff

MAX_PARALLEL_REQUESTS = 4
"""Enough to hide a round trip, few enough for the memory of a small edge node."""

T = TypeVar("T")
S = TypeVar("S")


@dataclass(frozen=True)
class RetryPolicy:
    """Bounds on one read or write: the number of attempts, and the seconds of all attempts together."""

    attempts: int = 4
    timeout_s: float = 20.0

    @property
    def try_s(self) -> float:
        """The read timeout of one attempt in seconds; all attempts and pauses fit in `timeout_s`."""
        # One share more than attempts leaves time for the pauses; the floor keeps a tiny timeout usable on loopback.
        return max(0.05, self.timeout_s / (max(1, self.attempts) + 1))

    def budget(self) -> RetryBudget:
        """A retry budget for one sequence of requests: the retries of MAX_PARALLEL_REQUESTS steps, plus one per
        success.

        A store that refuses a tenth of the requests never exhausts the budget. A store that refuses most requests ends
        the sequence after a few steps, although each step alone would be allowed all its attempts.
        """
        return RetryBudget(burst=MAX_PARALLEL_REQUESTS * max(1, self.attempts - 1), per_second=0.0, per_success=1.0)

    def __call__(self, action: Callable[[], T], budget: RetryBudget | None = None) -> T:
        """The result of `action`, one request, repeated after a corrupt transfer or an unavailable registry.

        A sequence of requests shares `budget`.

        Raises:
            Corrupt, RegistryUnavailable: the error of the last attempt.
        """
        # Scaled with the timeout, so that the pauses of all attempts take a fraction of the time.
        pauses = backoff(min(0.1, self.timeout_s / 50), self.timeout_s / 10)

        def pause_after(error: Exception) -> bool | float:
            if not isinstance(error, RegistryUnavailable | Corrupt) or (budget is not None and not budget.take()):
                return False
            return next(pauses)

        caller = stamina.RetryingCaller(attempts=max(1, self.attempts), timeout=self.timeout_s)
        result = caller(pause_after, action)
        if budget is not None:
            budget.succeeded()
        return result

    def conditional(
        self, write: Callable[[], bool], is_ours: Callable[[], bool], budget: RetryBudget | None = None
    ) -> bool:
        """Whether a conditional write of this call was stored; `write` returns False where the condition failed.

        An attempt whose response was lost may have been stored, and then the next attempt meets its own data:
        `is_ours` reads back. Source: icechunk issue 2099.
        """
        lost = False

        def attempt() -> bool:
            nonlocal lost
            try:
                return write()
            except (RegistryUnavailable, Corrupt):
                lost = True
                raise

        if self(attempt, budget):
            return True
        try:
            return lost and self(is_ours, budget)
        except Missing:
            return False


def in_parallel(action: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """Results of `action` in order of completion, MAX_PARALLEL_REQUESTS at a time; the first error cancels queued
    items.
    """
    pool = ThreadPoolExecutor(MAX_PARALLEL_REQUESTS, thread_name_prefix="registry")
    try:
        for future in as_completed([pool.submit(action, item) for item in items]):
            yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
