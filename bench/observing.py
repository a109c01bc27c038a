"""What observing costs: microseconds of a request with traces off, not sampled and sampled, and of a scrape."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
from flask.testing import FlaskClient
from harness import Report, Samples, arguments, at_most, interleave

from isthmus.routing.state import CandidateState, HopState, ModelState, RouterState
from isthmus.serving import create_router_app
from isthmus.serving.metrics import FunctionMetrics
from isthmus.serving.routing_metrics import MAX_ROUTES, MAX_VERSIONS, RoutingMetrics
from support.bundles import Published, publish_photos, ready, router_settings
from support.otlp_receiver import otlp_receiver
from support.ports import free_port

# Three spans: the request, its route, the segment. The SDK alone takes 130 µs for one of a Flask app with an
# instrumentation, measured before this was built.
UNSAMPLED_US, SAMPLED_US = 100.0, 350.0
# A scrape every 15 s must not be seen in the latencies of requests.
SCRAPE_MS = 60.0


def main() -> None:
    report = arguments("observing", __doc__, ["flask", "opentelemetry-sdk", "prometheus-client"])
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        published = publish_photos(Path(folder) / "photos")
        receiver = opened.enter_context(receiver_process())
        away = f"http://127.0.0.1:{free_port()}"
        routers = {
            "traces off": {},
            "not sampled": {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver, "OTEL_TRACES_SAMPLER": "always_off"},
            "sampled": {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver},
            "sampled, no receiver": {"OTEL_EXPORTER_OTLP_ENDPOINT": away},
        }
        calls = {
            name: partial(ask, opened.enter_context(router(published, Path(folder) / str(i), variables)))
            for i, (name, variables) in enumerate(routers.items())
        }
        report.say("requests by turns")
        times = interleave(calls, turns=30 if report.quick else 200, block=20, warm=2, clock=time.thread_time)
    add_requests(report, times)
    report.say("scrapes")
    add_scrapes(report)
    report.emit()


def ask(client: FlaskClient) -> None:
    """A tensor through a model of four nodes, in this process."""
    response = client.post("/v2/models/photos/infer", data=BODY, headers=BINARY)
    if response.status_code != 200:
        raise RuntimeError(response.get_data(as_text=True))


BODY = (
    b'{"inputs": [{"name": "x", "shape": [1, 3, 8, 8], "datatype": "FP32", "parameters": {"binary_data_size": 768}}]}'
)
BINARY = {"Inference-Header-Content-Length": str(len(BODY)), "Content-Type": "application/octet-stream"}
BODY += np.zeros((1, 3, 8, 8), np.float32).tobytes()


@contextmanager
def router(published: Published, cache: Path, variables: Mapping[str, str]) -> Iterator[FlaskClient]:
    """A router with a hop of its own, in an environment of its own."""
    with mock.patch.dict(os.environ, variables):
        app = create_router_app(router_settings(published, cache, ("local",), guard_share=0.0))
        client = ready(app.test_client())
    try:
        yield client
    finally:
        app.extensions["isthmus"].close()


@contextmanager
def receiver_process() -> Iterator[str]:
    """A receiver in a process of its own, so that its work is not counted; its URL."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=receive, args=(theirs,), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        ours.send(None)
        process.join()


def receive(pipe: multiprocessing.connection.Connection) -> None:
    with otlp_receiver() as receiver:
        pipe.send(receiver.url)
        pipe.recv()


def add_requests(report: Report, times: Mapping[str, Samples]) -> None:
    off = times["traces off"]
    added = {name: (samples.p50 - off.p50) * 1e6 for name, samples in times.items()}
    rows = [{"": name, "p50_us": round(s.p50 * 1e6, 1), "added_us": round(added[name], 1)} for name, s in times.items()]
    report.add("CPU time of a request in its own thread", rows)
    report.goals += [
        at_most("a request that is not sampled, over traces off", added["not sampled"], UNSAMPLED_US, "µs"),
        at_most("a sampled request, over traces off", added["sampled"], SAMPLED_US, "µs"),
        at_most("the same without a receiver", added["sampled, no receiver"], SAMPLED_US, "µs"),
    ]


def add_scrapes(report: Report) -> None:
    rows = []
    for versions, routes in ((1, 1), (4, MAX_ROUTES), (MAX_VERSIONS, MAX_ROUTES)):
        metrics = full_metrics(versions, routes)
        turns = 5 if report.quick else 20
        seconds = interleave({"": partial(metrics.expose, "")}, turns=turns, clock=time.thread_time)[""].p50
        size = len(metrics.expose("")[0])
        rows.append({"versions": versions, "routes": routes, "ms": round(seconds * 1000, 2), "kB": round(size / 1000)})
    report.add("CPU time of a scrape", rows)
    report.goals.append(at_most("a scrape with as many series as there can be", float(rows[-1]["ms"]), SCRAPE_MS, "ms"))


def full_metrics(versions: int, routes: int) -> FunctionMetrics:
    """Metrics of a router that serves so many versions, each with so many routes in use."""
    candidates = tuple(CandidateState(f"split-{i}", ("..",), 0.1, 0.1, 0.1, 9, 1) for i in range(routes))
    models = tuple(ModelState(f"model-{i}", "1", "split-0", 1, candidates) for i in range(versions))
    state = RouterState(tuple(HopState(f"hop{i}", rtt_s=0.1, up_bytes_s=1e6) for i in range(2)), models)
    routing = RoutingMetrics(mock.Mock(expose_details=True, hops=()))
    routing.measure(mock.Mock(state=lambda: state))
    for model in models:
        for candidate in candidates:
            routing.answered(model.name, "1", candidate.name, 0.1)
    metrics = FunctionMetrics()
    metrics.add(routing)
    return metrics


if __name__ == "__main__":
    sys.exit(main())
