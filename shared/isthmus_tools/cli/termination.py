"""SIGTERM and SIGHUP as exceptions, so that commands remove their temporary folders before they end.

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
# Libraries may catch the exception, as torch does during its import; after this time it is raised again.
AGAIN_S = 10.0


class _EndedError(SystemExit):
    """Leaves every `with` block on its way out; no `except Exception` catches it."""


class _Ending:
    """The first signal received, and the time of the last exception raised for it."""

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
            # A daemon: it must not keep a process alive whose main thread is done.
            self._repeating = threading.Thread(target=self._repeat, daemon=True)
            self._repeating.start()
        self._raised = time.monotonic()
        raise _EndedError(128 + number)

    def _repeat(self) -> None:
        # Past AGAIN_S, within which `__call__` ignores signals.
        while not self._left.wait(1.1 * AGAIN_S):
            os.kill(os.getpid(), self.number)

    def finish(self) -> None:
        """End the process by the received signal, if any."""
        self._left.set()
        if self._repeating is not None:
            self._repeating.join()
            # A death by signal skips the flush at exit.
            sys.stdout.flush()
            sys.stderr.flush()
            signal.signal(self.number, signal.SIG_DFL)
            # By the signal itself, so that a shell sees an interrupted command and ends its script.
            os.kill(os.getpid(), self.number)


@contextmanager
def unwinding() -> Iterator[None]:
    """Let SIGTERM and SIGHUP leave the block as an exception does, then end the process by the signal.

    A signal that is ignored, as under nohup, stays ignored. A library's call in the main thread ends first.
    """
    handled = [n for n in _SIGNALS if signal.getsignal(n) is signal.SIG_DFL]
    ending = _Ending()
    for number in handled:
        signal.signal(number, ending)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)
        ending.finish()


@contextmanager
def until_signal() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set for as long as the block lasts."""
    leave = threading.Event()
    # SIGTERM as well: a program ends the command by it, and still gets the last counters.
    before = {n: signal.signal(n, lambda *_: leave.set()) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield leave
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
