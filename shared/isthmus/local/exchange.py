"""One request on its way to a replica, and the answer on its way back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from enum import Enum, auto

from isthmus.local.flow import FIRST_BYTES, Body, Chunked, Counted, Flow, TooLong, UntilEnd
from isthmus.local.heads import AnswerHead, Header, NotHttp, RequestHead, split_head
from isthmus.local.pipes import Pipes
from isthmus.local.wire import Wire

_MOST_AHEAD = 1 << 16
"""Bytes of a caller's next requests that are kept while one is under way."""


class End(Enum):
    """How an exchange ended."""

    ANSWERED = auto()
    UNREACHABLE = auto()
    TIMED_OUT = auto()
    TOO_LONG = auto()
    GONE = auto()
    """The caller hung up."""


class Exchange:
    """From a request's head to its answer's last byte; both bodies pass as they come, at the same time.

    `done` is called once with how it ended. Units: most is bytes of a chunked request, timeout_s bounds it all.
    """

    def __init__(
        self,
        caller: Wire,
        upstream: Wire,
        request: RequestHead,
        *,
        ours: Sequence[Header],
        scratch: memoryview,
        pipes: Pipes,
        most: int,
        timeout_s: float,
        done: Callable[[End], None],
    ) -> None:
        self.status = 0
        """The answer's, once its head has been passed on."""
        self.keeps_caller = self.keeps_upstream = False
        """Whether the connection can take another request."""
        self.ahead = bytearray()
        """What the caller sent after this request."""
        self._caller = caller
        self._upstream = upstream
        self._request = request
        self._ours = ours
        self._scratch = scratch
        self._pipes = pipes
        self._done = done
        self._started = time.perf_counter()
        self._timeout_s = timeout_s
        self._timer: asyncio.TimerHandle | None = None
        self._over = False
        self._head = bytearray()
        body: Body = Chunked(request, most) if request.chunked else Counted(request.length or 0)
        self._sending = Flow(
            caller,
            upstream,
            body,
            chunks=request.chunked,
            scratch=scratch,
            pipes=pipes,
            ended=self._sent,
            failed=lambda e: self._end(End.TOO_LONG if isinstance(e, TooLong) else End.GONE),
        )
        self._answering: Flow | None = None

    def begin(self, head: bytes, first: memoryview) -> None:
        """Send the request's `head` and what is here of its body."""
        self._caller.on_readable = self._sending.readable
        self._upstream.on_readable = self._read_head
        self._sending.begin(head, first)
        if self._request.expects and not self._sending.over:
            self._caller.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if not self._over:  # last, while the function is at work already
            self._timer = asyncio.get_running_loop().call_later(self._timeout_s, self._end, End.TIMED_OUT)

    def _sent(self, rest: memoryview) -> None:
        self.ahead += rest
        self._caller.on_readable = self._read_ahead

    def _read_ahead(self) -> None:
        """The caller says more, or hangs up, before it is answered."""
        count = self._caller.receive(self._scratch)
        if count == 0:
            self._end(End.GONE)
        elif count > 0:
            self.ahead += self._scratch[:count]
            if len(self.ahead) > _MOST_AHEAD:
                self._caller.pause()

    def _read_head(self) -> None:
        count = self._upstream.receive(self._scratch[:FIRST_BYTES])
        if count < 0:
            return
        if count == 0:
            self._end(End.UNREACHABLE)
            return
        data = self._scratch[:count]
        if self._head:
            self._head += data
            data = memoryview(bytes(self._head))
        try:
            self._look_for_head(data)
        except NotHttp:
            self._end(End.UNREACHABLE)

    def _look_for_head(self, data: memoryview) -> None:
        while (found := split_head(data)) is not None:
            head, data = found
            answer = AnswerHead(head)
            if not answer.interim:
                self._answer(answer, data)
                return
        self._head[:] = data

    def _answer(self, answer: AnswerHead, first: memoryview) -> None:
        body, framing = self._framing(answer)
        chunks = framing == b"Transfer-Encoding: chunked"
        lines = [framing] if framing else []
        # A caller that is answered before it has said everything is not asked for the rest.
        self.keeps_caller = self._request.keep_alive and self._sending.over and self._request.version == "1.1"
        if self._request.more:  # what followed a chunked body went into its parser
            self.keeps_caller = False
        if isinstance(body, UntilEnd) and not chunks:
            self.keeps_caller = False
        if not self.keeps_caller:
            lines.append(b"Connection: close")
        took = b"%.6f" % (time.perf_counter() - self._started)
        head = answer.returned(self._ours, b"X-Duration-Seconds: " + took, *lines)
        self.status = answer.status

        def ended(rest: memoryview) -> None:
            whole = self._sending.over and not rest and not answer.more and not isinstance(body, UntilEnd)
            self.keeps_upstream = whole and answer.keep_alive
            self._end(End.ANSWERED)

        self._answering = Flow(
            self._upstream,
            self._caller,
            body,
            chunks=chunks,
            scratch=self._scratch,
            pipes=self._pipes,
            ended=ended,
            failed=lambda _: self._end(End.UNREACHABLE),
        )
        self._upstream.on_readable = self._answering.readable
        self._answering.begin(head, first)

    def _framing(self, answer: AnswerHead) -> tuple[Body, bytes]:
        """How the answer's body ends, and the header that tells the caller so."""
        length = answer.length
        said = b"" if length is None else b"Content-Length: %d" % length
        if answer.bodiless(self._request.method):
            return Counted(0), said
        body: Body
        if answer.chunked:
            body = Chunked(answer)
        elif length is not None:
            return Counted(length), said
        else:
            body = UntilEnd()
        return body, b"Transfer-Encoding: chunked" if self._request.version == "1.1" else b""

    def _end(self, how: End) -> None:
        if self._over:
            return
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
        for flow in (self._sending, self._answering):
            if flow is not None:
                flow.stop()
        # It holds this exchange, and a call leaves nothing to the garbage collector.
        done = self._done
        del self._done
        done(how)

    def stop(self) -> None:
        """End it now, unanswered."""
        self._end(End.GONE)
