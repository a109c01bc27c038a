"""Pipes of the kernel's, through which bytes go from one socket to another without leaving it. Source: splice(2)."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys

MOVES = sys.platform == "linux"
"""Whether this system has splice."""
FILLED_BYTES = 1 << 20
"""The most that is taken from a socket at a time."""

_SLOTS_BYTES = 1 << 18
"""A pipe's slots, in pages; a socket's bytes lie in larger pieces as a rule, and one takes one slot."""
_MOST_IDLE = 16
_FLAGS = os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE if MOVES else 0


class Pipe:
    """One pipe."""

    def __init__(self) -> None:
        self.held = 0
        """Bytes that are in it."""
        self._out, self._in = os.pipe()
        with contextlib.suppress(OSError):  # a user's pipes have a bound together; then it holds less
            fcntl.fcntl(self._in, fcntl.F_SETPIPE_SZ, _SLOTS_BYTES)

    def fill(self, sock: socket.socket, most: int) -> int:
        """How many of the socket's bytes went in; 0 at its end. BlockingIOError: none are here."""
        self.held = os.splice(sock.fileno(), self._in, most, flags=_FLAGS)
        return self.held

    def empty(self, sock: socket.socket) -> None:
        """Pass on all of them. BlockingIOError: the socket takes no more now."""
        while self.held:
            self.held -= os.splice(self._out, sock.fileno(), self.held, flags=_FLAGS)

    def close(self) -> None:
        """Drop what it holds."""
        os.close(self._in)
        os.close(self._out)


class Pipes:
    """Empty pipes that wait for the next body: making one and closing it takes as long as moving 300 kB."""

    def __init__(self) -> None:
        self._idle: list[Pipe] = []

    def take(self) -> Pipe:
        """An empty pipe.

        Raises:
            OSError: there is none, and none can be made.
        """
        return self._idle.pop() if self._idle else Pipe()

    def put(self, pipe: Pipe) -> None:
        """Keep `pipe` for another body; one that still holds something is closed."""
        if pipe.held or len(self._idle) >= _MOST_IDLE:
            pipe.close()
        else:
            self._idle.append(pipe)

    def close(self) -> None:
        """Close those that wait."""
        while self._idle:
            self._idle.pop().close()
