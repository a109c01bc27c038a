"""The real server of a function under raw sockets: smuggled requests, malformed heads, bodies that come slowly."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from isthmus.wire import frame as frames
from support.attacks import MIN_CASES
from support.bundles import Published, framed
from support.bundles import photos as photos
from support.local_stack import http
from support.paths import ROOT
from support.patience import LONG_S, eventually
from support.template_process import served

HANDLER = (ROOT / "functions" / "cloud-tail" / "handler.py").read_text()
CRLF = b"\r\n"
RECEIVE_S = 1.0


@dataclass(frozen=True)
class Function:
    """A segment function in a process of its own."""

    port: int
    body: bytes

    def ask(self, data: bytes, *, half_closed: bool = True) -> bytes:
        """Everything that the server answers to these bytes until it closes the connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=LONG_S) as s:
            s.sendall(data)
            if half_closed:
                s.shutdown(socket.SHUT_WR)
            answer = b""
            try:
                while part := s.recv(2**16):
                    answer += part
            except ConnectionResetError:
                pass  # after an answer, the rest of a request is not read
            return answer

    def runs(self) -> float:
        """How many segments ran since the start."""
        lines = http("GET", f"http://127.0.0.1:{self.port}/metrics").data.decode().splitlines()
        counted = [line for line in lines if line.startswith('isthmus_stage_seconds_count{stage="run"}')]
        return float(counted[0].rpartition(" ")[2]) if counted else 0.0

    def good(self) -> int:
        """The status of a request that the function serves."""
        kind = {"Content-Type": frames.CONTENT_TYPE}
        return http("POST", f"http://127.0.0.1:{self.port}/", body=self.body, headers=kind).status


@pytest.fixture(scope="module")
def function(photos: Published, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Function]:
    folder = tmp_path_factory.mktemp("function")
    environment = {
        "registry": str(photos.folder),
        "cache_dir": str(folder / "cache"),
        "threads": "1",
        "log_level": "error",
        "deadline_s": str(RECEIVE_S),
        "exec_timeout": "0",
        "max_request_bytes": "1000000",
        "PYTHONPATH": str(ROOT / "shared"),
    }
    with served(HANDLER, folder / "app", **environment) as port:
        made = Function(port, framed(photos))
        eventually(lambda: made.good() == 200)
        yield made


def statuses(answer: bytes) -> list[int]:
    """The statuses of all responses in an answer."""
    return [int(part[:12].split()[1]) for part in answer.split(b"HTTP/1.")[1:] for part in (b"HTTP/1." + part,)]


def request(*lines: bytes, body: bytes = b"", method: bytes = b"POST / HTTP/1.1") -> bytes:
    return CRLF.join([method, b"Host: localhost", *lines, b"", b""]) + body


def smuggled(body: bytes) -> Iterator[tuple[str, bytes, int]]:
    """Heads of which two readers would take another length; a frame lies where one of them sees a second request."""
    length = b"Content-Length: %d" % len(body)
    inner = request(length, b"Content-Type: " + frames.CONTENT_TYPE.encode(), body=body)
    chunks = b"0\r\n\r\n" + inner
    chunked = b"Transfer-Encoding: chunked"
    many = b"Content-Length: %d" % len(chunks)
    yield "CL and TE", request(many, chunked, body=chunks), 400
    yield "TE and CL", request(chunked, many, body=chunks), 400
    yield "CL 0 and TE", request(b"Content-Length: 0", chunked, body=chunks), 400
    for status, texts in {
        501: (
            *(b"xchunked", b"chunked, identity", b"identity", b"gzip, chunked", b"gzip", b"cow", b"chunked;q=1"),
            *(b'"chunked"', b"chun ked", b", chunked x"),
        ),
        400: (b"chunked, chunked", b"\x0bchunked", b"chunked\x00", b"chunked,", b",chunked"),
    }.items():
        for text in texts:
            yield f"TE {text!r}", request(b"Transfer-Encoding: " + text, body=chunks), status
    for name in (
        b"Transfer-Encoding ",
        b" Transfer-Encoding",
        b"Transfer\x00-Encoding",
        b"Transfer-Encoding\t",
        b"X\nTransfer-Encoding",
    ):
        yield f"name {name!r}", request(name + b": chunked", many, body=chunks), 400
    for text in (
        b"+5",
        b"-1",
        b"5 5",
        b"5,5",
        b"5, 6",
        b"0x5",
        b"5.0",
        b"1e1",
        b"",
        b" ",
        b"five",
        b"5\x00",
        b"\xd9\xa5",
        b"5;",
        b"'5'",
        b"1_0",
        b"9" * 400,
    ):
        yield f"CL {text[:9]!r}", request(b"Content-Length: " + text, body=inner), 413 if len(text) > 99 else 400
    for other in (b"0", b"5", b"%d" % (len(inner) - 1)):
        yield (
            f"CL twice, {other!r}",
            request(b"Content-Length: " + other, b"Content-Length: %d" % len(inner), body=inner),
            400,
        )
        yield (
            f"CL twice, {other!r} last",
            request(b"Content-Length: %d" % len(inner), b"Content-Length: " + other, body=inner),
            400,
        )
    exact = b"Content-Length: %d" % len(inner)
    yield "obs-fold", request(b"X: a", b" Content-Length: 5", exact, body=inner), 400
    yield "obs-fold by a tab", request(b"X: a", b"\tb", exact, body=inner), 400
    yield "obs-fold of a length", request(b"Content-Length:", b" %d" % len(inner), body=inner), 400
    yield "host twice", request(b"Host: localhost", exact, body=inner), 400
    yield "chunks of HTTP/1.0", request(chunked, body=chunks, method=b"POST / HTTP/1.0"), 400
    yield "obs-fold first", CRLF.join([b"POST / HTTP/1.1", b" Host: localhost", exact, b"", b""]) + inner, 400
    yield "obs-fold of TE", request(b"Transfer-Encoding:", b" chunked", body=chunks), 400
    for ended in (
        b"X: a\rY: b",
        b"X: a\nY: b\rZ",
        b"X: a\x00b",
        b"X\x00: b",
        b"no colon",
        b": no name",
        b"X Y: b",
        b"X\x7f: b",
        b"(X): b",
    ):
        yield f"header {ended!r}", request(ended, length, body=body), 400
    for size in (b"-1", b"0x5", b"g", b"", b" 5", b"5 ", b"+5", b"1_0", b"5;" + b"x" * 9 + b"\x00"):
        yield f"chunk of {size!r}", request(chunked, body=size + CRLF + b"hello" + CRLF + chunks), 400
    yield "chunk too long", request(chunked, body=b"3\r\nhello\r\n0\r\n\r\n" + inner), 400
    yield "chunk without its end", request(chunked, body=b"5\r\nhelloXX0\r\n\r\n" + inner), 400


def malformed() -> Iterator[tuple[str, bytes, int]]:
    """Request lines that are none, and heads without end."""
    for status, lines in {
        400: (
            *(b"", b"POST", b"POST /", b"POST / HTTP/1.1 x", b"POST  / HTTP/1.1", b"POST / HTTP/1", b"POST / http/1.1"),
            *(b"POST / HTTP/9.9", b"post / HTTP/1.1", b"POST /\xff HTTP/1.1", b"\x00\x00 / HTTP/1.1"),
            *(b"GET http://[::1 HTTP/1.1", b"\x16\x03\x01\x02\x00\x01", b"\xff" * 40),
        ),
        404: (
            *(b"POST /\x00 HTTP/1.1", b"PRI * HTTP/2.0", b"CONNECT x:1 HTTP/1.1", b"OPTIONS * HTTP/1.1"),
            *(b"POST ../../etc/passwd HTTP/1.1", b"POST /%2e%2e/%2e%2e/ HTTP/1.1", b"POST //run HTTP/1.1"),
        ),
        405: (b"TRACE / HTTP/1.1", b"PUT / HTTP/1.1", b"DELETE /ready HTTP/1.1"),
    }.items():
        for line in lines:
            yield f"line {line[:20]!r}", request(b"Content-Length: 0", method=line), status
    yield "a line of 300 kB", request(method=b"POST /" + b"x" * 300_000 + b" HTTP/1.1"), 431
    yield "a header of 300 kB", request(b"X: " + b"x" * 300_000), 431
    yield "headers of 300 kB", request(*(b"X%d: x" % n for n in range(30_000))), 431
    yield "a body of two megabytes", request(b"Content-Length: 2000000", body=bytes(2_000_000)), 413
    yield (
        "chunks of two megabytes",
        request(b"Transfer-Encoding: chunked", body=b"1e8480\r\n" + bytes(2_000_000) + b"\r\n0\r\n\r\n"),
        413,
    )
    yield "a length of a terabyte", request(b"Content-Length: 1000000000000", body=b"x"), 0


def test_smuggled_and_malformed_requests_run_nothing(function: Function) -> None:
    before, wrong = function.runs(), []
    cases = [*smuggled(function.body), *malformed()]
    for what, data, status in cases:
        # One response: no second one, to a request within the request.
        if (found := statuses(function.ask(data))) != ([status] if status else []):
            wrong.append(f"{what}: {found}, not {status}")
    assert not wrong, "\n".join(wrong)
    assert function.runs() == before
    assert function.good() == 200
    assert len({data for _, data, _ in cases}) >= MIN_CASES["connection"]


def test_bodies_that_come_slowly_end_with_the_deadline_and_run_nothing(function: Function) -> None:
    before = function.runs()
    whole = request(b"Content-Length: %d" % len(function.body), body=function.body)
    chunked = request(b"Transfer-Encoding: chunked", body=b"%x\r\n" % len(function.body) + function.body)

    def dribble(data: bytes) -> list[int]:
        answer = b""
        with socket.create_connection(("127.0.0.1", function.port), timeout=RECEIVE_S / 4) as s:
            s.sendall(data[:-99])
            for place in range(len(data) - 99, len(data)):
                try:
                    s.sendall(data[place : place + 1])
                    answer += s.recv(2**16)
                except TimeoutError:
                    continue
                except OSError:
                    break
                break
        return statuses(answer)

    with ThreadPoolExecutor(16) as pool:
        slow = [pool.submit(dribble, data) for data in (whole, chunked, whole[:120], whole[:110]) * 4]
        assert function.good() == 200
        assert [each.result() for each in slow] == [[408]] * 16
    assert function.runs() == before + 1
