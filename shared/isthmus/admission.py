"""Admission control: bounds on the requests in work, on those that wait for the registry, and on their memory.

A request that waits for a look-up returns its slot meanwhile, so that requests for cached models get one. Waiting
requests have a bound of their own: each holds a thread of the server, of which the template starts as many more.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from isthmus.context import Deadline
from isthmus.errors import DeadlineExceeded, Overloaded, RequestTooLarge

# Requests that wait for the registry at a time; the template's index.py counts them among its threads.
MAX_WAITING = 16
RETRY_AFTER_S = 1


class _Bound:
    """A count from 0 to `limit`."""

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
    """At most `limit` requests are in work; MAX_WAITING more, but no more than `limit`, may wait for the registry."""

    def __init__(self, limit: int) -> None:
        self.working = _Bound(limit)
        self.waiting = _Bound(min(limit, MAX_WAITING))
        # Half of the slots, where there are two, stay for requests that need no look-up.
        self.waiting_in_slot = _Bound(max(1, limit // 2))

    @contextmanager
    def admitted(self, deadline: Deadline) -> Iterator[None]:
        """Hold a slot for this thread's request, except within `aside`.

        Raises:
            Overloaded: `limit` requests are in work.
        """
        request = _AdmittedRequest(self, deadline, needs_slot=True)
        request.take_slot()
        with _current(request):
            yield

    @contextmanager
    def unadmitted(self, deadline: Deadline) -> Iterator[None]:
        """For a request that needs no slot: its waits for the registry count as others' do."""
        with _current(_AdmittedRequest(self, deadline, needs_slot=False)):
            yield


class _AdmittedRequest:
    """A request's deadline, and its slot while it holds one."""

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
def _current(request: _AdmittedRequest) -> Iterator[None]:
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
def aside(*, refuse: bool = True) -> Iterator[None]:
    """Return this thread's slot while the block waits for the registry, and take a slot again afterwards.

    Where too many requests wait already, this request keeps its slot if `refuse` is false, up to half of all slots.
    No-op outside of requests. A block that raises leaves its request without a slot: the request is about to end.

    Raises:
        Overloaded: too many requests wait already; or, after the block, all slots are taken.
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
    """A count of bytes with a limit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._used = 0
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """Bytes reserved now."""
        return self._used

    def reserve(self, count: int) -> bool:
        """Count `count` bytes more if they fit; False where they do not."""
        with self._lock:
            if self._used + count > self.limit:
                return False
            self._used += count
            return True

    def release(self, count: int) -> None:
        """Count `count` bytes less."""
        with self._lock:
            self._used -= count


class Reservation:
    """One request's share of a budget; `close` releases all of it, however the request ends."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self._reserved = 0

    def hold(self, count: int) -> None:
        """Reserve `count` bytes more, until `close`.

        Raises:
            RequestTooLarge: no request may take so much, even alone.
            Overloaded: with what the other requests take, it is too much now.
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
        """Release at the block's end what was reserved within it."""
        before = self._reserved
        try:
            yield
        finally:
            self._budget.release(self._reserved - before)
            self._reserved = before

    def close(self) -> None:
        """Release everything."""
        reserved, self._reserved = self._reserved, 0
        self._budget.release(reserved)


class Turns:
    """At most `count` threads at a time do work that takes memory and the CPU alone; others wait for their turn.

    All at once they would take as many times the memory, and no less time.
    """

    def __init__(self, count: int) -> None:
        self._semaphore = threading.Semaphore(count)

    @contextmanager
    def one(self, deadline: Deadline) -> Iterator[None]:
        """Have a turn within the block.

        Raises:
            DeadlineExceeded: no turn came in time.
        """
        if not self._semaphore.acquire(timeout=deadline.remaining()):
            raise DeadlineExceeded("the deadline passed while other requests were read")
        try:
            yield
        finally:
            self._semaphore.release()
