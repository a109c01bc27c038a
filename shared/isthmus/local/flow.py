"""A message's body on its way from one socket to another, as it comes and no faster than it leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from isthmus.local.heads import AnswerHead, NotHttp, RequestHead
from isthmus.local.pipes import FILLED_BYTES, MOVES, Pipe, Pipes
from isthmus.local.wire import Buffer, Wire

READ_BYTES = 1 << 18
FIRST_BYTES = 1 << 15
"""Read with a head: what follows it is copied, and most of a large body need not be."""
TURN_BYTES = 1 << 22
"""What passes before others have their turn."""

_MOVED_FROM = 1 << 16


class TooLong(Exception):
    """A body of unknown length went over its bound."""


class Body(Protocol):
    """How a body's end is told."""

    over: bool

    def take(self, data: memoryview) -> tuple[Buffer, memoryview]:
        """The body's part of `data`, and what follows the body.

        Raises:
            NotHttp: it is not what the head says. TooLong: it exceeds its bound.
        """
        ...


class Counted:
    """A body of known length."""

    def __init__(self, length: int) -> None:
        self.left = length
        self.over = not length

    def take(self, data: memoryview) -> tuple[Buffer, memoryview]:
        """See `Body.take`."""
        count = min(self.left, len(data))
        self.count(count)
        return data[:count], data[count:]

    def count(self, count: int) -> None:
        """Note that so much of it has passed."""
        self.left -= count
        self.over = not self.left


class Chunked:
    """A chunked body, read by its head's parser; it has no bound on its way back."""

    def __init__(self, head: RequestHead | AnswerHead, most: int | None = None) -> None:
        self.over = False
        self._head = head
        self._most = most
        self._passed = 0

    def take(self, data: memoryview) -> tuple[Buffer, memoryview]:
        """See `Body.take`."""
        self._head.feed(data)
        body = b"".join(self._head.pieces)
        self._head.pieces.clear()
        self.over = self._head.ended
        self._passed += len(body)
        if self._most is not None and self._passed > self._most:
            raise TooLong
        return body, data[:0]


class UntilEnd:
    """A body that ends with its connection."""

    over = False

    def take(self, data: memoryview) -> tuple[Buffer, memoryview]:
        """See `Body.take`."""
        return data, data[:0]


class Flow:
    """Carries a body from `source` to `sink`, chunked anew or as it is.

    `ended` is told what came after the body, `failed` why it is not whole.
    """

    def __init__(
        self,
        source: Wire,
        sink: Wire,
        body: Body,
        *,
        chunks: bool,
        scratch: memoryview,
        pipes: Pipes,
        ended: Callable[[memoryview], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self.over = False
        self._source = source
        self._sink = sink
        self._body = body
        self._chunks = chunks
        self._scratch = scratch
        self._pipes = pipes
        self._ended = ended
        self._failed = failed
        # Counted bodies can be moved from socket to socket inside the kernel, where that is Linux.
        self._moves = body if isinstance(body, Counted) and not chunks and MOVES else None
        self._pipe: Pipe | None = None

    def begin(self, head: bytes, first: memoryview) -> None:
        """Send `head` and the part of the body that is here already."""
        if self._body.over:
            self._sink.send(head)
            self._end(first)
        else:
            self._pass(first, head)
            if not self.over and self._may_move():
                self.readable()  # more of it came meanwhile, as a rule

    def readable(self) -> None:
        """Pass on what came."""
        passed = 0
        while passed < TURN_BYTES:
            count = self._move() if self._may_move() else self._copy()
            if not count:
                return
            passed += count

    def _may_move(self) -> bool:
        return self._moves is not None and self._moves.left >= _MOVED_FROM and not self._sink.backlog

    def stop(self) -> None:
        """Pass nothing more on."""
        self.over = True
        # Whoever is told holds this flow as a rule; without these, neither waits for the garbage collector.
        self._ended = self._failed = _tell_nobody
        if self._pipe is not None:
            self._pipes.put(self._pipe)
            self._pipe = None

    def _copy(self) -> int:
        """Receive and send; how many bytes, 0 where no more are here or the sink takes no more."""
        count = self._source.receive(self._scratch)
        if count < 0:
            return 0
        if count == 0:
            self._source_ended()
            return 0
        self._pass(self._scratch[:count])
        if self.over:
            return 0
        if self._sink.backlog:
            self._source.pause()
            self._sink.on_drained = self._source.resume
            return 0
        return count

    def _pass(self, data: memoryview, *head: bytes) -> None:
        try:
            part, rest = self._body.take(data)
        except (NotHttp, TooLong) as e:
            self._fail(e)
            return
        if not self._chunks:
            self._sink.send(*head, part)
        else:
            last = b"0\r\n\r\n" if self._body.over else b""
            self._sink.send(*head, *((b"%x\r\n" % len(part), part, b"\r\n") if len(part) else ()), last)
        if self._body.over:
            self._end(rest)

    def _move(self) -> int:
        """As `_copy`, without taking the bytes out of the kernel. docs/local.md has what that saves."""
        if self._moves is None:
            return 0
        if self._pipe is None:
            try:
                self._pipe = self._pipes.take()
            except OSError:  # no descriptors are left for it
                self._moves = None
                return self._copy()
        try:
            count = self._pipe.fill(self._source.sock, min(self._moves.left, FILLED_BYTES))
        except BlockingIOError:
            return 0
        except OSError:
            count = 0
        if not count:
            self._source_ended()
            return 0
        self._moves.count(count)
        return count if self._drain(self._pipe, self._moves) else 0

    def _drain(self, pipe: Pipe, body: Counted) -> bool:
        """Move what the pipe holds on to the sink; whether more may follow now."""
        try:
            pipe.empty(self._sink.sock)
        except BlockingIOError:
            self._source.pause()
            self._sink.when_writable(lambda: self._drained(pipe, body))
            return False
        except OSError:
            # The sink has ended; what is left is read and dropped, until whoever reads from the sink learns of it.
            pipe.close()
            self._pipe = self._moves = None
        if body.over:
            self._end(self._scratch[:0])
        return not self.over

    def _drained(self, pipe: Pipe, body: Counted) -> None:
        if not self.over and self._drain(pipe, body):
            self._source.resume()

    def _source_ended(self) -> None:
        if isinstance(self._body, UntilEnd):
            if self._chunks:
                self._sink.send(b"0\r\n\r\n")
            self._end(self._scratch[:0])
        else:
            self._fail(NotHttp("the connection ended early"))

    def _end(self, rest: memoryview) -> None:
        ended = self._ended
        self.stop()
        ended(rest)

    def _fail(self, error: Exception) -> None:
        failed = self._failed
        self.stop()
        failed(error)


def _tell_nobody(_: object) -> None:
    pass
