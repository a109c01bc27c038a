"""A share of a CPU slows the processes that it has, and ends with its block, however its owner ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from isthmus.errors import LocalError
from isthmus_tools.engine import Event, cpu_share
from isthmus_tools.engine.cpu_share import joining, share_of_a_cpu
from isthmus_tools.usecases.local_functions import EDGE_FUNCTIONS, on_one_thread
from support.patience import LONG_S, eventually

OWNER = """
import sys, time
from isthmus_tools.engine import cpu_share
cpu_share._make_group = lambda *_: None
with cpu_share.share_of_a_cpu(0.05, [int(sys.argv[1])]) as share:
    print(share.helper.pid, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def process() -> Iterator[psutil.Process]:
    with subprocess.Popen(["sleep", "600"]) as child:
        yield psutil.Process(child.pid)
        child.kill()


def is_stopped(process: psutil.Process) -> bool:
    return process.status() == psutil.STATUS_STOPPED


def groups() -> set[Path]:
    """The control groups of this process's making; other processes have theirs."""
    roots = (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup"))
    return {p.resolve() for root in roots for p in root.glob(f"**/isthmus-share-{os.getpid()}-*")}


def test_a_control_group_has_the_quota_and_is_gone_after_the_block(process: psutil.Process) -> None:
    origin = Path(f"/proc/{process.pid}/cgroup").read_text()
    with share_of_a_cpu(1 / 8, [process.pid]) as share:
        if "control group" not in share.method:
            pytest.skip("this process may make no control group")
        (folder,) = groups()
        assert str(process.pid) in (folder / "cgroup.procs").read_text().split()
        if (folder / "cpu.max").exists():
            quota, period = map(int, (folder / "cpu.max").read_text().split())
        else:
            quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        assert (quota, period) == (1000, 8000)
        assert "1 of every 8 ms" in share.method
    assert not groups()
    assert Path(f"/proc/{process.pid}/cgroup").read_text() == origin


def test_without_a_group_processes_are_stopped_and_continued_and_left_running(
    process: psutil.Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_share, "_make_group", lambda *_: None)
    with share_of_a_cpu(1 / 16) as share:
        assert "by turns, 1 of every 16 ms" in share.method
        share.add(process.pid)
        share.add(2**22 - 1)  # no such process
        eventually(lambda: is_stopped(process))
        eventually(lambda: not is_stopped(process))
        eventually(lambda: is_stopped(process))
    eventually(lambda: not is_stopped(process))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_an_owner_that_is_killed_leaves_nothing_stopped(process: psutil.Process, number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(process.pid)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as owner:
        assert owner.stdout is not None
        helper = int(owner.stdout.readline())
        eventually(lambda: is_stopped(process))
        owner.send_signal(number)
        owner.wait(LONG_S)
    eventually(lambda: not psutil.pid_exists(helper) or psutil.Process(helper).status() == psutil.STATUS_ZOMBIE)
    assert not is_stopped(process)


def test_groups_of_killed_owners_are_removed_by_the_next(tmp_path: Path) -> None:
    stale, own = tmp_path / "isthmus-share-4194303-aa", tmp_path / f"isthmus-share-{os.getpid()}-aa"
    stale.mkdir()
    own.mkdir()
    cpu_share._remove_stale(tmp_path)
    assert (stale.exists(), own.exists()) == (False, True)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.0, 0.01])
def test_a_share_is_a_sixty_fourth_or_more_and_less_than_one(share: float) -> None:
    with pytest.raises(LocalError, match="is no share of a CPU"), share_of_a_cpu(share):
        pass


class Shared:
    """A share that remembers its processes."""

    method = "memory"

    def __init__(self) -> None:
        self.pids: list[int] = []

    def add(self, pid: int) -> None:
        self.pids.append(pid)


def test_functions_of_the_edge_join_the_share_once_they_are_ready() -> None:
    share = Shared()
    on_event = joining(share, EDGE_FUNCTIONS)
    for kind, function, pid in (("starting", "edge-head", 0), ("ready", "edge-head", 1), ("ready", "cloud-tail", 2)):
        on_event(Event(kind, "", function, "replica", pid))  # type: ignore[arg-type]
    on_event(Event("ready", "", "router", "replica", 3))
    assert share.pids == [1, 3]


def test_a_slowed_edge_and_its_cloud_run_on_a_thread_each_unless_told_otherwise() -> None:
    assert on_one_thread({"router": {"a": "b"}}) == {"router": {"a": "b"}, "*": {"threads": "1"}}
    assert on_one_thread({"*": {"threads": "2"}}) == {"*": {"threads": "2"}}
