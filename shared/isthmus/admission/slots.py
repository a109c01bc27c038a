"""Slots for requests in work, with a queue in front that a request joins only if its deadline can still be met.

A request that waits for the registry releases its slot meanwhile, so that requests for cached models proceed. Waiting
requests have bounds of their own, since each occupies a server thread; the template starts as many extra threads.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from cachetools import LRUCache

from isthmus.admission.limit import AdaptiveLimit
from isthmus.admission.memory import RETRY_AFTER_S
from isthmus.admission.queue import FairQueue, Waiter
from isthmus.admission.request import AdmittedRequest, as_current
from isthmus.context import Deadline
from isthmus.errors import DeadlineExceeded, IsthmusError, Overloaded, http_status

# The template's index.py starts this many threads beyond a thread for each request in work and in the queue.
MAX_WAITING = 16
# Estimates of service seconds, by endpoint and model; the least recently used is forgotten.
_MAX_SERVICES = 256
# Of the mean and the mean deviation of service seconds, a sample's share: TCP's, RFC 6298.
_MEAN_SHARE, _DEVIATION_SHARE = 0.125, 0.25
# Deviations above the mean that a request in the queue is expected to take: half of all requests exceed the mean.
_DEVIATIONS = 2.0
# How many times the expected wait must fit: a refusal at once serves its caller better than one after a wait, and
# a queue that is half as long keeps the slots as busy.
_WAIT_SAFETY = 2.0
# A cost of nothing would give a caller endless turns.
_MIN_COST_S = 0.001
# Retry-After of a queue that seems endless: the estimate is of the present, not of in a minute.
_MAX_RETRY_AFTER_S = 30
# Statuses of requests that ended at a deadline, or at the limit of another function: evidence of load.
_SIGNS_OF_LOAD = frozenset((429, 504))
REFUSALS = ("full", "share", "deadline", "late")
"""Reasons of refusals: no place in the queue, none left for this caller, the deadline could not be met by then, or was
not met in the queue."""


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


class _Service(NamedTuple):
    """Seconds that requests hold a slot: their mean and mean deviation of late."""

    mean_s: float = 0.0
    deviation_s: float = 0.0

    def after(self, seconds: float) -> _Service:
        if not self.mean_s:
            return _Service(seconds, seconds / 2)
        error = seconds - self.mean_s
        return _Service(
            self.mean_s + _MEAN_SHARE * error,
            self.deviation_s + _DEVIATION_SHARE * (abs(error) - self.deviation_s),
        )


class Slots:
    """Requests in work, at most `limit`, or fewer by an adaptive limit; requests in a queue, at most `max_queued`.

    Besides, up to MAX_WAITING requests, but at most `limit`, wait for the registry.
    """

    def __init__(
        self,
        limit: int,
        *,
        max_queued: int = 0,
        adaptive: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_limit, self._clock = limit, clock
        self._adaptive = AdaptiveLimit(limit, clock) if adaptive else None
        self._queue = FairQueue(max_queued)
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._working = 0
        self._services: LRUCache[str, _Service] = LRUCache(_MAX_SERVICES)
        self._refused: Counter[str] = Counter(dict.fromkeys(REFUSALS, 0))
        self.waiting = Bound(min(limit, MAX_WAITING))
        # With two or more slots, half stay available to requests without a look-up.
        self.waiting_in_slot = Bound(max(1, limit // 2))

    @property
    def limit(self) -> int:
        """Requests that may be in work at present."""
        return self.max_limit if self._adaptive is None else self._adaptive.value

    @property
    def working(self) -> int:
        """Requests in work."""
        return self._working

    @property
    def queued(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    def keep_at_least(self, floor: Callable[[], int]) -> None:
        """Keep the adaptive limit at `floor()` or above, as of each change of the limit."""
        if self._adaptive is not None:
            self._adaptive.floor = floor

    def refused(self) -> dict[str, int]:
        """Refusals since the start, by their reasons `REFUSALS`."""
        with self._lock:
            return dict(self._refused)

    @contextmanager
    def admitted(self, deadline: Deadline, *, caller: str | None = None, work: str = "") -> Iterator[float]:
        """Hold a slot for the request of this thread, except within `slot_released`; gives the seconds in the queue.

        `work` names requests that take about the same time, such as an endpoint and a model; `describe_work` adds
        details once these are known. `caller` is None where callers are not told apart.

        Raises:
            Overloaded: the request would wait too long for its deadline, or the queue has no place left.
            DeadlineExceeded: the deadline passed, or came too near, in the queue.
        """
        request = AdmittedRequest(self, deadline, work, needs_slot=True)
        waited_s = self._admit(request, caller)
        with as_current(request):
            yield waited_s

    @contextmanager
    def unadmitted(self, deadline: Deadline) -> Iterator[None]:
        """Run a request without a slot; its waits for the registry count towards the bound on waiting requests."""
        with as_current(AdmittedRequest(self, deadline, "", needs_slot=False)):
            yield

    def _admit(self, request: AdmittedRequest, caller: str | None) -> float:
        began, deadline = self._clock(), request.deadline
        deadline.check("work on the request began")
        with self._lock:
            if not self._queue and self._working < self.limit:
                self._begin(request)
                return 0.0
            waiter = self._waiter(request, caller)
            self._queue.add(waiter)
        # Without the lock: `_call_next` calls the waiter.
        waiter.called.wait(max(0.0, waiter.latest_start - self._clock()))
        with self._lock:
            waited_s = self._clock() - began
            if not waiter.called.is_set():
                self._queue.remove(waiter)
                self._refused["late"] += 1
            elif waiter.is_admitted:
                self._note_begin(request)
                return waited_s
        raise DeadlineExceeded(
            f"the request waited {waited_s:.3f} s for others and could no longer be answered before its deadline",
            waited_s=round(waited_s, 3),
        )

    def _waiter(self, request: AdmittedRequest, caller: str | None) -> Waiter:
        """A place in the queue.

        Raises:
            Overloaded: see `admitted`.
        """
        service = self._services.get(request.work) or self._services.get("") or _Service()
        limit = max(1, self.limit)
        if not self._queue.has_room(caller):
            if len(self._queue) < self._queue.max_length:
                raise self._refusal("share", "this caller's share of the queue is full")
            raise self._refusal("full", f"{self._working} requests are under way, {len(self._queue)} wait; try again")
        now, latest_start = self._clock(), request.deadline.at - service.mean_s
        # A slot is given back each mean_s / limit seconds: this request's turn comes after earlier requests.
        wait_s = (self._queue.ahead_s(caller, latest_start) + service.mean_s) / limit
        needed_s = _WAIT_SAFETY * wait_s + service.mean_s + _DEVIATIONS * service.deviation_s
        if now + needed_s > request.deadline.at:
            raise self._refusal(
                "deadline",
                f"the request would wait some {wait_s:.3f} s, and could not be answered before its deadline",
            )
        return Waiter(latest_start, next(self._numbers), caller, max(service.mean_s, _MIN_COST_S))

    def _refusal(self, reason: str, message: str) -> Overloaded:
        self._refused[reason] += 1
        # The seconds in which the present queue drains.
        drain_s = self._queue.cost_s / max(1, self.limit)
        retry_after_s = min(max(RETRY_AFTER_S, math.ceil(drain_s)), _MAX_RETRY_AFTER_S)
        return Overloaded(message, retry_after_s=retry_after_s)

    def _begin(self, request: AdmittedRequest) -> None:
        self._working += 1
        self._note_begin(request)

    def _note_begin(self, request: AdmittedRequest) -> None:
        request.has_slot = True
        request.began, request.in_work = self._clock(), self._working

    def _call_next(self) -> None:
        """Give free slots to the queue; waiters that come too late for their deadlines are called and not admitted."""
        while self._working < self.limit and (waiter := self._queue.next()) is not None:
            if waiter.latest_start >= self._clock():
                self._working += 1
                waiter.is_admitted = True
            else:
                self._refused["late"] += 1
            waiter.called.set()

    def take_again(self, request: AdmittedRequest) -> None:
        """Take a slot after `slot_released`, before requests in the queue and beyond an adaptive limit.

        Raises:
            Overloaded: `max_limit` requests are in work.
        """
        with self._lock:
            if self._working >= self.max_limit:
                raise self._refusal("full", f"{self.max_limit} requests are under way; that is the limit")
            self._begin(request)
            # Time before and after a wait for the registry is no service time.
            request.is_whole = False

    def give_back(self, request: AdmittedRequest, error: BaseException | None = None) -> None:
        """Return the request's slot to the next request of the queue."""
        with self._lock:
            request.has_slot = False
            self._working -= 1
            if request.is_whole:
                self._learn(request, error)
            self._call_next()

    def _learn(self, request: AdmittedRequest, error: BaseException | None) -> None:
        seconds = self._clock() - request.began
        is_load = isinstance(error, IsthmusError) and http_status(error) in _SIGNS_OF_LOAD
        if error is not None and not is_load:
            return
        for key in (request.work, ""):
            service = self._services.get(key, _Service())
            # A request that missed its deadline would have taken longer still; a mean of the quick requests alone would
            # be too low.
            if error is None or seconds > service.mean_s > 0:
                self._services[key] = service.after(seconds)
        if self._adaptive is not None and request.is_load_sample:
            self._adaptive.observe(f"{request.work}{request.detail}", seconds, request.in_work, succeeded=error is None)
