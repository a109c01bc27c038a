"""Estimates from real calls over an emulated link, and from records of calls."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from statistics import median

import numpy as np
import pytest

from isthmus.errors import HopUnavailable
from isthmus.http.pool import ExchangeTimes
from isthmus.pipeline import HopReply, HttpHop, ServedTimes
from isthmus.routing import Estimates, LinkEstimate, LinkProber, watch
from isthmus.routing import estimates as estimates_module
from isthmus.routing.estimates import MAX_SEGMENTS
from isthmus.wire import frame as frames
from isthmus.wire.frame import Frame, Step
from isthmus_tools.netem import LinkShape, NetworkEmulator
from support.hop_servers import FRAME, context
from support.hops import Echo
from support.patience import LONG_S, eventually

MBIT = 1e6
SIZES = (400, 10_000, 40_000)


class Echoing(BaseHTTPRequestHandler):
    """A function that answers each frame with a small one, and says how long it had the frame."""

    protocol_version = "HTTP/1.1"  # connections stay open between requests

    def do_POST(self) -> None:
        frame = frames.decode(self.rfile.read(int(self.headers["Content-Length"])), max_bytes=2**24)
        began = time.perf_counter()
        body, timing = self.answer(frame)
        seconds = time.perf_counter() - began
        self._send(body, timing or f"run;dur={seconds * 500:.3f}, total;dur={seconds * 1000:.3f}")

    def do_GET(self) -> None:
        self._send(b"{}", "")

    def answer(self, frame: Frame) -> tuple[bytes, str]:
        return frames.encode(frame._replace(tensors={"y": np.zeros(4, np.float32)})), ""

    def _send(self, body: bytes, timing: str) -> None:
        self.send_response(200)
        for name, value in (("Content-Length", str(len(body))), ("Server-Timing", timing)):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """No lines for hundreds of requests."""


class Large(Echoing):
    """A function whose answers are large."""

    def answer(self, frame: Frame) -> tuple[bytes, str]:
        return frames.encode(frame._replace(tensors={"y": np.zeros(100_000, np.uint8)})), ""


class Lying(Echoing):
    """A function that claims more time than any call took."""

    def answer(self, frame: Frame) -> tuple[bytes, str]:
        claim = "999999999"
        return frames.encode(frame), f"run;dur={claim}, wait;dur={claim}, load;dur={claim}, total;dur={claim}"


@contextmanager
def serving(function: type[Echoing]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), function) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class Remote:
    """A function behind an emulated link, and the estimates of its calls."""

    def __init__(self, url: str, link: NetworkEmulator) -> None:
        self.link, self.estimates = link, Estimates()
        self.inner = HttpHop(link.url, attempts=1, connect_timeout_s=LONG_S, max_reply_bytes=2**20)
        self.hop = watch([[self.inner]], self.estimates)[0]
        self._count = 0

    @property
    def estimate(self) -> LinkEstimate:
        return self.estimates.link(self.inner.name)

    def call(self, size: int | None = None) -> None:
        self._count += 1
        size = SIZES[self._count % len(SIZES)] if size is None else size
        self.hop.call(FRAME._replace(tensors={"x": np.zeros(size, np.uint8)}), context())

    def until(self, is_followed: Callable[[LinkEstimate], bool]) -> int:
        """Call until the estimate has followed the link; the number of calls."""
        for count in range(1, 100):
            self.call()
            time.sleep(0.01)
            if is_followed(self.estimate):
                return count
        pytest.fail(f"not followed: {self.estimate}")


def is_about(rtt_ms: float, mbit: float) -> Callable[[LinkEstimate], bool]:
    """Whether small and large uploads are expected to take as long as they do, and what a busy machine adds."""

    def check(estimate: LinkEstimate) -> bool:
        if estimate.rtt_s is None or estimate.up_bytes_s is None:
            return False
        pairs = [
            (estimate.rtt_s + size / estimate.up_bytes_s, rtt_ms / 1000 + size * 8 / mbit / MBIT)
            for size in (300, 40_000)
        ]
        return all(0.7 * exact < expected < 1.3 * exact + 0.006 for expected, exact in pairs)

    return check


@pytest.fixture
def remote() -> Iterator[Remote]:
    with (
        serving(Echoing) as url,
        NetworkEmulator(url, LinkShape(uplink_bps=8 * MBIT, downlink_bps=50 * MBIT, rtt_s=0.02)) as link,
    ):
        made = Remote(url, link)
        yield made
        made.hop.close()


def test_calls_over_a_link_show_its_round_trip_and_its_rate(remote: Remote) -> None:
    assert remote.until(is_about(20, 8)) <= 40
    assert remote.estimate.age_s is not None


def test_steps_of_the_link_are_followed_within_some_transfers(remote: Remote) -> None:
    remote.until(is_about(20, 8))
    for rate, rtt in ((2, 0.02), (16, 0.02), (16, 0.08), (8, 0.01)):
        remote.link.set(replace(remote.link.shape, uplink_bps=rate * MBIT, rtt_s=rtt))
        # Ten where nothing else runs; a busy machine adds transfers of its own.
        assert remote.until(is_about(rtt * 1000, rate)) <= 40


def test_a_link_with_jitter_keeps_its_estimate(remote: Remote) -> None:
    remote.link.set(replace(remote.link.shape, jitter_s=0.01))
    remote.until(is_about(20, 8))
    expected = []
    for _ in range(80):
        remote.call()
        time.sleep(0.005)
        estimate = remote.estimate
        expected.append((estimate.rtt_s or 0.0) + 20_000 / (estimate.up_bytes_s or 1.0))
    middle = median(expected)
    assert 0.03 < middle < 0.06  # 40 ms, and what a busy machine adds
    # Some transfers of a busy machine are outliers in earnest.
    assert sum(0.7 * middle < each < 1.4 * middle for each in expected) > 0.9 * len(expected)


def test_calls_that_share_the_link_show_its_whole_rate(remote: Remote) -> None:
    remote.until(is_about(20, 8))
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(remote.call, [20_000] * 60))
    rate = (remote.estimate.up_bytes_s or 0.0) * 8 / MBIT
    assert 4 < rate < 16  # six of them at a time: without their sharing 1.5


def test_a_large_response_shows_the_downlink() -> None:
    with serving(Large) as url, NetworkEmulator(url, LinkShape(downlink_bps=16 * MBIT, rtt_s=0.01)) as link:
        remote = Remote(url, link)
        for _ in range(10):
            remote.call(100)
        remote.hop.close()
    assert remote.estimate.down_bytes_s == pytest.approx(16 * MBIT / 8, rel=0.4)


def test_probes_keep_an_idle_link_known(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.routing.links.PROBE_AFTER_S", 0.05)
    prober = LinkProber({remote.inner.name: remote.inner}, remote.estimates)
    try:
        remote.call(100)
        before = remote.link.counters.bytes_up
        eventually(lambda: remote.link.counters.bytes_up > before)
        remote.link.set(replace(remote.link.shape, rtt_s=0.1))
        eventually(lambda: (remote.estimate.rtt_s or 0.0) > 0.09)
    finally:
        prober.close()
    after = remote.link.counters.bytes_up
    time.sleep(0.2)
    assert remote.link.counters.bytes_up == after


def test_calls_of_one_size_and_probes_tell_the_round_trip_from_the_rate(remote: Remote) -> None:
    prober = LinkProber({remote.inner.name: remote.inner}, remote.estimates)
    try:
        for rate, rtt in ((8, 0.02), (2, 0.02), (2, 0.08), (8, 0.08)):
            remote.link.set(replace(remote.link.shape, uplink_bps=rate * MBIT, rtt_s=rtt))
            is_followed = is_about(rtt * 1000, rate)
            for _ in range(100):
                remote.call(20_000)
                time.sleep(0.02)
                if is_followed(remote.estimate):
                    break
            else:
                pytest.fail(f"not followed at {rate} Mbit/s, {rtt} s: {remote.estimate}")
    finally:
        prober.close()


def test_a_prober_of_hops_in_this_process_has_no_thread() -> None:
    prober = LinkProber({"echo": Echo({})}, Estimates())
    assert prober._thread is None
    prober.close()


def test_a_probe_of_a_function_that_is_away_leaves_the_estimate() -> None:
    hop = HttpHop("http://127.0.0.1:9", attempts=1, connect_timeout_s=1, max_reply_bytes=100)
    with pytest.raises(HopUnavailable):
        hop.probe(1.0)


# Records of calls


SEGMENT = ("hop", "sha256:1", "..1")


def record(estimates: Estimates, run_s: float, *, load_s: float = 0.0, wait_s: float = 0.0, hop: str = "hop") -> None:
    frame = Frame({}, "sha256:1", "..1", "r")
    total_s = run_s + load_s + wait_s + 0.001
    times = ExchangeTimes(0.0, total_s + 0.02, total_s + 0.02)
    call = estimates.began(hop, 1000)
    estimates.succeeded(
        call, "sha256:1", "..1", HopReply(frame, run_s, 0.0, 1000, 100, ServedTimes(total_s, wait_s, load_s), times)
    )


def test_cold_loads_and_outliers_do_not_poison_a_segments_seconds() -> None:
    estimates = Estimates()
    record(estimates, 0.9, load_s=3.0)
    assert estimates.run_s(*SEGMENT) is None
    for run_s in (0.02, 0.021, 5.0, 0.019, 0.02, 3.0, 0.02):
        record(estimates, run_s)
    assert estimates.run_s(*SEGMENT) == pytest.approx(0.02)
    assert estimates.busy_s(*SEGMENT) == pytest.approx(0.021)


def test_a_segment_that_became_slower_is_followed_within_five_calls() -> None:
    estimates = Estimates()
    for run_s in [0.02] * 20 + [0.2] * 5:
        record(estimates, run_s)
    assert estimates.run_s(*SEGMENT) == 0.2


def test_a_cpu_quota_shows_in_the_stall_of_a_hop() -> None:
    estimates = Estimates()
    assert estimates.stall("hop") == 1
    for _ in range(40):  # at full speed until the quota is spent, then a wait for the next period
        for run_s in (0.02, 0.02, 0.14):
            record(estimates, run_s)
    assert estimates.run_s(*SEGMENT) == pytest.approx(0.02)
    assert estimates.stall("hop") == pytest.approx(3.0, rel=0.2)
    record(estimates, 3600.0)  # a paused machine is no quota
    assert estimates.stall("hop") < 4


def test_waits_are_a_mean_of_the_latest_calls() -> None:
    estimates = Estimates()
    assert estimates.wait_s("hop") == 0
    for wait_s in [0.0] * 20 + [0.1] * 15:
        record(estimates, 0.02, wait_s=wait_s)
    assert estimates.wait_s("hop") == pytest.approx(0.1, rel=0.1)
    assert estimates.run_s(*SEGMENT) == pytest.approx(0.02)


def test_the_routers_own_work_is_known_by_candidate() -> None:
    estimates = Estimates()
    assert estimates.preprocess_s("sha256:1", "edge") is None
    estimates.answered("sha256:1", "edge", 0.1, None, 0.003)
    assert estimates.preprocess_s("sha256:1", "edge") is None
    estimates.answered("sha256:1", "edge", 0.2, 0.01, 0.003)
    estimates.answered("sha256:1", "edge", 0.2, 0.01, 0.003)
    assert estimates.whole_s("sha256:1", "edge") == 0.2
    assert estimates.preprocess_s("sha256:1", "edge") == 0.01
    assert estimates.encode_s("sha256:1", "edge") == 0.003
    assert estimates.encode_s("sha256:1", "cloud") is None


def test_memory_is_bounded_by_segments_and_hops() -> None:
    estimates = Estimates()
    for i in range(3 * MAX_SEGMENTS):
        estimates.answered("sha256:1", f"route {i}", 0.1, 0.01, 0.0)
        record(estimates, 0.01, hop=f"hop {i}")
    for cache in (estimates._links, estimates._segments, estimates._waits, estimates._work):
        assert len(cache) <= MAX_SEGMENTS


def test_a_wall_clock_that_jumps_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    steady, jumping = Estimates(), Estimates()
    clock = iter(range(1, 10**6))
    monkeypatch.setattr(estimates_module.time, "monotonic", lambda: float(next(clock)))
    for i in range(50):
        record(steady, 0.01 + i * 1e-4)
    clock = iter(range(1, 10**6))
    wall = iter([1e9, 0.0, -5.0, 4e9] * 1000)
    monkeypatch.setattr(time, "time", lambda: next(wall))
    for i in range(50):
        record(jumping, 0.01 + i * 1e-4)
    assert jumping.link("hop")._replace(age_s=0) == steady.link("hop")._replace(age_s=0)
    assert jumping.run_s(*SEGMENT) == steady.run_s(*SEGMENT)


def test_a_lying_header_is_bounded_by_the_calls_own_duration() -> None:
    with serving(Lying) as url:
        hop = HttpHop(url, attempts=1, connect_timeout_s=LONG_S, max_reply_bytes=2**20)
        began = time.perf_counter()
        reply = hop.call(FRAME, context())
        took = time.perf_counter() - began
        hop.close()
    assert max(reply.run_s, *reply.served) <= took
    estimates = Estimates()
    estimates.succeeded(estimates.began("hop", 100), "sha256:1", "..1", reply)
    assert estimates.link("hop") == LinkEstimate()


class Timed:
    """A hop whose runs take as many seconds as their frames have positions."""

    name, encodes = "http://timed", True

    def call(self, frame: Frame, context: object) -> HopReply:
        return HopReply(frame, float(next(iter(frame.tensors.values())).shape[1]))


def test_of_the_steps_of_sessions_those_of_one_token_are_a_segments_seconds() -> None:
    estimates = Estimates()
    (hop,) = watch([[Timed()]], estimates)  # type: ignore[list-item]
    for positions in (256, 200, 1, 7, 1, 1):
        step = FRAME._replace(tensors={"h": np.zeros((1, positions, 2), np.float32)}, step=Step("s", 0))
        hop.call(step, context())
    assert estimates.run_s(hop.name, FRAME.bundle, FRAME.segment) == 1.0
    # What is slow for a chunk of a prompt is not what is slow for a token.
    counts = dict.fromkeys((1, 7, 256), 0)
    for positions in counts:
        step = FRAME._replace(tensors={"h": np.zeros((1, positions, 2), np.float32)}, step=Step("s", 0))
        counts[positions] = sum(hop.times.quantile(step, 0.5, n) is not None for n in range(1, 7))  # type: ignore[union-attr]
    assert counts == {1: 3, 7: 1, 256: 1}
