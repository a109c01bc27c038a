"""Commands that are told to end leave nothing in TMPDIR."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from isthmus.cli.termination import unwinding

# The import stops where its files are being made, in whichever folders the command made for them.
_SCRIPT = """
import signal, sys, tempfile
import isthmus.graph
def build(path, name, folder, **how):
    (folder if isinstance(folder, type(path)) else type(path)(folder)).joinpath("weights.bin").write_bytes(bytes(10**6))
    print("at work", flush=True)
    try:
        while True:
            signal.pause()
    except Exception:
        print("swallowed", flush=True)
isthmus.graph.build = build
from isthmus.cli import main
sys.argv = ["isthmus", "import", "model.onnx", "--registry", sys.argv[1]]
main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_removes_what_a_command_made_in_tmpdir(number: signal.Signals, tmp_path: Path) -> None:
    place = tmp_path / "tmp"
    place.mkdir()
    command = [sys.executable, "-c", _SCRIPT, str(tmp_path / "registry")]
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
