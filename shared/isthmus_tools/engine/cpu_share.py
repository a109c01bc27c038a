"""A share of one CPU for processes of this machine, to rehearse a slower device in use.

The share is a CPU quota of a control group where this process may make one, else duty cycling by SIGSTOP and SIGCONT.
Both hold over many calls and not for one: a call of less CPU time than a tick of the clock may have full speed. What is
measured for a plan takes `isthmus_tools.profiling.slow_edge` instead. Both end with the block, and a killed parent
leaves no process stopped.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from isthmus.errors import LocalError
from isthmus_tools.engine.telemetry import Event, OnEvent

MAX_SLOWDOWN = 64.0
"""Beyond, a start and a cold model outlast the deadlines of functions."""
# The kernel's least quota (sched-bwc.rst) and its longest period.
_MIN_QUOTA_US, _MAX_PERIOD_US = 1_000, 1_000_000
# The shortest period for a quarter of a CPU: a call much shorter than the quota would pass at full speed.
_PERIOD_US = 4_000
_GROUP = "isthmus-share-"
_CGROUPS = Path("/sys/fs/cgroup")
# The helper reads pids from its standard input; the end of that input is the end of its parent, however it came.
# pidfds, where the system has them, never signal another process that took over the id of an ended one.
_DUTY_CYCLE = """
import os, select, signal, sys
share, period = float(sys.argv[1]), float(sys.argv[2])
handles, buffer = {}, b""
def tell(number):
    for pid, handle in list(handles.items()):
        try:
            if handle is None:
                os.kill(pid, number)
            else:
                signal.pidfd_send_signal(handle, number)
        except OSError:
            handles.pop(pid)
def wait(seconds):
    global buffer
    if select.select([0], [], [], seconds)[0]:
        if not (data := os.read(0, 4096)):
            tell(signal.SIGCONT)
            sys.exit()
        *lines, buffer = (buffer + data).split(b"\\n")
        for pid in map(int, lines):
            try:
                handles[pid] = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None
            except OSError:
                pass
while True:
    tell(signal.SIGCONT)
    wait(period * share)
    tell(signal.SIGSTOP)
    wait(period * (1 - share))
"""


class CpuShare(Protocol):
    """Processes that share a part of one CPU; `method` says by which means, as a sentence's end."""

    @property
    def method(self) -> str:
        """How the share is held."""
        ...

    def add(self, pid: int) -> None:
        """Slow one more process, all its threads; a process that has ended is ignored."""
        ...


def joining(share: CpuShare, functions: Collection[str]) -> OnEvent:
    """An engine's callback that moves each ready replica of `functions` into the share.

    Only then: a start at a small share of a CPU would take minutes.
    """

    def on_event(event: Event) -> None:
        if event.kind == "ready" and event.function in functions:
            share.add(event.pid)

    return on_event


@contextlib.contextmanager
def share_of_a_cpu(share: float, pids: Iterable[int] = ()) -> Iterator[CpuShare]:
    """Give processes a share of one CPU, all of them together, for the block; `share` is above 0 and below 1.

    Raises:
        LocalError: a share outside 1/MAX_SLOWDOWN to 1.
    """
    if not 1 / MAX_SLOWDOWN <= share < 1:
        raise LocalError(f"{share:g} is no share of a CPU: it is at least 1/{MAX_SLOWDOWN:g} and below 1", share=share)
    period_us = min(_MAX_PERIOD_US, max(_PERIOD_US, round(_MIN_QUOTA_US / share)))
    with contextlib.ExitStack() as stack:
        group = _make_group(round(period_us * share), period_us)
        limited: CpuShare
        if group is not None:
            limited = stack.enter_context(group)
        else:
            limited = stack.enter_context(_DutyCycle.running(share, period_us))
        for pid in pids:
            limited.add(pid)
        yield limited


@dataclass
class _Group:
    """A control group with a CPU quota; processes return to the groups that they came from."""

    folder: Path
    v1: bool
    method: str
    origins: dict[int, Path]

    def add(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            origin = _group_of(pid, self.v1)
            _move(self.folder, pid)
            self.origins[pid] = origin

    def __enter__(self) -> _Group:
        return self

    def __exit__(self, *_: object) -> None:
        for pid, origin in self.origins.items():
            with contextlib.suppress(OSError):
                if _group_of(pid, self.v1) == self.folder:
                    _move(origin, pid)
        # Processes that they started are in the group too.
        with contextlib.suppress(OSError):
            for pid in map(int, (self.folder / "cgroup.procs").read_text().split()):
                with contextlib.suppress(OSError):
                    _move(self.folder.parent, pid)
            self.folder.rmdir()


def _make_group(quota_us: int, period_us: int) -> _Group | None:
    """A group with the quota below the first parent that allows one; None without such a parent."""
    try:
        v1 = any("cpu" in line.split(":")[1].split(",") for line in Path("/proc/self/cgroup").read_text().splitlines())
        own = _group_of(os.getpid(), v1)
    except OSError:
        return None
    # Of version 2, a group with processes has no groups with controllers below, but for the root.
    parents = dict.fromkeys((own, _root(v1)) if v1 else (own.parent, _root(v1)))
    method = f"a control group's CPU quota, {quota_us / 1000:g} of every {period_us / 1000:g} ms"
    for parent in parents:
        if parent.is_relative_to(_root(v1)) and (folder := _try_group(parent, v1, quota_us, period_us)) is not None:
            return _Group(folder, v1, method, {})
    return None


def _try_group(parent: Path, v1: bool, quota_us: int, period_us: int) -> Path | None:
    _remove_stale(parent)
    folder = parent / f"{_GROUP}{os.getpid()}-{os.urandom(3).hex()}"
    try:
        folder.mkdir()
    except OSError:
        return None
    try:
        if v1:
            (folder / "cpu.cfs_period_us").write_text(str(period_us))
            (folder / "cpu.cfs_quota_us").write_text(str(quota_us))
        else:
            (folder / "cpu.max").write_text(f"{quota_us} {period_us}")
        # A group that may be made may still refuse processes: a process of no use tries it.
        with subprocess.Popen(["/bin/sh", "-c", "read _"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as probe:
            _move(folder, probe.pid)
    except OSError:
        with contextlib.suppress(OSError):
            folder.rmdir()
        return None
    return folder


def _remove_stale(parent: Path) -> None:
    """Remove the groups of processes that were killed; a group with processes stays."""
    for folder in parent.glob(f"{_GROUP}*-*"):
        if not Path(f"/proc/{folder.name.removeprefix(_GROUP).partition('-')[0]}").exists():
            with contextlib.suppress(OSError):
                # A folder with processes cannot be removed: those that outlived their parent keep their share.
                folder.rmdir()


def _root(v1: bool) -> Path:
    return _CGROUPS / "cpu" if v1 else _CGROUPS


def _group_of(pid: int, v1: bool) -> Path:
    """The folder of a process's group. Source: cgroups(7), /proc/pid/cgroup."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if ("cpu" in controllers.split(",")) if v1 else not controllers:
            return _root(v1) / path.lstrip("/")
    raise FileNotFoundError(f"process {pid} is in no group of the controller cpu")


def _move(folder: Path, pid: int) -> None:
    (folder / "cgroup.procs").write_text(str(pid))


@dataclass
class _DutyCycle:
    """A helper process that stops and continues the others by turns."""

    helper: subprocess.Popen[bytes]
    method: str
    pids: list[int]

    @classmethod
    @contextlib.contextmanager
    def running(cls, share: float, period_us: int) -> Iterator[_DutyCycle]:
        period_s = period_us / 1e6
        # A session of its own: Ctrl-C in the terminal must not end it while the others are stopped.
        helper = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _DUTY_CYCLE, str(share), str(period_s)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        method = f"stopping and continuing it by turns, {period_s * share * 1e3:g} of every {period_s * 1e3:g} ms"
        cycle = cls(helper, method, [])
        try:
            yield cycle
        finally:
            # The helper first: it would stop them again.
            helper.kill()
            helper.communicate()
            for pid in cycle.pids:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGCONT)

    def add(self, pid: int) -> None:
        if self.helper.stdin is None:
            return
        self.helper.stdin.write(f"{pid}\n".encode())
        self.helper.stdin.flush()
        self.pids.append(pid)
