"""The load of the benchmarks: an open loop keeps its schedule, and what came of each request is recorded."""

from __future__ import annotations

import importlib
import itertools
import json
import statistics
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from support.paths import ROOT

PHOTO = json.dumps({"classes": [{"label": "cat", "index": 3}]}).encode()


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("traffic")


@contextmanager
def server(first: threading.Event | None = None, status: int = 200) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A server with an answer for all requests; the first request waits for `first`."""
    requests: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            requests.append(dict(self.headers))
            self.rfile.read(int(self.headers["Content-Length"]))
            if first is not None and len(requests) == 1:
                first.wait(30)
            self.send_response(status)
            self.send_header("Isthmus-Route", self.headers.get("Isthmus-Route", "chosen"))
            self.send_header("Retry-After", "1")
            self.send_header("Content-Length", str(len(PHOTO)))
            self.end_headers()
            self.wfile.write(PHOTO)

        def log_message(self, *args: Any) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_port}/", requests
    finally:
        running.shutdown()
        thread.join()
        running.server_close()


def test_arrivals_have_the_rate_and_come_again_with_the_seed(traffic: Any) -> None:
    assert traffic.OpenLoop(10, 2, poisson=False).arrivals() == pytest.approx([0.1 * n for n in range(20)])
    times = traffic.OpenLoop(100, 100).arrivals()
    assert times == sorted(traffic.OpenLoop(100, 100).arrivals())
    assert len(times) == 10_000
    assert times != traffic.OpenLoop(100, 100, seed=1).arrivals()
    # Of a Poisson process, gaps deviate as much as they last.
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert statistics.pstdev(gaps) == pytest.approx(statistics.mean(gaps), rel=0.05)


def test_an_open_loop_does_not_wait_for_a_response_that_is_late(traffic: Any) -> None:
    first = threading.Event()
    with server(first) as (url, requests):
        threading.Timer(0.5, first.set).start()
        outcome = traffic.send(traffic.OpenLoop(40, 0.5, poisson=False), [traffic.Query(url, b"photo")])
    assert len(outcome) == len(requests) == 20
    gaps = [b.scheduled - a.scheduled for a, b in itertools.pairwise(outcome.exchanges)]
    assert gaps == pytest.approx([0.025] * 19)
    late = outcome.exchanges[0]
    assert late.latency_s == max(e.latency_s for e in outcome.exchanges)
    assert outcome.within(late.latency_s - 1e-9) == pytest.approx(0.95)
    assert sum(e.done < late.done for e in outcome.exchanges) > 10


def test_latency_counts_from_the_schedule_even_where_the_client_sent_late(traffic: Any) -> None:
    exchange = traffic.Exchange(0, scheduled=10.0, sent=10.4, done=10.5, status=200)
    outcome = traffic.Outcome([exchange], 1.0)
    assert exchange.latency_s == pytest.approx(0.5)
    assert outcome.within(0.2) == 0
    assert outcome.lateness_s == pytest.approx(0.4)


def test_callers_of_a_closed_loop_have_one_request_each_and_queries_take_turns(traffic: Any) -> None:
    with server() as (url, _), traffic.Traffic() as process:
        queries = [traffic.Query(url, b"a"), traffic.Query(url, b"b").with_headers(Isthmus_Route="cut")]
        outcome = process.run(traffic.ClosedLoop(3, 0.3), queries)
    for e in outcome.exchanges:
        assert sum(o.scheduled <= e.scheduled < o.done for o in outcome.exchanges) <= 3
    assert {(e.query, e.route) for e in outcome.exchanges} == {(0, "chosen"), (1, "cut")}
    assert outcome.routes["cut"] == pytest.approx(0.5, abs=0.1)
    assert not outcome.wrong({"cat"})
    assert len(outcome.wrong({"dog"})) == len(outcome)


def test_refusals_are_no_answers_and_no_losses(traffic: Any) -> None:
    with server(status=503) as (url, _):
        refused = traffic.send(traffic.OpenLoop(50, 0.1), [traffic.Query(url, b"a")])
    assert refused.statuses == {503: len(refused)}
    assert refused.goodput(10) == 0
    assert not refused.lost
    assert {e.retry_after for e in refused.exchanges} == {"1"}
    # The server is gone.
    gone = traffic.send(traffic.OpenLoop(50, 0.1), [traffic.Query(url, b"a")])
    assert len(gone.lost) == len(gone) > 0
    assert "Connect" in gone.exchanges[0].error
