"""Background probes of hops whose breakers are open: GET /ready through the hop's own URL."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Protocol

from isthmus.routing.breaker import Breaker

# Over a link with a round trip of 0.6 s a new connection and a request take 1.2 s.
PROBE_TIMEOUT_S = 1.5


class Probed(Protocol):
    """A hop with a breaker."""

    @property
    def name(self) -> str:
        """The hop's name."""
        ...

    @property
    def breaker(self) -> Breaker:
        """The hop's breaker."""
        ...

    def is_ready(self, timeout_s: float) -> bool:
        """Whether the hop says within `timeout_s` seconds that it can run segments."""
        ...


class ReadinessProber:
    """Probes hops while their breakers are open; a single thread for all, which exists from the first opening on."""

    def __init__(self, hops: Sequence[Probed], log: logging.Logger) -> None:
        self._hops, self._log = tuple(hops), log
        self._wakes = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_closed = False
        for hop in self._hops:
            hop.breaker.on_open = partial(self._wake, hop)

    def _wake(self, hop: Probed) -> None:
        """The breaker of the hop opened."""
        openings = hop.breaker.openings
        self._log.warning(
            "%s fails; requests avoid it until a probe succeeds", hop.name, extra={"facts": {"openings": openings}}
        )
        with self._wakes:
            if self._thread is None and not self._is_closed:
                self._thread = threading.Thread(target=self._run, name="probe hops", daemon=True)
                self._thread.start()
            self._wakes.notify()

    def close(self) -> None:
        """End the thread; a probe under way ends within PROBE_TIMEOUT_S."""
        with self._wakes:
            self._is_closed = True
            self._wakes.notify()
            thread = self._thread
        if thread is not None:
            thread.join(2 * PROBE_TIMEOUT_S)

    def _run(self) -> None:
        while True:
            with self._wakes:
                if self._is_closed:
                    return
                due = [(at, hop) for hop in self._hops if (at := hop.breaker.probe_at()) is not None]
                soonest = min((at for at, _ in due), default=None)
                if soonest is None or (pause_s := soonest - time.monotonic()) > 0:
                    self._wakes.wait(None if soonest is None else pause_s)
                    continue
            for at, hop in due:
                if at <= time.monotonic():
                    self._probe(hop)

    def _probe(self, hop: Probed) -> None:
        if is_ready := hop.is_ready(PROBE_TIMEOUT_S):
            self._log.info("%s is ready again; one request at a time tries it", hop.name)
        hop.breaker.probed(is_ready)
