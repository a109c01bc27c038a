"""Commands that are told to end, by SIGTERM or a terminal that closes, remove their temporary folders first.

Python ends at once by default, without leaving its `with` blocks: gigabytes stay in TMPDIR.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
AGAIN_S = 10.0
"""Libraries may catch the exception, as torch does while it is imported; so long after, it is raised again."""


class _EndedError(SystemExit):
    """Leaves every `with` block on the way out; passes by what catches errors."""


class _Ending:
    """The first signal that came, and when the exception was last raised for it."""

    def __init__(self) -> None:
        self.number = 0
        self._raised = -AGAIN_S
        self._left = threading.Event()
        self._repeating: threading.Thread | None = None

    def __call__(self, number: int, _: object) -> None:
        # Another signal would interrupt the removal.
        if time.monotonic() - self._raised < AGAIN_S:
            return
        if not self.number:
            self.number = number
            self._repeating = threading.Thread(target=self._repeat, daemon=True)
            self._repeating.start()
        self._raised = time.monotonic()
        raise _EndedError(128 + number)

    def _repeat(self) -> None:
        while not self._left.wait(1.1 * AGAIN_S):
            os.kill(os.getpid(), self.number)

    def finish(self) -> None:
        """End the process as the signal would have, if one came."""
        self._left.set()
        if self._repeating is not None:
            self._repeating.join()
            sys.stdout.flush()
            sys.stderr.flush()
            signal.signal(self.number, signal.SIG_DFL)
            os.kill(os.getpid(), self.number)


@contextmanager
def unwinding() -> Iterator[None]:
    """Let SIGTERM and SIGHUP leave the block as an exception does, and then end the process as they would have.

    One that is ignored, as under nohup, stays so. While the main thread is in a library's call, the call ends first.
    """
    taken = [n for n in _SIGNALS if signal.getsignal(n) is signal.SIG_DFL]
    ending = _Ending()
    for number in taken:
        signal.signal(number, ending)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
        ending.finish()
