"""A slower machine out of this one: processes that get only a share of one CPU, and how it was done."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

PERIOD_US = 4_000
"""As short as a share of a quarter allows (the kernel's least quota is 1 ms): what is measured is much longer."""

_V1, _V2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
_TURNS = """
import os, signal, sys, time
share, period, *pids = sys.argv[1:]
share, period, pids = float(share), float(period), [int(p) for p in pids]
def tell(what):
    for pid in pids:
        os.kill(pid, what)
signal.signal(signal.SIGTERM, lambda *_: (tell(signal.SIGCONT), os._exit(0)))
while os.getppid() != 1:
    tell(signal.SIGCONT); time.sleep(period * share)
    tell(signal.SIGSTOP); time.sleep(period * (1 - share))
tell(signal.SIGCONT)
"""


@contextlib.contextmanager
def share_of_a_cpu(share: float, pids: Sequence[int]) -> Iterator[str]:
    """Give processes that share of one CPU's time, all together; yields how.

    By a CPU quota of a control group where this process may make one; else by stopping and continuing them by turns.
    """
    group = _make_group(share)
    if group is not None:
        folder, how = group
        try:
            for pid in pids:
                _move(folder, pid)
            yield how
        finally:
            for pid in pids:
                with contextlib.suppress(OSError):
                    _move(folder.parent, pid)
            with contextlib.suppress(OSError):
                folder.rmdir()
        return
    period = PERIOD_US / 1e6
    turns = subprocess.Popen([sys.executable, "-c", _TURNS, str(share), str(period), *map(str, pids)])
    try:
        yield f"stopped and continued by turns: {period * share * 1000:g} of every {period * 1000:g} ms"
    finally:
        turns.terminate()
        turns.wait()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def _make_group(share: float) -> tuple[Path, str] | None:
    name = f"isthmus-bench-{os.getpid()}"
    quota = round(PERIOD_US * share)
    how = f"CPU quota of a control group: {quota / 1000:g} of every {PERIOD_US / 1000:g} ms"
    v1 = (_V1 / "cpu.cfs_quota_us").exists() or (_V1 / "tasks").exists()
    folder = (_V1 if v1 else _V2) / name
    try:
        folder.mkdir()
        try:
            if v1:
                (folder / "cpu.cfs_period_us").write_text(str(PERIOD_US))
                (folder / "cpu.cfs_quota_us").write_text(str(quota))
            else:
                (folder / "cpu.max").write_text(f"{quota} {PERIOD_US}")
        except OSError:
            folder.rmdir()
            raise
    except OSError:
        return None
    return folder, how


def _move(folder: Path, pid: int) -> None:
    """All threads of a process into a group."""
    (folder / "cgroup.procs").write_text(str(pid))
