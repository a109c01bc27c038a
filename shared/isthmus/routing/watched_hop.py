"""A hop whose calls are seen by the estimates and by a circuit breaker."""

from __future__ import annotations

import threading
import time

from isthmus.context import Context, Deadline
from isthmus.errors import HopBusy, HopError, HopMismatch, HopTimeout, HopUnavailable
from isthmus.pipeline.hop import Hop, HopReply, HttpHop, SegmentLoader, SessionHop
from isthmus.routing.breaker import Breaker
from isthmus.routing.call_times import CallTimes
from isthmus.routing.estimates import Estimates
from isthmus.routing.fallback import is_hops_fault
from isthmus.routing.hop_memory import HopMemory
from isthmus.routing.outstanding import note_call
from isthmus.routing.state import HopState
from isthmus.wire.frame import Frame

# A call that had longer than this share of calls take, and this multiple of their median, had a fair chance. Before
# there are calls to compare with, the least sub-deadline of a route is fair.
_FAIR_SHARE, _FAIR_MULTIPLE, _COMPARED_CALLS, _FAIR_S = 0.95, 1.5, 3, 0.25


class WatchedHop:
    """A hop, its breaker, and the calls in flight. The estimates know it as `tier`, by default its own name."""

    def __init__(self, inner: Hop, estimates: Estimates, breaker: Breaker, tier: str = "") -> None:
        self.inner, self.name, self.encodes = inner, inner.name, inner.encodes
        self._tier = tier or inner.name
        self.breaker, self._estimates = breaker, estimates
        self.memory = HopMemory()
        self.times = CallTimes()
        self._lock = threading.Lock()
        self._in_flight = self._calls = self._failures = self._hedged = self._hedges_won = 0

    @property
    def watched(self) -> tuple[WatchedHop, ...]:
        """The hop itself, as a tier of one replica."""
        return (self,)

    @property
    def in_flight(self) -> int:
        """Calls under way."""
        return self._in_flight

    def allows(self) -> bool:
        """Whether the breaker allows a call."""
        return self.breaker.allows()

    def count_hedge(self, *, is_won: bool) -> None:
        """Count a call of which a second was made elsewhere, and whether the second was answered first."""
        with self._lock:
            self._hedged += 1
            self._hedges_won += is_won

    def call(self, frame: Frame, context: Context) -> HopReply:
        """See `Hop.call`.

        Raises:
            HopUnavailable: the breaker is open, and the context does not wait.
        """
        context = context.at_hop(self.name)
        if (passed := self.breaker.enter(always=context.waits)) is None:
            raise HopUnavailable(f"{self.name} failed lately, and is not called until it is back", hop=self.name)
        with self._lock:
            self._in_flight += 1
            self._calls += 1
        note_call(self._tier)
        call = self._estimates.began(self._tier, _payload_bytes(frame) if self.encodes else 0)
        reply: HopReply | None = None
        began, allowed_s = time.perf_counter(), context.deadline.remaining()
        cpu_began = 0.0 if self.encodes else time.thread_time()
        end = self.breaker.left
        try:
            reply = self.inner.call(frame, context)
            end = self.breaker.succeeded if _belongs(reply.frame, frame) else self.breaker.failed
        except HopError as e:
            if isinstance(e, HopMismatch):
                self.memory.tell(frame.bundle, frame.segment, is_loaded=False)
            if not is_hops_fault(e):
                end = self.breaker.succeeded  # a refusal is a response
                raise
            with self._lock:
                self._failures += 1
            if self._shows_failure(e, frame, context, allowed_s):
                end = self.breaker.failed
                if isinstance(e, HopUnavailable):
                    self.memory.forget()
            raise
        finally:
            if not self.encodes and reply is not None:  # in this process, and in the estimates of its segment
                self._estimates.own_work.ran(reply.run_s, time.thread_time() - cpu_began)
            if reply is None:
                self._estimates.failed(call)
            with self._lock:
                self._in_flight -= 1
            end(passed)
        self.times.add(frame, time.perf_counter() - began)
        # Of the steps of sessions the segment's estimates know those of a single token: the others are more work.
        self._estimates.succeeded(call, frame.bundle, frame.segment, reply, is_usual=frame.step_tokens <= 1)
        self.memory.ran(frame.bundle, frame.segment, reply.served.load_s)
        return reply

    def load(self, bundle: str, segment: str, deadline: Deadline) -> bool:
        """Have the hop load a segment; see `SegmentLoader.load`. True for a hop that cannot load ahead."""
        return self.inner.load(bundle, segment, deadline) if isinstance(self.inner, SegmentLoader) else True

    def end_session(self, session: str, deadline: Deadline) -> None:
        """See `SessionHop.end_session`; a hop that is away is not asked."""
        if self.allows() and isinstance(self.inner, SessionHop):
            self.inner.end_session(session, deadline)

    def is_ready(self, timeout_s: float) -> bool:
        """Whether the hop says within `timeout_s` seconds that it can run segments."""
        return not isinstance(self.inner, HttpHop) or self.inner.is_ready(timeout_s)

    def close(self) -> None:
        """Close the hop."""
        self.inner.close()

    def state(self) -> HopState:
        """The hop's present state."""
        link = self._estimates.link(self._tier)
        return HopState(
            self.name,
            self.breaker.state,
            self._in_flight,
            self._calls,
            self._failures,
            link.rtt_s,
            link.up_bytes_s,
            link.down_bytes_s,
            link.age_s,
            link.is_bound,
            self._estimates.wait_s(self._tier),
            opened=self.breaker.openings,
            hedged=self._hedged,
            hedges_won=self._hedges_won,
        )

    def _shows_failure(self, error: HopError, frame: Frame, context: Context, allowed_s: float) -> bool:
        """Whether the breaker counts the error: neither a refusal for load, nor the end of too short a deadline."""
        if isinstance(error, HopBusy) or (context.abandonment is not None and context.abandonment.is_abandoned):
            return False
        if not isinstance(error, HopTimeout) and context.deadline.remaining() > 0:
            return True
        slow_s = self.times.quantile(frame, _FAIR_SHARE, _COMPARED_CALLS)
        median_s = self.times.quantile(frame, 0.5, _COMPARED_CALLS)
        if slow_s is None or median_s is None:
            return allowed_s >= _FAIR_S
        return allowed_s >= max(slow_s, _FAIR_MULTIPLE * median_s)


def _belongs(reply: Frame, request: Frame) -> bool:
    return (reply.bundle, reply.segment, reply.request) == (request.bundle, request.segment, request.request)


def _payload_bytes(frame: Frame) -> int:
    return sum(a.nbytes for a in frame.tensors.values()) + sum(t.nbytes for t in frame.encoded.values())
