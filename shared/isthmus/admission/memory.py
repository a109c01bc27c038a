"""Bounds on memory: bytes of all requests together, and turns for work that takes much memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from isthmus.context import Deadline
from isthmus.errors import DeadlineExceeded, Overloaded, RequestTooLarge

# The least whole number of seconds, the unit of Retry-After.
RETRY_AFTER_S = 1


class MemoryBudget:
    """A bounded counter of bytes; thread-safe."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._used = 0
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """Bytes reserved at present."""
        return self._used

    def reserve(self, count: int) -> bool:
        """Reserve `count` bytes; False if the limit would be exceeded."""
        with self._lock:
            if self._used + count > self.limit:
                return False
            self._used += count
            return True

    def release(self, count: int) -> None:
        """Return `count` bytes."""
        with self._lock:
            self._used -= count


class Reservation:
    """The share of one request in a budget; `close` releases the whole share."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self._reserved = 0

    def hold(self, count: int) -> None:
        """Reserve `count` more bytes until `close`.

        Raises:
            RequestTooLarge: the request alone exceeds the budget.
            Overloaded: the budget is exhausted by all requests together.
        """
        limit = self._budget.limit
        if self._reserved + count > limit:
            raise RequestTooLarge(
                f"this request takes some {self._reserved + count} bytes of memory; at most {limit} are given",
                limit=limit,
                hint="send fewer or smaller tensors, or as binary data; the setting max_working_bytes is the bound",
            )
        if not self._budget.reserve(count):
            raise Overloaded(
                f"this request takes some {count} bytes of memory more, and all requests together may take {limit};"
                " try again",
                limit=limit,
                retry_after_s=RETRY_AFTER_S,
            )
        self._reserved += count

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Release reservations of the block at its end."""
        # A Reservation belongs to one thread, and so needs no lock.
        before = self._reserved
        try:
            yield
        finally:
            self._budget.release(self._reserved - before)
            self._reserved = before

    def close(self) -> None:
        """Release the whole reservation."""
        reserved, self._reserved = self._reserved, 0
        self._budget.release(reserved)


class Turns:
    """At most `count` threads at a time run work bound by memory and CPU; other threads queue.

    In parallel such work would multiply the memory and take no less time.
    """

    def __init__(self, count: int) -> None:
        self._semaphore = threading.Semaphore(count)

    @contextmanager
    def one(self, deadline: Deadline) -> Iterator[None]:
        """Run the block in a turn.

        Raises:
            DeadlineExceeded: no turn before the deadline.
        """
        if not self._semaphore.acquire(timeout=deadline.remaining()):
            raise DeadlineExceeded("the deadline passed while other requests were read")
        try:
            deadline.check("the request was read")  # a turn that is free is taken after the deadline as well
            yield
        finally:
            self._semaphore.release()
