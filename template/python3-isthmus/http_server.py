"""waitress, without what it costs a function whose bodies are megabytes: copies, threads that wake each other.

What waitress decides, such as when a connection ends, is left to it, and so is whoever reads or writes slowly.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from functools import lru_cache
from io import BytesIO
from typing import Any

from http_request import LARGE, Body, MemoryFull, Parser, TooSlow
from waitress.buffers import ReadOnlyFileBasedBuffer  # type: ignore[import-untyped]
from waitress.channel import ClientDisconnected, HTTPChannel  # type: ignore[import-untyped]
from waitress.task import ErrorTask, WSGITask  # type: ignore[import-untyped]
from waitress.utilities import InternalServerError, build_http_date  # type: ignore[import-untyped]

AFTER, TAKES_BUFFERS, MEMORY = "isthmus.after", "isthmus.takes_buffers", "isthmus.memory"
BEGAN = "isthmus.began"
RETRY_AFTER_S = 1
MAX_PARTS = 64  # the kernel takes 1,024 at a time


class JsonErrorTask(ErrorTask):  # type: ignore[misc]
    """What waitress refuses by itself (a body over the bound, a malformed request), as the JSON of our errors."""

    def execute(self) -> None:
        error = self.request.error
        kinds = {408: "DeadlineExceeded", 413: "RequestTooLarge", 429: "Overloaded", 500: "InternalError"}
        kind = kinds.get(error.code, "RequestMalformed")
        body = error_document(f"{error.reason}: {error.body}"[:1000], kind)
        self.status = f"{error.code} {error.reason}"
        self.response_headers.append(("Content-Type", "application/json"))
        if error.code == 429:
            self.response_headers.append(("Retry-After", str(RETRY_AFTER_S)))
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class OneTask(WSGITask):  # type: ignore[misc]
    """An answer of known length, sent in one go with its head: each piece of its own would wake the caller.

    Four keys in `environ` are not WSGI's: AFTER is a list of what the app wants called once its answer has been sent,
    where TAKES_BUFFERS is true an answer's parts may be memoryviews, in MEMORY this request's body is counted, and
    BEGAN is when its first byte had come, by `time.monotonic`.
    """

    def __init__(self, channel: Any, request: Any) -> None:
        super().__init__(channel, request)
        self._held: list[Any] = []
        self._after: list[Callable[[], None]] = []

    def get_environment(self) -> dict[str, Any]:
        environ: dict[str, Any] = super().get_environment()
        environ[TAKES_BUFFERS] = True
        environ[AFTER] = self._after
        environ[MEMORY] = self.channel.adj.memory
        environ[BEGAN] = self.request.began
        return environ

    def service(self) -> None:
        try:
            super().service()
        finally:  # what was done is counted, too, where the caller has gone
            for call in self._after:
                call()
            self._after.clear()  # what it holds may hold it, and with it a body of megabytes, until the collector comes

    def build_response_header(self) -> bytes:
        """As waitress does it, which takes four times as long over the answer that nearly every request gets."""
        plain = self.version == "1.1" and self.content_length is not None and self.has_body
        if not plain or self.request.connection_close or self.close_on_finish:
            head: bytes = super().build_response_header()
            return head
        lines = [f"HTTP/1.1 {self.status}", *(f"{name}: {value}" for name, value in self.response_headers)]
        said = {name.lower() for name, _ in self.response_headers}
        if "content-length" not in said:
            lines.append(f"Content-Length: {self.content_length}")
        if "date" not in said:
            lines.append(f"Date: {_date(int(self.start_time))}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    def write(self, data: Any) -> None:
        if not self.complete or self.content_length is None or not self.has_body:
            super().write(data)
            return
        if not self.wrote_header:
            self._held.append(self.build_response_header())
            self.wrote_header = True
        if data := data[: self.content_length - self.content_bytes_written]:
            self.content_bytes_written += len(data)
            self._held.append(data)
        if self.content_bytes_written == self.content_length or sum(map(len, self._held)) >= LARGE:
            self._send()

    def finish(self) -> None:
        super().finish()
        if self._held:
            self._send()

    def _send(self) -> None:
        held, self._held = self._held, []
        self.channel.write_parts(held)


class InPlace(ReadOnlyFileBasedBuffer):  # type: ignore[misc]
    """A body that is sent from where it lies.

    waitress copies a body into a buffer, and what is left of it anew for every piece that the socket takes.
    """

    def __init__(self, body: bytes | memoryview) -> None:
        super().__init__(BytesIO())
        self._left = memoryview(body)
        self.remain = len(body)

    def get(self, numbytes: int = -1, skip: bool = False) -> memoryview:
        piece = self._left if numbytes < 0 else self._left[:numbytes]
        if skip:
            self.skip(len(piece))
        return piece

    def skip(self, numbytes: int, allow_prune: int = 0) -> None:
        self._left = self._left[numbytes:]
        self.remain = len(self._left)


class Channel(HTTPChannel):  # type: ignore[misc]
    """A connection: waitress's loop reads and writes while it is nobody's, its worker does while it is `taken`."""

    error_task_class = JsonErrorTask
    task_class = OneTask
    parser_class = Parser
    taken = False
    paused = False  # requests wait until earlier responses have been sent

    def fileno(self) -> int:
        descriptor: int = self.socket.fileno()
        return descriptor

    def readable(self) -> bool:
        if self.taken:
            return False
        self._refuse_late()  # the loop asks every second, and more often
        if self.requests and not (self.total_outbufs_len or self.will_close or self.taken):
            self.server.add_task(self)  # what the worker had paused for has been sent
        return not self.taken and bool(super().readable())

    def writable(self) -> bool:
        # While a worker reads it may send, too: "100 Continue". While it answers, the loop sends what piles up.
        return (not self.taken or bool(self.requests)) and bool(super().writable())

    def service(self) -> bool:
        """Answer the requests that have come, or read on; whether its worker may wait for what comes next."""
        if not self.requests:
            self.handle_read()
            self._refuse_late()
        answered = self.paused = False
        # Who asks again and does not read is answered no further until what piled up has been sent.
        while self.requests and not (answered and self.total_outbufs_len):
            answered = True
            if not self._answer(self.requests[0]):
                with self.requests_lock:
                    self.close_when_flushed = True
                    for request in self.requests:
                        request.close()
                    self.requests = []
        self.last_activity = time.time()
        self.paused = bool(self.requests)
        return self.connected and not (self.close_when_flushed or self.will_close or self.total_outbufs_len)

    def handle_close(self) -> None:
        super().handle_close()
        if self.request is not None:
            self.request.close()  # its body's memory is others' at once, not when the collector comes

    def release(self) -> None:
        if self.requests and not self.paused:  # answering failed in a way that nobody foresaw
            self.will_close = True
        self.taken = False
        self.server.pull_trigger()

    def _answer(self, request: Any) -> bool:
        """Answer one request; whether another may follow on this connection."""
        task = (self.error_task_class if request.error else self.task_class)(self, request)
        try:
            if not self.connected:
                return False
            task.service()
        except ClientDisconnected:
            return False
        except Exception:
            self.logger.exception("a request to %s was not answered", request.path)
            if not task.wrote_header:
                request.error = InternalServerError("an unexpected error; the function's log has it")
                with contextlib.suppress(ClientDisconnected):
                    self.error_task_class(self, request).service()
            return False
        if task.close_on_finish:
            return False
        request.close()
        with self.requests_lock:
            self.requests.pop(0)
            if self.current_outbuf_count:  # the next answer gets a buffer of its own, and this one's memory is freed
                self.current_outbuf_count = self.adj.outbuf_high_watermark
            begun = self.request
            if not self.requests and begun is not None and begun.expect_continue and not self.sent_continue:
                self.send_continue()
        return True

    def write_soon(self, data: Any) -> int:
        if isinstance(data, bytes | memoryview) and len(data) >= LARGE:
            data = InPlace(data)
        sent: int = super().write_soon(data)
        return sent

    def write_parts(self, parts: list[Any]) -> None:
        """Send what the socket takes now, all parts at once, and leave the rest to the main thread."""
        if not self.connected:
            raise ClientDisconnected
        with self.outbuf_lock:
            if not self.total_outbufs_len and len(parts) <= MAX_PARTS:
                try:
                    sent = self.socket.sendmsg(parts)
                except BlockingIOError:
                    sent = 0
                except OSError:
                    self.will_close = True
                    raise ClientDisconnected from None
                while parts and sent >= len(parts[0]):
                    sent -= len(parts.pop(0))
                if sent:
                    parts[0] = memoryview(parts[0])[sent:]
        for part in parts:
            self.write_soon(part)

    def handle_read(self) -> None:
        """Read what is here; the loop closes what has ended."""
        taken = self.taken
        try:
            ended = self._body() is None and not self._read_other()
            # What came may have been a whole request, which the loop has given to a worker.
            if ended or (self.taken is taken and not self._read_body()):
                self.will_close = True
        except BlockingIOError:
            pass  # the rest is not here yet
        except OSError:
            self.will_close = True

    def _body(self) -> Body | None:
        """The body that is on its way, where its length is known and large."""
        receiver = None if self.request is None or self.request.chunked else self.request.body_rcv
        body = None if receiver is None else receiver.getbuf()
        return body if isinstance(body, Body) else None

    def _refuse(self, error: Any = None) -> None:
        """Answer the request that is on its way as if it had come, with an error."""
        with self.requests_lock:
            refused, self.request = self.request, None
            refused.refuse(error)
            self.requests.append(refused)
        self.server.add_task(self)

    def _refuse_late(self) -> None:
        """Answer 408 to a request that has been coming for longer than its answer may take, and close who never reads.

        waitress ends a connection where nothing happens, not one where a byte comes now and then.
        """
        begun, now = self.request, time.monotonic()
        if begun is not None and not self.requests and now - begun.began > self.adj.receive_s:
            self._refuse(TooSlow(f"the request did not come within {self.adj.receive_s:g} s"))
        elif self.requests and not self.taken and time.time() - self.last_activity > self.adj.channel_timeout:
            self.will_close = True

    def _read_other(self) -> bool:
        """Read a head, or a body that goes waitress's own way; False at the connection's end."""
        data = self.socket.recv(self.adj.recv_bytes)
        self.last_activity = time.time()
        self.received(data)
        return bool(data)

    def _read_body(self) -> bool:
        """Read what is here of the body on its way, where there is one; False at the connection's end."""
        while (body := self._body()) is not None:
            receiver = self.request.body_rcv
            try:
                room = body.room()[: receiver.remain]
            except MemoryFull:
                self._refuse()
                break
            if not (count := self.socket.recv_into(room)):
                return False
            self.last_activity = time.time()
            # The last byte goes waitress's own way, which begins the task.
            last = bytes(room[count - 1 : count]) if count == receiver.remain else b""
            count -= len(last)
            body.filled(count)
            receiver.remain -= count
            self.request.body_bytes_received += count
            if last:
                self.received(last)
                break
        return True


@lru_cache(4)
def _date(second: int) -> str:
    date: str = build_http_date(second)
    return date


def error_document(message: str, kind: str, **facts: Any) -> bytes:
    """An error as JSON, as the functions' own are."""
    return json.dumps({"error": message, "type": kind, "facts": facts}).encode()
