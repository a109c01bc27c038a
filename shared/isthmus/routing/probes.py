"""Probes of links: the smallest exchange with a function, so that estimates of unused links stay known.

Calls are the better probes. A probe is sent where none of them was small for PROBE_AFTER_S, as on an idle link, and
where they do not tell a longer round trip from a lower rate: after a step, and while all are of one size. No probe
measures a rate, since its bytes would delay the calls that it is sent for.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping

from isthmus.errors import HopError
from isthmus.pipeline import Hop, ProbedHop
from isthmus.routing.estimates import Estimates

# The longest that one hop's probe holds up the probes of the others.
PROBE_TIMEOUT_S = 1.0
# Between looks for a link that is due: calls may have begun meanwhile.
_MAX_SLEEP_S = 2.0


class LinkProber:
    """A thread that probes the links of remote hops, by the estimates' names; none where no hop is remote."""

    def __init__(self, hops: Mapping[str, Hop], estimates: Estimates) -> None:
        self._hops = {name: hop for name, hop in hops.items() if isinstance(hop, ProbedHop)}
        self._estimates = estimates
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="probes", daemon=True) if self._hops else None
        if self._thread is not None:
            self._thread.start()

    def close(self) -> None:
        """End the thread; a probe under way goes on to its end."""
        self._closed = True
        self._estimates.ambiguous.set()
        if self._thread is not None:
            self._thread.join(2 * PROBE_TIMEOUT_S)

    def _run(self) -> None:
        while not self._closed:
            due = min(map(self._estimates.probe_due, self._hops), default=math.inf)
            # Not a sleep: ambiguous calls, and `close`, end the wait.
            if self._estimates.ambiguous.wait(min(max(due - time.monotonic(), 0.0), _MAX_SLEEP_S)):
                self._estimates.ambiguous.clear()
            for name in self._hops:
                if not self._closed and self._estimates.probe_due(name) <= time.monotonic():
                    self._probe(name)

    def _probe(self, name: str) -> None:
        self._estimates.probing(name)
        try:
            times = self._hops[name].probe(PROBE_TIMEOUT_S)
        except HopError:
            return  # the estimate ages; whether the hop answers is the breaker's business
        self._estimates.probed(name, times)
