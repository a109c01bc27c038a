"""However the engine ends, no process and no folder of its own is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from isthmus_tools.engine import Engine
from isthmus_tools.engine.stack import build_folder
from support.local_stack import write_stack
from support.patience import LONG_S, eventually

RUN = """
import sys
from isthmus_tools.engine import EngineOptions, run_engine
run_engine(EngineOptions(stack_file=sys.argv[1], port=0, on_event=lambda e: print(e.kind, e.text, flush=True)))
"""


def start(stack: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    engine = subprocess.Popen([sys.executable, "-c", RUN, str(stack)], stdout=subprocess.PIPE, text=True)
    assert engine.stdout is not None
    ready = 0
    while ready < 2:
        said = engine.stdout.readline()
        assert said, "it ended before it was ready"
        ready += said.startswith("ready")
    children = psutil.Process(engine.pid).children(recursive=True)
    # Two functions, and the broker of asynchronous calls.
    assert sorted(child.name().partition("-")[0][:6] for child in children) == ["nats", "python", "python"]
    return engine, children


def gone(processes: list[psutil.Process]) -> bool:
    return not any(lives(p) for p in processes)


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_engine_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    engine, children = start(write_stack(tmp_path))
    engine.send_signal(number)
    with engine:
        assert engine.wait(LONG_S) == 0
    assert gone(children)
    assert list((tmp_path / ".isthmus" / "build").iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_a_killed_engine_leaves_no_process(tmp_path: Path) -> None:
    engine, children = start(write_stack(tmp_path))
    with engine:
        os.kill(engine.pid, signal.SIGKILL)
    eventually(lambda: gone(children))
    (left,) = (tmp_path / ".isthmus" / "build").iterdir()
    with Engine(tmp_path / "stack.yml", replicas={"echo": 0, "other": 0}):
        (own,) = (tmp_path / ".isthmus" / "build").iterdir()
    assert own != left
    assert list((tmp_path / ".isthmus" / "build").iterdir()) == []


def test_only_folders_of_engines_that_are_gone_are_swept(tmp_path: Path) -> None:
    (tmp_path / "8080" / "1").mkdir(parents=True)
    (tmp_path / "8080" / "1" / "index.py").touch()
    (tmp_path / "note").touch()
    (tmp_path / "elsewhere").symlink_to(Path(__file__).parent)
    with build_folder(tmp_path, 8080) as one:
        (one / "file").touch()
        with build_folder(tmp_path, 8080) as other:
            assert one != other
            assert {p.name for p in tmp_path.iterdir()} == {one.name, other.name, "note", "elsewhere"}
        assert (one / "file").is_file()
    assert {p.name for p in tmp_path.iterdir()} == {"note", "elsewhere"}
    assert Path(__file__).is_file()
