"""What a function keeps of tensors that may be refined: little, and not for long."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a function that is sent no such tensors never loads the codec
    from isthmus.codecs.kept_tensors import Held

LONGEST_S = 60.0
_EACH = 512
"""Bytes that one takes beside what it holds."""


class Kept:
    """What is held, by its key, the newest: at most `max_bytes` of it, and none found after `longest_s`."""

    def __init__(
        self,
        max_bytes: int = 32 * 2**20,
        longest_s: float = LONGEST_S,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_bytes, self._longest_s, self._clock = max_bytes, longest_s, clock
        self._lock = threading.Lock()
        self._held: OrderedDict[bytes, tuple[float, Held]] = OrderedDict()
        self._bytes = 0

    @property
    def nbytes(self) -> int:
        """What is kept now, and what keeping it takes; what is too old is let go."""
        with self._lock:
            self._forget(self._clock())
        return self._bytes

    def keep(self, held: Held) -> None:
        """Keep it, and let go of what is too old or too much; what alone is too much is not kept."""
        size = held.nbytes + _EACH
        with self._lock:
            self._drop(held.key)
            now = self._clock()
            if size <= self._max_bytes:
                self._held[held.key] = (now, held)
                self._bytes += size
            self._forget(now)

    def find(self, key: bytes) -> Held | None:
        """What that key stands for; None where it is not kept, or no longer."""
        with self._lock:
            since, held = self._held.get(key, (0.0, None))
            if held is not None and self._clock() - since > self._longest_s:
                self._drop(key)
                return None
            return held

    def _forget(self, now: float) -> None:
        """Let go of what is too old or too much, the oldest first."""
        while self._held:
            key, (since, _) = next(iter(self._held.items()))
            if self._bytes <= self._max_bytes and now - since <= self._longest_s:
                return
            self._drop(key)

    def _drop(self, key: bytes) -> None:
        if (found := self._held.pop(key, None)) is not None:
            self._bytes -= found[1].nbytes + _EACH


def keeps_all() -> Kept:
    """A place that forgets nothing, for trying refinements in one process."""
    return Kept(2**62, math.inf)
