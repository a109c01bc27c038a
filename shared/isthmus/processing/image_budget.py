"""The memory budget of all pictures in progress in a process: decoding starts with a reservation of its estimate.

Without Pillow, so that codecs and functions without images avoid its import.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from isthmus.admission import current_deadline
from isthmus.errors import Overloaded

DEFAULT_BYTES = 384 * 2**20
"""The budget of commands; functions have the setting `image_memory_bytes`. RGB of 64 million pixels fits."""
_RETRY_AFTER_S = 1
_WAIT_S = 20.0


class ImageMemory:
    """A budget in bytes for the pictures in progress; first come, first served."""

    def __init__(self, limit: int = DEFAULT_BYTES) -> None:
        self.limit = limit
        self.held = 0
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()

    @property
    def waiting(self) -> int:
        """Number of pictures that wait for memory."""
        return len(self._waiting)

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """Reserve `count` bytes of the budget, once available.

        Waits for half of the time to the request's deadline: decoding and inference follow.

        Raises:
            Overloaded: other pictures reserved the memory for too long.
        """
        deadline = current_deadline()
        wait_s = _WAIT_S if deadline is None else deadline.remaining() / 2
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            try:
                free = self._changed.wait_for(
                    lambda: self._waiting[0] is ticket and self.held + count <= self.limit, wait_s
                )
                if not free:
                    raise Overloaded(
                        f"pictures under way hold {self.held} of {self.limit} bytes for decoding; this one needs"
                        f" {count}",
                        retry_after_s=_RETRY_AFTER_S,
                        limit=self.limit,
                        bytes=count,
                    )
                self.held += count
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self.held -= count
                self._changed.notify_all()


SHARED = ImageMemory()
"""The default budget of a process."""
