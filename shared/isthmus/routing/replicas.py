"""A tier of several URLs: the least busy replica, the next where one fails, a hedged call where one is slow.

Segments are pure, so that a call may be made twice. Source: Dean and Barroso, The Tail at Scale, "Hedged requests". The
steps of a session go to the replica with the session's state, and are never hedged: another replica lacks the state.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from contextvars import copy_context
from dataclasses import replace

from cachetools import LRUCache

from isthmus.context import Abandonment, Context, Deadline
from isthmus.errors import HopError, HopMismatch, HopUnavailable, IsthmusError, StateMissing
from isthmus.pipeline.hop import Hop, HopReply
from isthmus.retries import RetryBudget
from isthmus.routing.breaker import Breaker
from isthmus.routing.call_times import CallTimes
from isthmus.routing.estimates import Estimates
from isthmus.routing.fallback import allowed_s, may_fall_back
from isthmus.routing.hop_memory import HopMemory
from isthmus.routing.watched_hop import WatchedHop
from isthmus.settings import tier_of
from isthmus.wire.frame import Frame

# A second call after the time in which 95% of calls end, known from so many calls.
HEDGED_SHARE, HEDGED_CALLS = 0.95, 20
# Hedged calls are at most a twentieth of all calls: were every replica slow, twice the calls would slow them further.
HEDGES_PER_CALL, HEDGE_BURST = 0.05, 3
# Sessions whose replica is known; a forgotten one is rebuilt where its next step goes.
MAX_STICKY = 4096
# A step counts as no quicker: another replica has to run all positions of the session before it, so that a step is not
# given up for a pause of its machine.
MIN_STEP_S = 0.5
# Calls that may be hedged at a time; each takes a thread. Beyond that calls are made as without hedging.
MAX_HEDGEABLE = 32


class Replicas:
    """A hop over the watched hops of one tier; thread-safe."""

    encodes = True

    def __init__(self, name: str, hops: Sequence[WatchedHop]) -> None:
        self.name, self.watched = name, tuple(hops)
        self.memory = HopMemory()
        self._times = CallTimes()
        self._hedges = RetryBudget(burst=HEDGE_BURST, per_second=0.0, per_success=HEDGES_PER_CALL)
        self._turns = itertools.count()
        self._lock = threading.Lock()
        self._sticky: LRUCache[str, WatchedHop] = LRUCache(MAX_STICKY)
        self._places = threading.BoundedSemaphore(MAX_HEDGEABLE)
        self._threads = ThreadPoolExecutor(MAX_HEDGEABLE, thread_name_prefix="replicas")

    def allows(self) -> bool:
        """Whether the breaker of any replica allows a call."""
        return any(hop.allows() for hop in self.watched)

    def call(self, frame: Frame, context: Context) -> HopReply:
        """See `Hop.call`."""
        context, began = context.at_hop(self.name), time.perf_counter()
        left = self._in_order(frame)
        while True:
            hop, *left = left
            try:
                reply = self._call(hop, left, frame, context)
            except StateMissing:
                # The session is rebuilt on this replica.
                self._stick(frame, hop)
                raise
            except HopError as e:
                if isinstance(e, HopUnavailable) and not left:
                    self.memory.forget()
                if isinstance(e, HopMismatch) and not left:
                    self.memory.tell(frame.bundle, frame.segment, is_loaded=False)
                if not left or not may_fall_back(e) or context.deadline.remaining() <= 0:
                    raise
                continue
            self._stick(frame, hop)
            self._times.add(frame, time.perf_counter() - began)
            self._hedges.succeeded()
            self.memory.ran(frame.bundle, frame.segment, reply.served.load_s)
            return reply

    def load(self, bundle: str, segment: str, deadline: Deadline) -> bool:
        """Have every replica load a segment; True once all that respond have it.

        Raises:
            As `SegmentLoader.load`, where no replica can.
        """
        loaded: list[bool] = []
        for i, hop in enumerate(self.watched):
            try:
                loaded.append(hop.load(bundle, segment, deadline))
            except IsthmusError:
                if i == len(self.watched) - 1 and not loaded:
                    raise
            else:
                hop.memory.tell(bundle, segment, is_loaded=loaded[-1])
        return all(loaded)

    def end_session(self, session: str, deadline: Deadline) -> None:
        """See `SessionHop.end_session`; every replica is asked, at the same time: calls may have gone to several."""
        with self._lock:
            self._sticky.pop(session, None)
        with suppress(RuntimeError):  # the executor is shut down
            asked = [self._threads.submit(hop.end_session, session, deadline) for hop in self.watched]
            wait(asked, deadline.remaining())

    def close(self) -> None:
        """Close the replicas; calls under way end."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for hop in self.watched:
            hop.close()

    def _in_order(self, frame: Frame) -> list[WatchedHop]:
        """The replicas that may be called first, the least busy before the others; equals take turns.

        Of a session's step the replica with the session comes before all that are as able to answer.
        """
        turn, key = next(self._turns), (frame.bundle, frame.segment)
        count = len(self.watched)
        turned = [self.watched[(turn + i) % count] for i in range(count)]
        with self._lock:
            sticky = None if frame.step is None else self._sticky.get(frame.step.session)
        return sorted(
            turned, key=lambda hop: (not hop.allows(), hop is not sticky, key not in hop.memory, hop.in_flight)
        )

    def _stick(self, frame: Frame, hop: WatchedHop) -> None:
        if frame.step is not None:
            with self._lock:
                self._sticky[frame.step.session] = hop

    def _call(self, hop: WatchedHop, others: list[WatchedHop], frame: Frame, context: Context) -> HopReply:
        """The reply of a replica; `others` come next, and one that was called as well is taken from them."""
        answering = [other for other in others if other.allows()]
        if not answering:
            return hop.call(frame, context)
        slow_s = self._times.quantile(frame, HEDGED_SHARE, HEDGED_CALLS)
        if slow_s is not None and frame.step is not None:
            slow_s = max(slow_s, MIN_STEP_S)
        left_s = context.deadline.remaining()
        limit = Deadline.after(allowed_s(left_s, slow_s, slow_s))
        limited = replace(context, deadline=limit, waits=False)
        is_hedged = slow_s is not None and slow_s < left_s and context.abandonment is None and frame.step is None
        if not is_hedged or slow_s is None or not self._places.acquire(blocking=False):
            return hop.call(frame, limited)
        return self._hedged(hop, answering[0], others, frame, limited, slow_s)

    def _hedged(
        self,
        hop: WatchedHop,
        other: WatchedHop,
        others: list[WatchedHop],
        frame: Frame,
        context: Context,
        slow_s: float,
    ) -> HopReply:
        """The first reply of two calls; the second begins after `slow_s` seconds, and the later one is abandoned."""
        first, second = Abandonment(), Abandonment()
        running = self._submit(hop, frame, replace(context, abandonment=first))
        if wait((running,), slow_s).done or not self._hedges.take():
            return running.result()
        others.remove(other)
        running.add_done_callback(lambda done: None if done.exception() else second.abandon())
        is_won = False
        try:
            reply = other.call(frame, replace(context, abandonment=second))
            is_won = True
        except HopError:
            return running.result()
        finally:
            hop.count_hedge(is_won=is_won)
            first.abandon()
        return reply

    def _submit(self, hop: WatchedHop, frame: Frame, context: Context) -> Future[HopReply]:
        # The account of outstanding work and the trace follow the request into its other thread.
        call: Callable[..., HopReply] = copy_context().run
        try:
            future = self._threads.submit(call, hop.call, frame, context)
        except RuntimeError:  # the executor is shut down
            self._places.release()
            raise HopUnavailable(f"{self.name} is being closed", hop=self.name) from None
        future.add_done_callback(lambda _: self._places.release())
        return future


RoutedHop = WatchedHop | Replicas


def watch(tiers: Iterable[Sequence[Hop]], estimates: Estimates) -> tuple[RoutedHop, ...]:
    """The hop of each tier, whose replicas have a breaker each."""
    return tuple(_watched(replicas, estimates) for replicas in tiers)


def _watched(replicas: Sequence[Hop], estimates: Estimates) -> RoutedHop:
    name = tier_of([hop.name for hop in replicas])
    watched = [WatchedHop(hop, estimates, Breaker(), name) for hop in replicas]
    return watched[0] if len(watched) == 1 else Replicas(name, watched)
