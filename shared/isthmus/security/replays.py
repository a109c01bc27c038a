"""Refusal of calls that came before: a window of counters for each sender, a set of numbers used once.

Bounded in memory, and so only within the time that a call may be old; a function that was restarted, or another
replica, does not know what came before. Source of the window: RFC 4303, appendix A2.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable

from cachetools import LRUCache, TTLCache

# A sender is a process: its calls overtake one another by no more than its concurrency.
WINDOW = 4096
MAX_SENDERS = 1024
MAX_NONCES = 100_000


class CounterWindow:
    """Which counters of each sender were taken; thread-safe.

    Senders are authenticated before they come here, so that nobody else can displace them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # The highest counter, and a bit for each of the WINDOW counters up to it.
        self._senders: LRUCache[Hashable, tuple[int, int]] = LRUCache(MAX_SENDERS)

    def take(self, sender: Hashable, counter: int) -> bool:
        """Whether the counter is new; a counter more than WINDOW behind the highest is not."""
        with self._lock:
            highest, taken = self._senders.get(sender, (-1, 0))
            if counter > highest:
                shift = counter - highest
                taken = ((taken << shift) | 1) & ((1 << WINDOW) - 1) if shift < WINDOW else 1
                self._senders[sender] = (counter, taken)
                return True
            behind = highest - counter
            if behind >= WINDOW or taken >> behind & 1:
                return False
            self._senders[sender] = (highest, taken | 1 << behind)
            return True


class NonceSet:
    """Numbers that were used within `age_s` seconds; thread-safe.

    Beyond MAX_NONCES in that time the oldest are forgotten.
    """

    def __init__(self, age_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._lock = threading.Lock()
        self._nonces: TTLCache[Hashable, None] = TTLCache(MAX_NONCES, age_s, timer=clock)

    def take(self, nonce: Hashable) -> bool:
        """Whether the number is new."""
        with self._lock:
            if nonce in self._nonces:
                return False
            self._nonces[nonce] = None
            return True
