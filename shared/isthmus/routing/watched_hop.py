"""A hop whose calls are seen by the estimates and by a circuit breaker."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from isthmus.context import Context, Deadline
from isthmus.errors import HopBusy, HopError, HopRejected, HopTimeout, HopUnavailable
from isthmus.pipeline.hop import Hop, HopReply, SegmentLoader
from isthmus.routing.breaker import Breaker
from isthmus.routing.estimates import Estimates
from isthmus.routing.hop_memory import HopMemory
from isthmus.routing.outstanding import note_call
from isthmus.routing.state import HopState
from isthmus.wire.frame import Frame


def watch(hops: Sequence[Hop], estimates: Estimates) -> tuple[WatchedHop, ...]:
    """The hops, each with a breaker of its own."""
    return tuple(WatchedHop(hop, estimates, Breaker()) for hop in hops)


class WatchedHop:
    """A hop, its breaker, and the calls in flight."""

    def __init__(self, inner: Hop, estimates: Estimates, breaker: Breaker) -> None:
        self.inner, self.name, self.encodes = inner, inner.name, inner.encodes
        self.breaker, self._estimates = breaker, estimates
        self.memory = HopMemory()
        self._lock = threading.Lock()
        self._in_flight = self._calls = self._failures = 0

    def call(self, frame: Frame, context: Context) -> HopReply:
        """See `Hop.call`."""
        with self._lock:
            self._in_flight += 1
            self._calls += 1
        note_call(self.name)
        call = self._estimates.began(self.name, _payload_bytes(frame) if self.encodes else 0)
        reply: HopReply | None = None
        try:
            reply = self.inner.call(frame, context)
        except HopError as e:
            if isinstance(e, HopUnavailable):
                self.memory.forget()
            if is_hops_fault(e):
                self.breaker.failed()
                with self._lock:
                    self._failures += 1
            raise
        finally:
            if reply is None:
                self._estimates.failed(call)
            with self._lock:
                self._in_flight -= 1
        self.breaker.succeeded()
        self._estimates.succeeded(call, frame.bundle, frame.segment, reply)
        self.memory.ran(frame.bundle, frame.segment, reply.served.load_s)
        return reply

    def load(self, bundle: str, segment: str, deadline: Deadline) -> bool:
        """Have the hop load a segment; see `SegmentLoader.load`. True for a hop that cannot load ahead."""
        return self.inner.load(bundle, segment, deadline) if isinstance(self.inner, SegmentLoader) else True

    def close(self) -> None:
        """Close the hop."""
        self.inner.close()

    def state(self) -> HopState:
        """The hop's present state."""
        link = self._estimates.link(self.name)
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
        )


def _payload_bytes(frame: Frame) -> int:
    return sum(a.nbytes for a in frame.tensors.values()) + sum(t.nbytes for t in frame.encoded.values())


def is_hops_fault(error: HopError) -> bool:
    """Whether another hop may do better: no response, a refusal for load, or a response that is no frame."""
    if isinstance(error, HopUnavailable | HopTimeout | HopBusy):
        return True
    return isinstance(error, HopRejected) and (error.facts.get("status") == 200 or error.facts.get("status", 0) >= 500)
