"""Commands that are told to end, by SIGTERM or a terminal that closes, remove their temporary folders first.

Python ends at once by default, without leaving its `with` blocks: gigabytes stay in TMPDIR.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class _EndedError(SystemExit):
    """Leaves every `with` block on the way out; passes by what catches errors."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


@contextmanager
def unwinding() -> Iterator[None]:
    """Let SIGTERM and SIGHUP leave the block as an exception does, and then end the process as they would have.

    One that is ignored, as under nohup, stays so. While the main thread is in a library's call, the call ends first.
    """
    before = {n: signal.getsignal(n) for n in _SIGNALS}
    taken = [n for n, handler in before.items() if handler is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, _end)
    try:
        yield
    except _EndedError as e:
        sys.stdout.flush()
        sys.stderr.flush()
        signal.signal(e.number, signal.SIG_DFL)
        os.kill(os.getpid(), e.number)
        raise
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _end(number: int, _: object) -> NoReturn:
    # A second signal would interrupt the removal.
    for other in _SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise _EndedError(number)
