"""The systems of bench/load.py, each behind one HTTP query with the same input tensor."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import urllib3
from functions import Process, free_port, running, stage_functions
from harness import BENCH, STATE, Report, python_with
from models import PLANNED, import_model, inputs
from traffic import Query

from isthmus.arrays import Array
from isthmus.artifacts.segment_id import WHOLE
from isthmus.registry import open_cache, open_registry
from isthmus.settings import SegmentSettings
from isthmus_tools.usecases import model_import

FUNCTIONS, HEAD_IN_ROUTER = "isthmus", "isthmus, head in the router"
ALONE = "onnxruntime alone"
RAY, LITSERVE, MLSERVER = "Ray Serve", "LitServe, uncut", "MLServer, uncut"
# Whether a peer serves the uncut model.
PEERS = {RAY: False, LITSERVE: True, MLSERVER: True}
REGISTRY = STATE / "load-registry"
THREADS = "1"
# Relative to the largest logit.
TOLERANCE = 1e-4
_BINARY = "application/octet-stream"
_JSON = {"Content-Type": "application/json"}
_AWAIT_S = 60.0


@dataclass(frozen=True)
class Loadable:
    """A model, its files as all systems load them, an input and its output."""

    name: str
    title: str
    head: Path
    tail: Path
    whole: Path
    input_name: str
    x: Array
    expected: Array


class TurnResult(NamedTuple):
    """Latencies of the answers of a closed loop, its duration, the system's CPU seconds, and requests without answer.

    Units: seconds.
    """

    latencies: list[float]
    during_s: float
    cpu_s: float
    failed: int = 0


Turn = Callable[[int, float], TurnResult]
"""A closed loop with so many callers for so many seconds."""


@dataclass(frozen=True)
class Server:
    """A system's query, how its response's body becomes the output's bytes, and the first of its processes."""

    query: Query
    output: Callable[[bytes], bytes]
    processes: Sequence[Process]

    def cpu_s(self) -> float:
        """CPU seconds of the system's processes and all that these started."""
        return sum(cpu_seconds(process.process.pid) for process in self.processes)

    def check(self, expected: Array) -> None:
        """Ask until the system answers, and compare the output.

        Raises:
            RuntimeError: no answer within a minute, or another output than the model's.
        """
        until = time.monotonic() + _AWAIT_S
        while True:
            response = urllib3.request(
                "POST", self.query.url, body=self.query.body, headers=self.query.headers, retries=False, timeout=30.0
            )
            if response.status == 200:
                break
            if time.monotonic() > until:
                raise RuntimeError(f"{self.query.url} answered {response.status}: {response.data[:300]!r}")
            time.sleep(0.2)
        got = np.frombuffer(self.output(response.data), np.float32)
        if got.size != expected.size or np.abs(got - expected.ravel()).max() > TOLERANCE * np.abs(expected).max():
            raise RuntimeError(f"{self.query.url} gives another output than the model")


def cpu_seconds(pid: int) -> float:
    """CPU seconds of a process and of those below it; of the ended ones as far as they were waited for."""
    total = 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += sum(process.cpu_times()[:2])
    return total


def _photo_input() -> Array:
    """The first photo as EfficientNet-Lite0 takes it."""
    import_model()
    (x,) = inputs(1)[0].values()
    return x


def _noise_input() -> Array:
    return np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)


MODELS: Mapping[str, tuple[Callable[[], str], Callable[[], Array]]] = {
    "efficientnet-lite0": (lambda: "efficientnet-lite0", _photo_input),
    # Ten times the computation; random weights.
    "resnet-50": (lambda: str(PLANNED["resnet-50"].path()), _noise_input),
}


def loadable(name: str, report: Report) -> Loadable:
    """The model with a free batch dimension, cut at its narrowest cut; imported on first use."""
    settings = SegmentSettings(registry=str(REGISTRY), cache_dir=str(STATE / "load-files"))
    REGISTRY.mkdir(parents=True, exist_ok=True)
    registry = open_registry(settings)
    source, make_input = MODELS[name]
    if name not in registry.models():
        report.say(f"importing {name}, once")
        with contextlib.redirect_stdout(sys.stderr):
            model_import.import_model(
                model_import.ImportRequest(model=source(), name=name, registry=settings, free_batch=True)
            )
    version = registry.resolve(name)
    cache = open_cache(settings, registry)
    head, tail = (segment.id for segment in version.bundle.partition())
    paths = [cache.locate(version.digest, segment).path for segment in (head, tail, WHOLE)]
    x, input_name = make_input(), version.bundle.inputs[0].name
    return Loadable(name, f"{name}, cut at {head.stop}", *paths, input_name, x, _output(paths[2], input_name, x))


def _output(whole: Path, name: str, x: Array) -> Array:
    """The uncut model's only output, by a session of its own."""
    from isthmus.runtime.ort import ort

    session = ort.InferenceSession(str(whole), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {name: x})
    return np.asarray(output)


@contextlib.contextmanager
def functions(model: Loadable, *, head_in_router: bool = False) -> Iterator[Server]:
    """The router with hops to the processes of head and tail, or with the head in its own."""
    staged = stage_functions("router", "edge-head", "cloud-tail", registry=REGISTRY, model=model.name)
    common = {"cache_dir": str(STATE / "load-cache"), "threads": THREADS}
    # A pod's limit allows one request at a time for each of 64 callers.
    common |= {"max_concurrency": "64", "max_queued": "64", "max_working_bytes": "1GiB"}
    with contextlib.ExitStack() as stack:
        tail = stack.enter_context(staged["cloud-tail"].start(**common))
        head = None if head_in_router else stack.enter_context(staged["edge-head"].start(**common))
        hops = f"{head.url if head else 'local'},{tail.url}"
        router = stack.enter_context(staged["router"].start(**common, hops=hops))
        processes = [process for process in (router, head, tail) if process]
        for process in processes:
            process.wait_ready()
        # The output's bytes end the response.
        size = model.expected.nbytes
        query = _binary_query(f"{router.url}/v2/models/{model.name}/infer", model)
        yield Server(query, lambda body: body[-size:], processes)


def _binary_query(url: str, model: Loadable) -> Query:
    tensor = {
        "name": model.input_name,
        "shape": list(model.x.shape),
        "datatype": "FP32",
        "parameters": {"binary_data_size": model.x.nbytes},
    }
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": _BINARY}
    return Query(url, head + model.x.tobytes(), headers)


@contextlib.contextmanager
def ray_serve(model: Loadable) -> Iterator[Server]:
    """Router, head and tail as deployments of Ray Serve, which pass arrays through its object store."""
    temp = tempfile.mkdtemp(prefix="ray-")
    shape = json.dumps(model.x.shape)
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0", "PYTHONPATH": str(BENCH)}
    with _peer("ray", "ray_load.py", environment, temp, model.head, model.tail, model.input_name, shape) as process:
        try:
            process.wait_ready("/-/healthz")
            yield Server(Query(process.url, model.x.tobytes(), {"Content-Type": _BINARY}), bytes, [process])
        finally:
            _end(process)
            shutil.rmtree(temp, ignore_errors=True)


@contextlib.contextmanager
def litserve(model: Loadable) -> Iterator[Server]:
    """The uncut model behind LitServe."""
    body = json.dumps({"tensor": base64.b64encode(model.x.tobytes()).decode()}).encode()
    environment = {**os.environ, "PYTHONPATH": str(BENCH)}
    with _peer("litserve", "litserve_load.py", environment, model.whole, json.dumps(model.x.shape)) as process:
        try:
            process.wait_ready("/health")
            yield Server(Query(f"{process.url}/predict", body, _JSON), bytes, [process])
        finally:
            _end(process)


@contextlib.contextmanager
def mlserver(model: Loadable) -> Iterator[Server]:
    """The uncut model behind MLServer, in two worker processes."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    tensor = {
        "name": model.input_name,
        "shape": [1],
        "datatype": "BYTES",
        "data": [base64.b64encode(model.x.tobytes()).decode()],
    }
    with tempfile.TemporaryDirectory(prefix="mlserver-") as folder:
        settings = {"http_port": port, "grpc_port": free_port(), "metrics_endpoint": None, "parallel_workers": 2}
        Path(folder, "settings.json").write_text(json.dumps({**settings, "host": "127.0.0.1", "debug": False}))
        parameters = {"uri": str(model.whole), "extra": {"path": str(model.whole), "shape": model.x.shape}}
        document = {"name": "uncut", "implementation": "mlserver_load.UncutRuntime", "parameters": parameters}
        Path(folder, "model-settings.json").write_text(json.dumps(document))
        command = [str(python_with("mlserver").with_name("mlserver")), "start", folder]
        with running(command, "mlserver", url, {**os.environ, "PYTHONPATH": str(BENCH)}, Path(folder)) as process:
            try:
                process.wait_ready("/v2/models/uncut/ready")
                body = json.dumps({"inputs": [tensor]}).encode()
                yield Server(Query(f"{url}/v2/models/uncut/infer", body, _JSON), _base64, [process])
            finally:
                _end(process)


def _base64(body: bytes) -> bytes:
    return base64.b64decode(json.loads(body)["outputs"][0]["data"][0])


@contextlib.contextmanager
def _peer(name: str, script: str, environment: Mapping[str, str], *arguments: object) -> Iterator[Process]:
    port = free_port()
    command = [str(python_with(name)), str(BENCH / script), str(port), *map(str, arguments)]
    with running(command, name, f"http://127.0.0.1:{port}", environment) as process:
        yield process


def _end(process: Process) -> None:
    """Let a peer end its own processes; end those that are left, such as LitServe's workers."""
    with contextlib.suppress(psutil.NoSuchProcess):
        below = psutil.Process(process.process.pid).children(recursive=True)
        process.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.process.wait(timeout=10)
        for child in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(below, timeout=10)


@contextlib.contextmanager
def onnxruntime_alone(model: Loadable) -> Iterator[Turn]:
    """Turns of a process that runs head and tail in a closed loop of its own threads, without any server."""
    with tempfile.TemporaryDirectory(prefix="isthmus-bench-") as folder:
        path = Path(folder, "input.npy")
        np.save(path, model.x)
        command = [sys.executable, str(BENCH / "sessions.py"), THREADS, str(path), str(model.head), str(model.tail)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("no pipes")

        def turn(callers: int, seconds: float) -> TurnResult:
            before_s = cpu_seconds(process.pid)
            print(callers, seconds, file=process.stdin, flush=True)
            result: dict[str, Any] = json.loads(process.stdout.readline())  # type: ignore[union-attr]
            return TurnResult(result["times"], result["seconds"], cpu_seconds(process.pid) - before_s)

        try:
            yield turn
        finally:
            process.kill()
            process.wait()


SERVERS: Mapping[str, Callable[[Loadable], contextlib.AbstractContextManager[Server]]] = {
    FUNCTIONS: functions,
    HEAD_IN_ROUTER: partial(functions, head_in_router=True),
    RAY: ray_serve,
    LITSERVE: litserve,
    MLSERVER: mlserver,
}
