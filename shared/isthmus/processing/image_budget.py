"""The memory that all pictures under way in a process may take: a decode takes its estimate before it starts."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from isthmus.admission import current_deadline
from isthmus.errors import Overloaded

DEFAULT_BYTES = 384 * 2**20
"""What commands decode with; a function has its setting `image_memory_bytes`. RGB of 64 million pixels fits."""
_RETRY_AFTER_S = 1
_WAIT_S = 20.0


class ImageMemory:
    """Bytes that the pictures under way in a process may take together; who comes first is served first."""

    def __init__(self, limit: int = DEFAULT_BYTES) -> None:
        self.limit = limit
        self.held = 0
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()

    @property
    def waiting(self) -> int:
        """Pictures that wait for memory."""
        return len(self._waiting)

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """Hold `count` bytes of the budget, once they are free.

        Waits for half of what the request's deadline leaves: decoding and running are still to come.

        Raises:
            Overloaded: others held them for too long.
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
"""The budget of a process that names none."""
