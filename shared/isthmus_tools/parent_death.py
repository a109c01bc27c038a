"""Replace this process by a program that the kernel kills when the parent dies (exec with PR_SET_PDEATHSIG).

Run as a script: `python parent_death.py PARENT_PID PROGRAM ARGUMENT…`. The script imports nothing of the package, so
that a process starts milliseconds later and not a second.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h; the setting survives execve


def die_with(parent: int) -> None:
    """Have the kernel kill this process with `parent`; on other systems than Linux it outlives the parent."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
        if os.getppid() != parent:  # the parent died before prctl
            sys.exit(1)


def exec_with_pdeathsig(parent: int, command: list[str]) -> None:
    """Become `command`, killed with the process `parent`."""
    die_with(parent)
    os.execv(command[0], command)  # noqa: S606


if __name__ == "__main__":
    exec_with_pdeathsig(int(sys.argv[1]), sys.argv[2:])
