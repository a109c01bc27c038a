"""A completion as server-sent events, generated in a thread of its own.

The thread lets the reader tell a pause from the end: a comment line keeps proxies from closing a silent connection,
and shows whether the client is still there.
Source: HTML Living Standard, 9.2 "Server-sent events"; docs/reference/openai.md.
"""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Generator

from isthmus.context import Abandonment
from isthmus.generation.completion import TextPiece

# Shorter than the idle timeouts of proxies; a client that has gone is seen at the next of these.
KEEP_ALIVE_S = 5.0
KEEP_ALIVE = b": waiting\n\n"
DONE = b"data: [DONE]\n\n"


class PieceFeed:
    """The pieces of a completion, generated ahead of their reader.

    The number of tokens bounds what waits for the reader. `abandonment` ends the call of a hop under way.
    """

    def __init__(self, pieces: Generator[TextPiece, None, None], abandonment: Abandonment) -> None:
        self._pieces, self._abandonment = pieces, abandonment
        self._queue: queue.SimpleQueue[TextPiece | Exception | None] = queue.SimpleQueue()
        # The request's context: its ids in log lines, and its slot.
        run = contextvars.copy_context().run
        self._thread = threading.Thread(target=run, args=(self._generate,), name="completion", daemon=True)
        self._thread.start()

    def next(self, timeout_s: float) -> TextPiece | None:
        """The next piece; None at the end.

        Raises:
            queue.Empty: none within `timeout_s` seconds.
            Further errors as the generation.
        """
        item = self._queue.get(timeout=timeout_s)
        if isinstance(item, Exception):
            raise item
        return item

    def close(self) -> None:
        """End the generation; returns when its present step is over, which the request's slot and memory are for."""
        self._abandonment.abandon()
        self._thread.join()

    def _generate(self) -> None:
        try:
            for piece in self._pieces:
                self._queue.put(piece)
                if self._abandonment.is_abandoned:
                    break
        except Exception as e:  # the reader raises it
            self._queue.put(e)
        else:
            self._queue.put(None)
        finally:
            self._pieces.close()
