"""A slower edge, by computation: the CPU time of the edge's work at full speed, multiplied.

A scheduler cannot imitate a slower CPU for calls of milliseconds. Measured for a slowdown of 8, runs of 2 and of 6 ms:
a control group's quota of 1 in 8 ms slowed them 1 and 5 times, since it acts at the clock's ticks of 4 ms; stops each
half millisecond, as long as the CPU time so far demands, 4 and 6 times, since the CPU time of a running process is
known at ticks alone, and a stop wakes all 51 threads of a function. CPU time is exact once the process waits: with two
busy neighbours on two CPUs it grew by a tenth, the time of the same calls by half.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from isthmus.errors import LocalError

# A function goes on after its response, as for a log line.
_WAIT_S, _MAX_WAITS = 0.0005, 200


@dataclass(frozen=True)
class EdgeWork:
    """CPU seconds of a request at the edge, at full speed: of the function there, and of this thread, the router's."""

    function_s: float
    router_s: float


@dataclass(frozen=True)
class SlowEdge:
    """An edge `slowdown` times slower than this machine; `pids` are its functions' processes, each on one thread."""

    slowdown: float = 1.0
    pids: Collection[int] = ()

    @property
    def method(self) -> str:
        """How the edge is slowed, as a sentence's end."""
        return f"the CPU time of its work at full speed, times {self.slowdown:g}"

    def work(self) -> EdgeWork:
        """CPU seconds so far, once the processes wait; the difference of two is the work between.

        Raises:
            LocalError: a process has ended, or this system has no clock of another process's CPU time.
        """
        return EdgeWork(sum(map(_cpu_s, list(self.pids))), time.thread_time())

    def slowed(
        self, seconds: Mapping[str, float], before: EdgeWork, preprocess_cpu_s: float, share: float = 1.0
    ) -> Mapping[str, float]:
        """The seconds of a request's parts with the edge's as its CPU time since `before`, times the slowdown.

        `edge` then holds the router's HTTP too, of which a `share` counts. `total` changes by as much as the parts.
        """
        after = self.work()
        router_s = after.router_s - before.router_s
        http_s = max(0.0, router_s - preprocess_cpu_s - seconds["pack"]) * share
        at_full_speed = {
            "preprocess": preprocess_cpu_s,
            "pack": seconds["pack"],
            "edge": after.function_s - before.function_s + http_s,
        }
        parts = {name: self.slowdown * s for name, s in at_full_speed.items()}
        change = sum(parts.values()) - sum(seconds.get(name, 0.0) for name in parts)
        if "edge_run" in seconds:
            parts["edge_run"] = min(self.slowdown * seconds["edge_run"], parts["edge"])
        return {**seconds, **parts, "total": seconds["total"] + change}


AT_FULL_SPEED = SlowEdge()


def _cpu_s(pid: int) -> float:
    """CPU seconds of a process so far, once it waits: a running thread's are added at the clock's ticks alone."""
    clock = ctypes.c_int()
    try:
        for _ in range(_MAX_WAITS):
            if not _is_running(pid):
                break
            time.sleep(_WAIT_S)
        # Of POSIX, and not in Python's own modules.
        if error := ctypes.CDLL(None).clock_getcpuclockid(pid, ctypes.byref(clock)):
            raise OSError(error, os.strerror(error))
        return time.clock_gettime(clock.value)
    except (OSError, AttributeError) as e:
        raise LocalError(f"the CPU time of process {pid}, a function at the edge, is unknown: {e}", pid=pid) from e


def _is_running(pid: int) -> bool:
    """Whether a thread of the process runs or could. Source: proc_pid_stat(5)."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended
            # After the name in parentheses, which may hold anything.
            if (task / "stat").read_text(errors="replace").rpartition(")")[2].split()[0] == "R":
                return True
    return False
