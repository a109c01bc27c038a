"""Capacities of edge and cloud in busy seconds a second, learned: a tier of four CPUs runs four segments at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

from isthmus.routing.mix import Resources

# A tier counts as one CPU until it has carried more than this share without a queue.
_TRIED_SHARE = 0.7
# Growth of a step, seconds between steps, and the bound: a thousand CPUs, or an error of the demands.
_STEP, _EVERY_S, _MAX = 1.1, 0.5, 1024.0
# Waits for a CPU relative to a call's own seconds: no queue below the first, a queue above the second.
_NO_QUEUE, _QUEUE = 0.3, 2.0
# Minimal capacity that other models leave: their requests end.
_MIN_LEFT = 0.05


class TierCapacity:
    """The learned capacity of edge or cloud; not thread-safe."""

    def __init__(self) -> None:
        self.value = 1.0
        self._stepped_at = -math.inf

    def update(self, now: float, used: float, rate: float, wait_s: float) -> None:
        """Learn from `used` busy seconds a second by `rate` requests a second, whose calls wait `wait_s` for a CPU."""
        if rate <= 0 or abs(now - self._stepped_at) < _EVERY_S:
            return
        busy_s = used / rate
        if used > _TRIED_SHARE * self.value and wait_s < _NO_QUEUE * busy_s:
            self.value, self._stepped_at = min(self.value * _STEP, _MAX), now
        elif wait_s > _QUEUE * busy_s:
            self.value, self._stepped_at = max(self.value / _STEP, 1.0), now


class Capacities:
    """Learned capacities of both tiers; a link has one second a second each way."""

    def __init__(self) -> None:
        self._edge, self._cloud = TierCapacity(), TierCapacity()

    def update(
        self, now: float, used: Sequence[float], rate: float, calls: float, edge_wait_s: float, cloud_wait_s: float
    ) -> None:
        """Learn from the use of each resource by all requests in a second; units as of `TierCapacity.update`.

        `calls` a second reach the cloud: waits are theirs, and not those of requests that end at the edge.
        """
        self._edge.update(now, used[0], rate, edge_wait_s)
        self._cloud.update(now, used[3], calls, cloud_wait_s)

    def left(self, taken: Sequence[float]) -> Resources:
        """Capacity of each resource behind `taken`, the use by other models."""
        whole = (self._edge.value, 1.0, 1.0, self._cloud.value)
        edge, uplink, downlink, cloud = (max(_MIN_LEFT, w - t) for w, t in zip(whole, taken, strict=True))
        return Resources(edge, uplink, downlink, cloud)
