"""The registry's retry policy, and the number of requests to it in parallel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TypeVar

import stamina

from isthmus.errors import Corrupt, RegistryUnavailable
from isthmus.retries import RetryBudget, backoff

MAX_PARALLEL_REQUESTS = 4
"""Reads or writes under way at once: enough to hide a round trip, few enough for a small edge node."""

T = TypeVar("T")
S = TypeVar("S")


@dataclass(frozen=True)
class RetryPolicy:
    """How often, and for how many seconds in all, one read or write is tried before its error stands."""

    attempts: int = 4
    timeout_s: float = 20.0

    @property
    def try_s(self) -> float:
        """The longest one try may hear nothing: all of them and the pauses between them fit in `timeout_s`."""
        return max(0.05, self.timeout_s / (max(1, self.attempts) + 1))

    def budget(self) -> RetryBudget:
        """The retry budget of a sequence: as many as its steps under way at once may take, and one for each success.

        A store that refuses a tenth of the requests never uses it up; one that refuses most of them ends the sequence
        after a few steps, where each step alone might take its full number of tries.
        """
        return RetryBudget(burst=MAX_PARALLEL_REQUESTS * max(1, self.attempts - 1), per_second=0.0, per_success=1.0)

    def __call__(self, action: Callable[[], T], budget: RetryBudget | None = None) -> T:
        """`action`'s result; a faulty transfer or a registry that does not answer is tried again, nothing else.

        `action` is one step. The steps of a sequence share a `budget`.

        Raises:
            Corrupt, RegistryUnavailable: the last try's error.
        """
        pauses = backoff(min(0.1, self.timeout_s / 50), self.timeout_s / 10)

        def again(error: Exception) -> bool | float:
            if not isinstance(error, RegistryUnavailable | Corrupt) or (budget is not None and not budget.take()):
                return False
            return next(pauses)

        caller = stamina.RetryingCaller(attempts=max(1, self.attempts), timeout=self.timeout_s)
        result = caller(again, action)
        if budget is not None:
            budget.succeeded()
        return result


def in_parallel(action: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """Results of `action`, MAX_PARALLEL_REQUESTS at a time, as they come; the first error stops what has not begun."""
    pool = ThreadPoolExecutor(MAX_PARALLEL_REQUESTS, thread_name_prefix="registry")
    try:
        for future in as_completed([pool.submit(action, item) for item in items]):
            yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
