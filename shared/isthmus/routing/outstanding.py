"""Outstanding work: seconds of routed requests on each resource, by their forecasts.

The router directs every request, and so knows the queues of edge, link and cloud without a question.
"""

from __future__ import annotations

import threading
from contextvars import ContextVar
from typing import NamedTuple


class Busy(NamedTuple):
    """Seconds of each resource, in the order of `demand.RESOURCES`."""

    edge: float = 0.0
    uplink: float = 0.0
    downlink: float = 0.0
    cloud: float = 0.0


IDLE = Busy()
_current: ContextVar[Ticket | None] = ContextVar("ticket", default=None)


class Outstanding:
    """The account of outstanding work; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = 0
        self._seconds, self._users = list(IDLE), [0] * len(IDLE)

    def begin(self, work: Busy, far_hop: str) -> Ticket:
        """Enter a request that was routed by `far_hop`; its work is done once the ticket is closed."""
        ticket = Ticket(self, work, far_hop)
        with self._lock:
            self._open += 1
            for i, seconds in enumerate(work):
                self._seconds[i] += seconds
                self._users[i] += seconds > 0
        return ticket

    def seconds(self) -> Busy:
        """Outstanding seconds of each resource."""
        with self._lock:
            return Busy(*self._seconds)

    def wait_s(self, work: Busy) -> float:
        """Seconds that a new request waits for its resources.

        Requests share a CPU or a link side by side, so that each one before it delays `work` by no more than its own
        seconds: a photo that passes through to the cloud does not wait until the edge has run all models before it.
        The resources work at the same time on different requests, so the longest of the waits counts, not their sum.
        """
        with self._lock:
            each = zip(self._seconds, self._users, work, strict=True)
            return max(min(seconds, users * own) for seconds, users, own in each)

    def remove(self, work: Busy, closed: int) -> None:
        """Take away work that is done, and `closed` requests."""
        with self._lock:
            self._open -= closed
            for i, seconds in enumerate(work):
                self._seconds[i] = max(0.0, self._seconds[i] - seconds)
                self._users[i] -= seconds > 0
            if not self._open:  # without the rounding errors of thousands of sums
                self._seconds[:] = IDLE


class Ticket:
    """The outstanding work of a request in this thread; a context manager."""

    def __init__(self, account: Outstanding, work: Busy, far_hop: str) -> None:
        self._account, self._work, self._far_hop = account, work, far_hop

    def __enter__(self) -> Ticket:
        self._token = _current.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _current.reset(self._token)
        self.close()

    def close(self) -> None:
        """The request has ended."""
        self._account.remove(self._work, 1)
        self._work = IDLE

    def calls(self, hop: str) -> None:
        """A hop is called; a call of the far hop ends the work at the edge."""
        if hop == self._far_hop and (self._work.uplink or self._work.cloud):
            self._account.remove(Busy(self._work.edge), 0)
            self._work = self._work._replace(edge=0.0)


def note_call(hop: str) -> None:
    """Note a call of a hop by the routed request of this thread, if any."""
    if (ticket := _current.get()) is not None:
        ticket.calls(hop)
