"""Admission control: bounds on requests in work, on requests that wait for the registry, and on memory.

A request that waits for a look-up releases its slot meanwhile, so that requests for cached models proceed. Waiting
requests have a bound of their own, since each occupies a server thread; the template starts as many extra threads.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from isthmus.context import Deadline
from isthmus.errors import DeadlineExceeded, Overloaded, RequestTooLarge

# The template's index.py starts this many threads beyond max_concurrency.
MAX_WAITING = 16
# The least whole number of seconds, the unit of Retry-After.
RETRY_AFTER_S = 1


class Bound:
    """A counter from 0 to `limit`."""

    def __init__(self, limit: int) -> None:
        self.limit, self.count = limit, 0
        self._lock = threading.Lock()

    def enter(self) -> bool:
        """Count one more; False at the limit."""
        with self._lock:
            if self.count == self.limit:
                return False
            self.count += 1
            return True

    def leave(self) -> None:
        """Count one less."""
        with self._lock:
            self.count -= 1


class Slots:
    """At most `limit` requests in work; up to MAX_WAITING more, but at most `limit`, wait for the registry."""

    def __init__(self, limit: int) -> None:
        self.working = Bound(limit)
        self.waiting = Bound(min(limit, MAX_WAITING))
        # With two or more slots, half stay available to requests without a look-up.
        self.waiting_in_slot = Bound(max(1, limit // 2))

    @contextmanager
    def admitted(self, deadline: Deadline) -> Iterator[None]:
        """Hold a slot for the request of this thread, except within `slot_released`.

        Raises:
            Overloaded: `limit` requests are in work.
        """
        request = _AdmittedRequest(self, deadline, needs_slot=True)
        request.take_slot()
        with _as_current(request):
            yield

    @contextmanager
    def unadmitted(self, deadline: Deadline) -> Iterator[None]:
        """Run a request without a slot; its waits for the registry count towards the bound on waiting requests."""
        with _as_current(_AdmittedRequest(self, deadline, needs_slot=False)):
            yield


class _AdmittedRequest:
    """A request's deadline and slot."""

    def __init__(self, slots: Slots, deadline: Deadline, *, needs_slot: bool) -> None:
        self.slots, self.deadline = slots, deadline
        self._needs_slot, self._has_slot = needs_slot, False

    def take_slot(self) -> None:
        if not self._needs_slot:
            return
        if not self.slots.working.enter():
            limit = self.slots.working.limit
            raise Overloaded(f"{limit} requests are under way; that is the limit", retry_after_s=RETRY_AFTER_S)
        self._has_slot = True

    def return_slot(self) -> None:
        if self._has_slot:
            self.slots.working.leave()
            self._has_slot = False


_CURRENT: ContextVar[_AdmittedRequest | None] = ContextVar("request", default=None)


@contextmanager
def _as_current(request: _AdmittedRequest) -> Iterator[None]:
    token = _CURRENT.set(request)
    try:
        yield
    finally:
        _CURRENT.reset(token)
        request.return_slot()


def current_deadline() -> Deadline | None:
    """The deadline of this thread's request; None outside of requests."""
    return None if (request := _CURRENT.get()) is None else request.deadline


@contextmanager
def slot_released(*, refuse: bool = True) -> Iterator[None]:
    """Release this thread's slot while the block waits for the registry, and take a slot again afterwards.

    If too many requests wait already and `refuse` is false, the request waits in its slot, in up to half of all slots.
    No-op outside of requests. After an exception in the block the request has no slot: the request is about to end.

    Raises:
        Overloaded: too many requests wait already, or no slot is free after the block.
    """
    if (request := _CURRENT.get()) is None:
        yield
        return
    slots = request.slots
    if slots.waiting.enter():
        request.return_slot()
        try:
            yield
        finally:
            slots.waiting.leave()
        request.take_slot()
        return
    if refuse or not slots.waiting_in_slot.enter():
        raise Overloaded(
            f"{slots.waiting.limit} requests wait for the registry; that is the limit", retry_after_s=RETRY_AFTER_S
        )
    try:
        yield
    finally:
        slots.waiting_in_slot.leave()


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
            yield
        finally:
            self._semaphore.release()
