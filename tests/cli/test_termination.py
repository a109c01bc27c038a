"""Commands that are told to end leave nothing in TMPDIR."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from isthmus_tools.cli import termination
from isthmus_tools.cli.termination import unwinding

# The import stops where its files are being made, in whichever folders the command made for them.
_SCRIPT = """
import signal, sys
import isthmus.errors, isthmus_tools.graph
def build(path, name, folder, **how):
    (folder if isinstance(folder, type(path)) else type(path)(folder)).joinpath("weights.bin").write_bytes(bytes(10**6))
    print("at work", flush=True)
    try:
        while True:
            signal.pause()
    except SystemExit:
        if swallowed == "raise":
            raise
        raise isthmus.errors.ModelError("what a library makes of it, that was interrupted at a bad time") from None
isthmus_tools.graph.build = build
from isthmus_tools.cli import main
swallowed = sys.argv.pop()
sys.argv = ["isthmus", "import", "model.onnx", "--registry", sys.argv[1]]
main()
"""


@pytest.mark.parametrize(("number", "swallowed"), [(signal.SIGTERM, "raise"), (signal.SIGHUP, "swallow")])
def test_a_signal_removes_what_a_command_made_in_tmpdir(number: signal.Signals, swallowed: str, tmp_path: Path) -> None:
    place = tmp_path / "tmp"
    place.mkdir()
    command = [sys.executable, "-c", _SCRIPT, str(tmp_path / "registry"), swallowed]
    environment = {**os.environ, "TMPDIR": str(place)}
    with subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "at work\n"
        assert list(place.glob("*/weights.bin"))
        process.send_signal(number)
        assert process.stdout.read() == ""
        assert process.wait(30) == -number
    assert not list(place.glob("isthmus-*/weights.bin"))
    assert not [p for p in place.iterdir() if p.name != "isthmus-cli"]


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with unwinding():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_exception_that_a_library_caught_is_raised_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    now, sent, again = [100.0], [], threading.Event()

    def kill(pid: int, number: int) -> None:
        sent.append((pid, number))
        again.set()

    monkeypatch.setattr(termination, "AGAIN_S", 0.01)
    monkeypatch.setattr(termination.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(termination.os, "kill", kill)
    monkeypatch.setattr(termination.signal, "signal", lambda *_: None)
    ending = termination._Ending()
    with pytest.raises(SystemExit):
        ending(signal.SIGTERM, None)
    ending(signal.SIGTERM, None)  # what is being removed is not interrupted
    now[0] += 1
    with pytest.raises(SystemExit):
        ending(signal.SIGTERM, None)
    assert again.wait(30)
    ending.finish()
    assert set(sent) == {(os.getpid(), signal.SIGTERM)}
