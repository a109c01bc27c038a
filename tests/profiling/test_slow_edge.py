"""A slower edge counts the CPU time of its work: of the function's process, and of the router's thread."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from isthmus.artifacts.profile import HopCost
from isthmus.errors import LocalError
from isthmus_tools.profiling import profiles, slow_edge
from isthmus_tools.profiling.slow_edge import EdgeWork, SlowEdge
from isthmus_tools.usecases.local_functions import local_functions
from support.paths import ROOT
from support.profiles import PROFILE

# Works for as many CPU seconds as a line of its input says, before its response and after it again.
FUNCTION = """
import sys, time
def work(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
for line in sys.stdin:
    work(float(line))
    print(flush=True)
    work(float(line))
"""


@pytest.fixture
def function() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", FUNCTION]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def call(function: subprocess.Popen[str], seconds: float) -> None:
    assert function.stdin is not None
    assert function.stdout is not None
    print(seconds, file=function.stdin, flush=True)
    assert function.stdout.readline() == "\n"


@pytest.mark.parametrize("seconds", [0.002, 0.003, 0.02])
def test_a_short_calls_cpu_time_counts_whole_that_after_the_response_included(
    function: subprocess.Popen[str], seconds: float
) -> None:
    call(function, 0.001)
    edge = SlowEdge(8.0, [function.pid])
    before = edge.work()
    call(function, seconds)
    # Reading and writing the lines is the function's work too.
    assert 2 * seconds <= edge.work().function_s - before.function_s < 2 * seconds + 0.005


@dataclass(frozen=True)
class Edge(SlowEdge):
    """An edge whose work is what a test says."""

    after: EdgeWork = field(default_factory=lambda: EdgeWork(0.0, 0.0))

    def work(self) -> EdgeWork:
        return self.after


def test_the_edges_parts_are_cpu_time_times_the_slowdown_and_the_rest_stays() -> None:
    edge = Edge(8.0, after=EdgeWork(5.03, 7.1))
    seconds = {"total": 1.0, "preprocess": 0.2, "pack": 0.02, "edge": 0.3, "edge_run": 0.01, "cloud": 0.4}
    slowed = edge.slowed(seconds, EdgeWork(5.0, 7.0), 0.05, share=0.5)
    # Of the router's 100 ms of CPU 50 were the photo's and 20 the encoding's: 30 of HTTP, half of which count.
    parts = {"preprocess": 0.4, "pack": 0.16, "edge": 8 * (0.03 + 0.015), "edge_run": 0.08}
    assert slowed == pytest.approx({**seconds, **parts, "total": 1.0 - 0.52 + 0.4 + 0.16 + 0.36})


def test_a_call_to_the_cloud_alone_has_the_routers_http_at_the_edge() -> None:
    edge = Edge(4.0, after=EdgeWork(0.0, 0.03))
    slowed = edge.slowed({"total": 1.0, "preprocess": 0.0, "pack": 0.0, "cloud": 0.9}, EdgeWork(0.0, 0.02), 0.0)
    assert slowed == pytest.approx({"total": 1.04, "preprocess": 0.0, "pack": 0.0, "edge": 0.04, "cloud": 0.9})


def test_an_ended_function_has_no_cpu_time(function: subprocess.Popen[str]) -> None:
    function.kill()
    function.wait()
    with pytest.raises(LocalError, match=f"the CPU time of process {function.pid}"):
        SlowEdge(8.0, [function.pid]).work()


def test_a_process_that_never_waits_is_read_at_last(
    function: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slow_edge, "_is_running", lambda _: True)
    assert slow_edge._cpu_s(function.pid) > 0


def test_a_slower_devices_profile_has_all_times_but_no_sizes_multiplied() -> None:
    hop = HopCost(1.0, 2.0, 3.0, 4.0, 5.0)
    # Half of the measured time was of other work on the machine.
    slowed = profiles.slowed(PROFILE, 8.0, hop, PROFILE.whole.run.median / 2)
    assert slowed.device.cpu == f"1/8 of a CPU: {PROFILE.device.cpu}"
    assert slowed.hop == hop
    assert slowed.nodes == tuple(4 * seconds for seconds in PROFILE.nodes)
    for segment, cost in PROFILE.segments.items():
        assert slowed.segments[segment].run.median == 4 * cost.run.median
        assert slowed.segments[segment].memory_bytes == cost.memory_bytes
    assert {n: s.pack_s for n, s in slowed.codecs.items()} == {n: 8 * s.pack_s for n, s in PROFILE.codecs.items()}


def test_the_local_edge_counts_the_cpu_time_of_edge_head_alone(tmp_path: Path) -> None:
    variables = {**os.environ, "ISTHMUS_REGISTRY": str(tmp_path)}
    with local_functions(ROOT / "stack.yml", variables, edge_slowdown=8.0) as functions:
        (pid,) = functions.edge.pids
        process = psutil.Process(pid)
        assert "edge-head" in process.cwd()
        assert process.environ()["threads"] == "1"
        assert functions.edge.slowdown == 8
        before = functions.edge.work()
        with urllib.request.urlopen(f"{functions.head}/ready"):
            pass
        assert functions.edge.work().function_s > before.function_s > 0
    assert list(functions.edge.pids) == []
