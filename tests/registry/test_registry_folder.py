"""A registry in a folder: what a killed publish leaves there, and a share that hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from isthmus.errors import Missing, RegistryUnavailable
from isthmus.registry import FolderStore, Registry, RetryPolicy
from isthmus.registry.folder import MAX_HANGING, FileCalls, Staging
from support.fake_bundles import make_bundle
from support.patience import LONG_S, until

WRITER = """
import sys, time
from isthmus.registry import FolderStore
store = FolderStore(sys.argv[1])
def write(f):
    f.write(b"x" * 2**20); f.flush()
    print("writing", flush=True)
    sys.stdin.read()
store._place("blobs/sha256/late", write, __import__("os").replace)
print("placed", flush=True)
"""
HASTY = RetryPolicy(attempts=2, timeout_s=0.6)


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process in the middle of a publish; the end of its input lets it finish."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    yield process
    process.kill()
    process.communicate()


def staged(folder: Path) -> list[Path]:
    return list((folder / ".staging").iterdir())


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_what_a_killed_publish_staged_is_swept_by_the_next(
    writer: subprocess.Popen[str], tmp_path: Path, death: signal.Signals
) -> None:
    writer.send_signal(death)
    writer.wait(LONG_S)
    assert sum(path.stat().st_size for path in staged(tmp_path)) == 2**20
    fake = make_bundle(tmp_path / "fake")
    Registry(FolderStore(tmp_path)).publish(fake.bundle, fake.files)
    assert staged(tmp_path) == []


def test_what_a_running_publish_stages_is_left_alone(writer: subprocess.Popen[str], tmp_path: Path) -> None:
    FolderStore(tmp_path).put("blobs/x", b"x")
    assert len(staged(tmp_path)) == 1
    out, _ = writer.communicate("", timeout=LONG_S)
    assert out == "placed\n"
    assert (tmp_path / "blobs/sha256/late").stat().st_size == 2**20
    assert staged(tmp_path) == []


def test_a_file_that_is_swept_while_it_is_written_is_written_again(tmp_path: Path) -> None:
    """As where locks do not reach another machine."""
    store, times = FolderStore(tmp_path, RetryPolicy(attempts=2, timeout_s=5.0)), []
    source = tmp_path / "source"
    source.write_bytes(b"content")
    replace = os.replace

    def swept_once(path: Path, target: Path) -> None:
        if not times:
            times.append(1)
            path.unlink()
        replace(path, target)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("isthmus.registry.folder.os.replace", swept_once)
        store.put_file("blobs/x", source)
    assert store.get("blobs/x", max_bytes=10) == b"content"


def test_a_sweep_follows_no_links_and_leaves_folders(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "folder").mkdir()
    (tmp_path / "s" / "link").symlink_to(tmp_path / "precious")
    (tmp_path / "precious").write_text("kept")
    with Staging(tmp_path / "s").file():
        pass
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["folder", "link"]
    assert (tmp_path / "precious").read_text() == "kept"


@pytest.fixture
def hung(tmp_path: Path) -> Iterator[FolderStore]:
    """A registry whose alias hangs when it is read, as a file on a share without a server does."""
    store = FolderStore(tmp_path, HASTY)
    store.put("models/m/aliases/other", b"1")
    pipe = tmp_path / "models/m/aliases/prod"
    os.mkfifo(pipe)
    yield store
    # Let every reader come back.
    while any(t.name == "registry file" for t in threading.enumerate()):
        try:
            os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:
            threading.Event().wait(0.01)


def test_a_folder_that_hangs_is_unavailable_within_the_time_of_a_read(hung: FolderStore) -> None:
    with pytest.raises(RegistryUnavailable, match="did not answer within") as caught:
        Registry(hung, HASTY).resolve("m")
    assert caught.value.facts == {"registry": hung.url, "blob": "models/m/aliases/prod"}
    assert "mounted" in caught.value.hint
    assert hung.get("models/m/aliases/other", max_bytes=9) == b"1"


def test_calls_that_hang_are_bounded_in_number_and_forgotten_when_they_come_back() -> None:
    calls, gate = FileCalls("/r"), threading.Event()
    for _ in range(MAX_HANGING):
        with pytest.raises(RegistryUnavailable, match="did not answer"):
            calls(lambda: gate.wait(LONG_S), 0.001, "k")
    with pytest.raises(RegistryUnavailable, match="have not come back"):
        calls(lambda: 1, LONG_S, "k")
    gate.set()
    assert until(lambda: calls._hanging == 0)
    assert calls(lambda: 1, LONG_S, "k") == 1
    with pytest.raises(Missing):
        calls(lambda: (_ for _ in ()).throw(Missing("none")), LONG_S, "k")
