"""Rate limits of callers: token buckets of requests and of body bytes, each in this process alone.

Own code, since libraries of rate limits count windows of requests, and store each unit of a cost of a megabyte.
Sources: ITU-T I.371 (leaky bucket as a meter); draft-ietf-httpapi-ratelimit-headers-10.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from cachetools import LRUCache

from isthmus.errors import CallerLimited
from isthmus.security.callers import CallerLimits

# Buckets of callers that called last; subjects of tokens have no bound. A forgotten bucket is full again.
MAX_BUCKETS = 10_000


@dataclass(frozen=True)
class BucketState:
    """A bucket after a request. Units: `left` and `size` of the bucket's unit, `full_s` seconds until it is full."""

    name: str
    size: int
    window_s: int
    left: int
    full_s: int


class RateLimiter:
    """The buckets of all callers; thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        # Level and time of a bucket by caller and kind.
        self._buckets: LRUCache[tuple[str, str], tuple[float, float]] = LRUCache(MAX_BUCKETS)

    def take(self, caller: str, limits: CallerLimits, body_bytes: int) -> list[BucketState]:
        """Count a request; a request that is refused counts in no bucket.

        A body larger than a whole burst is taken where the bucket is not empty, and waited for afterwards: it could
        never be taken otherwise.

        Raises:
            CallerLimited: a bucket has no room; with the seconds until it has.
        """
        burst_s = limits.burst_s
        wanted = [
            ("requests", limits.requests_per_s, max(1.0, limits.requests_per_s * burst_s), 1.0),
            ("bytes", float(limits.bytes_per_s), max(1.0, limits.bytes_per_s * burst_s), float(body_bytes)),
        ]
        with self._lock:
            now, after = self._clock(), list[tuple[str, float, float, float]]()
            for name, rate, size, cost in wanted:
                if not rate:
                    continue
                level, at = self._buckets.get((caller, name), (size, now))
                level = min(size, level + (now - at) * rate)
                needed = min(cost, 1.0)
                if level < needed:
                    raise _limited(name, rate, (needed - level) / rate)
                after.append((name, rate, size, level - cost))
            for name, _, _, level in after:
                self._buckets[caller, name] = (level, now)
        return [
            BucketState(
                name,
                int(size),
                max(1, math.ceil(size / rate)),
                max(0, math.floor(level)),
                math.ceil((size - level) / rate),
            )
            for name, rate, size, level in after
        ]


def rate_headers(states: list[BucketState]) -> dict[str, str]:
    """The headers RateLimit-Policy and RateLimit."""
    if not states:
        return {}
    policies = (f'"{s.name}";q={s.size};w={s.window_s}' + (';qu="bytes"' * (s.name == "bytes")) for s in states)
    return {
        "RateLimit-Policy": ", ".join(policies),
        "RateLimit": ", ".join(f'"{s.name}";r={s.left};t={s.full_s}' for s in states),
    }


def _limited(name: str, rate: float, wait_s: float) -> CallerLimited:
    retry_after_s = max(1, math.ceil(wait_s))
    return CallerLimited(
        f"this caller may send {rate:g} {name} per second; again in {retry_after_s} s",
        limit=name,
        per_second=rate,
        retry_after_s=retry_after_s,
    )
