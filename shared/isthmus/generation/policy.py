"""What the generations of a router share: bounds, the memory of replays, the budget of recoveries, ended sessions."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from isthmus.admission import MemoryBudget
from isthmus.context import Context, Deadline
from isthmus.errors import HopError
from isthmus.pipeline import Hop, Route, SessionHop
from isthmus.pipeline.hop import END_SESSION_S
from isthmus.retries import RetryBudget

# A function that restarts loses the sessions of all generations at once: sixteen are rebuilt immediately, and then four
# a second, since each replay computes as much as a prompt. Completed steps earn further ones.
_RECOVERY_BURST, _RECOVERIES_PER_S, _RECOVERIES_PER_STEP = 16, 4.0, 0.01
_ENDING_THREADS, _MAX_ENDING = 2, 256


class Rerouting(Protocol):
    """Another route for a generation whose hop fails, and in time for it."""

    def limited(self, context: Context, expected_s: float | None) -> Context:
        """The context of a call that takes `expected_s` seconds: hops with an alternative are given up early."""
        ...

    def instead(self, error: HopError, context: Context) -> Route | None:
        """The route without the hop that failed; None where there is none, or another hop would do no better."""
        ...


class FixedRoute:
    """No other route: calls wait for their hop as long as the deadline allows."""

    def limited(self, context: Context, expected_s: float | None) -> Context:
        """See `Rerouting.limited`."""
        return context

    def instead(self, error: HopError, context: Context) -> Route | None:
        """See `Rerouting.instead`."""
        return None


class SessionEnder:
    """Ends sessions in the background, at most _MAX_ENDING at a time; more are left to their functions."""

    def __init__(self) -> None:
        self._places = threading.BoundedSemaphore(_MAX_ENDING)
        self._threads = ThreadPoolExecutor(_ENDING_THREADS, thread_name_prefix="ended-sessions")

    def end(self, session: str, hops: Iterable[Hop]) -> None:
        """Have the functions behind `hops` drop the session's state; returns at once."""
        for hop in hops:
            if not self._places.acquire(blocking=False):
                return
            try:
                future = self._threads.submit(_end, hop, session)
            except RuntimeError:  # closed
                self._places.release()
                return
            future.add_done_callback(lambda _: self._places.release())

    def finish(self) -> None:
        """Take no further sessions, and have the threads end behind those that were taken; returns at once."""
        self._threads.shutdown(wait=False)

    def close(self) -> None:
        """End no further sessions; waits for calls under way, which are bounded by their timeout."""
        self._threads.shutdown(cancel_futures=True)


@dataclass(frozen=True, kw_only=True)
class GenerationPolicy:
    """Bounds of each generation, and the objects that all generations of a router share.

    Units: seconds and bytes. `silence_s` bounds the time without a completed call, `replay_bytes` the boundary tensors
    of one generation, `memory` those of all.
    """

    silence_s: float = 60.0
    replay_bytes: int = 32 * 2**20
    memory: MemoryBudget = field(default_factory=lambda: MemoryBudget(256 * 2**20))
    recoveries: RetryBudget = field(
        default_factory=lambda: RetryBudget(
            burst=_RECOVERY_BURST, per_second=_RECOVERIES_PER_S, per_success=_RECOVERIES_PER_STEP
        )
    )
    ender: SessionEnder = field(default_factory=SessionEnder)


def _end(hop: Hop, session: str) -> None:
    if isinstance(hop, SessionHop):
        hop.end_session(session, Deadline.after(END_SESSION_S))
