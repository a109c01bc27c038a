"""A link delays, paces and breaks connections as its shape says; what it computes is exact, what it does is close."""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from isthmus.errors import LocalError
from isthmus.units import format_duration, format_rate, parse_duration, parse_rate
from isthmus_tools.cli import app
from isthmus_tools.netem import LinkShape, NetworkEmulator
from isthmus_tools.netem.relay import MAX_BUFFERED_BYTES
from isthmus_tools.netem.script import KEYS, parse_script
from isthmus_tools.netem.shaping import (
    INITIAL_WINDOW,
    MAX_QUANTUM,
    MIN_QUANTUM,
    Direction,
    Flow,
    Shaper,
    SlowStartWindow,
)
from support.paths import ROOT
from support.patience import LONG_S, eventually, least

DOCS = (ROOT / "docs" / "how-to" / "link.md").read_text()
MBIT = 1e6
LATE_S = 0.25  # what a machine that is not stopped meanwhile may add


class Target:
    """Serves on every connection: 16 bytes say how many come up and how many to send down; silent once `deaf`."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.got = bytearray()
        self.open: list[socket.socket] = []
        self.deaf = threading.Event()
        self._threads: list[threading.Thread] = []
        self._spawn(self._accept)

    def _spawn(self, work: object, *arguments: object) -> None:
        self._threads.append(thread := threading.Thread(target=work, args=arguments))  # type: ignore[arg-type]
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                end, _ = self._listener.accept()
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.open.append(end)
                self._spawn(self._serve, end)

    def _serve(self, end: socket.socket) -> None:
        with suppress(OSError, ValueError), end, end.makefile("rb") as stream:
            while not self.deaf.is_set() and (head := stream.read(16)):
                up, down = int.from_bytes(head[:8], "big"), int.from_bytes(head[8:], "big")
                self.got[:] = stream.read(up)
                end.sendall(pattern(down))
            while self.deaf.is_set():
                time.sleep(0.02)

    def close(self) -> None:
        self.deaf.clear()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in self.open:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(LONG_S)
            assert not thread.is_alive()


class Client:
    def __init__(self, link: NetworkEmulator | int) -> None:
        port = link if isinstance(link, int) else link.port
        self.end = socket.create_connection(("127.0.0.1", port), timeout=LONG_S)
        self.end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._stream = self.end.makefile("rb")

    def ask(self, up: int = 0, down: int = 1) -> float:
        """Seconds from before the first byte is sent until the last is received; only a pause makes it too long."""
        request = up.to_bytes(8, "big") + down.to_bytes(8, "big") + pattern(up)
        began = time.perf_counter()
        self.end.sendall(request)
        assert self._stream.read(down) == pattern(down)
        return time.perf_counter() - began

    def close(self) -> None:
        self._stream.close()
        self.end.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def pattern(size: int) -> bytes:
    return random.Random(size).randbytes(size)


@pytest.fixture
def target() -> Iterator[Target]:
    made = Target()
    yield made
    made.close()


def lane(bps: float, delay_s: float = 0.0, jitter_s: float = 0.0) -> Shaper:
    return Shaper(Direction(bps, delay_s, jitter_s), random.Random(0))


# What is computed.


def test_bytes_leave_one_after_the_other_and_arrive_a_delay_later() -> None:
    flow = Flow(lane(8000, delay_s=0.5))  # a byte a millisecond
    assert flow.send(10.0, 1000) == pytest.approx((11.0, 11.5))
    assert flow.send(10.2, 500) == pytest.approx((11.5, 12.0))  # waited its turn
    assert flow.send(20.0, 100) == pytest.approx((20.1, 20.6))  # the lane had been idle


def test_asking_when_the_last_bytes_were_due_loses_nothing_however_many_pieces() -> None:
    paced, due = lane(10 * MBIT), 0.0
    for _ in range(800):
        due = paced.send(due, 1250)
    assert due == pytest.approx(0.8)


def test_connections_share_one_lane() -> None:
    shared = lane(8000)
    first, second = Flow(shared), Flow(shared)
    assert [first.send(0, 100)[0], second.send(0, 100)[0], first.send(0, 100)[0]] == pytest.approx([0.1, 0.2, 0.3])


def test_an_unlimited_lane_only_delays() -> None:
    assert Flow(lane(math.inf, 0.04)).send(1.0, 10**9) == pytest.approx((1.0, 1.04))


def test_jitter_stays_in_its_bounds_and_never_reorders() -> None:
    jittery = lane(math.inf, 0.01, 0.004)
    travels = [jittery.delay_s() for _ in range(1000)]
    assert 0.006 <= min(travels) < 0.0065
    assert 0.0135 < max(travels) <= 0.014
    flow = Flow(jittery)
    arrivals = [flow.send(at / 1000, 1)[1] for at in range(1000)]
    assert arrivals == sorted(arrivals)
    wild = lane(math.inf, 0.001, 0.5)
    assert min(wild.delay_s() for _ in range(100)) == 0.0


def test_a_shape_halves_its_round_trip_unless_the_ways_are_set_apart() -> None:
    shape = LinkShape(10 * MBIT, 50 * MBIT, 0.02, 0.002)
    assert shape.up == Direction(10 * MBIT, 0.01, 0.001)
    assert shape.down == Direction(50 * MBIT, 0.01, 0.001)
    apart = replace(shape, up_delay_s=0.03)
    assert (apart.up.delay_s, apart.down.delay_s, apart.round_trip_s) == pytest.approx((0.03, 0.01, 0.04))


@pytest.mark.parametrize(
    ("bps", "quantum"), [(1 * MBIT, MIN_QUANTUM), (100 * MBIT, 12_500), (10_000 * MBIT, 65536), (math.inf, MAX_QUANTUM)]
)
def test_a_turn_is_a_millisecond_within_bounds(bps: float, quantum: int) -> None:
    assert Direction(bps, 0, 0).quantum == quantum


def test_what_is_in_flight_is_rate_times_delay() -> None:
    assert Direction(100 * MBIT, 0.04, 0).in_flight == 500_000
    assert Direction(math.inf, 0, 0).in_flight == 0
    assert Direction(math.inf, 0.01, 0).in_flight == 16 << 20


@pytest.mark.parametrize(
    "wrong",
    [
        {"uplink_bps": 0.0},
        {"downlink_bps": math.nan},
        {"rtt_s": -1.0},
        {"jitter_s": math.inf},
        {"up_delay_s": math.nan},
        {"cuts_per_s": -0.1},
    ],
)
def test_a_shape_that_no_network_has_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(LocalError, match=next(iter(wrong))):
        LinkShape(**wrong)  # type: ignore[arg-type]


def rounds(window: SlowStartWindow, at: float, size: int, rtt_s: float) -> tuple[int, float]:
    """How often sending `size` bytes waits for an acknowledgement, and when the last ones go."""
    waited, piece = 0, INITIAL_WINDOW // 10
    for _ in range(math.ceil(size / piece)):
        sent = window.may_send(at, piece, rtt_s)
        waited, at = waited + (sent > at), sent
        window.on_sent(piece, sent + rtt_s)
    return waited, at


def test_slow_start_doubles_each_round_trip_and_starts_again_after_a_pause() -> None:
    window = SlowStartWindow()
    # 10, 20 and 40 segments in three round trips, the rest of 104 in the fourth.
    assert rounds(window, 0.0, 150_000, 0.08) == (3, pytest.approx(0.24))
    assert rounds(window, 0.33, 150_000, 0.08)[0] == 0  # the window is still open
    assert rounds(window, 5.0, 150_000, 0.08) == (3, pytest.approx(5.24))


@pytest.mark.parametrize(
    ("text", "bps"),
    [
        ("10mbit", 1e7),
        ("1.5Mbit/s", 1.5e6),
        ("100kbit", 1e5),
        ("1gbit", 1e9),
        ("9600 bit/s", 9600),
        ("unlimited", math.inf),
    ],
)
def test_rates(text: str, bps: float) -> None:
    assert parse_rate(text) == bps


@pytest.mark.parametrize("text", ["", "10", "10mb", "10mbps", "-1mbit", "1e6bit", "mbit", "10 m bit", "infbit"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a rate such as 10mbit"):
        parse_rate(text)


def test_rates_and_durations_are_shown_as_they_are_read() -> None:
    assert [format_rate(parse_rate(t)) for t in ("1500kbit", "1gbit", "9600bit", "unlimited")] == [
        "1.5 Mbit/s",
        "1 Gbit/s",
        "9.6 kbit/s",
        "unlimited",
    ]
    assert format_rate(0) == "0 bit/s"
    assert [format_duration(parse_duration(t)) for t in ("20ms", "0.5s", "1m30s")] == ["20 ms", "500 ms", "90 s"]


def test_a_script_is_json_lines_or_a_list() -> None:
    lines = '{"at_s": 0.5, "uplink": "1mbit", "rtt": "80ms"}\n\n{"at_s": 2, "down": true}\n'
    listed = '[\n {"at_s": 0.5, "uplink": "1mbit", "rtt": "80ms"},\n {"at_s": 2, "down": true}\n]'
    steps = parse_script(lines)
    assert steps == parse_script(listed)
    assert (steps[0].at_s, dict(steps[0].shape)) == (0.5, {"uplink_bps": 1e6, "rtt_s": 0.08})
    assert (steps[1].at_s, steps[1].down) == (2.0, True)
    assert parse_script("") == parse_script("[]") == ()


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ('{"at_s": 1}\n{"at_s": 2, "uplink": "1x"}', 2, "uplink: '1x' is not a rate"),
        ('[\n{"at_s": 1},\n\n{"at_s": 2, "rtt": 5}]', 4, "rtt is 5; it is a text with its unit"),
        ('{"at_s": 1}\n{"at_s": 0.5}', 2, "before the step above it"),
        ('{"at_s": 1}\n{"up": true}', 2, "an object with at_s"),
        ('{"at_s": 1, "bandwidth": "1mbit"}', 1, "'bandwidth' is none of at_s, down"),
        ('{"at_s": 1, "down": 1}', 1, "down is 1; it is true or false"),
        ('{"at_s": 1, "uplink": "1bit"}', 1, "at least 1000 bit/s"),
        ('{"at_s": -1}', 1, "0 or more"),
        ('{"at_s": 1}\n{"at_s": ', 2, "no JSON"),
        ('[{"at_s": 1},\n {"at_s": 2}', 2, "no JSON"),
        ("hello", 1, "no JSON"),
    ],
)
def test_a_wrong_script_names_the_line(text: str, line: int, says: str) -> None:
    with pytest.raises(LocalError, match=f"^line {line} of the link's script") as e:
        parse_script(text)
    assert says in e.value.message
    assert e.value.facts["line"] == line


# What is done.


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_transfer_takes_its_bytes_over_the_rate_and_a_round_trip(target: Target, way: str) -> None:
    with NetworkEmulator(target.address, LinkShape(8 * MBIT, 8 * MBIT, 0.04)) as link, Client(link) as client:
        client.ask()
        took = least(lambda: client.ask(**{way: 400_000}), 0.44 + LATE_S)
        assert 0.44 - 0.005 <= took < 0.44 + LATE_S
        if way == "up":
            assert target.got == pattern(400_000)
        counters = link.counters
        assert (counters.connections, counters.open) == (1, 1)
        assert getattr(counters, f"bytes_{way}") >= 400_000


def test_a_small_request_takes_a_round_trip_and_a_new_connection_one_more(target: Target) -> None:
    with NetworkEmulator(target.address, LinkShape(1 * MBIT, 1 * MBIT, 0.06)) as link:

        def first() -> float:
            began = time.perf_counter()
            with Client(link) as client:
                client.ask()
            return time.perf_counter() - began

        assert 0.12 <= least(first, 0.12 + LATE_S) < 0.12 + LATE_S
        with Client(link) as client:
            client.ask()
            assert 0.06 <= least(client.ask, 0.075) < 0.075


def test_the_ways_can_differ(target: Target) -> None:
    shape = LinkShape(math.inf, 4 * MBIT, up_delay_s=0.0, down_delay_s=0.1, connect_rtts=0)
    with NetworkEmulator(target.address, shape) as link, Client(link) as client:
        client.ask()
        assert 0.1 <= least(lambda: client.ask(up=300_000), 0.1 + LATE_S) < 0.1 + LATE_S
        assert 0.2 <= least(lambda: client.ask(down=50_000), 0.2 + LATE_S) < 0.2 + LATE_S


def test_slow_start_costs_a_new_connection_round_trips(target: Target) -> None:
    with NetworkEmulator(target.address, LinkShape(rtt_s=0.05, slow_start=True)) as link:

        def two() -> tuple[float, float]:
            with Client(link) as client:
                client.ask()
                return client.ask(up=100_000), client.ask(up=100_000)

        took = [two()]
        while len(took) < 20 and not (took[-1][0] < 0.15 + LATE_S and took[-1][1] < 0.14):
            took.append(two())  # a pause makes them longer, and closes the window again
        assert min(first for first, _ in took) >= 0.15  # 10, 20 and 40 segments: two more round trips
        assert min(second for _, second in took) >= 0.05
        assert took[-1][0] < 0.15 + LATE_S
        assert took[-1][1] < 0.14


def test_many_connections_share_the_rate_fairly(target: Target) -> None:
    with NetworkEmulator(target.address, LinkShape(8 * MBIT, 8 * MBIT)) as link, ThreadPoolExecutor(4) as pool:
        clients = [Client(link) for _ in range(4)]
        together = threading.Barrier(5)

        def ask(client: Client) -> float:
            together.wait()
            client.ask(down=100_000)
            return time.perf_counter()

        def all_four() -> tuple[float, float]:
            asked = [pool.submit(ask, client) for client in clients]
            began = time.perf_counter()
            together.wait()
            ends = [future.result() - began for future in asked]
            return min(ends), max(ends)

        took = [all_four()]
        while len(took) < 20 and not (took[-1][0] > 0.2 and took[-1][1] < 0.4 + LATE_S):
            took.append(all_four())  # a machine that paused may have let them ask one after the other
        for client in clients:
            client.close()
        assert min(longest for _, longest in took) >= 0.4 - 0.005
        assert took[-1][1] < 0.4 + LATE_S
        assert took[-1][0] > 0.2  # one that was served first would take 0.1
        eventually(lambda: link.counters.open == 0)
        assert link.counters.connections == 4


def test_bytes_and_half_closed_connections_pass_unchanged_under_jitter(target: Target) -> None:
    with (
        NetworkEmulator(target.address, LinkShape(rtt_s=0.004, jitter_s=0.004), seed=3) as link,
        Client(link) as client,
    ):
        client.ask(up=200_000, down=200_000)
        client.end.shutdown(socket.SHUT_WR)
        assert client.end.recv(1) == b""
        eventually(lambda: link.counters.open == 0)


def test_a_link_holds_no_more_than_is_in_flight_and_some(target: Target) -> None:
    target.deaf.set()
    shape = LinkShape(400 * MBIT, 400 * MBIT, 0.01, connect_rtts=0)
    with NetworkEmulator(target.address, shape) as link, Client(link) as client:
        client.end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
        client.end.setblocking(False)
        most, left, held = shape.up.in_flight + MAX_BUFFERED_BYTES + shape.up.quantum, 16 << 20, 0
        quiet_since = time.monotonic()
        while held <= MAX_BUFFERED_BYTES or time.monotonic() < quiet_since + 0.3:
            with suppress(BlockingIOError):
                left -= client.end.send(bytes(min(left, 65536)))
                quiet_since = time.monotonic()
            held = link.counters.held_bytes
            assert held <= most
            assert left > 0
            assert time.monotonic() < quiet_since + LONG_S
            time.sleep(0.001)


def test_a_sender_feels_the_rate(target: Target) -> None:
    began = time.monotonic()
    with NetworkEmulator(target.address, LinkShape(1 * MBIT, connect_rtts=0)) as link, Client(link) as client:
        client.end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
        client.end.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.end.sendall((1 << 20).to_bytes(8, "big") + bytes(1 << 20))
        let_through = link.counters.bytes_up
        assert let_through <= 1 * MBIT / 8 * (time.monotonic() - began) + 2 * MIN_QUANTUM


def test_an_early_answer_arrives_before_the_connection_is_reset() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        NetworkEmulator(f"127.0.0.1:{listener.getsockname()[1]}", LinkShape(8 * MBIT, rtt_s=0.02)) as link,
        Client(link) as client,
    ):
        client.end.sendall(bytes(50_000))
        end, _ = listener.accept()
        end.recv(1000)
        end.sendall(b"too large")
        eventually(lambda: link.counters.bytes_down == 9)
        end.recv(1, socket.MSG_PEEK)
        end.close()  # with unread bytes: the kernel resets
        assert client.end.recv(100) == b"too large"
        with pytest.raises(ConnectionResetError):
            client.end.recv(100)


def test_cut_resets_what_is_established_and_takes_new_connections(target: Target) -> None:
    with NetworkEmulator(target.address) as link, Client(link) as client:
        client.ask()
        link.cut()
        with pytest.raises(ConnectionResetError):
            client.end.recv(1)
        with Client(link) as again:
            again.ask()
        assert link.counters.cuts == 1


def test_down_refuses_at_the_same_port_until_up(target: Target) -> None:
    with NetworkEmulator(target.address) as link, Client(link) as client:
        client.ask()
        link.down()
        link.down()
        with pytest.raises(ConnectionResetError):
            client.end.recv(1)
        for _ in range(3):
            with pytest.raises(ConnectionRefusedError):
                Client(link)
        link.up()
        link.up()
        with Client(link) as again:
            again.ask()


def test_refusing_lets_established_connections_live(target: Target) -> None:
    with NetworkEmulator(target.address) as link, Client(link) as client:
        client.ask()
        link.refuse()
        with pytest.raises(ConnectionRefusedError):
            Client(link)
        client.ask()
        link.refuse(False)
        with Client(link) as again:
            again.ask()


def test_a_stall_holds_everything_and_then_lets_it_go(target: Target) -> None:
    with NetworkEmulator(target.address) as link, Client(link) as client:
        client.ask()

        def held() -> float:
            began = time.monotonic()
            link.stall(0.3)
            with Client(link) as other, ThreadPoolExecutor(2) as pool:
                list(pool.map(lambda c: c.ask(10_000, 10_000), (client, other)))
                return time.monotonic() - began

        assert 0.3 <= least(held, 0.3 + LATE_S) < 0.3 + LATE_S
        link.stall(10 * LONG_S)
        link.up()
        client.ask()


def test_a_shape_set_at_run_time_holds_for_open_connections(target: Target) -> None:
    with NetworkEmulator(target.address) as link, Client(link) as client:
        client.ask()
        link.set(LinkShape(8 * MBIT, rtt_s=0.05))
        assert 0.15 - 0.005 <= least(lambda: client.ask(up=100_000), 0.15 + LATE_S) < 0.15 + LATE_S
        link.set(replace(link.shape, rtt_s=0.0, uplink_bps=math.inf))
        assert least(lambda: client.ask(up=100_000), 0.1) < 0.1


def test_a_script_changes_the_link_on_time(target: Target) -> None:
    script = parse_script('[{"at_s": 0.2, "rtt": "100ms"}, {"at_s": 0.4, "down": true}]')
    began = time.monotonic()
    with NetworkEmulator(target.address, script=script) as link:
        with suppress(ConnectionRefusedError), Client(link) as client:  # refused: a pause, and it is down already
            with pytest.raises(ConnectionResetError):
                client.end.recv(1)
            assert time.monotonic() - began >= 0.4
        assert link.shape.rtt_s == 0.1
        assert time.monotonic() - began >= 0.2
        with pytest.raises(ConnectionRefusedError):
            Client(link)
    script = parse_script('[{"at_s": 0, "down": true, "rtt": "100ms"}, {"at_s": 0.2, "down": false, "rtt": "1ms"}]')
    began = time.monotonic()
    with NetworkEmulator(target.address, script=script) as link:
        eventually(lambda: link.shape.rtt_s == 0.001)
        assert time.monotonic() - began >= 0.2
        with Client(link) as again:
            again.ask()


def test_connections_are_cut_by_chance(target: Target) -> None:
    with NetworkEmulator(target.address, LinkShape(cuts_per_s=20.0)) as link:
        clients = [Client(link) for _ in range(10)]
        for client in clients:
            with pytest.raises(ConnectionResetError):
                client.end.recv(1)
            client.close()
        eventually(lambda: link.counters.cuts == 10)


def test_a_target_that_refuses_resets_the_client_after_a_round_trip() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with NetworkEmulator(f"127.0.0.1:{nobody.getsockname()[1]}", LinkShape(rtt_s=0.05)) as link:
            began = time.perf_counter()
            with Client(link) as client, pytest.raises(ConnectionResetError):
                client.end.recv(1)
            assert time.perf_counter() - began > 0.04


def test_nothing_is_left_behind(target: Target) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    for _ in range(3):
        link = NetworkEmulator(target.address, LinkShape(8 * MBIT, rtt_s=0.02)).start()
        idle, busy = Client(link), Client(link)
        idle.ask()
        busy.end.sendall((1 << 20).to_bytes(8, "big") + bytes(100_000))
        link.stop()
        link.stop()
        for client in (idle, busy):
            with pytest.raises(ConnectionResetError):
                client.end.recv(1)
            client.close()
        assert link.counters.connections == 2
        assert link.counters.open == 0
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", link.port), timeout=LONG_S)
        with pytest.raises(LocalError, match="does not run"):
            link.cut()
    eventually(lambda: descriptors() <= before and not any(t.name == "link" for t in threading.enumerate()))


def test_a_port_that_is_taken_is_named(target: Target) -> None:
    port = int(target.address.rpartition(":")[2])
    with pytest.raises(LocalError, match=f"cannot listen on 127.0.0.1:{port}") as e:
        NetworkEmulator(target.address, port=port).start()
    assert e.value.facts["port"] == port


def test_a_link_to_itself_is_refused() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with pytest.raises(LocalError, match="would lead to itself"):
        NetworkEmulator(f"127.0.0.1:{port}", port=port).start()


@pytest.mark.parametrize("address", ["", "8080", "host", ":80", "http://", "host:port", "host:99999", "https://h:1"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(LocalError, match="is no address"):
        NetworkEmulator(address)


# The command, and the page.


def test_the_command_relays_and_counts_until_it_is_interrupted(target: Target, tmp_path: Path) -> None:
    script = tmp_path / "script.jsonl"
    script.write_text('{"at_s": 0, "downlink": "50mbit"}')
    options = ["--to", target.address, "--uplink", "10mbit", "--rtt", "20ms", "--script", str(script), "--json"]
    command = [sys.executable, "-c", "from isthmus_tools.cli import main; main()", "link", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        began = json.loads(running.stdout.readline())
        assert began["shape"]["uplink_bps"] == 10 * MBIT
        with Client(began["port"]) as client:
            client.ask()
            assert client.ask(up=10_000) > 0.02
        assert json.loads(running.stdout.readline()) == {"step": {"at_s": 0, "downlink": "50mbit"}}
        running.send_signal(signal.SIGINT)
        rest, complaints = running.communicate(timeout=LONG_S)
    assert (running.returncode, complaints) == (0, "")
    assert json.loads(rest.splitlines()[-1])["bytes_up"] == 10_032


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--to", "127.0.0.1:1", "--uplink", "10mb"], "--uplink: '10mb' is not a rate such as 10mbit"),
        (["--to", "127.0.0.1:1", "--rtt", "20"], "--rtt: '20' is not a duration such as 20ms"),
        (["--to", "nowhere"], "'nowhere' is no address to link to"),
        (["--to", "127.0.0.1:1", "--script", "/no/such"], "cannot be read: No such file"),
        (["--to", "127.0.0.1:1", "--uplink", "10bit"], "at least 1000 bit/s"),
    ],
)
def test_wrong_options_are_named(options: list[str], says: str) -> None:
    result = CliRunner().invoke(app, ["link", *options])
    assert result.exit_code == 1
    assert says in result.stderr


def test_the_page_lists_every_key_of_a_script() -> None:
    table = DOCS.partition("| key |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(KEYS)
    assert {f.name for f in fields(LinkShape)} == {
        {"uplink": "uplink_bps", "downlink": "downlink_bps"}.get(
            k, f"{k}_s" if k.endswith(("rtt", "jitter", "delay")) else k
        )
        for k in KEYS
        if k not in ("at_s", "down", "refuse", "cut", "stall_s")
    }
