"""Hops over HTTP and time: no server, name server or stalled connection outlasts the deadline."""

from __future__ import annotations

import math
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from isthmus.errors import (
    HopRejected,
    HopTimeout,
    HopUnavailable,
)
from isthmus.http import sockets
from isthmus.pipeline import HttpHop
from isthmus.wire import frame as frames
from isthmus.wire.frame import Frame
from support.hop_servers import ECHO, FRAME, PROXY, context, doc, raw_server, server
from support.hop_servers import hop_to as hop_to
from support.patience import LONG_S, eventually, least


def test_a_name_server_that_does_not_answer_is_given_up_at_the_deadline(
    hop_to: Callable[..., HttpHop], monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = threading.Event()

    def silent_resolver(*_: object, **__: object) -> list[object]:
        answered.wait(LONG_S)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", silent_resolver)
    try:
        start = time.monotonic()
        with pytest.raises((HopUnavailable, HopTimeout), match=r"tail\.example"):
            hop_to("http://tail.example/", attempts=1).call(FRAME, context(0.3))
        assert time.monotonic() - start < LONG_S / 2
    finally:
        answered.set()
        wait_for_lookups()


def test_callers_who_ask_for_the_same_name_share_one_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answered = [], threading.Event()

    def slow_resolver(host: str, port: int, **_: object) -> list[object]:
        asked.append(host)
        answered.wait(LONG_S)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", slow_resolver)
    try:
        for _ in range(3):
            with pytest.raises(TimeoutError, match=r"tail\.example"):
                sockets.resolve("tail.example", 80, timeout_s=0.01)
        assert asked == ["tail.example"]
    finally:
        answered.set()
        wait_for_lookups()
    assert sockets.resolve("tail.example", 80, timeout_s=LONG_S)[0][4] == ("192.0.2.1", 80)
    wait_for_lookups()


def test_a_tls_handshake_that_trickles_is_given_up_in_time() -> None:
    def trickle(c: socket.socket) -> None:
        c.recv(2**16)
        record = b"\x16\x03\x03\x40\x00"  # a handshake record of 16 KiB, a byte at a time
        for n in range(int(20 * MUCH_LATER_S)):
            c.sendall(record[n : n + 1] or b"\x02")
            time.sleep(0.05)

    with raw_server(trickle) as url:
        port = int(url.rstrip("/").rpartition(":")[2])
        start = time.monotonic()
        with pytest.raises(TimeoutError, match="handshake"):
            sockets.connect("127.0.0.1", port, timeout_s=0.4, tls=ssl.create_default_context())
        assert time.monotonic() - start < MUCH_LATER_S / 2


def wait_for_lookups() -> None:
    eventually(lambda: not any(t.name.startswith("resolve ") for t in threading.enumerate()))


MUCH_LATER_S = 30.0
"""When these servers give up by themselves: far from every deadline below, with room for a machine that pauses."""


def wait_for_the_end(c: socket.socket) -> None:
    """Until the other end closes the connection; nothing is read."""
    ends = select.poll()
    ends.register(c, select.POLLRDHUP)
    ends.poll(MUCH_LATER_S * 1000)


def silent(c: socket.socket) -> None:
    c.recv(65536)
    wait_for_the_end(c)


def dripping(c: socket.socket) -> None:
    c.recv(65536)
    c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(int(10 * MUCH_LATER_S)):
        time.sleep(0.1)
        c.sendall(b"x")


def dripping_head(c: socket.socket) -> None:
    c.recv(65536)
    c.sendall(b"HTTP/1.1 200 OK\r\nX: ")
    for _ in range(int(10 * MUCH_LATER_S)):
        time.sleep(0.1)
        c.sendall(b"x")


def dripping_chunks(c: socket.socket) -> None:
    c.recv(65536)
    c.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(int(10 * MUCH_LATER_S)):
        time.sleep(0.1)
        c.sendall(b"1\r\nx\r\n")


@pytest.mark.parametrize("behave", [silent, dripping, dripping_head, dripping_chunks])
def test_no_answer_outlasts_the_deadline(
    hop_to: Callable[..., HttpHop], behave: Callable[[socket.socket], None]
) -> None:
    with raw_server(behave) as url:
        start = time.monotonic()
        with pytest.raises(HopTimeout) as e:
            hop_to(url).call(FRAME, context(0.4))
        assert time.monotonic() - start < MUCH_LATER_S / 2
    assert e.value.facts["hop"] == url


def stalled(c: socket.socket) -> None:
    c.recv(65536)
    time.sleep(0.25)
    c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf")
    wait_for_the_end(c)


def test_a_stall_in_the_middle_of_an_answer_does_not_begin_the_wait_anew(hop_to: Callable[..., HttpHop]) -> None:
    def given_up() -> float:
        start = time.monotonic()
        with raw_server(stalled) as url, pytest.raises(HopTimeout):
            hop_to(url).call(FRAME, context(0.4))
        return time.monotonic() - start

    assert 0.4 <= least(given_up, 0.6) < 0.6


LARGE = Frame({"x": np.zeros(2**22, "float32")}, "sha256:" + "0" * 64, "..1", "r1")


def test_a_frame_may_take_longer_to_send_than_a_connection_to_make(hop_to: Callable[..., HttpHop]) -> None:
    def sip(c: socket.socket) -> None:
        length, received = len(frames.encode(LARGE)), 0
        while received < length and (piece := c.recv(2**21)):
            received += len(piece)
            time.sleep(0.02)
        c.sendall(b"HTTP/1.1 410 Gone\r\nContent-Length: 0\r\n\r\n")

    with raw_server(sip) as url, pytest.raises(HopRejected):
        hop_to(url, attempts=1, connect_timeout_s=0.05).call(LARGE, context())


def test_a_frame_that_nobody_takes_is_given_up_at_the_deadline(hop_to: Callable[..., HttpHop]) -> None:
    with raw_server(wait_for_the_end) as url:
        start = time.monotonic()
        with pytest.raises(HopTimeout):
            hop_to(url).call(LARGE, context(0.4))
        assert time.monotonic() - start < MUCH_LATER_S / 2


def test_a_refusal_that_comes_while_a_large_frame_is_sent_is_read(hop_to: Callable[..., HttpHop]) -> None:
    refused = doc("RequestTooLarge")

    def refuse(c: socket.socket) -> None:
        c.recv(2**10)
        c.sendall(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: %d\r\n\r\n" % len(refused) + refused)

    with raw_server(refuse) as url, pytest.raises(HopRejected, match="it said so") as e:
        hop_to(url, attempts=1).call(LARGE, context())
    assert e.value.facts["status"] == 413


def test_no_pause_outlasts_the_deadline(hop_to: Callable[..., HttpHop]) -> None:
    def given_up() -> float:
        with server([(503, PROXY, b"")]) as (url, seen):
            start = time.monotonic()
            with pytest.raises((HopUnavailable, HopTimeout)) as e:
                hop_to(url, attempts=50).call(FRAME, context(0.5))
            took = time.monotonic() - start
        assert len(seen) <= 9
        # On a busy machine a try may end at the deadline, or be the only one.
        return took if e.type is HopUnavailable and len(seen) >= 2 else math.inf

    assert least(given_up, 0.5) < 0.5


def test_a_connection_that_is_not_made_in_time_is_unavailable(hop_to: Callable[..., HttpHop]) -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        hop = hop_to(f"http://127.0.0.1:{full.getsockname()[1]}/", attempts=1, connect_timeout_s=0.1)
        # One waits in the backlog; the kernel drops the next one's SYN.
        with socket.create_connection(full.getsockname()):
            start = time.monotonic()
            with pytest.raises(HopUnavailable):
                hop.call(FRAME, context())
            assert time.monotonic() - start < LONG_S / 2


def test_a_deadline_that_has_passed_calls_nobody(hop_to: Callable[..., HttpHop]) -> None:
    with server([ECHO]) as (url, seen), pytest.raises(HopTimeout):
        hop_to(url).call(FRAME, context(0))
    assert not seen
