"""Cold start and memory of edge-head with EfficientNet-Lite0's head."""

from __future__ import annotations

import collections
import contextlib
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import urllib3
from functions import Process, StagedFunction, stage_functions
from harness import STATE, Report, arguments, at_most
from models import MODEL, REGISTRY, head_frame, import_model

from isthmus.wire.frame import CONTENT_TYPE

CACHE = STATE / "start-cache"
POLL_S = 0.02
MAX_S = 60.0
LIBRARIES = ("libtorch", "libonnxruntime", "onnxruntime_pybind11_state", "numpy", "PIL", "boto")
SHOWN = 14
_IMPORT = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \|( +)(\S+)")


def main() -> None:
    report = arguments("start", __doc__, ["flask", "numpy", "onnxruntime", "waitress"])
    report.say(f"importing {MODEL} if absent")
    import_model()
    head = stage_functions("edge-head", registry=REGISTRY, model=MODEL)["edge-head"]
    body = head_frame()
    start(head, body, empty=True)  # fills the operating system's file cache, for equal conditions
    starts: dict[str, list[dict[str, Any]]] = {"empty": [], "warm": []}
    for turn in range(3 if report.quick else 12):
        for cache in ("empty", "warm") if turn % 2 else ("warm", "empty"):
            report.say(f"starting edge-head, {cache} segment cache")
            starts[cache].append(start(head, body, empty=cache == "empty"))
    report.add("edge-head from the start of its process, medians", [row(cache, runs) for cache, runs in starts.items()])
    report.add("libraries mapped by the process", libraries(starts["warm"][-1]["maps"]))
    report.say("starting it once more, with the time of each import")
    report.add(f"the {SHOWN} packages with the longest imports, each without its own imports", imports(head, body))
    report.add("imports before the port is bound, and after", phases(head))
    add_goals(report, starts)
    report.emit()


def start(head: StagedFunction, body: bytes, *, empty: bool, **environment: str) -> dict[str, Any]:
    """Start edge-head, send requests until a response, measure the process, and end it. Units: seconds, bytes."""
    if empty:
        shutil.rmtree(CACHE, ignore_errors=True)
    began = time.perf_counter()
    with head.start(cache_dir=str(CACHE), **environment) as process:
        await_status(process, began, {200, 503})
        listening_s = time.perf_counter() - began
        await_status(process, began, {200})
        ready_s = time.perf_counter() - began
        ask(process, body)
        answered_s = time.perf_counter() - began
        first = weight(process.process.pid)
        for _ in range(20):
            ask(process, body)
        return {
            "listening_s": listening_s,
            "ready_s": ready_s,
            "answered_s": answered_s,
            "cpu_s": sum(psutil.Process(process.process.pid).cpu_times()[:2]),
            **first,
            "later_rss": weight(process.process.pid)["rss"],
            "log": process.log.read_text(),
        }


def ask(process: Process, body: bytes) -> None:
    """Send a request.

    Raises:
        RuntimeError: the response is an error.
    """
    # A pool of its own: an earlier process may have had the same port, and its connections are dead.
    reply = urllib3.PoolManager().request(
        "POST", process.url, body=body, headers={"Content-Type": CONTENT_TYPE}, timeout=30.0
    )
    if reply.status != 200:
        raise RuntimeError(f"edge-head answered {reply.status}: {reply.data[:300]!r}")


def await_status(process: Process, began: float, statuses: set[int]) -> None:
    """Return once GET /ready responds with a status in `statuses`; a shorter pause would slow the start down.

    Raises:
        TimeoutError: no such response within MAX_S.
        ChildProcessError: the process ended before.
    """
    while time.perf_counter() - began < MAX_S:
        if process.process.poll() is not None:
            raise ChildProcessError(f"edge-head ended:\n{process.log.read_text()[-3000:]}")
        with contextlib.suppress(urllib3.exceptions.HTTPError):
            if urllib3.request("GET", f"{process.url}/ready", retries=False, timeout=10.0).status in statuses:
                return
        time.sleep(POLL_S)
    raise TimeoutError(f"edge-head was not ready:\n{process.log.read_text()[-3000:]}")


def weight(pid: int) -> dict[str, Any]:
    """Memory of a process: resident bytes, unshared bytes, and mapped files."""
    memory = psutil.Process(pid).memory_full_info()
    return {"rss": memory.rss, "uss": memory.uss, "maps": Path(f"/proc/{pid}/maps").read_text()}


def row(cache: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians of several starts."""
    median = {key: statistics.median(run[key] for run in runs) for key in runs[0] if key not in ("maps", "log")}
    return {
        "segment_cache": cache,
        "listens_after_s": median["listening_s"],
        "ready_after_s": median["ready_s"],
        "first_answer_after_s": median["answered_s"],
        "slowest_s": max(run["answered_s"] for run in runs),
        "CPU_s": median["cpu_s"],
        "resident_MB": median["rss"] / 1e6,
        "unshared_MB": median["uss"] / 1e6,
        "resident_after_20_more_MB": median["later_rss"] / 1e6,
    }


def libraries(maps: str) -> list[dict[str, Any]]:
    """Whether the process maps a file of each library."""
    return [{"library": name, "mapped": name in maps} for name in LIBRARIES]


def imports(head: StagedFunction, body: bytes) -> list[dict[str, Any]]:
    """Import time of each package's own modules by -X importtime, which slows imports down somewhat."""
    own: collections.Counter[str] = collections.Counter()
    count: collections.Counter[str] = collections.Counter()
    log = start(head, body, empty=False, PYTHONPROFILEIMPORTTIME="1")["log"]
    for self_us, _, _, name in _IMPORT.findall(log):
        own[name.partition(".")[0]] += int(self_us)
        count[name.partition(".")[0]] += 1
    total = {"package": "all", "modules": sum(count.values()), "ms": sum(own.values()) / 1e3}
    return [total] + [{"package": p, "modules": count[p], "ms": us / 1e3} for p, us in own.most_common(SHOWN)]


def phases(head: StagedFunction) -> list[dict[str, Any]]:
    """Seconds of Python alone, of index.py's own imports, and of the handler's, each in a fresh process."""
    handler = "import sys, index; sys.path[:0] = ['function', 'function/shared']; import function.handler"
    steps = {
        "Python itself": "pass",
        "index.py's imports": "import index",
        "the handler's imports": handler,
        "onnxruntime, if not imported yet": f"{handler}, onnxruntime",
    }
    rows = []
    for step, code in steps.items():
        times = []
        for _ in range(5):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], cwd=head.folder, check=True)
            times.append(time.perf_counter() - began)
        rows.append({"up_to": step, "s": statistics.median(times)})
    return rows


def add_goals(report: Report, starts: dict[str, list[dict[str, Any]]]) -> None:
    """Goals for the medians."""
    for cache, runs in starts.items():
        answered = statistics.median(run["answered_s"] for run in runs)
        report.goals.append(at_most(f"process start to first answer, {cache} segment cache", answered, 1.5, "s"))
    every = [run for runs in starts.values() for run in runs]
    heaviest = statistics.median(max(run["rss"], run["later_rss"]) for run in every) / 1e6
    report.goals.append(at_most("resident memory", heaviest, 150, "MB"))
    torch = sum("libtorch" in run["maps"] for run in every)
    report.goals.append(at_most("starts that mapped libtorch", torch, 0))


if __name__ == "__main__":
    main()
