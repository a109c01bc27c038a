"""The fixtures that fail tests which leave something behind, seen to fail."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from support.paths import ROOT

pytest_plugins = ("pytester",)

CONFTEST = f"""
import sys

sys.path.insert(0, {str(ROOT / "tests")!r})
pytest_plugins = ("support.leftovers",)


def pytest_configure():
    from support import leftovers

    leftovers.GRACE_S = 0.05
"""
LEAKS = """
import socket
import subprocess
import tempfile
import threading

KEPT = []


def test_a_thread():
    threading.Thread(target=threading.Event().wait, daemon=True).start()


def test_a_process():
    KEPT.append(subprocess.Popen(["sleep", "20"]))


def test_a_socket():
    KEPT.append(socket.socket())


def test_a_temporary_file():
    tempfile.mkdtemp()


def test_all_of_it_ended():
    threading.Thread(target=int).start()
    subprocess.run(["true"])
    socket.socket().close()
    tempfile.TemporaryDirectory().cleanup()
"""


def test_what_a_test_leaves_behind_fails_it(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(LEAKS)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.stdout.fnmatch_lines([f"*this test left behind: *{kind}*" for kind in ("threads", "processes", "sockets")])
    result.stdout.fnmatch_lines(["*this test left behind: *temporary files*", "*this module's tests left behind: *"])
    result.assert_outcomes(passed=5, errors=5)


def test_torch_keeps_its_cache_outside_of_a_tests_temporary_folder() -> None:
    cache, temporary = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]), Path(tempfile.gettempdir())
    assert cache.is_dir()
    assert not cache.is_relative_to(temporary)
    assert temporary == Path(os.environ["TMPDIR"])
