"""Cost of the chain alone: client, router, head and tail without computation, beside Ray Serve and plain sockets."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from functions import Process, free_port, gateway, running, stage_functions
from harness import (
    BENCH,
    STATE,
    Report,
    Stages,
    add_stages,
    arguments,
    at_least,
    interleave,
    python_with,
    stage_medians,
    version_in,
)
from onnx import TensorProto, helper
from tcp_chain import Peer

from isthmus.context import Deadline
from isthmus.http.pool import ConnectionPool
from isthmus.registry import open_registry
from isthmus.settings import RegistrySettings
from isthmus_tools.graph import build

WIDTH = 256
# Bytes of the boundary tensor.
SIZES = {"150 kB": 147 * WIDTH * 4, "1.2 MB": 1172 * WIDTH * 4}

DIRECT, GATEWAY = "isthmus, direct", "isthmus, gateway"
# Ray Serve's p50 over Isthmus's.
MIN_OVER_RAY = {(DIRECT, "150 kB"): 4.0, (DIRECT, "1.2 MB"): 2.5, (GATEWAY, "150 kB"): 2.0}

BLOCK = 10
RAY, RAY_DIRECT = "Ray Serve", "Ray Serve, head to tail"
TCP = "plain sockets"


@dataclass
class RouterClient:
    """A client of a router with a prepared request for each model."""

    url: str
    stages: dict[str, Stages] = field(default_factory=dict)
    """Stages of Server-Timing, by model."""

    def __post_init__(self) -> None:
        self._caller = Caller(self.url)
        x = np.arange(WIDTH, dtype=np.float32)
        head = json.dumps(
            {
                "inputs": [
                    {
                        "name": "x",
                        "shape": [WIDTH],
                        "datatype": "FP32",
                        "parameters": {"binary_data_size": x.nbytes},
                    }
                ],
                "parameters": {"binary_data_output": True},
            }
        ).encode()
        self._body = head + x.tobytes()
        self._headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
        self._answer = x[:16].tobytes()

    def ask(self, model: str) -> None:
        """Send a request and check the response.

        Raises:
            RuntimeError: another response than expected.
        """
        status, headers, data = self._caller.post(f"/v2/models/{model}/infer", self._body, self._headers)
        if status != 200 or not data.endswith(self._answer):
            raise RuntimeError(f"{self.url} answered {status}: {data[:300]!r}")
        add_stages(self.stages.setdefault(model, {}), headers["server-timing"])


class Caller:
    """Keep-alive connections with a minimal client, so that the servers take most of the measured time."""

    def __init__(self, url: str) -> None:
        self._pool = ConnectionPool(url, connect_timeout_s=5.0)

    def post(self, path: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, Mapping[str, str], bytes]:
        """The response's status, headers (names in lower case) and body."""
        response = self._pool.post(
            [body], headers, Deadline.after(60.0), max_bytes=2**30, max_error_bytes=2**16, path=path
        )
        return response.status, response.headers, bytes(response.body)


def main() -> None:
    report = arguments("chain", __doc__, ["flask", "numpy", "onnxruntime", "urllib3", "waitress"])
    report.versions["ray"] = version_in("ray", "ray")
    with contextlib.ExitStack() as stack:
        report.say("building two models without computation")
        registry = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="isthmus-bench-")))
        models = publish(registry)
        report.say("starting the functions, the gateway, plain sockets and Ray Serve")
        direct = RouterClient(stack.enter_context(direct_functions(registry, next(iter(models.values())))).url)
        through = stack.enter_context(gateway(registry, next(iter(models.values()))))
        routers = {DIRECT: direct, GATEWAY: RouterClient(f"{through.url}/function/router")}
        plain = stack.enter_context(tcp_chain())
        ray = stack.enter_context(ray_serve())
        results = {}
        for label, size in SIZES.items():
            report.say(f"asking all of them by turns, {label}")
            calls: dict[str, Callable[[], object]] = {
                name: partial(router.ask, models[label]) for name, router in routers.items()
            }
            calls[TCP] = partial(ask_plain, plain, size)
            calls[RAY] = partial(ray, f"/{size}")
            calls[RAY_DIRECT] = partial(ray, f"/{size}/direct")
            interleave(calls, turns=1, block=1, warm=5 if report.quick else 20)
            for router in routers.values():
                router.stages.clear()
            results[label] = interleave(calls, turns=8 if report.quick else 30, block=BLOCK, warm=2)
            report.add(f"{label} across the cut", rows(results[label], routers, models[label]))
            report.add(
                f"{label}: stages by Server-Timing of the router and its hops, medians in ms",
                [{"through": name, **stage_medians(router.stages[models[label]])} for name, router in routers.items()],
            )
    add_goals(report, results)
    report.emit()


def rows(times: Mapping[str, Any], routers: Mapping[str, RouterClient], model: str) -> list[dict[str, Any]]:
    """A row for each system; `runtime` is onnxruntime's part, absent in the peers."""
    return [
        {
            "through": name,
            "p50_ms": samples.p50 * 1e3,
            "p95_ms": samples.p95 * 1e3,
            "over_plain_sockets": samples.over(times[TCP]),
            "Ray_Serve_over_this": times[RAY].over(samples),
            "runtime_ms": runtime_ms(routers[name].stages[model]) if name in routers else None,
        }
        for name, samples in times.items()
    ]


def runtime_ms(stages: Stages) -> float:
    """Median time in the two segments' runs."""
    return sum(ms for stage, ms in stage_medians(stages).items() if stage.endswith("-run"))


def add_goals(report: Report, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Goals for both routes of Isthmus against Ray Serve's faster mode."""
    for (mode, label), goal in MIN_OVER_RAY.items():
        times = results[label]
        best = min(RAY, RAY_DIRECT, key=lambda name: times[name].p50)
        report.goals.append(
            at_least(f"{mode}, {label}: p50 of {best} over ours", times[best].p50 / times[mode].p50, goal)
        )


def publish(registry: Path) -> dict[str, str]:
    """A model for each size: the head repeats a row of 256 values, the tail takes the first 16 of them."""
    names = {}
    for label, size in SIZES.items():
        rows = size // (4 * WIDTH)
        graph = helper.make_graph(
            [
                helper.make_node("Expand", ["x", "shape"], ["wide"]),
                helper.make_node("Slice", ["wide", "from", "to"], ["y"]),
            ],
            "nothing",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [WIDTH])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 16])],
            [
                helper.make_tensor("shape", TensorProto.INT64, [2], [rows, WIDTH]),
                helper.make_tensor("from", TensorProto.INT64, [2], [0, 0]),
                helper.make_tensor("to", TensorProto.INT64, [2], [1, 16]),
            ],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "nothing.onnx"
            onnx.save(model, path)
            names[label] = f"nothing-{rows}"
            bundle, files = build(path, names[label], Path(folder) / "out", partitions=[["nothing=wide"]])
            store = open_registry(RegistrySettings(registry=str(registry)))
            store.publish(bundle, files, alias="prod")
    return names


@contextlib.contextmanager
def direct_functions(registry: Path, model: str) -> Iterator[Process]:
    """The router with hops to the head's and the tail's processes, without a gateway."""
    staged = stage_functions("router", "edge-head", "cloud-tail", registry=registry, model=model)
    cache = {"cache_dir": str(STATE / "chain-cache")}
    with contextlib.ExitStack() as stack:
        head, tail = (stack.enter_context(staged[name].start(**cache)) for name in ("edge-head", "cloud-tail"))
        router = stack.enter_context(staged["router"].start(**cache, hops=f"{head.url},{tail.url}"))
        for process in (head, tail, router):
            process.wait_ready()
        yield router


@contextlib.contextmanager
def tcp_chain() -> Iterator[Peer]:
    """A connection to the router of the three processes on plain sockets."""
    ports = {role: free_port() for role in ("head", "tail", "router")}
    options = {role: [port] for role, port in ports.items()}
    options["router"] += [ports["head"], ports["tail"]]
    with contextlib.ExitStack() as stack:
        for role, numbers in options.items():
            command = [sys.executable, str(BENCH / "tcp_chain.py"), role, *map(str, numbers)]
            url = f"tcp://127.0.0.1:{numbers[0]}"
            stack.enter_context(running(command, f"tcp-{role}", url, dict(os.environ)))
            await_port(numbers[0])
        yield Peer.at(ports["router"])


def await_port(port: int) -> None:
    """Return once a server listens on `port`."""
    until = time.monotonic() + 10
    while True:
        try:
            Peer.at(port)
        except ConnectionRefusedError:
            if time.monotonic() > until:
                raise
            time.sleep(0.02)
        else:
            return


def ask_plain(router: Peer, size: int) -> None:
    """A request over plain sockets."""
    router.send(bytes(4 * WIDTH), size)
    router.receive()


@contextlib.contextmanager
def ray_serve() -> Iterator[Callable[[str], None]]:
    """Three deployments of Ray Serve; yields a function that sends a request."""
    port, temp = free_port(), tempfile.mkdtemp(prefix="ray-")
    command = [str(python_with("ray")), str(BENCH / "ray_chain.py"), str(port), temp]
    url = f"http://127.0.0.1:{port}"
    caller = Caller(url)
    body = np.arange(WIDTH, dtype=np.float32).tobytes()

    def ask(path: str) -> None:
        status, _, data = caller.post(path, body, {})
        if status != 200 or len(data) != 64:
            raise RuntimeError(f"Ray Serve answered {status}: {data[:300]!r}")

    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
    with running(command, "ray", url, environment) as process:
        try:
            process.wait_ready("/-/healthz")
            await_answer(lambda: ask("/1024"))
            yield ask
        finally:
            process.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.process.wait(timeout=30)
            shutil.rmtree(temp, ignore_errors=True)


def await_answer(ask: Callable[[], None]) -> None:
    """Return once `ask` succeeds: a proxy is healthy before its application runs."""
    until = time.monotonic() + 60
    while True:
        try:
            return ask()
        except RuntimeError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


if __name__ == "__main__":
    main()
