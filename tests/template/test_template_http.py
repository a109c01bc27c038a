"""The template's HTTP server: bodies arrive and leave whole, however they are cut up on the way."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path

import pytest

from support.local_stack import http
from support.patience import LONG_S, until
from support.template_process import TEMPLATE, served

HANDLER = """
import hashlib
import os

PARTS = [b"a" * 100, b"b" * 50_000, b"", b"c" * 2_000_000, b"d"]


def create_app():
    def app(environ, start_response):
        body, path = environ["wsgi.input"], environ["PATH_INFO"]
        if path == "/echo":
            data = body.read()
            start_response("200 OK", [("Content-Length", str(len(data)))])
            return [data]
        if path == "/pieces":
            digest = hashlib.sha256(body.read(10))
            for line in body:
                digest.update(line)
            start_response("200 OK", [("Content-Length", "64")])
            return [digest.hexdigest().encode()]
        if path == "/parts":
            assert not [key for key in environ if key.startswith("isthmus.")]
            start_response("200 OK", [("Content-Length", str(sum(map(len, PARTS))))])
            return PARTS
        if path == "/open-files":
            body.read()
            links = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd") if int(name) > 2]
            names = "\\n".join(os.readlink(link) for link in links if os.path.lexists(link)).encode()
            start_response("200 OK", [("Content-Length", str(len(names)))])
            return [names]
        if path == "/unknown-length":
            start_response("200 OK", [])
            return iter([b"x" * 40_000, b"y"])
        if path == "/short":
            start_response("200 OK", [("Content-Length", "100")])
            return [b"only this"]
        start_response("204 No Content", [])
        return []

    return app
"""


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with served(HANDLER, tmp_path_factory.mktemp("http") / "app", max_request_bytes="8MiB") as port:
        yield port


@pytest.mark.parametrize("size", [0, 1, 32_767, 32_768, 32_769, 65_536, 3_000_000, 7_000_000])
def test_a_body_of_any_size_comes_back_on_one_connection(port: int, size: int) -> None:
    body = os.urandom(size)
    connection = HTTPConnection("127.0.0.1", port, timeout=LONG_S)
    for _ in range(3):
        connection.request("POST", "/echo", body)
        assert connection.getresponse().read() == body
    connection.close()


def test_a_body_that_arrives_in_pieces_is_whole(port: int) -> None:
    body = os.urandom(100_000)
    with socket.create_connection(("127.0.0.1", port), timeout=LONG_S) as s:
        said = b"POST /echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 100000\r\n\r\n" + body
        for start, end in ((0, 50), (50, 90), (90, 20_000), (20_000, len(said) - 1), (len(said) - 1, len(said))):
            s.sendall(said[start:end])
            time.sleep(0.02)
        assert s.makefile("rb").read().endswith(body)


def test_a_request_after_a_large_one_may_follow_at_once(port: int) -> None:
    body = os.urandom(200_000)
    asked = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 200000\r\n\r\n" + body
    with socket.create_connection(("127.0.0.1", port), timeout=LONG_S) as s:
        s.sendall(asked + asked.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
        answers = s.makefile("rb").read()
    assert answers.count(body) == 2


def test_a_large_request_may_follow_a_small_one_at_once(port: int) -> None:
    body = os.urandom(200_000)
    small = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nsmall"
    large = b"POST /echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 200000\r\n\r\n" + body
    for _ in range(20):  # on a new connection the loop reads, and a worker once there is something to answer
        with socket.create_connection(("127.0.0.1", port), timeout=LONG_S) as s:
            s.sendall(small + large[:100])
            s.sendall(large[100:])
            answers = s.makefile("rb").read()
        assert answers.index(b"small") < answers.index(body)


def test_a_body_can_be_read_in_pieces_and_lines(port: int) -> None:
    body = os.urandom(100_000)
    said = http("POST", f"http://127.0.0.1:{port}/pieces", body=body).data
    assert said.decode() == hashlib.sha256(body).hexdigest()


def test_a_response_in_parts_arrives_as_one_body(port: int) -> None:
    reply = http("GET", f"http://127.0.0.1:{port}/parts")
    assert reply.data == b"a" * 100 + b"b" * 50_000 + b"c" * 2_000_000 + b"d"


def test_a_response_is_whole_for_a_slow_reader(port: int) -> None:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        s.connect(("127.0.0.1", port))
        s.settimeout(LONG_S)
        s.sendall(b"GET /parts HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        time.sleep(0.2)
        assert len(s.makefile("rb").read().partition(b"\r\n\r\n")[2]) == 2_050_101


def test_a_response_of_unknown_length_is_chunked(port: int) -> None:
    reply = http("GET", f"http://127.0.0.1:{port}/unknown-length")
    assert (reply.headers["Transfer-Encoding"], reply.data) == ("chunked", b"x" * 40_000 + b"y")


def test_a_response_shorter_than_its_content_length_ends_the_connection(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=LONG_S) as s:
        s.sendall(b"GET /short HTTP/1.1\r\nHost: x\r\n\r\n")
        assert s.makefile("rb").read().endswith(b"only this")


def test_head_has_the_length_and_no_body(port: int) -> None:
    connection = HTTPConnection("127.0.0.1", port, timeout=LONG_S)
    for _ in range(2):
        connection.request("HEAD", "/nothing")
        assert connection.getresponse().status == 204
    connection.close()


def begun(port: int, head: bytes, body: bytes) -> socket.socket:
    """A connection on which a request has begun, and as much of its body was sent as was taken."""
    s = socket.create_connection(("127.0.0.1", port), timeout=LONG_S)
    with contextlib.suppress(ConnectionError):
        s.sendall(b"POST /echo HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n")
        for at in range(0, len(body), 2**16):
            s.sendall(body[at : at + 2**16])
    return s


@pytest.mark.parametrize("chunked", [False, True])
def test_unfinished_bodies_are_bounded_together_and_freed_with_their_connections(tmp_path: Path, chunked: bool) -> None:
    sent = bytes(5_000_000)
    head, body = b"Content-Length: 7000000", sent
    if chunked:
        head, body = b"Transfer-Encoding: chunked", b"".join((b"%x\r\n" % len(sent), sent))
    with served(HANDLER, tmp_path / "app", max_request_bytes="7MiB", max_working_bytes="1MiB") as port:
        unfinished = [begun(port, head, body) for _ in range(4)]  # twice 8 MiB have room for one
        try:
            readable, _, _ = select.select(unfinished, [], [], LONG_S)
            refusal = HTTPResponse(readable[0])
            refusal.begin()
            error = json.loads(refusal.read())
            assert (refusal.status, refusal.headers["Retry-After"], error["type"]) == (429, "1", "Overloaded")
            assert "16777216 bytes together" in error["error"]
            refusal.close()
            assert http("POST", f"http://127.0.0.1:{port}/echo", body=b"small").data == b"small"
        finally:
            for connection in unfinished:
                connection.close()
        whole = os.urandom(7_000_000)
        assert until(lambda: http("POST", f"http://127.0.0.1:{port}/echo", body=whole).data == whole)


@pytest.mark.parametrize("chunks", [b"5;a b\r\n", b"zz\r\n", b"5\r\nhelloo\r\n"], ids=["extension", "size", "end"])
def test_a_malformed_chunk_is_refused(port: int, chunks: bytes) -> None:
    with begun(port, b"Transfer-Encoding: chunked", chunks) as s:
        reply = HTTPResponse(s)
        reply.begin()
        assert reply.status == 400
        reply.close()


def test_a_chunk_line_without_an_end_is_refused_with_the_body_that_it_is_in(tmp_path: Path) -> None:
    endless = b"5;" + b"x" * 3_000_000
    with (
        served(HANDLER, tmp_path / "app", max_request_bytes="1KiB") as port,
        begun(port, b"Transfer-Encoding: chunked", endless) as s,
    ):
        reply = HTTPResponse(s)
        reply.begin()
        assert reply.status == 413
        reply.close()


def test_a_request_must_arrive_within_the_deadline_however_short_its_pauses(tmp_path: Path) -> None:
    with served(HANDLER, tmp_path / "app", deadline_s="0.5") as port:
        for begin in (
            b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n",
            b"POST /echo HTTP/1.1\r\nHost: ",
        ):
            with socket.create_connection(("127.0.0.1", port), timeout=LONG_S) as s:
                s.sendall(begin)
                while not select.select([s], [], [], 0.05)[0]:  # a byte now and then
                    s.sendall(b"x")
                reply = HTTPResponse(s)
                reply.begin()
                assert (reply.status, json.loads(reply.read())["type"]) == (408, "DeadlineExceeded")
                reply.close()
        assert http("POST", f"http://127.0.0.1:{port}/echo", body=b"quick").data == b"quick"


def test_clients_that_pipeline_and_do_not_read_are_cut_off_and_hold_no_worker_for_good(tmp_path: Path) -> None:
    limits = {"max_concurrency": "1", "max_queued": "0", "max_request_bytes": "1MiB", "deadline_s": "1"}
    with served(HANDLER, tmp_path / "app", **limits) as port:  # 4 workers
        greedy = [socket.create_connection(("127.0.0.1", port), timeout=LONG_S) for _ in range(8)]
        try:
            for s in greedy:
                s.sendall(b"GET /parts HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
            assert http("POST", f"http://127.0.0.1:{port}/echo", body=b"others").data == b"others"
            assert any(map(is_cut_off, greedy))
        finally:
            for s in greedy:
                s.close()


def read_responses(s: socket.socket, count: int) -> None:
    """Read responses of /parts.

    Raises:
        EOFError: the connection ended before.
    """
    reader = s.makefile("rb")
    for _ in range(count):
        while (line := reader.readline()) != b"\r\n":
            if not line:
                raise EOFError
        if len(reader.read(2_050_101)) < 2_050_101:
            raise EOFError


def is_cut_off(s: socket.socket) -> bool:
    try:
        read_responses(s, 100)
    except (ConnectionError, EOFError):
        return True
    return False


def test_pipelined_requests_are_answered_once_their_client_reads(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=LONG_S) as s:
        s.sendall(b"GET /parts HTTP/1.1\r\nHost: x\r\n\r\n" * 20)
        read_responses(s, 20)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body_is_in_no_temporary_file(port: int, chunked: bool) -> None:
    connection = HTTPConnection("127.0.0.1", port, timeout=LONG_S)
    body = os.urandom(7_000_000)
    connection.request("POST", "/open-files", iter([body]) if chunked else body, encode_chunked=chunked)
    names = connection.getresponse().read().decode()
    connection.close()
    assert "socket:" in names
    assert "deleted" not in names


def test_three_hundred_slow_bodies_leave_room_for_others(tmp_path: Path) -> None:
    with served(HANDLER, tmp_path / "app") as port:
        head = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 60000000\r\n\r\nx"
        slow = [socket.create_connection(("127.0.0.1", port), timeout=LONG_S) for _ in range(300)]
        try:
            for s in slow:
                s.sendall(head)
            whole = os.urandom(3_000_000)
            assert http("POST", f"http://127.0.0.1:{port}/echo", body=whole).data == whole
        finally:
            for s in slow:
                s.close()


def test_the_bytes_of_an_answered_request_are_counted_no_longer(tmp_path: Path) -> None:
    body = os.urandom(1_000_000)
    with served(HANDLER, tmp_path / "app", max_request_bytes="1MiB", max_working_bytes="1MiB") as port:
        connection = HTTPConnection("127.0.0.1", port, timeout=LONG_S)
        for _ in range(20):
            connection.request("POST", "/echo", body)
            assert connection.getresponse().read() == body
        connection.close()


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_bound_is_refused_as_json_before_all_of_it_has_come(tmp_path: Path, chunked: bool) -> None:
    sent = bytes(3_000_000)
    head, body = b"Content-Length: 90000000", sent
    if chunked:
        head, body = b"Transfer-Encoding: chunked", b"".join((b"%x\r\n" % 90_000_000, sent))
    with served(HANDLER, tmp_path / "app", max_request_bytes="1MiB") as port, begun(port, head, body) as s:
        reply = HTTPResponse(s)
        reply.begin()
        assert (reply.status, json.loads(reply.read())["type"]) == (413, "RequestTooLarge")
        reply.close()


def test_a_refusal_below_v1_has_openais_form(tmp_path: Path) -> None:
    with served(HANDLER, tmp_path / "app", max_request_bytes="1MiB") as port:
        reply = http("POST", f"http://127.0.0.1:{port}/v1/completions", body=bytes(3_000_000))
    assert reply.status == 413
    error = reply.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "request_too_large")
    assert error["facts"] == {"limit": 2**20}


def test_a_refusal_reaches_a_client_that_sends_its_whole_body_first(tmp_path: Path) -> None:
    with (
        served(HANDLER, tmp_path / "app", max_request_bytes="1MiB") as port,
        socket.create_connection(("127.0.0.1", port), timeout=LONG_S) as s,
    ):
        s.sendall(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 9000000\r\n\r\n" + bytes(9_000_000))
        assert s.makefile("rb").read().startswith(b"HTTP/1.1 413")


def answers(port: int, request: bytes) -> bytes:
    """All that comes back until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=LONG_S) as s:
        s.sendall(request)
        return s.makefile("rb").read()


def test_a_request_whose_length_is_stated_twice_is_refused_alone(port: int) -> None:
    inner = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx"
    both = (
        b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + inner
    )
    answer = answers(port, both)
    assert answer.startswith(b"HTTP/1.0 400")
    assert answer.count(b"HTTP/1.") == 1


def test_a_malformed_url_ends_its_connection_alone(port: int) -> None:
    assert answers(port, b"GET http://[::1/echo HTTP/1.1\r\nHost: x\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert http("POST", f"http://127.0.0.1:{port}/echo", body=b"others").data == b"others"


def test_a_client_that_expects_100_continue_is_asked_for_its_body(port: int) -> None:
    expects = b"POST /echo HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nConnection: close\r\n"
    assert answers(port, expects + b"Content-Length: 1\r\n\r\nx").startswith(b"HTTP/1.1 100")


def test_a_refused_connection_may_be_closed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(TEMPLATE)
    server = importlib.import_module("bounded_server")
    near, far = socket.socketpair()
    with far:
        connection = server.BoundedConnection(near, server.Admission(server.Limits(0, 2**30, LONG_S)))
        far.sendall(bytes(2 * server.FRAMING_BYTES // 16))
        while connection.recv(2**16):  # until it is refused
            far.sendall(bytes(2**16))
        connection.close()
        connection.close()
        assert far.recv(100).startswith(b"HTTP/1.1 413")
    assert until(lambda: not [thread for thread in threading.enumerate() if "_linger" in thread.name])
